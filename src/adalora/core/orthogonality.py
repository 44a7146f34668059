"""The regulariser that keeps P and Q close to orthonormal (paper, equation 4), with its gradient in closed form.

    R(P, Q) = ‖PᵀP - I‖_F² + ‖QQᵀ - I‖_F²             ∂R/∂P = 4 P (PᵀP - I)

Functions take a stack of factors X of one shape, [m, r, d], whose *rows* are the singular vectors: Q as it is, P
transposed. So ‖XXᵀ - I‖ covers both; :mod:`.regulariser` makes few stacks of the many factors of a model.

``squared`` is the paper's sum of squared norms over all factors; ``frobenius`` the mean of plain norms, as in the
authors' code and in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from .triplets import Triplets

ROUNDING = 32  # in units of the last place; QR and XXᵀ leave 2 at d = 384, r = 6 and 9 at d = 4096, r = 64
Orthogonality = Literal["squared", "frobenius"]
KINDS: tuple[str, ...] = get_args(Orthogonality)


def deviation(x: Tensor) -> Tensor:
    """XXᵀ - I: [m, r, d] -> [m, r, r]."""
    return minus_identity_(x @ x.mT)


def minus_identity_(products: Tensor, identity: Tensor | int = 1) -> Tensor:
    """XXᵀ -> XXᵀ - I, in place: [m, r, r].

    Args:
        identity: the diagonal of I, [m, r], if it is 0 somewhere: in rows of X that only fill it up.
    """
    products.diagonal(dim1=-2, dim2=-1).sub_(identity)
    return products


def slope_(off: Tensor, kind: Orthogonality, factors: int, weight: float = 1.0) -> Tensor:
    """XXᵀ - I -> A with γ·∂R/∂X = A X, both [m, r, r]; uses up what it is given.

    Entries of XXᵀ - I within rounding of 0 count as 0. At the first step of an orthonormal start nothing else has a
    gradient in P and Q, and Adam would blow that noise up to full steps of the learning rate (decision 003).

    Args:
        factors: number of factors (two a matrix) in the whole model; ``frobenius`` is a mean over them.
        weight: γ
    """
    finfo = torch.finfo(off.dtype)
    off = functional.hardshrink(off, ROUNDING * finfo.eps)
    if kind == "squared":
        return off.mul_(4 * weight)
    lengths = norms(off).clamp_min_(finfo.tiny)  # 0/0 at an exactly orthonormal factor
    return off.div_(lengths.view(-1, 1, 1)).mul_(2 / factors * weight)


def gradient(x: Tensor, kind: Orthogonality, factors: int) -> Tensor:
    """∂R/∂X for a stack of factors, [m, r, d] -> [m, r, d]."""
    return slope_(deviation(x), kind, factors) @ x


def errors(x: Tensor) -> Tensor:
    """‖XXᵀ - I‖_F of each factor: [m, r, d] -> [m]."""
    return norms(deviation(x))


def norms(matrices: Tensor) -> Tensor:
    """‖·‖_F of each: [m, r, r] -> [m]."""
    found: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1))
    return found


def penalty(triplets: Iterable[Triplets], kind: Orthogonality = "squared", vector_norm: float = 1.0) -> Tensor:
    """R over all matrices as a differentiable scalar: to log, or to add to a loss by hand (with orth_reg_weight=0)."""
    factors = [rows / vector_norm for t in triplets for rows in (t.factors.p.mT, t.factors.q)]
    squared = torch.stack([deviation(rows).square().sum() for rows in factors] or [torch.zeros(())])
    if kind == "squared":
        return squared.sum()
    norms = torch.where(squared > 0, squared, 1.0).sqrt()  # the root has no derivative at 0
    return torch.where(squared > 0, norms, 0.0).mean()
