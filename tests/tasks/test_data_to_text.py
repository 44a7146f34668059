"""Tables and triples as text: each data set's own notation, its several references, and what is scored."""

from __future__ import annotations

import math
from typing import Any

import pytest
from datasets import Dataset

from adalora.data import DataError, read_rows, sample
from adalora.tasks import names
from adalora.tasks.data_to_text import (
    linearize_table,
    linearize_triples,
    read_dart,
    read_e2e,
    read_text,
    read_webnlg,
)

from ..data import benchmark_data
from .generators import model_of, task_of, tokenizer_of

TASKS = [name for name in names() if name.startswith("data_to_text")]
AARHUS = {"mtriple_set": [['Aarhus_Airport | cityServed | "Aarhus, Denmark"', "Aarhus | leaderName | J._Bundsgaard"]]}
SPOKEN = "Aarhus Airport : cityServed : Aarhus, Denmark | Aarhus : leaderName : J. Bundsgaard"


# ------------------------------------------------------------------------------------------------ reading


def test_linearisations() -> None:
    assert (
        linearize_table([("name", "The Vaults"), ("near", "Café Adriatic")])
        == "name : The Vaults | near : Café Adriatic"
    )
    assert linearize_triples([['"a b"', "p_q", "3.5"], ["c", "d", "_e"]]) == "a b : p q : 3.5 | c : d :  e"


def test_e2e() -> None:
    given = "name[The Vaults], customer rating[5 out of 5], near[Café Adriatic], food[]"
    text = "name : The Vaults | customer rating : 5 out of 5 | near : Café Adriatic | food : "
    assert read_e2e(given, " A pub. ") == (text, ["A pub."])
    assert read_e2e("name : The Vaults | near : Café Adriatic") == ("name : The Vaults | near : Café Adriatic", [])
    assert read_e2e("name[A, B]") == ("name : A, B", [])


def test_webnlg() -> None:
    lex = {"comment": ["good", "good"], "lid": ["Id1", "Id2"], "text": ["One.", "Two."], "lang": ["", ""]}
    assert read_webnlg(AARHUS, lex) == (SPOKEN, ["One.", "Two."])
    assert read_webnlg({"mtriple_set": [["a | b | c"], ["d | e | f"]]}) == ("a : b : c", [])
    assert read_webnlg(SPOKEN) == (SPOKEN, [])


def test_dart() -> None:
    """One of the references of the real test split is null."""
    triples = [["Mars Hill College", "JOINED", "1973"], ["[TABLECONTEXT]", "HOME_TEAM", "Chivas"]]
    text = "Mars Hill College : JOINED : 1973 | [TABLECONTEXT] : HOME TEAM : Chivas"
    assert read_dart(triples, {"source": ["x", "x"], "text": ["One.", None]}) == (text, ["One."])
    assert read_dart(text) == (text, [])


def test_own_columns() -> None:
    assert read_text(" as it is | a : b ", ["One.", "Two."]) == ("as it is | a : b", ["One.", "Two."])
    assert read_text("x", "One.") == ("x", ["One."])


@pytest.mark.parametrize(
    ("task", "text", "label", "message"),
    [
        ("e2e", "name[The Vaults, near[x]", "a", r"expected attributes such as name\[The Vaults\]"),
        ("e2e", "name[The Vaults] and more", "a", "expected.*found 'name.* and more'"),
        ("e2e", "The Vaults", "a", "expected attributes"),
        ("e2e", 3, "a", "expected a text, found 3"),
        ("webnlg", {"mtriple_set": [["a | b"]]}, {"text": ["x"]}, r'expected {"mtriple_set": \[\["subject \|'),
        ("webnlg", {"mtriple_set": []}, {"text": ["x"]}, "expected.*found {'mtriple_set': \\[\\]}"),
        ("webnlg", {"triples": ["a | b | c"]}, {"text": ["x"]}, "expected"),
        ("webnlg", "a | b | c", {"text": ["x"]}, "expected triples such as Aarhus : leaderName"),
        ("dart", [["a", "b"]], {"text": ["x"]}, r"expected \[\[subject, relation, object\]"),
        ("dart", [["a", "b", None]], {"text": ["x"]}, r"expected \[\[subject, relation, object\]"),
        ("dart", [["a", "b", "c"]], {"words": ["x"]}, "expected a text or a list of texts as references"),
    ],
)
def test_what_does_not_parse_is_named(task: str, text: Any, label: Any, message: str) -> None:
    """With its row and what was expected."""
    found = task_of(f"data_to_text/{task}")
    columns = found.columns
    rows = Dataset.from_dict({columns.text: [text], columns.label: [label]})
    with pytest.raises(DataError, match=f"row 1 of file.jsonl, columns '{columns.text}' and .*: {message}"):
        found.check(rows, "file.jsonl")


def test_rows_of_the_command_line() -> None:
    """A table in either notation, triples as a line, any text for own columns: the model reads the same."""
    e2e = task_of("data_to_text/e2e")
    rows = e2e.rows_of(["name[A], near[B]", "name : A | near : B"], None)
    e2e.check(rows, "here", with_targets=False)
    assert [example.text for example in e2e.examples(rows)] == ["name : A | near : B"] * 2
    for name, text in [("webnlg", SPOKEN), ("dart", SPOKEN), ("e2e", "name[A]")]:
        task = task_of(f"data_to_text/{name}")
        task.check(task.rows_of([text], None), "here", with_targets=False)
        with pytest.raises(DataError, match=r"row 2 of here, column .*: expected"):
            task.check(task.rows_of([text, "just words"], None), "here", with_targets=False)
    own = task_of("data_to_text")
    own.check(own.rows_of(["just words"], None), "here", with_targets=False)


# ------------------------------------------------------------------------------------------------ scoring


def e2e_rows() -> Dataset:
    texts = ["name[A], near[B]", "name[C]", "name[A], near[B]"]
    return Dataset.from_dict(
        {"meaning_representation": texts, "human_reference": ["A is near B.", "C.", "Near B is A."]}
    )


def test_rows_with_one_input_are_scored_once_with_all_references() -> None:
    task = task_of("data_to_text/e2e")
    rows = e2e_rows()
    task.check(rows, "here")
    answers = [{"output": "Near B is A."}, {"output": "C."}, {"output": "Near B is A."}]
    assert task.inputs([answer["output"] for answer in answers], rows) == [
        ("Near B is A.", ["A is near B.", "Near B is A."]),
        ("C.", ["C."]),
    ]
    found = task.metrics(answers, rows)
    assert (
        found["ter"] == 0
        and found["chrf"] == found["rougeL"] == pytest.approx(100)
        and tuple(found) == task.metric_names
    )
    alone = task.metrics(answers[:2], rows.select([0, 1]))
    assert alone["ter"] > 0 and alone["bleu"] < found["bleu"]
    assert task.signatures(rows)["bleu"].startswith("nrefs:var|")
    said, baseline = task.baseline(rows)
    assert said == "the input itself" and baseline["bleu"] < found["bleu"]
    assert baseline == task.metrics([{"output": "name : A | near : B"}, {"output": "name : C"}, {"output": ""}], rows)


def webnlg_rows(kinds: list[str | None], categories: list[str]) -> Dataset:
    inputs = [{"mtriple_set": [[f"s | p | {index}"]]} for index in range(len(kinds))]
    lex = [{"text": [] if kind == "testdata_no_lex" else ["The answer is seven."]} for kind in kinds]
    return Dataset.from_dict(
        {"modified_triple_sets": inputs, "lex": lex, "test_category": kinds, "category": categories}
    )


def test_webnlg_is_scored_on_the_file_that_has_all_references_and_by_category() -> None:
    task = task_of("data_to_text/webnlg")
    kinds = ["testdata_with_lex", "testdata_with_lex", "testdata_no_lex", "testdata_unseen_with_lex"]
    rows = webnlg_rows(kinds, ["Airport", "Athlete", "Airport", "Athlete"])
    task.check(rows, "here")
    answers = [{"output": text} for text in ("The answer is seven.", "Nothing.", "x", "x")]
    found = task.metrics(answers, rows)
    assert tuple(found) == task.metric_names
    assert found["bleu_seen"] == pytest.approx(100) and found["ter_seen"] == 0
    assert found["bleu_unseen"] == 0 and found["ter_unseen"] == pytest.approx(100)
    assert found["rougeL"] == pytest.approx(50) and 0 < found["bleu"] < 100
    assert task.signatures(rows)["ter"].startswith("nrefs:1|")
    training = webnlg_rows(["", "", None], ["Food", "City", "Food"])
    task.check(training, "here")
    seen = task.metrics(answers[:1] * 3, training)
    assert seen["bleu"] == seen["bleu_seen"] and math.isnan(seen["bleu_unseen"])
    with pytest.raises(DataError, match=r"has no testdata_with_lex.*it has testdata_no_lex"):
        task.check(webnlg_rows(["testdata_no_lex"], ["Food"]), "here")
    no_references = (
        webnlg_rows(["testdata_with_lex"], ["Food"]).remove_columns("lex").add_column("lex", [{"text": [""]}])
    )
    with pytest.raises(DataError, match="column 'lex' of here has no text in row 1"):
        task.check(no_references, "here")


# ------------------------------------------------------------------------------------------------ the real data


@pytest.mark.parametrize(
    ("task", "folder", "split", "rows", "inputs", "references"),
    [
        ("data_to_text/e2e", "e2e_nlg/default", "validation", 4672, 547, 4672),
        ("data_to_text/e2e", "e2e_nlg/default", "test", 4693, 630, 4693),
        ("data_to_text/webnlg", "web_nlg/webnlg_challenge_2017", "dev", 872, 871, 2268),
        ("data_to_text/webnlg", "web_nlg/webnlg_challenge_2017", "test", 4615, 1862, 4928),
        ("data_to_text/dart", "dart/default", "validation", 2768, 2721, None),
        ("data_to_text/dart", "dart/default", "test", 5097, 4159, None),
    ],
)
def test_the_published_data_sets_can_be_read(
    task: str, folder: str, split: str, rows: int, inputs: int, references: int | None
) -> None:
    """Every row, and no reference is lost on the way."""
    found, data = task_of(task), read_rows(str(benchmark_data(folder)), split)
    assert len(data) == rows
    found.check(data, folder)
    scored = data.select(found.scored(data))
    distinct = found.inputs([""] * len(scored), scored)
    assert len(distinct) == inputs
    assert references is None or sum(len(item.references) for item in distinct) == references


def test_the_unseen_categories_are_those_of_webnlgs_own_file() -> None:
    """Who answers the rows of that file alone, and those with their own references, has all of unseen right."""
    task = task_of("data_to_text/webnlg")
    rows = read_rows(str(benchmark_data("web_nlg/webnlg_challenge_2017")), "test")
    unseen = rows.filter(lambda row: row["test_category"] == "testdata_unseen_with_lex")
    texts = {example.text for example in task.examples(unseen)}
    scored = rows.select(task.scored(rows)[::12])
    answers = [example.references[0] if example.text in texts else "" for example in task.examples(scored)]
    found = task.metrics([{"output": answer} for answer in answers], scored)
    assert len(unseen) == len(texts) == 891
    assert found["ter_unseen"] == 0 and found["chrf_seen"] == 0 and 0 < found["chrf"] < 100


def test_features_of_real_rows() -> None:
    """A causal model's inputs, one for each reference, none cut."""
    task = task_of("data_to_text/webnlg", max_length=2000, max_target_length=500)
    rows = sample(read_rows(str(benchmark_data("web_nlg/webnlg_challenge_2017")), "dev"), 8)
    examples = task.examples(rows)
    tokenizer = tokenizer_of("gpt2", [example.text for example in examples])
    model = model_of("gpt2", len(tokenizer))
    model.config.max_position_embeddings = 2500
    features = task.features(rows, tokenizer, model)
    assert [tokenizer.decode(row["input_ids"]) for row in features] == [
        f"{example.text}\n{reference}</s>" for example in examples for reference in example.references
    ]
    assert set(TASKS) == {"data_to_text", "data_to_text/dart", "data_to_text/e2e", "data_to_text/webnlg"}
