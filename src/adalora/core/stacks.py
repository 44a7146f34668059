"""The entries of all matrices of a model side by side: a step takes as many operations for 200 of them as for 2.

Singular vectors of one length d lie in one block as rows, matrix after matrix, whatever the ranks: Q as it is, P
transposed. All entries together are one vector: every λ, then the blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .sharded import is_sharded, like, whole
from .triplets import TRIPLET_DIMS, Triplets, states_of

Parts: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""P, λ and Q of one matrix, or their gradients."""
P, LAM, Q = 0, 1, 2


class Factor(NamedTuple):
    """P or Q of one matrix."""

    matrix: int
    side: int  # P or Q
    rank: int

    def rows(self, parts: Sequence[Parts]) -> Tensor:
        """Its singular vectors, [rank, d] (a view)."""
        tensor = parts[self.matrix][self.side]
        if tensor.ndim > 2:  # of a convolution
            tensor = tensor.flatten(1)
        return tensor.mT if self.side == P else tensor


class Stack:
    """Factors whose vectors have one length, as rows of one block.

    Args:
        factors: with rank 1 at least.
        height: give every factor so many rows, of which those beyond its rank are 0; None for as many as it has.
        zero: a scalar, for stacks with a height.
    """

    def __init__(
        self, length: int, factors: Iterable[Factor], height: int | None = None, zero: Tensor | None = None
    ) -> None:
        self.length = length
        self.factors = sorted(factors, key=lambda factor: factor.side != Q)  # every Q before every P
        self.qs = sum(factor.side == Q for factor in self.factors)
        self.sizes: list[int] = []  # rows of each factor; with a height, each followed by its rows of zeros
        self.fillings: list[Tensor] = []  # these zeros, all of them one number in memory
        for factor in self.factors:
            self.sizes.append(factor.rank)
            if height is not None and zero is not None:
                self.sizes.append(height - factor.rank)
                self.fillings.append(zero.expand(height - factor.rank, length))

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    @torch.no_grad()
    def gather(self, parts: Sequence[Parts], out: Tensor | None = None) -> Tensor:
        """[rows, d], into ``out`` or in the type of the parts."""
        rows = [factor.rows(parts) for factor in self.factors]
        if self.fillings:
            rows = [tensor for both in zip(rows, self.fillings, strict=True) for tensor in both]
        return torch.cat(rows) if out is None else torch.cat(rows, out=out)

    def scatter(self, rows: Tensor) -> list[Tensor]:
        """What each factor has of a block [rows, d], as a matrix laid like its parameter (views)."""
        step = 2 if self.fillings else 1
        split = self.qs * step
        end = sum(self.sizes[:split])
        of_q = torch.split(rows[:end], self.sizes[:split])[::step]
        of_p = torch.split(rows[end:].mT, self.sizes[split:], dim=1)[::step]
        return [*of_q, *of_p]


class Stacks:
    """How the entries of these triplets lie in one vector; for their present ranks."""

    def __init__(self, triplets: Sequence[Triplets]) -> None:
        self.triplets = triplets
        self.sizes = [t.rank for t in triplets]
        self.device = triplets[0].lam.device
        self.empty = [t for t in triplets if not t.rank]
        by_length: dict[int, list[Factor]] = {}
        for k, t in enumerate(triplets):
            for side, length in zip((P, Q), t.shape, strict=True):
                if t.rank:
                    by_length.setdefault(length, []).append(Factor(k, side, t.rank))
        self.blocks = [Stack(length, factors) for length, factors in by_length.items()]
        self.triplets_count = sum(self.sizes)
        self.entries_count = self.triplets_count + sum(block.rows * block.length for block in self.blocks)
        self._places = self._places_of_triplets().to(self.device)

    def parameters(self) -> list[Parts]:
        """Of every matrix. They may be replaced between two steps, so they are collected at each.

        Instead of those that lie in shards there are whole copies, each of which names its shards.
        """
        parameters = [t.parameters for t in self.triplets]
        if any(is_sharded(w) for parts in parameters for w in parts):
            return [(whole(p), whole(lam), whole(q)) for p, lam, q in parameters]
        return [*parameters]

    @torch.no_grad()
    def gather(self, parts: Sequence[Parts]) -> Tensor:
        """All entries as one vector, in float32 at least."""
        dtype = common_dtype(tensor for part in parts for tensor in part)
        entries = torch.empty(self.entries_count, dtype=dtype, device=self.device)
        lam, blocks = self.split(entries)
        torch.cat([part[LAM] for part in parts], out=lam)
        for block, rows in zip(self.blocks, blocks, strict=True):
            block.gather(parts, out=rows)
        return wide(entries)

    @torch.no_grad()
    def gather_lam(self, parts: Sequence[Parts]) -> Tensor:
        """λ of all triplets, [sum of sizes], in float32 at least."""
        return wide(torch.cat([part[LAM] for part in parts]))

    def split(self, entries: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A vector of all entries -> λ, [sum of sizes], and the blocks, [rows, d] (views)."""
        sizes = [self.triplets_count, *(block.rows * block.length for block in self.blocks)]
        lam, *blocks = torch.split(entries, sizes)
        return lam, [rows.view(-1, block.length) for rows, block in zip(blocks, self.blocks, strict=True)]

    def by_triplet(self, of_lam: Tensor, of_rows: Sequence[Tensor]) -> Tensor:
        """Numbers of all λ and of the rows of each block -> those of every triplet's λ, P and Q: [3, sum of sizes]."""
        return torch.cat([of_lam, *of_rows])[self._places]

    @torch.no_grad()
    def mask(self, mask: Tensor, optimizers: Sequence[torch.optim.Optimizer] = (), *, vectors: bool = False) -> None:
        """λ = 0 where the mask, [sum of sizes], is False.

        Args:
            optimizers: their states, too: averages of λ, as schedule-free optimizers keep them, would bring these back.
            vectors: P and Q there become 0 as well.
        """
        masks = {dtype: split(mask.to(dtype), self.sizes) for dtype in {t.lam.dtype for t in self.triplets}}
        pairs: list[tuple[Tensor, Tensor]] = []
        for k, t in enumerate(self.triplets):
            for w, dim in zip(t.parameters, TRIPLET_DIMS, strict=True) if vectors else ((t.lam, 0),):
                shape = [-1 if d == dim else 1 for d in range(w.ndim)]
                m = like(w, masks[t.lam.dtype][k].view(shape).expand(w.shape))
                pairs.append((w.data, m))
                pairs += [
                    (value, m)
                    for state in states_of(optimizers, w)
                    for value in state.values()
                    if type(value) is type(m) and value.shape == m.shape and value.is_floating_point()
                ]
        torch._foreach_mul_([values for values, _ in pairs], [m for _, m in pairs])

    def _places_of_triplets(self) -> Tensor:
        """Where λ, P and Q of each triplet are among all λ and the rows of all blocks: [3, sum of sizes]."""
        lam = range(self.triplets_count)
        rows: dict[tuple[int, int], range] = {}
        place = len(lam)
        for factor in (factor for block in self.blocks for factor in block.factors):
            rows[factor.side, factor.matrix] = range(place, place + factor.rank)
            place += factor.rank
        matrices = [k for k, size in enumerate(self.sizes) if size]
        p, q = ([place for k in matrices for place in rows[side, k]] for side in (P, Q))
        return torch.tensor([list(lam), p, q], dtype=torch.long)


@torch.no_grad()
def gradients_of(parameters: Sequence[Parts]) -> list[Parts]:
    """Zero where there is none."""
    zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def gradient(w: Tensor) -> Tensor:
        if w.grad is not None:
            return w.grad
        kind = w.dtype, w.device
        if kind not in zeros:  # one number for all that have none
            zeros[kind] = w.new_zeros(())
        return zeros[kind].expand(w.shape)

    return [(gradient(p), gradient(lam), gradient(q)) for p, lam, q in parameters]


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})


def wide(tensor: Tensor) -> Tensor:
    """Importance and regulariser are computed in float32 at least, whatever the adapter's type."""
    return tensor.float() if torch.finfo(tensor.dtype).bits < 32 else tensor


def split(flat: Tensor, sizes: list[int]) -> list[Tensor]:
    """Views of a vector over all triplets, one for each matrix."""
    return list(torch.split(flat, sizes))
