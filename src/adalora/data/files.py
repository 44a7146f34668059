"""Files of rows, and what is wrong with one that cannot be read: its line, and its byte or field."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from .errors import DataError

# An empty field of a CSV is missing; a text that says "NA" or "null" is a text.
CSV = {"keep_default_na": False, "na_values": [""]}


def read_file(path: Path) -> Dataset:
    """All rows of a file, whose kind is what its name ends in. DataError naming file and line where it can be told."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is of no known kind: expected a name that ends in {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    try:
        return reader(path)
    except DataError:
        raise
    except Exception as error:  # the readers of pandas and Arrow raise a dozen types, wrapped by datasets
        if "corresponds to no data" in str(error):
            return Dataset.from_dict({})
        find = _FAULTS.get(path.suffix.lower(), _no_fault)
        fault = find(path) or f"{path} could not be read as {path.suffix[1:].upper()}: {innermost(error)}"
        raise DataError(fault) from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, or, of ``-``, of standard input, that are not blank.

    Raises DataError when the file is not there, or naming what is not UTF-8.
    """
    if str(path) == "-":
        return [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not path.is_file():
        raise DataError(f"no file {path}")
    fault = _not_utf8(path)
    if fault:
        raise DataError(fault)
    with path.open(encoding="utf-8-sig") as lines:
        return [line.rstrip("\n") for line in lines if line.strip()]


def innermost(error: BaseException) -> str:
    """The first line of the innermost cause: ``datasets`` wraps what a reader said in a general error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# --- one reader for each kind -----------------------------------------------------------------------


def _read_csv(path: Path) -> Dataset:
    return _read_separated(path, ",")


def _read_tsv(path: Path) -> Dataset:
    if _quotes_are_text(path):
        return Dataset.from_csv(str(path), sep="\t", quoting=csv.QUOTE_NONE, **CSV)
    fault = _open_quote(path, "\t")  # which would swallow the rows up to the next quote
    if fault and "field limit" not in fault:  # a field that is too long for this module may be right for pandas
        raise DataError(fault)
    return _read_separated(path, "\t")


def _quotes_are_text(path: Path) -> bool:
    """Whether a TSV has a row in each line, as GLUE's own files do, and quotes that do not enclose its fields."""
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        tabs = [line.count("\t") for line in lines if line != "\n"]
    if len(set(tabs)) > 1:
        return False
    try:
        rows = sum(bool(fields) for _, fields in _records(path, "\t", strict=True))
    except csv.Error:
        return True
    return rows < len(tabs) and tabs[0] > 0  # fields over several lines that hold tabs; in one column there are none


def _read_separated(path: Path, separator: str) -> Dataset:
    other = _other_separator(path, separator)
    if other:
        raise DataError(other)
    # A first row that is wider than the header would have pandas take its first field for a name of the row
    fault = _too_wide(path, separator, rows=1)
    if fault:
        raise DataError(fault)
    return Dataset.from_csv(str(path), sep=separator, **CSV)


_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def _other_separator(path: Path, separator: str) -> str | None:
    """What the columns are separated by, where the first line has another separator and not this one."""
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        header = next(lines, "").rstrip("\r\n")
    found = [name for mark, name in _SEPARATORS.items() if mark in header]
    wanted = _SEPARATORS[separator]
    if not found or wanted in found or header.startswith('"'):
        return None
    kind = path.suffix.lower()
    advice = f"save it with {wanted}" + (", or as .tsv" if found[0] == "tabs" else "")
    return f"{path} separates its columns by {found[0]} ({header[:60]}), a {kind} by {wanted}: {advice}"


def _read_json(path: Path) -> Dataset:
    fault = _not_utf8(path)  # which Arrow would not notice before a row is used
    if fault:
        raise DataError(fault)
    return Dataset.from_json(str(path))


def _read_parquet(path: Path) -> Dataset:
    return Dataset.from_parquet(str(path))


def _read_conll(path: Path) -> Dataset:
    """A sentence for each block of lines, one line for each word: its first column is the word, its last the tag.

    Columns are ``tokens`` and ``ner_tags``. Lines that start with -DOCSTART- say nothing.
    """
    fault = _not_utf8(path)
    if fault:
        raise DataError(fault)
    sentences: list[list[list[str]]] = [[]]
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            content = line.strip("\r\n\t ")
            if not content:
                sentences.append([])
            elif not content.startswith("-DOCSTART-"):
                fields = re.split(r"\t" if "\t" in content else " +", content)
                if len(fields) < 2:
                    raise DataError(f"{path}, line {number}: expected a word and its tag, there is only {content!r}")
                sentences[-1].append(fields)
    filled = [words for words in sentences if words]
    return Dataset.from_dict(
        {
            "tokens": [[fields[0] for fields in words] for words in filled],
            "ner_tags": [[fields[-1] for fields in words] for words in filled],
        }
    )


READERS: dict[str, Callable[[Path], Dataset]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".conll": _read_conll,
}


# --- where the fault is -----------------------------------------------------------------------------


def _not_utf8(path: Path) -> str | None:
    """The first byte that is not text."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"{path}, line {number}, byte {error.start + 1}: 0x{line[error.start]:02x} is not UTF-8: "
                    "save the file in UTF-8"
                )
    return None


def _bad_csv(path: Path) -> str | None:
    return _not_utf8(path) or _too_wide(path, ",") or _open_quote(path, ",")


def _bad_tsv(path: Path) -> str | None:
    return _not_utf8(path) or _too_wide(path, "\t") or _open_quote(path, "\t")


def _too_wide(path: Path, separator: str, rows: int | None = None) -> str | None:
    """The first of so many rows that has more fields than the header."""
    records = _records(path, separator)
    try:
        _, header = next(records, (0, []))
        for line, fields in islice(records, rows):
            if len(fields) > len(header):
                return (
                    f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)} "
                    f"({', '.join(header)}): put texts that hold the separator in double quotes"
                )
    except csv.Error:  # a field that is too long for this module may be right for pandas
        pass
    return None


def _open_quote(path: Path, separator: str) -> str | None:
    """The first row whose quotes do not match."""
    line = 1
    try:
        for line, fields in _records(path, separator, strict=True):
            line += 1 + sum(field.count("\n") for field in fields)
    except csv.Error as error:
        return f"{path}, line {line}: {error} (is a double quote left open?)"
    return None


def _records(path: Path, separator: str, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Each row with the line that it starts at; it may go over several."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        reader = csv.reader(lines, delimiter=separator, strict=strict)
        line = 1
        for fields in reader:
            yield line, fields
            line = reader.line_num + 1


def _bad_json(path: Path) -> str | None:
    """Where a JSON file of one value stops being JSON; one of several lines is judged line by line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _bad_json_line(path)
        return f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
    if isinstance(value, list):
        for number, row in enumerate(value, 1):
            if not isinstance(row, dict):
                return f'{path}, row {number}: expected an object such as {{"text": ...}}, it is {_kind(row)}'
    return None


def _bad_json_line(path: Path) -> str | None:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.rstrip("\n"))
            except json.JSONDecodeError as error:
                return f"{path}, line {number}, column {error.colno}: not JSON: {error.msg}"
            if not isinstance(value, dict):
                return f'{path}, line {number}: expected an object such as {{"text": ...}}, it is {_kind(value)}'
    return None


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def _no_fault(path: Path) -> str | None:
    return None


_FAULTS: dict[str, Callable[[Path], str | None]] = {
    ".csv": _bad_csv,
    ".tsv": _bad_tsv,
    ".json": _bad_json,
    ".jsonl": _bad_json_line,
}
