"""A checkpoint that is not what was written is not resumed from: the file is named, and nothing is touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Finished
from .test_train import adapter_bytes, interrupted_copy

Run = Callable[..., Finished]
CHECKPOINT = Path("run/checkpoints/checkpoint-20")


def flip(name: str) -> None:
    path = CHECKPOINT / name
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(bytes(content))


def cut(name: str) -> None:
    path = CHECKPOINT / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("adapter_model.safetensors", flip),
        ("adalora_state.safetensors", flip),
        ("optimizer.pt", flip),
        ("optimizer.pt", cut),
        ("trainer_state.json", cut),
        ("manifest.json", cut),
        ("rng_state.pth", lambda name: (CHECKPOINT / name).unlink()),
        ("adalora_state.safetensors", lambda name: (CHECKPOINT / name).unlink()),
    ],
)
def test_a_damaged_checkpoint(adalora: Run, finished: Path, name: str, damage: Callable[[str], None]) -> None:
    interrupted_copy(finished, after=20)
    damage(name)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    refused = adalora("train", "--resume", "--output", "run")
    assert refused.code == 2 and refused.err.count("\n") == 1, refused
    assert str(CHECKPOINT / name) in refused.err and f"remove {CHECKPOINT} to resume" in refused.err
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_a_trace_that_is_broken_in_the_middle(adalora: Run, finished: Path) -> None:
    interrupted_copy(finished, after=20)
    lines = Path("run/trace.jsonl").read_text().splitlines(keepends=True)
    Path("run/trace.jsonl").write_text("".join([*lines[:3], lines[3][:20] + "\n", *lines[4:]]))
    refused = adalora("train", "--resume", "--output", "run")
    assert refused.code == 2 and "run/trace.jsonl is not what was written" in refused.err
    Path("run/trace.jsonl").unlink()
    assert "run/trace.jsonl is missing" in adalora("train", "--resume", "--output", "run").err


def test_what_a_resumed_run_says_is_what_the_whole_run_says(adalora: Run, finished: Path) -> None:
    """From the very end of an epoch, whose evaluation had not been made, and from between two log lines."""
    whole = said(finished)
    assert [entry["step"] for entry in whole["evaluations"]] == [12, 24, 36]
    for step in (12, 16):
        interrupted_copy(finished, after=step)
        assert adalora("train", "--resume", "--output", "run").code == 0
        assert said(Path("run")) == whole
        assert adapter_bytes("run") == adapter_bytes(finished)
        shutil.rmtree("run")


def said(run: Path) -> dict[str, Any]:
    """What ``metrics.json`` says, without what must differ."""
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    runtime = metrics["log"].pop()
    assert runtime.keys() >= {"train_runtime", "train_loss"}
    return {key: value for key, value in metrics.items() if key not in {"seconds", "memory", "resumed_from_step"}}
