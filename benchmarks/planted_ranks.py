"""Does allocation find ranks that are known? A planted teacher: its weights are the student's plus ΔW* of known rank.

Student: eight residual tanh layers of width 32, x <- x + tanh(W x + b), random. Teacher: the same with ΔW* of rank
RANKS added, all singular values 1, directions random. The student is trained on the teacher's outputs at an average
rank of 2, exactly what ΔW* has: by AdaLoRA (6 triplets a matrix, pruned to 2 on average), and at rank 2 everywhere, in
the form of P Λ Q and as PEFT's LoRA. Adam, warm-up and linear decay, the same steps and batches for all. Of RATES, each
method is shown at the one with the lowest median error on the seeds of --choose, which are not reported.

    python benchmarks/planted_ranks.py --seeds 10

The error is the mean squared one on fresh inputs, as a share of the one that the untrained student has.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr
from torch import nn

import adalora
from adalora import AdaLoraConfig

WIDTH = 32
RANKS = (0, 6, 0, 1, 4, 0, 2, 3)  # of the ΔW*; each seed puts them in an order of its own
AVERAGE, INITIAL = 2, 6
RATES = (3e-3, 1e-2, 3e-2)
METHODS: dict[str, Any] = {
    "adalora": lambda steps: AdaLoraConfig(target_r=AVERAGE, init_r=INITIAL, lora_alpha=2 * INITIAL, total_step=steps),
    "uniform": lambda steps: AdaLoraConfig(target_r=AVERAGE, init_r=AVERAGE, lora_alpha=2 * AVERAGE, total_step=steps),
    "lora": lambda steps: LoraConfig(r=AVERAGE, lora_alpha=2 * AVERAGE),
}


class Network(nn.Module):
    """Residual layers, each with a matrix to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in RANKS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, WIDTH] -> [rows, WIDTH]."""
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Outcome(NamedTuple):
    """What one training came to."""

    error: float  # as a share of the untrained student's
    planted: list[int]  # rank of each ΔW*
    learned: list[int]  # triplets left of each matrix

    @property
    def correlation(self) -> float:
        """Spearman's, of planted and learned ranks."""
        return float(spearmanr(self.planted, self.learned).statistic)

    @property
    def matched(self) -> float:
        """Share of the budget that lies where a planted direction is."""
        return sum(map(min, self.planted, self.learned)) / sum(self.planted)


def planted(student: Network, generator: torch.Generator) -> tuple[Network, list[int]]:
    """A teacher for ``student``, and the rank of each of its ΔW*."""
    teacher = copy.deepcopy(student)
    ranks = [RANKS[place] for place in torch.randperm(len(RANKS), generator=generator)]
    for layer, rank in zip(teacher.layers, ranks, strict=True):
        left, right = (torch.linalg.qr(torch.randn(WIDTH, max(rank, 1), generator=generator)).Q for _ in range(2))
        with torch.no_grad():
            layer.weight += left[:, :rank] @ right[:, :rank].T
    return teacher, ranks


def train(method: str, seed: int, rate: float, steps: int = 400) -> Outcome:
    """One student, trained on the outputs of a teacher that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    student = Network()
    teacher, ranks = planted(student, generator)
    fresh = torch.randn(2000, WIDTH, generator=torch.Generator().manual_seed(seed + 1_000_000))
    with torch.no_grad():
        wanted = teacher(fresh)
        untrained = (student(fresh) - wanted).square().mean()
    config = METHODS[method](steps)
    config.target_modules = r"layers\.\d+"
    model = get_peft_model(student, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (k + 1) / (0.1 * steps)) * (1 - k / steps))
    for _ in range(steps):
        x = torch.randn(64, WIDTH, generator=generator)
        with torch.no_grad():
            y = teacher(x)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        error = (model(fresh) - wanted).square().mean() / untrained
    learned = [AVERAGE] * len(RANKS) if method == "lora" else [*adalora.ranks(model).values()]
    return Outcome(float(error), ranks, learned)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many are reported: 0, 1, ...")
    parser.add_argument("--choose", type=int, default=3, help="how many more choose the rates: 100, 101, ...")
    parser.add_argument("--steps", type=int, default=400)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sys.stdout.write(
        "| method | rate | error, median (worst) | rank correlation, mean (lowest) | budget where planted |\n"
    )
    sys.stdout.write("|---|---|---|---|---|\n")
    for method in METHODS:
        tried = {
            rate: [train(method, 100 + seed, rate, asked.steps).error for seed in range(asked.choose)] for rate in RATES
        }
        rate = min(tried, key=lambda rate: statistics.median(tried[rate]))
        found = [train(method, seed, rate, asked.steps) for seed in range(asked.seeds)]
        errors = [outcome.error for outcome in found]
        matched = statistics.mean(outcome.matched for outcome in found)
        same = [outcome.correlation for outcome in found] if method == "adalora" else []
        agreement = f"{statistics.mean(same):.2f} ({min(same):.2f})" if same else "–"
        shown = f"{statistics.median(errors):.4f} ({max(errors):.4f})"
        sys.stdout.write(f"| {method} | {rate:g} | {shown} | {agreement} | {matched:.0%} |\n")


if __name__ == "__main__":
    main()
