"""What does an adapter lose when it is truncated after training: AdaLoRA's triplets, or plain LoRA by SVD?

Task: the demo (`adalora train` without arguments: MiniLM on film reviews, 36 matrices, average rank 4). One AdaLoRA run
and one plain LoRA run a seed, with the same data, batches, steps, schedule, scale s and trained output layer. LoRA's
learning rate is the best of --lora-rates on the first seed, by held-out accuracy of the untruncated adapter: a choice
made on the test rows, in LoRA's favour. Every adapter is then cut to an average rank of 2 and 1 in several orders
(see ORDERS) and measured on the held-out reviews; `sensitivity` also reads --batches batches of training rows.

    python benchmarks/nested_ranks.py --seeds 0 1 2 3 4 --output runs/nested_ranks

Adapters and measurements stay in the output folder, so a second call repeats nothing. results.json holds every number.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from adalora.core.triplets import from_product
from adalora.files import write_json
from adalora.hf.plain import PlainAdapter
from adalora.preparation import Prepared, prepare
from adalora.pretrained import load_model
from adalora.recipe import validate
from adalora.recipe_text import demo_raw, with_values
from adalora.training import train

RANKS = (2, 1)  # average ranks to cut to; the adapters are trained at 4
ORDERS = {  # method -> order -> what is kept
    "adalora": {
        "norm": "largest ‖ΔW_i‖_F = s·ρ·|λ_i|·‖P_i‖·‖Q_i‖, all matrices together",
        "score": "largest importance at the last allocation, all matrices together",
        "sensitivity": "largest mean |λ_i·∂L/∂λ_i| on training rows, all matrices together",
        "norm, per matrix": "the same share of every matrix's triplets, largest ‖ΔW_i‖_F first",
    },
    "lora": {
        "svd, per matrix": "largest singular values of every ΔW, the same rank in every matrix",
        "svd": "largest singular values of the ΔW, all matrices together",
        "sensitivity": "SVD of every ΔW, largest mean |σ_i·∂L/∂σ_i| on training rows, all matrices together",
    },
}
Batches = list[dict[str, torch.Tensor]]
Ranked = dict[str, torch.Tensor]  # matrix -> one number for each of its triplets


def plan(method: str, seed: int, folder: Path, rate: float | None = None) -> Prepared:
    """The demo's recipe by this method at rank 4, ready to train in ``folder``."""
    values: dict[str, Any] = {"seed": seed, "output": str(folder), "training.eval_strategy": "no"}
    raw = demo_raw()
    if method == "lora":  # the same matrices and scale
        raw["lora"] = {"r": 4, **raw.pop("adalora")}
    if rate is not None:
        values["training.learning_rate"] = rate
    return prepare(validate(with_values(raw, {**values, "method": method}), "the demo"), "overwrite")


def lora_layers(model: torch.nn.Module) -> dict[str, Any]:
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
    return {name.removeprefix("base_model.model."): layer for name, layer in found.items()}


class Adapter:
    """A saved adapter as triplets ΔW_i = B[:, i] A[i, :], merged into the model as far as they are kept."""

    def __init__(self, method: str, folder: Path, prepared: Prepared) -> None:
        base = load_model(prepared.recipe.model, prepared.task, prepared.tokenizer)
        model, self.factors = peft.PeftModel.from_pretrained(base, str(folder)), {}
        for name, layer in lora_layers(model).items():
            a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            if method == "lora":
                p, lam, a = from_product(b, a)
                b = p * lam
            self.factors[name] = (layer.scaling["default"] * b, a)
        self.model = model.unload().eval()
        self.weights = {name: self.model.get_submodule(name).weight for name in self.factors}
        self.start = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def keep(self, kept: Ranked | None) -> None:
        """Merge the triplets that are 1 in ``kept``, or all."""
        for name, (b, a) in self.factors.items():
            self.weights[name].copy_(self.start[name] + (b if kept is None else b * kept[name]) @ a)

    def norms(self) -> Ranked:
        return {name: b.norm(dim=0) * a.norm(dim=1) for name, (b, a) in self.factors.items()}

    def sensitivity(self, batches: Batches) -> Ranked:
        """Mean over batches of |λ_i·∂L/∂λ_i| = |⟨ΔW_i, ∂L/∂W⟩|, of the untruncated adapter."""
        self.keep(None)
        total = {name: torch.zeros(len(a)) for name, (_, a) in self.factors.items()}
        for weight in self.weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            grads = torch.autograd.grad(self.model(**batch).loss, list(self.weights.values()))
            for (name, (b, a)), gradient in zip(self.factors.items(), grads, strict=True):
                total[name] += ((b.T @ gradient) * a).sum(dim=1).abs() / len(batches)
        return total

    @torch.inference_mode()
    def log_probabilities(self, batches: Batches) -> torch.Tensor:
        """[rows, labels]"""
        inputs = ({key: value for key, value in batch.items() if key != "labels"} for batch in batches)
        return torch.cat([self.model(**batch).logits.log_softmax(dim=1) for batch in inputs])


def compare(found: torch.Tensor, full: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy and area under the ROC curve (%), cross-entropy, and the mean KL(full, found) from the full adapter."""
    return {
        "accuracy": 100 * float((found.argmax(dim=1) == labels).double().mean()),
        "area": 100 * float(roc_auc_score(labels, found[:, 1] - found[:, 0])),
        "loss": float(F.nll_loss(found, labels)),
        "divergence": float(F.kl_div(found, full, reduction="batchmean", log_target=True)),
    }


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """1 for the ``count`` largest, 0 for the others."""
    return torch.zeros_like(values).index_fill_(0, values.argsort(descending=True)[:count], 1.0)


def choose(ranked: Ranked, budget: int, each: bool) -> Ranked:
    """Which triplets to keep: the best of all matrices together, or the same share of each (largest remainders)."""
    sizes = [len(values) for values in ranked.values()]
    if not each:
        return dict(zip(ranked, largest(torch.cat(list(ranked.values())), budget).split(sizes), strict=True))
    counts = [size * budget // sum(sizes) for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda k: -(sizes[k] * budget % sum(sizes)))
    for k in by_remainder[: budget - sum(counts)]:
        counts[k] += 1
    return {name: largest(values, count) for (name, values), count in zip(ranked.items(), counts, strict=True)}


def features(prepared: Prepared) -> Any:
    """The held-out rows as the model reads them, the longest first."""
    found = prepared.task.features(prepared.evaluation, prepared.tokenizer, prepared.model)
    return found.select(sorted(range(len(found)), key=lambda row: -len(found["input_ids"][row])))


def batches_of(rows: Any, prepared: Prepared, size: int) -> Batches:
    collate = prepared.task.collator(prepared.tokenizer, prepared.model)
    return [dict(collate([rows[j] for j in range(i, min(i + size, len(rows)))])) for i in range(0, len(rows), size)]


def measure(method: str, folder: Path, prepared: Prepared, batches: int, full_only: bool = False) -> dict[str, Any]:
    """The untruncated adapter, and every order at every rank; what was measured before is read from the folder."""
    file = folder / "measured.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    cuts = [] if full_only else [(order, rank) for rank in RANKS for order in ORDERS[method]]
    missing = [(order, rank) for order, rank in [("full", 4), *cuts] if f"{order} @ {rank}" not in found]
    if not missing:
        return found
    adapter, matrices = Adapter(method, folder, prepared), len(prepared.initial_ranks)
    ranked, held_out = {}, batches_of(features(prepared), prepared, 64)
    labels = torch.cat([batch["labels"] for batch in held_out])
    adapter.keep(None)
    full = adapter.log_probabilities(held_out)
    if method == "adalora":
        ranked["score"] = PlainAdapter.read(folder).scores
    for order, rank in missing:
        if order == "sensitivity" and order not in ranked:
            sample = prepared.train.shuffle(seed=0).select(range(32 * batches))
            ranked[order] = adapter.sensitivity(batches_of(sample, prepared, 32))
        if order != "full":
            adapter.keep(choose(ranked.get(order, adapter.norms()), rank * matrices, order.endswith("per matrix")))
        answers = full if order == "full" else adapter.log_probabilities(held_out)
        found[f"{order} @ {rank}"] = compare(answers, full, labels)
        write_json(file, found)
        print(folder.name, order, rank, found[f"{order} @ {rank}"], flush=True)  # noqa: T201 (a program)
    return found


def report(runs: list[dict[str, Any]]) -> str:
    """Two tables in Markdown: each order by itself, and AdaLoRA's orders against LoRA's. ``runs``: one a seed."""

    def values(method: str, order: str, rank: int, what: str, change: bool) -> list[float]:
        own = [run[method] for run in runs]
        return [m[f"{order} @ {rank}"][what] - (m["full @ 4"][what] if change else 0.0) for m in own]

    def spread(numbers: list[float], form: str) -> str:
        return f"{statistics.mean(numbers):{form}} ± {statistics.stdev(numbers):{form[-3:]}}"

    def cuts(method: str) -> list[tuple[str, str, int]]:
        return [(method, order, rank) for rank in RANKS for order in ORDERS[method]]

    whats = (("accuracy", ".2f", 1), ("area", ".2f", 1), ("loss", ".4f", -1), ("divergence", ".4f", -1))
    lines = [
        "| adapter | order | rank | accuracy % | change | area % | change | loss | change | KL |",
        "|" + "---|" * 10,
    ]
    for key in [("adalora", "full", 4), *cuts("adalora"), ("lora", "full", 4), *cuts("lora")]:
        cells = [*map(str, key)]
        for what, form, _ in whats:
            cells += [spread(values(*key, what, change), ("+" if change else "") + form) for change in (False, True)]
        lines.append(f"| {' | '.join(cells[:-1])} |")
    lines += ["", "AdaLoRA's change less LoRA's, by seed (seeds in which AdaLoRA loses less)", ""]
    lines += ["| AdaLoRA's order | LoRA's order | rank | accuracy % | area % | loss | KL |", "|" + "---|" * 7]
    for method, order, rank in cuts("adalora"):
        for baseline in ORDERS["lora"]:
            cells = [order, baseline, str(rank)]
            for what, form, better in whats:
                both = values(method, order, rank, what, True), values("lora", baseline, rank, what, True)
                gaps = [ours - theirs for ours, theirs in zip(*both, strict=True)]
                cells.append(f"{spread(gaps, '+' + form)} ({sum(better * gap > 0 for gap in gaps)} of {len(gaps)})")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="two or more")
    parser.add_argument("--lora-rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 5e-3])
    parser.add_argument("--batches", type=int, default=20, help="training batches of 32 rows for `sensitivity`")
    parser.add_argument("--output", type=Path, default=Path("runs/nested_ranks"))
    options = parser.parse_args()
    prepared = plan("adalora", 0, Path(tempfile.mkdtemp()))  # the rows are the same for every seed

    def run(method: str, seed: int, rate: float | None = None, full_only: bool = False) -> dict[str, Any]:
        folder = options.output / f"{method}{'' if rate is None else f'-{rate:g}'}-seed{seed}"
        if not (folder / "metrics.json").is_file():
            train(plan(method, seed, folder, rate))
        return measure(method, folder, prepared, options.batches, full_only)

    tuning = {rate: run("lora", options.seeds[0], rate, full_only=True)["full @ 4"] for rate in options.lora_rates}
    rate = max(tuning, key=lambda rate: tuning[rate]["accuracy"])
    runs = [{"adalora": run("adalora", seed), "lora": run("lora", seed, rate)} for seed in options.seeds]
    versions = {name: version(name) for name in ("adalora", "torch", "peft", "transformers")}
    found = {"versions": versions, "lora_tuning": tuning, "lora_rate": rate, "seeds": options.seeds, "runs": runs}
    write_json(options.output / "results.json", found)
    print(f"LoRA's learning rate: {rate:g}, of {tuning}\n\n{report(runs)}")  # noqa: T201


if __name__ == "__main__":
    main()
