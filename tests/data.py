"""The benchmark data that some tests read: real rows, never committed here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("ADALORA_DATA", Path(__file__).parents[2] / "shared" / "data"))


def benchmark_data(name: str) -> Path:
    """The folder of a benchmark, such as ``glue/mrpc``; the test is skipped where it is absent."""
    folder = ROOT / name
    if not folder.is_dir():
        pytest.skip(f"no {name} in the folder that ADALORA_DATA names ({ROOT})")
    return folder
