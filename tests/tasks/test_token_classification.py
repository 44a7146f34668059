"""Tags of words: which token learns and answers for a word, which entities tags spell, and how they are measured."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedTokenizerFast

from adalora import tasks
from adalora.data import DataError
from adalora.recipe import RecipeError
from adalora.tasks import Columns, Setup, Task

from ..cli.conftest import Finished

SENTENCES = [["anna", "smith", "likes", "rome"], ["in", "oslo"]]
TAGS = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]


def tagger(label_names: list[str] | None = None, max_length: int = 32, **options: object) -> Task:
    kind = tasks.get("token_classification")
    return kind(Setup(Columns("tokens", None, "ner_tags"), label_names, max_length, kind.options(**options)))


def rows(tags: list[object], sentences: list[list[str]] | None = None) -> Dataset:
    words = sentences or [["word"] * len(row) for row in tags]  # type: ignore[arg-type]
    return Dataset.from_dict({"tokens": words, "ner_tags": tags})


def score(predicted: list[list[str]], targets: list[list[str]], **options: object) -> dict[str, float]:
    return tagger(**options).metrics([{"tags": tags} for tags in predicted], rows(targets))


def test_metrics_of_entities() -> None:
    """Of three entities two are found, and one that is none; four of six words have their tag."""
    targets = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    predicted = [["B-PER", "I-PER", "O", "O"], ["B-ORG", "B-ORG"]]
    assert score(predicted, targets) == pytest.approx(dict.fromkeys(tagger().metric_names, 2 / 3))
    answer, found = tagger().baseline(rows(targets))
    assert answer == "always 'O'"
    assert found == pytest.approx({"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 2 / 6})


def test_an_entity_is_right_as_a_whole() -> None:
    """conlleval's rule: a part of an entity, or its span with another type, counts for nothing."""
    targets = [["B-PER", "I-PER", "O", "B-LOC"]]
    assert score([["B-PER", "O", "O", "B-ORG"]], targets)["f1"] == 0.0
    assert score([["B-PER", "I-PER", "O", "B-ORG"]], targets)["f1"] == 0.5


def test_iob1_and_iob2_by_default_and_strictly() -> None:
    """In IOB1 an entity starts with I, unless it follows one of its type; in strict IOB2 only B can start one."""
    neighbours = [["I-PER", "I-PER", "B-PER", "O"]]
    for options in ({}, {"scheme": "IOB1"}):
        assert score(neighbours, neighbours, **options)["f1"] == 1.0
        assert score([["I-PER", "I-PER", "I-PER", "O"]], neighbours, **options)["f1"] == 0.0
    assert score([["O", "I-PER"]], [["O", "B-PER"]])["f1"] == 1.0
    assert score([["O", "I-PER"]], [["O", "B-PER"]], scheme="IOB2")["f1"] == 0.0
    bilou = [["B-PER", "L-PER", "O", "U-LOC"]]
    assert score(bilou, bilou, scheme="BILOU")["f1"] == 1.0


def test_tags_have_names_and_an_order() -> None:
    assert tagger().fit(rows(TAGS)).label_names == ["O", "B-LOC", "B-PER", "I-PER"]
    names = ["B-PER", "I-PER", "O", "B-LOC", "I-LOC"]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    declared = Dataset.from_dict({"tokens": SENTENCES, "ner_tags": [[0, 1, 2, 3], [2, 3]]}, features)
    for task, given in ((tagger(), declared), (tagger(names), rows([[0, 1, 2, 3], [2, 3]], SENTENCES))):
        task.check(given, "rows")
        fitted = task.fit(given)
        assert fitted.label_names == names
        assert fitted.metrics([{"tags": tags} for tags in TAGS], given)["f1"] == 1.0


def test_the_first_piece_of_a_word_learns_its_tag(pieces: Path) -> None:
    task = tagger().fit(rows(TAGS))
    features = task.features(rows([["B-PER", "O"]], [["anna", "is"]]), AutoTokenizer.from_pretrained(pieces), None)
    # [CLS] a ##n ##n ##a i ##s [SEP]
    assert features["labels"][0] == [-100, 2, -100, -100, -100, 0, -100, -100]


def test_a_sentence_without_tokens_is_answered_and_not_learned(pieces: Path) -> None:
    """Its loss, alone in a batch, would be the mean over nothing."""
    names = ["O", "B-PER"]
    given = rows([["O"], ["B-PER", "O"], ["O"]], [[""], ["anna", "is"], [""]])
    tokenizer = AutoTokenizer.from_pretrained(pieces)
    features = tagger(names).features(given, tokenizer, None)
    assert features["labels"][:] == [[-100, 1, -100, -100, -100, 0, -100, -100]]
    model = AutoModelForTokenClassification.from_pretrained(pieces, **tagger(names).head()).eval()
    assert [len(answer["tags"]) for answer in tagger(names).predict(model, tokenizer, given, 1)] == [1, 2, 1]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_tokens_find_their_words_whatever_marks_the_space(kind: str) -> None:
    """Tokenizers that keep the space before a word in its first token, or as a token of its own."""
    words = ["Zoë", "lives", "in", "", "new-york,", "too", "."]
    tokenizer = Tokenizer(models.BPE())
    if kind == "bytes":
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = sorted({*" ".join(words), "▁"})
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + 8, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["in new in lives", "lives too new"] * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    names = ["O", *(f"B-{number}" for number in range(len(words)))]
    tags = [f"B-{number}" for number in range(len(words))]
    features = tagger(names).features(rows([tags], [words]), fast, None)[0]
    starts = {label - 1: place for place, label in enumerate(features["labels"]) if label != -100}
    assert sorted(starts) == [0, 1, 2, 4, 5, 6], "the word of no letters has no token"
    ends = [*list(starts.values())[1:], len(features["input_ids"])]
    for (word, start), end in zip(starts.items(), ends, strict=True):
        assert fast.decode(features["input_ids"][start:end]).strip() == words[word]


def test_a_long_sentence_is_read_in_windows_and_each_word_once(pieces: Path) -> None:
    """Whatever a word's window, its label is there once, with some of its neighbours on both sides."""
    words = [letter * 2 for letter in "abcdefghijklmnopqrstuvwxyz"] * 3
    names = [f"B-{number}" for number in range(len(words))]
    tokenizer = AutoTokenizer.from_pretrained(pieces)
    features = tagger(names, max_length=16).features(rows([names], [words]), tokenizer, None)
    assert len(features) > 10 and max(map(len, features["input_ids"])) == 16
    found = {}
    for tokens, labels in zip(features["input_ids"], features["labels"], strict=True):
        for place, label in enumerate(labels):
            if label != -100:
                assert label not in found and tokenizer.decode(tokens[place]) == words[label][0]
                found[label] = min(place, len(labels) - 1 - place)
    assert sorted(found) == list(range(len(words)))
    inner = [found[word] for word in range(4, len(words) - 4)]
    assert min(inner) >= 2, "a word at the edge of one window stands inside another"


def test_answers_are_about_words(pieces: Path) -> None:
    """The same model says the same of a sentence alone, in a batch padded on either side, and in windows."""
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    model = AutoModelForTokenClassification.from_pretrained(pieces, **tagger(names).head()).eval()
    model.bert.embeddings.position_embeddings.weight.data.zero_()  # so that padding on the left moves nothing
    given = Dataset.from_dict({"tokens": [["anna"], ["anna", "", "smith", "likes", "rome"], ["is", "in"]]})
    tokenizer = AutoTokenizer.from_pretrained(pieces)
    answers = tagger(names).predict(model, tokenizer, given, 2)
    assert [len(answer["tags"]) for answer in answers] == [1, 5, 2] and answers[1]["tags"][1] == "O"
    alone = [tagger(names).predict(model, tokenizer, given.select([row]), 1)[0] for row in range(3)]
    tokenizer.padding_side = "left"
    left = tagger(names).predict(model, tokenizer, given, 3)
    assert [answer["tags"] for answer in answers] == [a["tags"] for a in alone] == [a["tags"] for a in left]


def test_train_evaluate_and_predict(adalora: Callable[..., Finished], pieces: Path) -> None:
    """Names and places of made-up sentences, from files in CoNLL's columns."""
    draw = random.Random(0)
    for name, count in (("train", 120), ("test", 30)):
        sentences = []
        for _ in range(count):
            person = [draw.choice(["qa", "qe", "qo"]), draw.choice(["za", "zu"])][: draw.randint(1, 2)]
            person = [f"{word} {tag}" for word, tag in zip(person, ["B-PER", "I-PER"], strict=False)]
            place = [f"{draw.choice(['xi', 'xy'])} B-LOC"]
            other = [f"{draw.choice(['a', 'be', 'to', 'of'])} O" for _ in range(3)]
            sentences.append("\n".join([*other[:1], *person, *other[1:], *place]))
        Path(f"{name}.conll").write_text("-DOCSTART- O\n\n" + "\n\n".join(sentences) + "\n")
    done = adalora(
        *("train", "--model", pieces, "--task", "token_classification", "--train", "train.conll"),
        *("--eval", "test.conll", "--epochs", 4, "--lr", 3e-2, "--batch-size", 16, "--output", "run"),
        *("--set", "training.eval_strategy=no", "--set", "training.save_steps=999"),
    )
    assert done.code == 0, done.err
    found = json.loads(Path("run/metrics.json").read_text())
    assert list(found["metrics"]) == ["precision", "recall", "f1", "accuracy"] and found["metrics"]["f1"] > 0.9
    evaluated = json.loads(adalora("evaluate", "run", "--json").out)
    assert evaluated["metrics"] == pytest.approx(found["metrics"])
    answer = json.loads(adalora("predict", "run", "--text", "a qo zu be to xi", "--json").out)
    assert answer["tags"] == ["O", "B-PER", "I-PER", "O", "O", "B-LOC"]
    person, place = answer["entities"]
    assert person.pop("score") > 0.5 and place.pop("score") > 0.5
    assert person == {"type": "PER", "start": 1, "end": 3, "text": "qo zu"}
    assert place == {"type": "LOC", "start": 5, "end": 6, "text": "xi"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (rows([["O", "B-PER"]], [["a"]]), "row 1 of rows has 1 words in column 'tokens', but in column 'ner_tags' 2"),
        (rows([["O"], []], [["a"], []]), "'tokens' of rows has no word in row 2"),
        (Dataset.from_dict({"tokens": ["a b"], "ner_tags": [["O"]]}), "should hold lists of words, it holds"),
        (Dataset.from_dict({"tokens": [[1, 2]], "ner_tags": [["O", "O"]]}), "should hold lists of words"),
        (Dataset.from_dict({"tokens": [["a"]], "ner_tags": ["O"]}), "in column 'ner_tags' 'O': expected a list"),
        (Dataset.from_dict({"tokens": [["a"]], "tags": [["O"]]}), "rows has no column 'ner_tags'"),
        (rows([["O", "PER"]]), "holds 'PER': expected O, or B, I, E, S with a type, such as B-PER"),
        (rows([["O", "O"]]), "holds only O"),
        (rows([[0, 1]]), "holds numbers: say in data.label_names which tags they are"),
    ],
)
def test_sentences_that_cannot_be_learned(given: Dataset, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tagger().check(given, "rows")
        tagger().fit(given)


def test_tags_outside_the_names_and_the_scheme() -> None:
    with pytest.raises(DataError, match=r"holds 'I-PER', not among data\.label_names: 'O', 'B-PER', 'B-LOC'"):
        tagger(["O", "B-PER", "B-LOC"]).fit(rows(TAGS))
    with pytest.raises(DataError, match="holds 7, expected 0 to 1"):
        tagger(["O", "B-PER"]).fit(rows([[0, 7]]))
    with pytest.raises(DataError, match=r"holds 'S-LOC': expected O, or B, I with a type, .*\(IOB2\)"):
        tagger(scheme="IOB2").fit(rows([["B-PER", "S-LOC"]]))
    assert tagger(["O", "B-PER"]).metrics([{"tags": ["O"]}], rows([["B-NEW"]]))["recall"] == 0.0


def test_settings_that_cannot_be_meant() -> None:
    kind = tasks.get("token_classification")
    with pytest.raises(RecipeError, match="text_pair has no meaning"):
        kind(Setup(Columns("tokens", "other", "ner_tags"), None, 32, kind.options()))
    with pytest.raises(DataError, match="single texts"):
        tagger().rows_of(["a"], ["b"])
