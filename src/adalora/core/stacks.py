"""Factors of equal shape as one block, so that a step takes as many tensor operations for 200 matrices as for 2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .importance import Smoothed
from .triplets import Triplets


class Stack:
    """All factors of one shape [r, d], as one block [m, r, d]; its members are (matrix, "p" or "q")."""

    def __init__(self, members: list[tuple[int, str]], offsets: list[int], rank: int, device: torch.device) -> None:
        self.members = members
        starts = torch.tensor([offsets[k] for k, _ in members], device=device)
        self.positions = (starts.unsqueeze(1) + torch.arange(rank, device=device)).flatten()  # in the score vector
        self.importance: Smoothed | None = None

    def to(self, device: torch.device) -> None:
        """Follow the model to another device."""
        self.positions = self.positions.to(device)
        self.importance = None if self.importance is None else self.importance.to(device)

    def parameters(self, triplets: Sequence[Triplets]) -> list[Tensor]:
        return [getattr(triplets[k], side) for k, side in self.members]

    def rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Singular vectors as rows: Q as it is, P transposed (views)."""
        return [tensor.mT if side == "p" else tensor for tensor, (_, side) in zip(tensors, self.members, strict=True)]

    def values(self, triplets: Sequence[Triplets]) -> Tensor:
        return wide(torch.stack(self.rows([w.detach() for w in self.parameters(triplets)])))

    def gradients(self, triplets: Sequence[Triplets]) -> Tensor:
        return wide(torch.stack(self.rows([gradient_of(w) for w in self.parameters(triplets)])))


def wide(tensor: Tensor) -> Tensor:
    """Importance and regulariser are computed in float32 at least, whatever the adapter's type."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gradient_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()


def split(flat: Tensor, sizes: list[int]) -> list[Tensor]:
    """Views of a vector over all triplets, one for each matrix."""
    return list(torch.split(flat, sizes))
