"""What a run's checkpoint holds, digest by digest: one that was damaged is not resumed from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from .core.errors import AdaLoraError
from .files import write_json

MANIFEST = "manifest.json"
"""Written into a checkpoint when everything else is in it: its presence says that the checkpoint is complete."""

_CHUNK = 2**20  # bytes


class CheckpointError(AdaLoraError):
    """A checkpoint that cannot be resumed from, because it is not what was written."""


class Progress(NamedTuple):
    """How far a run had come, beyond what the Trainer keeps."""

    seconds: float  # of training, in all its parts
    processes: int  # that trained it
    loss_logged: float  # sum of the training losses of all steps up to the last log line
    loss_since: list[float]  # and of those after it, in each process
    step_logged: int


def write_manifest(checkpoint: Path, trace: Path, progress: Progress) -> None:
    """Say in a checkpoint that it is complete, and what it and the run's trace hold."""
    files = {str(path.relative_to(checkpoint)): digest(path) for path in _files(checkpoint)}
    size = trace.stat().st_size if trace.is_file() else 0
    beside = {"bytes": size, "sha256": digest(trace, size)} if size else None
    write_json(checkpoint / MANIFEST, {"progress": progress._asdict(), "trace": beside, "files": files})


def read_manifest(checkpoint: Path, trace: Path) -> Progress:
    """How far the run had come at a complete checkpoint, when that and the trace up to it are what was written.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    try:
        said: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        progress, files, beside = Progress(**said["progress"]), dict(said["files"]), said["trace"]
        expected: dict[Path, tuple[int | None, str]] = {checkpoint / name: (None, files[name]) for name in files}
        if beside is not None:
            expected[trace] = (int(beside["bytes"]), beside["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(checkpoint / MANIFEST, checkpoint, "cannot be read") from error
    for path, (size, sha256) in expected.items():
        if not path.is_file():
            raise _damaged(path, checkpoint, "is missing")
        if digest(path, size) != sha256:
            raise _damaged(path, checkpoint, "is not what was written (its SHA-256 differs)")
    return progress


def digest(path: Path, size: int | None = None) -> str:
    """SHA-256 of a file, or of its first ``size`` bytes."""
    total, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0 and (read := file.read(min(_CHUNK, left))):
            total.update(read)
            left -= len(read)
    return total.hexdigest()


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path != checkpoint / MANIFEST]


def _damaged(path: Path, checkpoint: Path, how: str) -> CheckpointError:
    advice = f"remove {checkpoint} to resume from the checkpoint before it, or start over with --overwrite"
    if path.parent != checkpoint and checkpoint not in path.parents:  # every checkpoint needs it
        advice = "bring it back, or start over with --overwrite"
    return CheckpointError(f"{path} {how}, so the run cannot be resumed to the same result: {advice}")
