"""Rows: from a file, a folder of files, a saved data set, the hub, or the built-in reviews.

Everything comes out as a ``datasets.Dataset``; what its columns mean is the business of ``adalora.tasks``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, load_dataset

from ..recipe import DEMO_REVIEWS
from .errors import DataError
from .files import READERS, innermost, read_file, read_lines
from .folders import is_one_table, pick_split, read_folder
from .holdout import Split, hold_out
from .reviews import demo_reviews

__all__ = [
    "DataError",
    "Split",
    "demo_reviews",
    "digest",
    "has_splits",
    "hold_out",
    "read_lines",
    "read_rows",
    "sample",
]


def read_rows(source: str, split: str, config: str | None = None) -> Dataset:
    """The rows of ``split`` of ``source``.

    Environment variables in ``source`` are replaced: ``${ADALORA_DATA}/glue/mrpc``. A single file has no splits: all
    of its rows are returned whatever ``split`` says.

    Raises DataError when the source is not there, not readable, has no such split or no rows.
    """
    rows = _read(source, split, config)
    if len(rows) == 0:
        raise DataError(f"{source} ({split}) has no rows: training and evaluation need some of each")
    return rows


def sample(rows: Dataset, most: int | None) -> Dataset:
    """A fixed random sample of ``most`` rows where there are more."""
    return rows if most is None or len(rows) <= most else rows.shuffle(seed=0).select(range(most))


def has_splits(source: str) -> bool:
    """Whether ``source`` can hold several splits; a single file cannot, nor can one table saved with save_to_disk."""
    path = _local(source)
    return not (path.is_file() or is_one_table(path))


def digest(rows: Dataset, columns: Sequence[str]) -> str:
    """SHA-256 over the values of ``columns``, lists and structures included, row after row."""
    total = hashlib.sha256()
    for batch in rows.select_columns(list(columns)).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns), strict=True):
            total.update(json.dumps(values, ensure_ascii=False, default=str).encode())
    return total.hexdigest()


def _read(source: str, split: str, config: str | None) -> Dataset:
    if source == DEMO_REVIEWS:
        return demo_reviews(split)
    if source == "-":
        raise DataError("rows cannot be read from standard input (-): save them in a file, and give that")
    path = _local(source)
    if path.is_file():
        return read_file(path)
    if path.is_dir():
        return read_folder(path, split, config)
    if source.startswith((".", "/", "~", "demo:")) or "$" in source or path.suffix.lower() in READERS:
        place = f"{source} ({path})" if "$" in source else source
        raise DataError(
            f"no data at {place}: expected a file ({', '.join(READERS)}), a folder of such files or one saved with "
            f"save_to_disk, the name of a data set on the hub, or {DEMO_REVIEWS}"
        )
    return _read_hub(source, split, config)


def _local(source: str) -> Path:
    """The path that ``source`` would be; DataError naming an environment variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise DataError(f"{source} needs the environment variable {name}, which is not set: export {name}=FOLDER")
        return os.environ[name]

    return Path(re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, source)).expanduser()


def _read_hub(name: str, split: str, config: str | None) -> Dataset:
    try:
        return pick_split(load_dataset(name, config), split, name)
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
            f"no file or folder {name}, and not to be had from the hub: {innermost(error)}. {advice}"
        ) from error
