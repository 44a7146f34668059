"""Small adapted models, and a training loop that drives the allocator by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adalora.core.allocator import Allocator
from adalora.core.settings import Settings
from adalora.core.triplets import Factors, Triplets

SHAPES = ((6, 5), (4, 7), (6, 5))  # (d_out, d_in); two matrices share a shape, one does not


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


@functools.cache
def inputs(width: int, seed: int) -> Tensor:
    return randn(16, width, seed=seed)


def orthonormal(columns: Tensor) -> Tensor:
    """As many orthonormal columns as there can be; rows instead, where there are more columns than rows."""
    wide = columns.shape[1] > columns.shape[0]
    q = torch.linalg.qr(columns.T if wide else columns).Q
    return q.T.contiguous() if wide else q.contiguous()


def random_triplets(
    d_out: int,
    d_in: int,
    rank: int,
    *,
    seed: int = 0,
    name: str = "m",
    gain: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Triplets:
    """Triplets in the middle of nowhere: Gaussian P, Λ and Q, rank 0 included."""
    triplets = Triplets.create(name, d_out, d_in, max(rank, 1), gain=gain, dtype=dtype)
    triplets.assign(
        Factors(
            randn(d_out, rank, seed=3 * seed, dtype=dtype),
            randn(rank, seed=3 * seed + 1, dtype=dtype),
            randn(rank, d_in, seed=3 * seed + 2, dtype=dtype),
        )
    )
    return triplets


class Toy(nn.Module):
    """Independent matrices side by side, y_k = (W0_k + ΔW_k) x_k; the loss is their squared distance to other maps."""

    def __init__(
        self,
        ranks: Sequence[int] = (4, 4, 4),
        shapes: Sequence[tuple[int, int]] = SHAPES,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.triplets = [
            random_triplets(d_out, d_in, rank, seed=seed + k, name=f"m{k}", dtype=dtype)
            for k, (rank, (d_out, d_in)) in enumerate(zip(ranks, shapes, strict=True))
        ]
        for t in self.triplets:  # a start as in training: orthonormal, λ small and not all the same
            p, lam, q = (w.detach() for w in t.parameters)
            t.assign(Factors(orthonormal(p), 0.1 * lam, orthonormal(q.T).T))
        self.parts = nn.ModuleList([part for t in self.triplets for part in (t.left, t.right)])
        self.wanted = [randn(*shape, seed=1000 + seed + k, dtype=dtype) for k, shape in enumerate(shapes)]

    def loss(self, batch: int) -> Tensor:
        total = torch.zeros((), dtype=self.wanted[0].dtype)
        for k, (t, wanted) in enumerate(zip(self.triplets, self.wanted, strict=True)):
            x = inputs(wanted.shape[1], 10_000 + 100 * batch + k).to(wanted.dtype)
            total = total + (t.forward(x, scale=0.5) - x @ wanted.T).square().mean()
        return total

    def values(self) -> list[Tensor]:
        return [w.detach().clone() for t in self.triplets for w in t.parameters]


def plan(**changes: Any) -> Settings:
    """Sixteen steps: pruning from step 3, an allocation every second step, the last at step 12."""
    return Settings(**{"target_rank": 2, "t_init": 2, "t_final": 4, "delta_t": 2, "total_step": 16, **changes})


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def momentum(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def train(
    toy: Toy,
    allocator: Allocator,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    after: Callable[[int], None] | None = None,
) -> None:
    """Optimizer steps (counted from 1), each followed by ``after(step)``."""
    for step in steps:
        optimizer.zero_grad()
        toy.loss(step).backward()
        allocator.before_step()
        optimizer.step()
        allocator.after_step(optimizer)
        if after is not None:
            after(step)


def feed(allocator: Allocator, gradients: Iterable[Sequence[Tensor]]) -> None:
    """Steps without an optimizer: the gradients (three a matrix: P, λ, Q) are given, the weights stay."""
    parameters = [w for t in allocator.triplets for w in t.parameters]
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone().to(parameter)
        allocator.before_step()
        allocator.after_step()
