"""Factors of equal shape as one block, so that a step takes as many tensor operations for 200 matrices as for 2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .orthogonality import Orthogonality, errors, gradient
from .triplets import Triplets


class Stack:
    """All factors of one shape [r, d]; its m members are (matrix, "p" or "q")."""

    def __init__(self, triplets: Sequence[Triplets], members: list[tuple[int, str]], positions: Tensor) -> None:
        self.triplets = triplets
        self.members = members
        self.positions = positions  # of its triplets in the vector over all triplets, [m·r]

    @property
    def parameters(self) -> list[Tensor]:
        return [getattr(self.triplets[k], side) for k, side in self.members]

    @torch.no_grad()
    def values(self) -> Tensor:
        """[m, r, d]"""
        return wide(torch.stack(self._rows(self.parameters)))

    @torch.no_grad()
    def gradients(self) -> Tensor:
        """[m, r, d], zero where there is none"""
        return wide(torch.stack(self._rows([gradient_of(w) for w in self.parameters])))

    def of_side(self, side: str) -> Tensor:
        """Which entries of ``positions`` belong to P, or to Q: boolean, [m·r]."""
        ours = torch.tensor([s == side for _, s in self.members], device=self.positions.device)
        return ours.repeat_interleave(len(self.positions) // len(self.members))

    @torch.no_grad()
    def add_to_gradients(self, update: Tensor) -> None:
        """Add a block [m, r, d] to the gradients of those members that are trained."""
        updates = self._rows(list(update.unbind(0)))  # back from rows: transposing is its own inverse
        trained = [(w, rows) for w, rows in zip(self.parameters, updates, strict=True) if w.requires_grad]
        for w, _ in trained:
            if w.grad is None:
                w.grad = torch.zeros_like(w)
        if trained:
            gradients = [gradient_of(w) for w, _ in trained]
            torch._foreach_add_(gradients, [rows.to(w.dtype).view_as(w) for w, rows in trained])

    def _rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Singular vectors as rows: Q as it is, P transposed (views)."""
        matrices = [tensor.flatten(1) for tensor in tensors]  # of a convolution; the others are matrices already
        return [matrix.mT if side == "p" else matrix for matrix, (_, side) in zip(matrices, self.members, strict=True)]


class Stacks:
    """The triplets of one model: λ as one vector, P and Q in blocks of equal shape."""

    def __init__(self, triplets: Sequence[Triplets]) -> None:
        self.triplets = triplets
        self.sizes = [t.rank for t in triplets]
        self.device = triplets[0].lam.device
        members: dict[tuple[int, int], list[tuple[int, str]]] = {}
        for k, t in enumerate(triplets):
            for side, d in zip("pq", t.shape, strict=True):
                if t.rank:
                    members.setdefault((t.rank, d), []).append((k, side))
        offsets = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        self.blocks = []
        for (rank, _), group in members.items():
            starts = torch.tensor([offsets[k] for k, _ in group], device=self.device)
            positions = starts.unsqueeze(1) + torch.arange(rank, device=self.device)
            self.blocks.append(Stack(triplets, group, positions.flatten()))

    @torch.no_grad()
    def lam(self) -> Tensor:
        """All λ: [sum of sizes]."""
        return wide(torch.cat([t.lam for t in self.triplets]))

    @torch.no_grad()
    def lam_gradient(self) -> Tensor:
        return wide(torch.cat([gradient_of(t.lam) for t in self.triplets]))

    @torch.no_grad()
    def mask_lam(self, mask: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """λ = 0 where the mask, [sum of sizes], is False.

        Args:
            optimizer: its state, too: averages of λ, as schedule-free optimizers keep them, would bring these back.
        """
        masks = split(mask.to(self.triplets[0].lam.dtype), self.sizes)
        pairs = [(t.lam.data, m) for t, m in zip(self.triplets, masks, strict=True)]
        if optimizer is not None:
            pairs += [
                (value, m)
                for t, m in zip(self.triplets, masks, strict=True)
                for value in optimizer.state.get(t.lam, {}).values()
                if type(value) is Tensor and value.shape == m.shape and value.is_floating_point()
            ]
        torch._foreach_mul_([values for values, _ in pairs], [m for _, m in pairs])

    @torch.no_grad()
    def add_orthogonality_gradient(self, weight: float, kind: Orthogonality, grad_scale: Tensor | None) -> None:
        """γ·∂R/∂P and γ·∂R/∂Q, times the loss scaler's factor if gradients carry one."""
        for block in self.blocks:
            update = gradient(block.values(), kind, factors=2 * len(self.triplets))
            block.add_to_gradients(update * (weight if grad_scale is None else weight * grad_scale.to(update.dtype)))

    @torch.no_grad()
    def orthogonality_errors(self) -> Tensor:
        """‖XXᵀ - I‖_F of every P and Q that has vectors left."""
        return torch.cat([errors(block.values()) for block in self.blocks] or [torch.zeros(1)])


def wide(tensor: Tensor) -> Tensor:
    """Importance and regulariser are computed in float32 at least, whatever the adapter's type."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gradient_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def split(flat: Tensor, sizes: list[int]) -> list[Tensor]:
    """Views of a vector over all triplets, one for each matrix."""
    return list(torch.split(flat, sizes))
