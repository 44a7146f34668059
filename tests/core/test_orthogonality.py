"""The regulariser and its closed-form gradient, against autograd and against the paper's formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adalora.core import orthogonality as orth
from adalora.core.allocator import Allocator
from adalora.core.triplets import Factors, Triplets
from tests.core.toys import plan, randn, random_triplets

PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-6)]  # relative to the largest entry: rounding of short sums
kinds = pytest.mark.parametrize("kind", orth.KINDS)


def relative(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(scale, 1e-30))


def by_hand(triplets: list[Triplets], kind: str) -> Tensor:
    """R written out: a sum of squared norms, or a mean of plain ones over all P and Q."""
    norms = []
    for t in triplets:
        identity = torch.eye(t.rank, dtype=t.p.dtype)
        norms += [(t.p.T @ t.p - identity).norm(), (t.q @ t.q.T - identity).norm()]
    return sum(n**2 for n in norms) if kind == "squared" else sum(norms) / len(norms)  # type: ignore[return-value]


@kinds
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@given(
    count=st.integers(1, 4), rank=st.integers(1, 6), width=st.integers(1, 9), factors=st.integers(1, 9),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_closed_form_is_the_gradient(
    kind: orth.Orthogonality,
    dtype: torch.dtype,
    tolerance: float,
    count: int,
    rank: int,
    width: int,
    factors: int,
    seed: int,
) -> None:
    """For a stack of any shape: autograd of Σ‖XXᵀ - I‖², or of Σ‖XXᵀ - I‖ / factors, done in float64."""
    x = randn(count, rank, width, seed=seed, dtype=dtype)
    leaf = x.double().requires_grad_()
    squares = (leaf @ leaf.mT - torch.eye(rank, dtype=torch.float64)).square().sum((1, 2))
    (squares.sum() if kind == "squared" else squares.sqrt().sum() / factors).backward()
    assert leaf.grad is not None
    relative(orth.gradient(x, kind, factors).double(), leaf.grad, tolerance)


@kinds
@given(
    shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_a_whole_model(kind: orth.Orthogonality, shapes: list[tuple[int, int, int]], seed: int) -> None:
    """penalty() is the formula, and what an allocator adds to the gradients is its gradient, whatever the shapes."""
    triplets = [
        random_triplets(d_out, d_in, rank, seed=seed + k, name=f"m{k}") for k, (d_out, d_in, rank) in enumerate(shapes)
    ]
    penalty = orth.penalty(triplets, kind)
    relative(penalty, by_hand(triplets, kind), 1e-12)
    weight = 0.3
    factors = [w for t in triplets for w in (t.p, t.q)]
    expected = torch.autograd.grad(weight * penalty, factors)
    allocator = Allocator(
        triplets, plan(target_rank=1, metric="magnitude", orthogonality=kind, orthogonality_weight=weight)
    )
    for t in triplets:
        t.lam.grad = torch.ones_like(t.lam)
    allocator.before_step()
    for w, gradient in zip(factors, expected, strict=True):
        assert w.grad is not None
        relative(w.grad, gradient, 1e-12)
    assert all(torch.equal(t.lam.grad, torch.ones_like(t.lam)) for t in triplets if t.lam.grad is not None)


@kinds
def test_a_matrix_without_triplets_counts_like_the_others(kind: orth.Orthogonality) -> None:
    """The penalty that is reported and the gradient that is added belong together, also beside a matrix at rank 0."""
    triplets = [random_triplets(6, 5, 3, seed=1, name="a"), random_triplets(6, 5, 0, seed=2, name="b")]
    allocator = Allocator(
        triplets, plan(target_rank=1, metric="magnitude", orthogonality=kind, orthogonality_weight=1.0)
    )
    p = triplets[0].p
    (expected,) = torch.autograd.grad(allocator.penalty(), [p])
    p.grad = torch.zeros_like(p)
    allocator.before_step()
    relative(p.grad, expected, 1e-12)


@kinds
@given(rank=st.integers(1, 5), extra=st.integers(0, 4), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_nothing_to_do_at_orthonormal_factors(
    kind: orth.Orthogonality, rank: int, extra: int, dtype: torch.dtype
) -> None:
    """At rows of the identity, where ‖XXᵀ - I‖ = 0 has no derivative: zero, not 0/0, by either way."""
    rows = torch.eye(rank, rank + extra, dtype=dtype)
    gradient = orth.gradient(rows.unsqueeze(0), kind, 2)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert torch.equal(orth.errors(rows.unsqueeze(0)), torch.zeros(1, dtype=dtype))
    t = random_triplets(rank + extra, rank + extra, rank, dtype=dtype)
    t.assign(Factors(rows.T, torch.ones(rank), rows))
    penalty = orth.penalty([t], kind)
    penalty.backward()
    assert penalty == 0
    for w in (t.p, t.q):
        assert w.grad is not None and torch.equal(w.grad, torch.zeros_like(w))


@kinds
def test_almost_orthonormal_factors_stay_finite(kind: orth.Orthogonality) -> None:
    """A deviation whose square underflows must not be divided by zero's neighbour."""
    x = torch.eye(2).unsqueeze(0)
    x[0, 0, 1] = 1e-25
    gradient = orth.gradient(x, kind, 2)
    assert gradient.isfinite().all() and gradient.abs().max() <= 2  # ‖∂‖X‖/∂X‖ is at most 2‖X‖ a factor


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "width"), [(1, 8), (6, 384), (64, 1024)])
def test_an_orthonormal_start_feels_nothing(
    kind: orth.Orthogonality, dtype: torch.dtype, rank: int, width: int
) -> None:
    """What QR leaves of XXᵀ - I is rounding. Adam would take full steps along it, so its gradient is exactly 0."""
    x = torch.linalg.qr(randn(2, width, rank, seed=0, dtype=dtype)).Q.mT
    assert not orth.gradient(x, kind, 4).any()
    x[1, 0] *= 1 + 1e-4  # far more than rounding
    gradient = orth.gradient(x, kind, 4)
    assert not gradient[0].any() and gradient[1, 0].any()


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 7), st.integers(0, 1000))
def test_errors_are_norms_of_deviations(count: int, rank: int, width: int, seed: int) -> None:
    x = randn(count, rank, width, seed=seed)
    expected = [float((part @ part.T - torch.eye(rank, dtype=x.dtype)).norm()) for part in x]
    torch.testing.assert_close(orth.errors(x), torch.tensor(expected, dtype=x.dtype), rtol=1e-12, atol=1e-12)


@kinds
def test_following_the_gradient_makes_factors_orthonormal(kind: orth.Orthogonality) -> None:
    """A hundred steps downhill from P, Q that are 30 % off: the deviation falls below 1 %."""
    x = torch.linalg.qr(randn(3, 8, 4, seed=0)).Q.mT.contiguous()
    x += 0.1 * randn(*x.shape, seed=1)
    start = orth.errors(x).max()
    for step in range(100):
        rate = 0.1 if kind == "squared" else 3 * 0.1 * 0.95**step  # a plain norm has steps of constant length
        x -= rate * orth.gradient(x, kind, 3)
    assert start > 0.3 and orth.errors(x).max() < 0.01


def test_no_triplets_no_penalty() -> None:
    for kind in orth.KINDS:
        assert orth.penalty([random_triplets(4, 4, 0)], kind) == 0  # type: ignore[arg-type]
        assert orth.penalty([], kind) == 0  # type: ignore[arg-type]
