"""Folders of data: saved with ``save_to_disk``, laid out as on the hub, or files with the names of splits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk

from .errors import DataError
from .files import CSV, READERS, innermost, read_file

_SHARD = re.compile(r"(?P<split>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?")
"""The name of one of the files of a split, as the hub has them: ``train-00000-of-00002``."""
_OTHER_NAMES = {"validation": ("dev", "val", "valid")}
"""What a split may be called where no file has its own name."""


def read_folder(path: Path, split: str, config: str | None) -> Dataset:
    """The rows of one split, reading no other; ``config`` may name a folder inside, as on the hub.

    Raises DataError when the folder has no such split, not all of its shards, or files that cannot be read.
    """
    if config is not None and (path / config).is_dir():
        path = path / config
    if is_one_table(path) or (path / "dataset_dict.json").exists():
        return pick_split(_loaded(path, None), split, str(path))
    files = _files_of_splits(path)
    found = files.get(split) or [file for name in _OTHER_NAMES.get(split, ()) for file in files.get(name, ())]
    if found:
        return _joined(found, split, path)
    if any(_SHARD.fullmatch(file.stem) for shards in files.values() for file in shards):
        raise _no_split(str(path), split, files)
    return pick_split(_loaded(path, config), split, str(path))  # names of files that only `datasets` understands


def is_one_table(path: Path) -> bool:
    """Whether the folder holds a ``Dataset`` that was saved with save_to_disk: one table, without splits."""
    return (path / "dataset_info.json").exists() and (path / "state.json").exists()


def pick_split(rows: Dataset | DatasetDict, split: str, source: str) -> Dataset:
    """The rows of one split of what ``datasets`` has loaded."""
    if isinstance(rows, Dataset):
        return rows
    if split not in rows:
        raise _no_split(source, split, rows)
    return rows[split]


def _files_of_splits(folder: Path) -> dict[str, list[Path]]:
    """The data files in the folder, and in its ``data``, by the split that their names say."""
    found: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for file in sorted(place.glob("*")):
            if file.suffix.lower() in READERS:
                shard = _SHARD.fullmatch(file.stem)
                found.setdefault(shard["split"] if shard else file.stem, []).append(file)
    return found


def _joined(files: Sequence[Path], split: str, folder: Path) -> Dataset:
    """The rows of the files of one split, which must be one file or all of its shards."""
    shards = [shard for file in files if (shard := _SHARD.fullmatch(file.stem))]
    names = ", ".join(file.name for file in files)
    if len(files) > max(len(shards), 1):
        raise DataError(f"{folder} has the split {split!r} more than once ({names}): keep one of them")
    if shards and sorted(int(shard["index"]) for shard in shards) != list(range(int(shards[0]["count"]))):
        raise DataError(f"{folder} should have {int(shards[0]['count'])} files of the split {split!r}, it has {names}")
    try:
        return concatenate_datasets([read_file(file) for file in files])
    except ValueError as error:
        raise DataError(f"the files of the split {split!r} in {folder} have different columns: {error}") from error


def _loaded(path: Path, config: str | None) -> Dataset | DatasetDict:
    try:
        if is_one_table(path) or (path / "dataset_dict.json").exists():
            return load_from_disk(str(path))
        kinds = READERS.keys() & {file.suffix.lower() for file in path.rglob("*")}
        return load_dataset(str(path), config, **(CSV if kinds and kinds <= {".csv", ".tsv"} else {}))
    except Exception as error:  # the readers of pandas and Arrow raise a dozen types, wrapped by datasets
        raise DataError(
            f"{path} could not be read: {innermost(error)}. "
            "Expected a folder saved with save_to_disk, or one of data files"
        ) from error


def _no_split(source: str, split: str, there: Mapping[str, object] | DatasetDict) -> DataError:
    return DataError(f"{source} has no split {split!r}: it has {', '.join(map(str, there))}")
