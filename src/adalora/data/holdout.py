"""Rows held out of the training rows: the same ones for every seed and on every machine.

Rows go by the hash of what is in them, not by a random number, so neither the training's seed nor the order of a file
has a say, and rows that are added later move few of the others. What belongs together is on one side.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset

from .errors import DataError


class Split(NamedTuple):
    """The two sides of the rows of one source."""

    train: Dataset
    held_out: Dataset


def hold_out(rows: Dataset, size: float, together: Sequence[Sequence[str]], classes: Sequence[Any] | None) -> Split:
    """Take about ``size`` rows (below 1: that share) out of ``rows``, which keep their order on both sides.

    Groups are taken by the hash of their key while they fit: never more rows than ``size``, fewer where no group left
    is small enough. With ``classes``, the class of each row, both sides have them in the same proportion as nearly as
    the groups allow, and each class keeps a row to train on.

    Args:
        together: sets of columns; rows that agree in all columns of one set are of one group, and so are those that
            such rows link.

    Raises:
        DataError: nothing to hold out, nothing left to train on, or no group that is small enough.
    """
    wanted = round(size * len(rows)) if size < 1 else int(size)
    asked = f"data.holdout ({size:g})"
    if wanted >= len(rows):
        raise DataError(f"{asked} leaves none of the {len(rows):,} rows to train on: hold out fewer")
    if wanted == 0:
        raise DataError(f"{asked} of {len(rows):,} rows is less than one: hold out 1 or more")
    names = list(classes) if classes is not None else [None] * len(rows)
    taken = _taken(_groups(rows, together), names, wanted)
    if not taken:
        same = " or ".join(" and ".join(columns) for columns in together)
        raise DataError(
            f"{asked}: rows with the same {same} stay together, and no such group has at most {wanted:,} of the "
            f"{len(rows):,} rows and leaves some of every class to train on: hold out more, or go by another column"
        )
    return Split(
        rows.select([index for index in range(len(rows)) if index not in taken]),
        rows.select(sorted(taken)),
    )


def _groups(rows: Dataset, together: Sequence[Sequence[str]]) -> list[list[int]]:
    """The rows of each group, groups in the order of the hash of what they hold."""
    keys = list(zip(*(_keys(rows, columns) for columns in together), strict=True))
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[int, bytes], int] = {}
    for index, row in enumerate(keys):
        for key in enumerate(row):
            parent[root(index)] = root(first.setdefault(key, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(rows)):
        groups.setdefault(root(index), []).append(index)
    return sorted(groups.values(), key=lambda group: min(keys[index] for index in group))


def _taken(groups: Sequence[Sequence[int]], names: Sequence[Any], wanted: int) -> set[int]:
    """The rows to hold out: first as many of each class as its share, then what still fits."""
    total = Counter(names)
    left = wanted
    share = _shares(total, wanted)
    held: Counter[Any] = Counter()
    taken: set[int] = set()
    for by_share in (True, False):
        for group in groups:
            of_class = Counter(names[index] for index in group)
            if len(group) > left or group[0] in taken:
                continue
            if any(
                held[name] + count > (min(share[name], total[name] - 1) if by_share else total[name] - 1)
                for name, count in of_class.items()
            ):
                continue
            taken.update(group)
            held += of_class
            left -= len(group)
    return taken


def _shares(total: Counter[Any], wanted: int) -> dict[Any, int]:
    """How many rows each class gives, which are ``wanted`` in all: the largest remainders are rounded up."""
    exact = {name: wanted * count / total.total() for name, count in total.items()}
    shares = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (shares[name] - exact[name], str(name)))
    for name in by_remainder[: wanted - sum(shares.values())]:
        shares[name] += 1
    return shares


def _keys(rows: Dataset, columns: Sequence[str]) -> list[bytes]:
    """A hash of what each row holds in ``columns``, lists and structures included."""
    values = zip(*(rows[column][:] for column in columns), strict=True)
    return [hashlib.sha256(json.dumps(row, ensure_ascii=False, default=str).encode()).digest() for row in values]
