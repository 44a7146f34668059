"""Files that are there whole or not at all, and folders that one process writes to."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .core.errors import AdaLoraError

# That a terminal would obey, or no file can hold.
_CONTROLS = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_UNWRITABLE = {
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EFBIG", "EIO"),
        *("ENAMETOOLONG", "ENOTDIR", "EISDIR", "ENOENT", "EINVAL", "ELOOP"),
    )
    if hasattr(errno, name)  # EDQUOT is not everywhere
}


def unwritable(error: BaseException) -> str | None:
    """Why the system did not let a file be written, where that is what ``error`` says: itself, or, of a library that
    raises errors of its own (safetensors, torch), in its text."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _UNWRITABLE else None
    code = re.search(r"\(os error (\d+)\)", str(error))
    if code and int(code[1]) in _UNWRITABLE:
        return os.strerror(int(code[1]))
    if "PytorchStreamWriter failed" in str(error) or "inline_container.cc" in str(error):
        return "torch could not write it to its end, as on a full disk"
    return None


class HeldError(AdaLoraError):
    """Another process holds a lock: the message names it."""


@contextmanager
def holding(lock: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock that the death of this process releases, and say in its file whose it is.

    Args:
        patience: seconds to wait for one that is held.

    Raises:
        HeldError: another process holds it.
    """
    held = FileLock(lock, timeout=patience)
    try:
        held.acquire()
    except Timeout:
        holder = ""
        with suppress(OSError):  # Windows lets nobody read what is locked
            holder = lock.read_text(encoding="utf-8", errors="replace").strip()
        raise HeldError(holder or "another process") from None
    try:
        with suppress(OSError):
            lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        held.release()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; on leaving it replaces ``path`` in one step, on an error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all; a number that is not finite becomes null."""
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON that every reader accepts: a number that is not finite (a correlation that is not
    defined) becomes null."""
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)  # they are in texts alone


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
