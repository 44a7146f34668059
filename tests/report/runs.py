"""Folders of runs, written by the code that writes them in training, without the training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from adalora.core.schedule import Schedule
from adalora.core.trace import Allocation, TraceFile
from adalora.files import write_json, write_text
from adalora.recipe import dump, validate

BERT = ["attention.self.query", "attention.self.key", "attention.self.value"]
BERT += ["attention.output.dense", "intermediate.dense", "output.dense"]
LLAMA = [*(f"self_attn.{letter}_proj" for letter in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]


def stack(layers: int, kinds: Sequence[str] = tuple(BERT), where: str = "encoder.layer") -> list[str]:
    """Names of matrices, layer by layer."""
    return [f"{where}.{layer}.{kind}" for layer in range(layers) for kind in kinds]


def write_run(
    folder: Path,
    names: Sequence[str],
    *,
    method: str = "adalora",
    rank: int = 6,
    target: int = 4,
    steps: int = 120,
    finished: bool = True,
    trace: bool = True,
    metric: str = "accuracy",
    **changes: Any,
) -> Path:
    """A run's folder: recipe, trace, metrics. ``changes`` are keys of the recipe."""
    settings = {"target_r": target, "init_r": rank} if method == "adalora" else {"r": rank}
    recipe = {
        "model": "demo:minilm",
        "method": method,
        "output": str(folder),
        "data": {"train": "demo:rotten_tomatoes", "text": "text", "label": "label"},
        "adalora" if method == "adalora" else "lora": settings,
        "facts": {"train_rows": 8530, "eval_rows": 1066, "train_digest": "0" * 64, "versions": {"adalora": "0.1.0"}},
    }
    write_text(folder / "recipe.yaml", dump(validate(recipe | changes, "test")))
    ranks = write_trace(folder / "trace.jsonl", names, rank, target, steps) if trace else [rank] * len(names)
    if finished:
        of_module = dict(zip(names, ranks, strict=True))
        write_json(folder / "metrics.json", metrics_of(method, of_module, rank, steps, metric))
    return folder


def write_trace(path: Path, names: Sequence[str], rank: int, target: int, steps: int, every: int = 2) -> list[int]:
    """A trace in which scores wander, so that triplets are pruned and come back; the final ranks."""
    draw = np.random.default_rng(0)
    matrices, total = len(names), len(names) * rank
    schedule = Schedule(total, matrices * target, steps, steps // 10, steps * 3 // 10, every)
    depth = np.linspace(0.4, 1.6, matrices)[:, None] * draw.lognormal(0, 0.7, (matrices, 1))
    usual = depth * np.exp(-0.45 * np.arange(rank)) * draw.lognormal(0, 0.3, (matrices, rank)) * 1e-7
    wander = draw.normal(0, 1, (matrices, rank))
    file = TraceFile(path)
    file.start(
        {
            "names": list(names),
            "initial_ranks": [rank] * matrices,
            "triplet_parameters": [769 + 384 * (place % 3) for place in range(matrices)],
            "budget": {"initial": total, "target": matrices * target},
            "schedule": asdict(schedule),
            "importance": "sensitivity_uncertainty",
            "policy": "global_topk",
        }
    )
    before, ranks = np.ones((matrices, rank), dtype=bool), [rank] * matrices
    for step in filter(schedule.allocates, range(1, steps + 1)):
        wander = 0.8 * wander + 0.6 * draw.normal(0, 1, wander.shape)
        scores = usual * np.exp(0.5 * wander * (1 - step / steps))
        live = np.zeros(total, dtype=bool)
        live[np.argsort(-scores, axis=None, kind="stable")[: schedule.budget(step)]] = True
        live = live.reshape(matrices, rank)
        ranks, returned = live.sum(1).tolist(), (live & ~before).sum(1).tolist()
        rounded = [[float(f"{score:.4g}") for score in row] for row in scores] if schedule.is_final(step) else None
        error = 0.1 * math.exp(-((step / steps - 0.2) ** 2) * 30) + 0.01
        file.append(Allocation(step, schedule.budget(step), ranks, returned, error, rounded))
        before = live
    return ranks


def metrics_of(method: str, ranks: dict[str, int], rank: int, steps: int, metric: str) -> dict[str, Any]:
    """What ``metrics.json`` says of such a run."""
    draw = np.random.default_rng(1)
    evaluations = [
        {"step": step, "epoch": 2 * step / steps, "metrics": {metric: 0.85 - 0.35 * 0.97**step, "mcc": 0.6}}
        for step in range(steps // 6, steps + 1, steps // 6)
    ]
    log = [
        {"loss": 0.3 + 0.4 * 0.97**step + draw.normal(0, 0.02), "learning_rate": 1e-3 * (1 - step / steps)}
        | {"grad_norm": 0.4, "epoch": 2 * step / steps, "step": step}
        for step in range(max(1, steps // 120), steps + 1, max(1, steps // 120))
    ]
    return {
        "model": "demo:minilm",
        "task": "classification",
        "method": method,
        "headline": metric,
        "versions": {"adalora": "0.1.0", "torch": "2.13.0"},
        "baseline": {"answer": "always 'rotten'", "metrics": {metric: 0.53, "mcc": 0.0}},
        "initial_triplets": rank * len(ranks),
        "live_triplets": sum(ranks.values()),
        "ranks": ranks,
        "parameters": {
            "adapter_start": 99000,
            "adapter_saved": 66000,
            "head": 770,
            "trainable": 99770,
            "frozen": 10**7,
        },
        "saved_bytes": {"adapter_model.safetensors": 617000},
        "metrics": evaluations[-1]["metrics"],
        "more_metrics": {},
        "evaluations": evaluations,
        "log": log,
        "training_loss": 0.4,
        "steps": steps,
        "seconds": 63.2,
        "memory": {"peak_bytes": 1_400_000_000, "gpu_peak_bytes": None},
    }
