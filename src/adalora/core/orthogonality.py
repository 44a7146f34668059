"""The regulariser that keeps P and Q close to orthonormal (paper, equation 4), with its gradient in closed form.

    R(P, Q) = ‖PᵀP - I‖_F² + ‖QQᵀ - I‖_F²             ∂R/∂P = 4 P (PᵀP - I)

Every function takes a stack of factors X of one shape, [m, r, d], whose *rows* are the singular vectors: Q as it is, P
transposed. So ‖XXᵀ - I‖ covers both, and a model needs one call for each distinct shape, not one a matrix.

``squared`` is the paper's sum of squared norms over all factors; ``frobenius`` the mean of plain norms, as in the
authors' code and in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from .triplets import Triplets

ROUNDING = 32  # in units of the last place; QR and XXᵀ leave 2 at d = 384, r = 6 and 9 at d = 4096, r = 64
Orthogonality = Literal["squared", "frobenius"]
KINDS: tuple[str, ...] = get_args(Orthogonality)


def deviation(x: Tensor) -> Tensor:
    """XXᵀ - I: [m, r, d] -> [m, r, r]."""
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    return x @ x.mT - identity


def gradient(x: Tensor, kind: Orthogonality, factors: int) -> Tensor:
    """∂R/∂X for a stack of factors, [m, r, d] -> [m, r, d].

    Entries of XXᵀ - I within rounding of 0 count as 0. At the first step of an orthonormal start nothing else has a
    gradient in P and Q, and Adam would blow that noise up to full steps of the learning rate (decision 003).

    Args:
        factors: number of factors (two a matrix) in the whole model; ``frobenius`` is a mean over them.
    """
    off = deviation(x)
    off.masked_fill_(off.abs() <= ROUNDING * torch.finfo(x.dtype).eps, 0.0)
    if kind == "squared":
        return 4 * (off @ x)
    norms = _norms(off).clamp_min(torch.finfo(x.dtype).tiny)  # 0/0 at an exactly orthonormal factor
    return 2 / factors * (off / norms.view(-1, 1, 1)) @ x


def errors(x: Tensor) -> Tensor:
    """‖XXᵀ - I‖_F of each factor: [m, r, d] -> [m]."""
    return _norms(deviation(x))


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    return norms


def penalty(triplets: Iterable[Triplets], kind: Orthogonality = "squared") -> Tensor:
    """R over all matrices as a differentiable scalar: to log, or to add to a loss by hand (with orth_reg_weight=0)."""
    factors = [rows for t in triplets for rows in (t.factors.p.mT, t.factors.q)]
    squared = torch.stack([deviation(rows).square().sum() for rows in factors] or [torch.zeros(())])
    if kind == "squared":
        return squared.sum()
    norms = torch.where(squared > 0, squared, 1.0).sqrt()  # the root has no derivative at 0
    return torch.where(squared > 0, norms, 0.0).mean()
