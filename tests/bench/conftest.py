"""Grids whose cells take a second: a tiny BERT, a few made-up reviews."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict

from ..cli.conftest import reviews, tiny_model

__all__ = ["tiny_model"]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 96 rows to train on and 40 held out, in the form that needs no cache."""
    folder = tmp_path_factory.mktemp("rows") / "reviews"
    splits = {"train": reviews(96, seed=1), "validation": reviews(40, seed=2)}
    DatasetDict({name: Dataset.from_list(found) for name, found in splits.items()}).save_to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_grid(tiny_model: Path, rows: Path) -> dict[str, Any]:
    """Two methods, two rates, one seed to report: six cells of four steps."""
    training = {"max_steps": 4, "per_device_train_batch_size": 8, "eval_strategy": "no", "save_steps": 2}
    return {
        "name": "tiny",
        "output": "out",
        "base": {
            "model": str(tiny_model),
            "data": {"train": str(rows), "max_length": 16},
            "lora": {"target_modules": ["query", "value"]},
            "training": training,
        },
        "tasks": {"reviews": None},
        "methods": {"lora": None, "head": None},
        "budgets": ["rank 1"],
        "learning_rates": [5e-2, 1e-3],
        "extend": 0,
        "seeds": {"choose": 0, "report": [1]},
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """Writes a grid to a file, its output folder beside it."""

    def write_grid(grid: Mapping[str, Any]) -> Path:
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump({**grid, "output": str(tmp_path / "out")}, sort_keys=False))
        return path

    return write_grid
