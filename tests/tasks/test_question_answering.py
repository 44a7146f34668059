"""Question answering: windows lose nothing, the best answer is found, and it is scored as SQuAD's scripts score it."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torchmetrics.functional.text import squad as torchmetrics_squad
from transformers import ByT5Tokenizer

from adalora import tasks
from adalora.data import DataError
from adalora.recipe import RecipeError
from adalora.tasks import Setup
from adalora.tasks.squad_metrics import squad_v1, squad_v2, words
from adalora.tasks.squad_windows import Window, best_spans

from ..cli.conftest import SPECIAL, bert_tokenizer, run_command, save_tiny_bert
from ..data import benchmark_data
from .squad_official import Articles, evaluate_v1, evaluate_v2

QA: Any = tasks.get("question_answering")
NO_ANSWER: dict[str, list[Any]] = {"text": [], "answer_start": []}
LETTERS = [chr(ord("a") + index) for index in range(26)]


def task(max_length: int = 32, columns: tasks.Columns = QA.columns, **options: Any) -> Any:
    return QA(Setup(columns, None, max_length, QA.options(**options)))


def answers(context: str, *texts: str) -> dict[str, list[Any]]:
    """The label of a question, where each text stands for the first time."""
    return {"text": list(texts), "answer_start": [context.index(text) for text in texts]}


def rows(*triples: tuple[str, str, dict[str, list[Any]]]) -> Dataset:
    """Rows of questions, contexts and answers."""
    return Dataset.from_list([{"question": q, "context": c, "answers": a} for q, c, a in triples])


@pytest.fixture(scope="module")
def letters() -> Any:
    """A tokenizer that knows the letters as words; [CLS] is token 2, `a` token 4."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *LETTERS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return bert_tokenizer(tokenizer, max_length=64)


@pytest.fixture(scope="module", params=["bytes", "spaces in tokens", "word pieces"])
def subwords(request: pytest.FixtureRequest) -> Any:
    """Tokenizers of the kinds that RoBERTa, DeBERTa and BERT have, which see places in a text differently."""
    texts = ["the river Rhône flows through Genève", "日本 の 首都 は 東京 です", "it costs 5€ — or 🙂 nothing"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if request.param == "bytes":
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    elif request.param == "spaces in tokens":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts * 3, trainer)
    return bert_tokenizer(tokenizer, max_length=64)


class Pointer(nn.Module):
    """A reader whose two outputs for a token depend on the token alone: what ``begin`` and ``end`` say, else -5."""

    def __init__(self, begin: dict[int, float], end: dict[int, float]) -> None:
        super().__init__()
        self.tables = nn.Parameter(torch.full((2, 400), -5.0))
        with torch.no_grad():
            for table, values in zip(self.tables, (begin, end), strict=True):
                for token, value in values.items():
                    table[token] = value

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        begin, end = self.tables[:, input_ids]
        return SimpleNamespace(start_logits=begin, end_logits=end)


def token(letter: str) -> int:
    return len(SPECIAL) + LETTERS.index(letter)


# --- metrics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The cat, a dog; and AN owl.", "cat dog and owl"),
        ("a.m. in the-end", "am in theend"),  # punctuation goes first, articles after
        ("  Ünïcode —  “quoted”\u00a0the\u2009end ", "ünïcode — “quoted” end"),  # only ASCII's punctuation goes
        ("İstanbul ÉCOLE ΣΑΣ", "i̇stanbul école σας"),
        ("$1,000.50", "100050"),
        ("an The a", ""),
        ("", ""),
    ],
)
def test_the_words_that_count(text: str, found: str) -> None:
    assert words(text) == found.split()


@pytest.mark.parametrize(
    ("answer", "references", "f1", "exact"),
    [
        ("the Rhine", ["Rhine."], 1.0, 1.0),
        ("river Rhine", ["the Rhine"], 2 / 3, 0.0),  # precision 1/2, recall 1
        ("one two two", ["two two three three"], 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4), 0.0),  # bags of words
        ("b c d", ["b c", "d", "b c d e"], 6 / 7, 0.0),  # the best of several
        ("x", ["y", "X!", "x z"], 1.0, 1.0),
        ("東京", ["東京"], 1.0, 1.0),
        ("東京 です", ["東京です"], 0.0, 0.0),  # words are what space divides, also in Japanese
        ("", ["x"], 0.0, 0.0),
    ],
)
def test_scores_by_hand(answer: str, references: list[str], f1: float, exact: float) -> None:
    found = squad_v1([answer], [references])
    assert found == pytest.approx({"f1": 100 * f1, "exact_match": 100 * exact})
    both = squad_v2([answer, ""], [references, []])
    assert both["has_answer_f1"] == found["f1"] and both["has_answer_exact_match"] == found["exact_match"]
    assert both["no_answer_f1"] == both["no_answer_exact_match"] == 100.0
    assert both["f1"] == pytest.approx((found["f1"] + 100) / 2)


def test_where_the_two_scripts_differ() -> None:
    """Answers without words: 1.1 gives them no F1, 2.0 does, and does not count such a reference beside others."""
    assert squad_v1(["the"], [["a"]]) == {"f1": 0.0, "exact_match": 100.0}
    assert squad_v2(["the"], [["a"]])["f1"] == squad_v2(["the"], [["a"]])["exact_match"] == 100.0
    assert squad_v1(["the"], [["a", "b"]])["exact_match"] == 100.0
    assert squad_v2(["the"], [["a", "b"]])["exact_match"] == 0.0
    assert squad_v2(["x"], [[]])["no_answer_f1"] == 0.0 and math.isnan(squad_v2(["x"], [[]])["has_answer_f1"])
    assert math.isnan(squad_v1([], [])["f1"]) and all(map(math.isnan, squad_v2([], []).values()))


def altered(row: dict[str, Any], other: str) -> str:
    """A fixed prediction for a question, right or wrong in one of eight ways, as a hash of its id decides."""
    kind = hashlib.sha256(row["id"].encode()).digest()[0] % 8
    known = row["answers"]["text"]
    gold, context = (known or [row["context"][20:40]])[0], row["context"]
    begin = context.index(gold)
    return [
        gold if known else "",
        f"the {gold.upper()}!" if known else "",
        " ".join(gold.split()[: max(1, len(gold.split()) // 2)]),
        context[begin : begin + len(gold) + 12],
        context[max(0, begin - 9) : begin + len(gold)],
        known[-1] if known else " the ",
        other,
        "",
    ][kind]


def articles_of(found: Dataset) -> Articles:
    """Rows as the official scripts read them."""
    qas = [
        {"id": row["id"], "question": row["question"], "answers": [{"text": text} for text in row["answers"]["text"]]}
        for row in found
    ]
    return [{"title": "all", "paragraphs": [{"context": "", "qas": qas}]}]


def fixed_predictions(name: str) -> tuple[Dataset, list[str]]:
    """The validation rows of a benchmark, with an answer to each."""
    found = load_dataset(str(benchmark_data(name)), split="validation")
    return found, [altered(row, found[index - 1]["question"]) for index, row in enumerate(found)]


def test_squad_1_1_as_the_official_script() -> None:
    """All questions, 3,758, most with several references. The tolerance is that of the order of addition."""
    found, predictions = fixed_predictions("squad")
    official = evaluate_v1(articles_of(found), dict(zip(found["id"], predictions, strict=True)))
    ours = task().metrics([{"answer": text} for text in predictions], found)
    assert tuple(ours) == task().metric_names
    assert ours == pytest.approx(official, rel=1e-12)
    assert 40 < ours["exact_match"] < ours["f1"] < 80  # right and wrong in many ways
    known = [value["text"][-1] for value in found["answers"]]
    perfect = task().metrics([{"answer": text} for text in known], found)
    with_words = 100 * sum(map(bool, map(words, known))) / len(found)  # all but one, which is "a"
    assert perfect == {"f1": pytest.approx(with_words), "exact_match": 100.0} and with_words > 99.9


def test_squad_2_0_as_the_official_script() -> None:
    """All questions, those with an answer and those without: 6,078."""
    found, predictions = fixed_predictions("squad_v2")
    official = evaluate_v2(articles_of(found), dict(zip(found["id"], predictions, strict=True)))
    reader = task(unanswerable=True)
    ours = reader.metrics([{"answer": text} for text in predictions], found)
    assert tuple(ours) == reader.metric_names
    renamed = {
        key.replace("HasAns", "has_answer").replace("NoAns", "no_answer").replace("exact", "exact_match"): value
        for key, value in official.items()
        if not key.endswith("total")
    }
    assert ours == pytest.approx(renamed, rel=1e-12)
    assert 30 < ours["no_answer_f1"] < 60 < ours["has_answer_f1"] < 80
    said, never = reader.baseline(found)
    share = 100 * sum(not value["text"] for value in found["answers"]) / len(found)
    assert said == "never an answer" and never["f1"] == never["exact_match"] == pytest.approx(share)
    assert never["has_answer_f1"] == 0.0 and never["no_answer_f1"] == 100.0


def test_squad_1_1_as_torchmetrics() -> None:
    """A port by other people, in single precision, where it has the rules of 1.1: answers have words."""
    found, predictions = fixed_predictions("squad")
    kept = [index for index, text in enumerate(predictions) if words(text)][:400]
    found, predictions = found.select(kept), [predictions[index] for index in kept]
    theirs = torchmetrics_squad(
        [{"id": key, "prediction_text": text} for key, text in zip(found["id"], predictions, strict=True)],
        [{"id": row["id"], "answers": row["answers"]} for row in found],
    )
    ours = squad_v1(predictions, [value["text"] for value in found["answers"]])
    assert ours == pytest.approx({name: float(value) for name, value in theirs.items()}, abs=1e-3)


# --- windows ----------------------------------------------------------------------------------------


def test_windows_by_hand(letters: Any) -> None:
    """10 tokens: [CLS] q r [SEP], five of the context, [SEP]. Two are shared, so windows begin at a, d, g."""
    context = "a b c d e f g h i j"
    data = rows(("q r", context, answers(context, "e f g")), ("q r", "x y", answers("x y", "y")))
    found = task(10, doc_stride=2).features(data, letters, nn.Identity())
    assert [letters.decode(ids) for ids in found["input_ids"]] == [
        "[CLS] q r [SEP] a b c d e [SEP]",
        "[CLS] q r [SEP] d e f g h [SEP]",
        "[CLS] q r [SEP] g h i j [SEP]",
        "[CLS] q r [SEP] x y [SEP]",
    ]
    assert found["start_positions"][:] == [0, 5, 0, 5]
    assert found["end_positions"][:] == [0, 7, 0, 5]  # the first and third windows hold a part of the answer only
    nothing = task(10, unanswerable=True).features(rows(("q", "a b", NO_ANSWER)), letters, nn.Identity())
    assert nothing["start_positions"][:] == nothing["end_positions"][:] == [0]


def test_windows_share_a_third_by_default(letters: Any) -> None:
    context = " ".join(LETTERS)
    found = task(12).features(rows(("q", context, answers(context, "z"))), letters, nn.Identity())
    assert [letters.decode(ids[3:-1])[:1] for ids in found["input_ids"]] == ["a", "e", "i", "m", "q", "u"]
    assert QA.max_length // 3 == 128


def test_training_pads_on_the_right(letters: Any) -> None:
    """Also where the tokenizer pads on the left: positions would be others."""
    left = bert_tokenizer(letters.backend_tokenizer, max_length=64)
    left.padding_side = "left"
    data = rows(("q", "a b c d", answers("a b c d", "d")), ("q", "a b", answers("a b", "b")))
    found = task().features(data, left, nn.Identity())
    batch = task().collator(left, nn.Identity())(list(found))
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 6 + [0] * 2]
    assert batch["input_ids"].gather(1, batch["end_positions"][:, None])[:, 0].tolist() == [token("d"), token("b")]


UNICODE = (
    "Le Rhône  — né en Suisse — passe à Genève 🙂🙂, puis à Lyon. 日本 の 首都 は 東京 です\u3000e\u0301te\u0301 5€ "
    * 3
)


@pytest.mark.parametrize(
    "answer",
    ["Rhône", "Genève 🙂🙂", "🙂🙂", "日本 の 首都", "東京 です", "e\u0301te\u0301", "5€", "Lyon. 日本", " passe "],
)
def test_answers_survive_any_tokenizer(subwords: Any, answer: str) -> None:
    """Tokens at the positions of an answer cover it, and little else."""
    data = rows(("où ?", UNICODE, answers(UNICODE, answer)))
    found = task(64, doc_stride=30).features(data, subwords, nn.Identity())
    holding = [row for row in found if row["start_positions"]]
    assert len(found) > 1 and holding
    for row in holding:
        begin, end = row["start_positions"], row["end_positions"]
        encoded = subwords(data[0]["question"], UNICODE, return_offsets_mapping=True)
        inside = row["input_ids"][begin : end + 1]
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        covers = [
            UNICODE[places[at][0] : places[at + len(inside) - 1][1]]
            for at in range(len(ids) - len(inside) + 1)
            if ids[at : at + len(inside)] == inside and encoded.sequence_ids()[at] == 1
        ]
        assert any(answer.strip() in cover and len(cover.strip()) <= len(answer.strip()) + 2 for cover in covers)


@pytest.mark.parametrize("answer", ["Rhône", "日本", "東京"])
def test_an_answer_comes_back_in_the_letters_of_the_context(subwords: Any, answer: str) -> None:
    data = rows(("où ?", UNICODE, answers(UNICODE, answer)))
    reader = task(64, doc_stride=30)
    row = next(row for row in reader.features(data, subwords, nn.Identity()) if row["start_positions"])
    begin, end = (row["input_ids"][row[f"{side}_positions"]] for side in ("start", "end"))
    if subwords.unk_token_id in (begin, end):
        pytest.skip("this tokenizer has no token for the answer")
    spans = reader.predict(Pointer({begin: 5.0}, {end: 5.0}), subwords, data, 2)[0]
    found = [best["answer"] for best in spans["n_best"]]
    assert answer in found and all(text == text.strip() for text in found)
    assert all(UNICODE[best["start"] :].startswith(best["answer"]) for best in spans["n_best"])


# --- answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_best_spans_are_the_best_of_all(seed: int) -> None:
    """Against two loops."""
    draw = np.random.default_rng(seed)
    count, longest, best = int(draw.integers(0, 9)), int(draw.integers(1, 14)), int(draw.integers(1, 30))
    window = Window(0, 3, np.zeros((count, 2), dtype=np.int64))
    begin, end = (torch.tensor(draw.normal(size=(1, 12)), dtype=torch.float32) for _ in range(2))
    scores, first, last = (found[0] for found in best_spans(begin, end, [window], longest, best))
    there = np.isfinite(scores)
    expected = sorted(
        (
            ((begin[0, i] + end[0, j]).item(), i, j)
            for i in range(3, 3 + count)
            for j in range(i, min(i + longest, 3 + count))
        ),
        reverse=True,
    )[:best]
    assert list(zip(scores[there], first[there], last[there], strict=True)) == [
        (pytest.approx(score), i, j) for score, i, j in expected
    ]


def test_the_best_answer_of_all_windows(letters: Any) -> None:
    """Windows [a b c d e] and [d e f g]: `b` 4, `g` 7, `f g` 8, and no answer 6 (of each window, so at least)."""
    data = rows(("q", "a b c d e f g", NO_ANSWER), ("q", "x b", NO_ANSWER))
    model = Pointer(
        {2: 3.0, token("b"): 2.0, token("f"): 4.0, token("g"): 3.0}, {2: 3.0, token("b"): 2.0, token("g"): 4.0}
    )
    read = {"doc_stride": 2, "n_best": 3}
    first, second = task(9, **read).predict(model, letters, data, 1)
    assert (first["answer"], first["start"]) == ("f g", 10) and (second["answer"], second["start"]) == ("b", 2)
    shares = np.exp([8, 7, 4]) / np.exp([8, 7, 4]).sum()
    assert [best["score"] for best in first["n_best"]] == pytest.approx(shares.tolist())
    assert [best["answer"] for best in first["n_best"]][:2] == ["f g", "g"] and first["no_answer_probability"] == 0.0

    first, second = task(9, unanswerable=True, **read).predict(model, letters, data, 4)
    total = np.exp([8, 7, 4, 6]).sum()
    assert first["answer"] == "f g" and first["score"] == pytest.approx(np.exp(8) / total)
    assert first["no_answer_probability"] == pytest.approx(np.exp(6) / total)
    assert (second["answer"], second["start"]) == ("", None) and second["n_best"][0]["answer"] == "b"  # 6 against 4
    assert second["score"] == second["no_answer_probability"] > 0.8
    bolder = task(9, unanswerable=True, null_threshold=2.5, **read)
    assert [found["answer"] for found in bolder.predict(model, letters, data, 4)] == ["f g", "b"]
    shy = task(9, unanswerable=True, null_threshold=-2.5, **read)
    assert [found["answer"] for found in shy.predict(model, letters, data, 4)] == ["", ""]
    assert task(9, max_answer_length=1, **read).predict(model, letters, data, 4)[0]["answer"] == "g"


class Doubtful(nn.Module):
    """Sure that there is no answer, unless the window holds the letter f."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        found = (input_ids == token("f")).any(1)
        logits = torch.full(input_ids.shape, 0.0)
        logits[:, 0] = torch.where(found, -2.0, 9.0)
        logits[input_ids == token("f")] = 3.0
        return SimpleNamespace(start_logits=logits * self.scale, end_logits=logits * self.scale)


def test_one_window_with_an_answer_is_enough(letters: Any) -> None:
    """The score of no answer is the least of all windows, not the first's or the highest."""
    data = rows(("q", "a b c d e f g h i j k l", NO_ANSWER), ("q", "a b c d", NO_ANSWER))
    found = task(9, unanswerable=True).predict(Doubtful(), letters, data, 2)
    assert [one["answer"] for one in found] == ["f", ""]
    assert found[0]["no_answer_probability"] < 0.01 < 0.99 < found[1]["no_answer_probability"]


def test_answers_come_in_the_order_of_the_rows(letters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the lengths, the batches and the parts that rows are read in."""
    draw = random.Random(0)
    contexts = [" ".join([*draw.choices(LETTERS[:20], k=draw.randint(1, 40)), "z"]) for _ in range(23)]
    data = rows(*((LETTERS[i], context, answers(context, "z")) for i, context in enumerate(contexts)))
    reader, model = task(14), Pointer({token("z"): 9.0}, {token("z"): 9.0})
    whole = reader.predict(model, letters, data, 4)
    assert [(one["answer"], one["start"]) for one in whole] == [("z", len(context) - 1) for context in contexts]
    features = reader.features(data, letters, model)
    monkeypatch.setattr("adalora.tasks.question_answering._ROWS_AT_ONCE", 5)
    parts = reader.predict(model, letters, data, 3)
    assert [(one["start"], one["score"]) for one in parts] == [(one["start"], one["score"]) for one in whole]
    assert reader.features(data, letters, model).to_dict() == features.to_dict()
    assert reader.predict(model, letters, data.select([]), 3) == []


def test_what_has_no_words_has_no_answer(letters: Any) -> None:
    data = rows(("q", "  ", NO_ANSWER))
    for unanswerable in (False, True):
        (found,) = task(unanswerable=unanswerable).predict(Pointer({}, {}), letters, data, 1)
        assert found["answer"] == "" and found["start"] is None and found["n_best"] == []
        assert found["no_answer_probability"] == 1.0


# --- what cannot be done ----------------------------------------------------------------------------

GOOD = ("q", "a b c", {"text": ["b"], "answer_start": [2]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("q", "a b c", NO_ANSWER), "'answers' of squad, row 2: there is no answer.*options.unanswerable: true"),
        (("q", "a b c", {"text": ["b", "c"], "answer_start": [2]}), "row 2: expected answers and where they begin"),
        (("q", "a b c", {"text": [None], "answer_start": [2]}), "row 2: expected answers"),
        (("q", "a b c", None), "column 'answers' of squad is empty in 1 of 2 rows"),
        (("q", "\n ", {"text": ["b"], "answer_start": [2]}), "column 'context' of squad has no text in row 2"),
        (("", "a b c", {"text": ["b"], "answer_start": [2]}), "column 'question' of squad has no text in row 2"),
    ],
)
def test_rows_that_cannot_be_read(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        task().check(rows(GOOD, row), "squad")


@pytest.mark.parametrize("label", ["b", ["b"], 2, {"text": ["b"]}])
def test_answers_of_the_wrong_type(label: Any) -> None:
    data = Dataset.from_list([{"question": "q", "context": "a b", "answers": label}])
    with pytest.raises(DataError, match=r"row 1: expected answers .* such as \{'text': \['Paris'\], .*, it holds"):
        task().check(data, "squad")
    task().check(data, "squad", with_targets=False)


def test_columns_that_are_not_there() -> None:
    with pytest.raises(DataError, match="squad has no column 'context': its columns are question, answers"):
        task().check(rows(GOOD).remove_columns("context"), "squad")
    renamed = rows(GOOD).rename_columns({"question": "asked", "context": "passage", "answers": "said"})
    own = tasks.Columns("asked", "passage", "said")
    task(columns=own).check(renamed, "squad")
    assert task(columns=own).fit(renamed).metrics([{"answer": "b"}], renamed)["f1"] == 100.0


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"text": ["b"], "answer_start": [1]}, "row 2: the answer 'b' is not in column 'context' at answer_start 1"),
        ({"text": ["c"], "answer_start": [-1]}, "row 2: the answer 'c' is not in column 'context' at answer_start -1"),
        ({"text": ["b", "x"], "answer_start": [2, 4]}, "row 2: the answer 'x' is not .*; 'c' is"),
        ({"text": ["b"], "answer_start": [99]}, "row 2: the answer 'b' is not .* at answer_start 99"),
        ({"text": [" "], "answer_start": [1]}, "row 2: an answer is blank"),
    ],
)
def test_answers_that_are_not_where_they_should_be(label: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        task().fit(rows(GOOD, ("q", "a b c", label)))


def test_places_are_counted_in_characters_not_in_bytes(letters: Any) -> None:
    context = "é 🙂 b"
    assert task().fit(rows(("q", context, answers(context, "b")))).label_names is None
    with pytest.raises(DataError, match="counted in characters from 0"):
        task().fit(rows(("q", context, {"text": ["b"], "answer_start": [len("é 🙂 ".encode())]})))


def test_nothing_to_learn() -> None:
    with pytest.raises(DataError, match="no answer in any of 2 rows: nothing can be learned"):
        task(unanswerable=True).fit(rows(("q", "a", NO_ANSWER), ("q", "b", NO_ANSWER)))


def test_a_question_needs_room_for_its_context(letters: Any) -> None:
    data = rows(("q", "a b c", answers("a b c", "b")), ("q r s t u", "a b c", answers("a b c", "b")))
    for reader in (task(12, doc_stride=4), task(9)):
        for use in (
            lambda reader=reader: reader.features(data, letters, nn.Identity()),
            lambda reader=reader: reader.predict(Pointer({}, {}), letters, data, 2),
        ):
            with pytest.raises(DataError, match=r"question of row 2 is too long: its 5 tokens .*'q r s t u'"):
                use()
    assert len(task(12, doc_stride=3).features(data, letters, nn.Identity())) == 2


def test_settings_that_have_no_meaning() -> None:
    with pytest.raises(RecipeError, match=r"doc_stride is 32.*data\.max_length, 32"):
        task(32, doc_stride=32)
    with pytest.raises(RecipeError, match="label_names"):
        QA(Setup(QA.columns, ["a"], 32, QA.options()))
    with pytest.raises(RecipeError, match="ByT5Tokenizer does not tell: choose a model with a fast tokenizer"):
        task().features(rows(GOOD), ByT5Tokenizer(), nn.Identity())
    with pytest.raises(DataError, match=r"pairs of texts \(question, context\)"):
        task().rows_of(["who?"], None)


# --- from end to end --------------------------------------------------------------------------------


def write_questions(path: Path, found: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reader(letters: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT of two layers that reads letters."""
    return save_tiny_bert(tmp_path_factory.mktemp("reader"), letters)


def test_a_handful_of_questions_is_learned(reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which letter follows x? In contexts of several windows; where there is no x, there is no answer."""
    monkeypatch.chdir(tmp_path)
    draw, found = random.Random(1), []
    for index in range(12):
        before, after = (draw.choices(LETTERS[1:9], k=draw.randint(3, 12)) for _ in range(2))
        marked = ["x"] if index % 4 else []
        context = " ".join([*before, *marked, *after])
        begin = 2 * len(before) + 2
        label = {"text": [context[begin]], "answer_start": [begin]} if marked else NO_ANSWER
        found.append({"question": "x", "context": context, "answers": label})
    file = write_questions(tmp_path / "questions.jsonl", found)
    shared = ["--model", reader, "--task", "question_answering", "--train", file, "--eval", file, "--max-length", 18]
    flags = ["--epochs", 20, "--lr", 2e-2, "--batch-size", 8, "--target-r", 4, "--output", "run"]
    quiet = ["--set", "training.eval_strategy=no", "--set", "training.save_steps=0.5"]

    refused = run_command("train", *shared, *flags, *quiet)
    assert refused.code == 2 and "row 1: there is no answer" in refused.err and not (tmp_path / "run").exists()

    done = run_command("train", *shared, *flags, *quiet, "--set", "options.unanswerable=true")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["metrics"]["exact_match"] > 90 > 25 == metrics["baseline"]["metrics"]["exact_match"]
    assert list(metrics["metrics"]) == list(task(unanswerable=True).metric_names)
    measured = run_command("evaluate", "run", "--json")
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["metrics"] == pytest.approx(metrics["metrics"])

    said = run_command("predict", "run", "--text", "x", "--text-pair", found[1]["context"], "--json")
    assert said.code == 0, said.err
    answer = json.loads(said.out)
    assert answer["answer"] == found[1]["answers"]["text"][0]
    assert found[1]["context"][answer["start"] :].startswith(answer["answer"])
