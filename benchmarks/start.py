"""How much of the gradient's largest singular triplets the gradient start finds, and what it costs.

Per task: the dense gradients ∂L/∂W0 of all adapted matrices (of --matrices of them, where the model is large), summed
over batches, are the truth. Block power iteration runs on them as the start does (the same `Sketch`), for every number
of sweeps and of oversampled rows; what is told is the share of the sum of the init_r largest singular values that its P
and Q hold, for the worst matrix and on average. `data` is the share of the truth of --reference batches that directions
found in fewer batches hold: how much the batches say about the training set. `start` is `adalora.start` itself, at its
defaults, on the model. Times and live bytes are of its passes and of training steps, in turns, in one process.

    python benchmarks/start.py minilm-sst2 minilm-stsb --output runs/start.json
    python benchmarks/start.py smollm2-e2e --matrices 15 --rows 4 --reference 16 --output runs/start.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

import adalora
from adalora.core.start import BATCHES, OVERSAMPLING, SWEEPS, Sketch, find_directions
from adalora.files import write_json
from adalora.hf import start as looks
from adalora.hf.layers import adapted_layers
from adalora.preparation import Prepared, prepare
from adalora.recipe import validate

TASKS: dict[str, dict[str, Any]] = {
    "minilm-sst2": {"model": "demo:minilm", "task": "glue/sst2", "data": {"train": "$ADALORA_DATA/glue/sst2"}},
    "minilm-stsb": {"model": "demo:minilm", "task": "glue/stsb", "data": {"train": "$ADALORA_DATA/glue/stsb"}},
    "smollm2-e2e": {
        "model": "demo:smollm2", "task": "data_to_text/e2e",
        "data": {"train": "$ADALORA_DATA/e2e_nlg/default", "max_length": 96, "max_train_rows": 2000,
                 "max_eval_rows": 50},
    },
}  # fmt: skip
RANK = 3


def prepared(task: str, folder: str, rows: int) -> Prepared:
    raw = {**TASKS[task], "output": folder, "adalora": {"target_r": 2, "init_r": RANK}}
    raw["training"] = {"per_device_train_batch_size": rows, "max_steps": 1000, "eval_strategy": "no"}
    return prepare(validate(raw, task))


def dense(model: nn.Module, layers: Mapping[str, Any], batches: Sequence[Any]) -> dict[str, Tensor]:
    """∂L/∂W0 of these layers, [d_out, d_in], summed over the batches."""
    model.eval()
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    for base in bases.values():
        base.weight.grad = None
        base.weight.requires_grad_(True)
    for batch in batches:
        model(**batch).loss.backward()
    found = {name: base.weight.grad.clone() for name, base in bases.items()}
    for base in bases.values():
        base.weight.grad = None
        base.weight.requires_grad_(False)
    return found


def iterated(g: Tensor, sweeps: int, oversampling: int) -> tuple[Tensor, Tensor]:
    """P and Qᵀ that the start finds in a gradient that is known."""
    sketch = Sketch(g.shape[0], g.shape[1:], RANK, F.linear, g.device, oversampling=oversampling)
    eye, gradient = torch.eye(g.shape[1]), g.T.contiguous()

    def look(scale: float) -> int:
        sketch.add(eye, gradient * scale)
        return 1

    (found,) = find_directions([sketch], look, sweeps)
    assert found is not None
    return found.left, found.right


def held(g: Tensor, best: Tensor, left: Tensor, right: Tensor) -> float:
    """The share of the sum of the largest singular values: Σ p_iᵀ G q_i / Σ σ_i."""
    return float(torch.diagonal(left.T @ g @ right.T).sum() / best[:RANK].sum())


def summary(shares: Sequence[float]) -> dict[str, float]:
    return {"worst": round(min(shares), 4), "mean": round(statistics.mean(shares), 4)}


def measure(task: str, matrices: int | None, reference: int, rows_each: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = prepared(task, folder, rows_each)
        batches = list(itertools.islice(_batches(run), reference))
    model = run.model
    every = dict(adapted_layers(model, "default"))
    step = 1 if matrices is None else max(1, len(every) // matrices)
    layers = {name: layer for i, (name, layer) in enumerate(every.items()) if i % step == 0}
    sums, done = {}, 0
    running = {name: torch.zeros_like(layer.get_base_layer().weight) for name, layer in layers.items()}
    for count in sorted({4, 8, 16, reference}):
        for name, g in dense(model, layers, batches[done:count]).items():
            running[name] += g
        done = count
        sums[count] = {name: g / count for name, g in running.items()}
    best = {count: {name: torch.linalg.svdvals(g) for name, g in of.items()} for count, of in sums.items()}
    rows: list[dict[str, Any]] = []
    for sweeps, oversampling in itertools.product((2, 4, 6), (2, 4, 6, 10)):
        shares = []
        for name, g in sums[BATCHES].items():
            shares.append(held(g, best[BATCHES][name], *iterated(g, sweeps, oversampling)))
        rows.append({"sweeps": sweeps, "oversampling": oversampling, **summary(shares)})
    data = []
    for count in (4, 8, 16):
        own, all_rows = [], []
        for name, g in sums[count].items():
            found = iterated(g, SWEEPS, OVERSAMPLING)
            own.append(held(g, best[count][name], *found))
            all_rows.append(held(sums[reference][name], best[reference][name], *found))
        data.append({"batches": count, "own": summary(own), "reference": summary(all_rows)})
    told = adalora.start(model, batches, number=BATCHES)
    triplets = dict(zip(every, adalora.allocator(model).triplets, strict=True))
    shares = []
    for name, g in sums[BATCHES].items():
        p, _, q = triplets[name].factors
        shares.append(held(g, best[BATCHES][name], -p.detach(), q.detach()))
    stable = [float(v.square().sum() / v[0].square()) for v in best[BATCHES].values()]
    whole = sum(float(v.square().sum()) for v in best[BATCHES].values())
    top = sum(float(v[:RANK].square().sum()) for v in best[BATCHES].values())
    return {
        "matrices": len(layers),
        "of": len(every),
        "stable_rank": {"mean": round(statistics.mean(stable), 2), "most": round(max(stable), 1)},
        "share_of_square": {"dense": round(top / whole, 4), "told": told["share"]},
        "sweeps": rows,
        "batches": data,
        "start": summary(shares),
        "cost": cost(model, batches),
    }


def cost(model: nn.Module, batches: Sequence[Any]) -> dict[str, Any]:
    """Seconds and live bytes of a pass of the start over one batch, and of a training step, in turns."""
    ours = adalora.allocator(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    layers = dict(adapted_layers(model, "default"))
    ranks = {name: t.rank for name, t in zip(layers, ours.triplets, strict=True)}
    seconds: dict[str, list[float]] = {"start": [], "step": []}
    peaks: dict[str, int] = {}

    def step(batch: Any) -> None:
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def start(batch: Any) -> None:
        looks.look_at_gradient(model, layers, "default", ranks, [batch], sweeps=SWEEPS)

    step(batches[0])
    for batch in batches[:4]:
        for name, work in (("step", step), ("start", start)):
            began = time.perf_counter()
            work(batch)
            seconds[name].append(time.perf_counter() - began)
    for name, work in (("step", step), ("start", start)):
        with LiveBytes() as bytes_:
            work(batches[0])
        peaks[name] = bytes_.peak
    step_seconds = statistics.median(seconds["step"])
    whole = statistics.median(seconds["start"]) * BATCHES  # its passes over BATCHES batches
    return {
        "step_seconds": round(step_seconds, 4),
        "start_seconds": round(whole, 2),
        "of_1000_steps": round(whole / (1000 * step_seconds), 4),
        "peak_bytes": peaks,
    }


def _batches(run: Prepared) -> Any:
    collate = run.task.collator(run.tokenizer, run.model)
    for rows in run.train.shuffle(seed=0).iter(run.arguments.train_batch_size):
        yield collate([dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=sorted(TASKS))
    parser.add_argument("--matrices", type=int, help="so many of the adapted matrices, spread over the model")
    parser.add_argument("--rows", type=int, default=16, help="in a batch")
    parser.add_argument("--reference", type=int, default=64, help="batches that stand for the training set")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for task in arguments.tasks:
        torch.manual_seed(0)
        results[task] = measure(task, arguments.matrices, arguments.reference, arguments.rows)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, results)


if __name__ == "__main__":
    main()
