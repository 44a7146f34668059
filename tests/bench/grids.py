"""A grid of two tasks, and made-up records of its cells."""

from __future__ import annotations

from typing import Any

from adalora.bench.grid import Grid, cell_folder
from adalora.bench.records import Record

DEBERTA = "microsoft/deberta-v3-base"


def grid(**keys: Any) -> Grid:
    """Two tasks, two budgets, lora and adalora and full; three seeds."""
    raw: dict[str, Any] = {
        "name": "example_grid",
        "output": "out",
        "base": {"model": "demo:minilm"},
        "tasks": {
            "mrpc": {"task": "glue/mrpc", "data": {"train": "data/glue/mrpc"}},
            "cola": {"task": "glue/cola", "data": {"train": "data/glue", "config": "cola"}},
        },
        "methods": {"lora": None, "adalora": None, "full": None},
        "budgets": ["rank 2", "rank 8"],
        "learning_rates": [1e-3, 5e-3],
        "extend": 0,
        "seeds": {"choose": 0, "report": [1, 2, 3]},
    }
    return Grid.model_validate(raw | keys)


def record(
    task: str, method: str, budget: Any, seed: int, score: float | None, rate: float = 1e-3, **more: Any
) -> Record:
    """One cell with a headline metric; ``None`` is a metric that is not defined."""
    headline = more.pop("headline", "mcc" if task == "cola" else "accuracy")
    fields: dict[str, Any] = {
        "role": "choose" if seed == 0 else "report",
        "state": "done",
        "folder": cell_folder((task, method, budget), rate, seed),  # type: ignore[arg-type]
        "headline": headline,
        "lower_is_better": False,
        "metrics": {headline: score},
        "parameters": {"adapter_start": 3000, "adapter_saved": 2000, "head": 10, "trainable": 3010},
        "seconds": 60.0 * seed,
        "peak_bytes": 2**30,
    }
    return Record(task=task, method=method, budget=budget, learning_rate=rate, seed=seed, **fields | more)


def failed(task: str, method: str, budget: Any, seed: int, why: str, rate: float = 1e-3) -> Record:
    """One cell that broke."""
    return record(
        task, method, budget, seed, None, rate, state="failed", failure=why, metrics={}, parameters={},
        seconds=None, peak_bytes=None,
    )  # fmt: skip
