"""The update of one matrix: its value, how it starts, how it is converted and how it shrinks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adalora.core.errors import ConfigError
from adalora.core.triplets import (
    GAUSSIAN_STD,
    Factors,
    SingularProjection,
    Triplets,
    automatic_gain,
    from_product,
    from_rows,
    to_product,
)
from tests.core.toys import randn, random_triplets

dims = st.integers(1, 9)
ranks = st.integers(0, 6)
seeds = st.integers(0, 1000)
gains = st.floats(0.125, 8.0)

EXACT64 = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of fewer than 100 products of numbers about 1
EXACT32 = {"rtol": 1e-5, "atol": 1e-5}  # the same in float32


# ------------------------------------------------------------------------------------------------ the value


@given(dims, dims, ranks, gains, st.floats(-4, 4), seeds)
def test_forward_is_the_update_applied(d_out: int, d_in: int, rank: int, gain: float, scale: float, seed: int) -> None:
    """forward(x) = x ΔWᵀ and ΔW = s ρ P diag(λ) Q, also when there is no triplet at all."""
    t = random_triplets(d_out, d_in, rank, seed=seed, gain=gain)
    x = randn(3, 2, d_in, seed=seed + 1)
    by_hand = scale * gain * (t.p @ torch.diag(t.lam) @ t.q)
    torch.testing.assert_close(t.delta(scale), by_hand, **EXACT64)
    torch.testing.assert_close(t.forward(x, scale), x @ by_hand.T, **EXACT64)


@given(dims, dims, ranks, gains, seeds)
def test_weight_is_the_right_half(d_out: int, d_in: int, rank: int, gain: float, seed: int) -> None:
    """Readers of ``lora_A.weight`` see ρ Λ Q, and applying it is what the module computes."""
    right = random_triplets(d_out, d_in, rank, seed=seed, gain=gain).right
    x = randn(4, d_in, seed=seed + 1)
    torch.testing.assert_close(right.weight, gain * torch.diag(right.singular_values) @ right.right_vectors, **EXACT64)
    torch.testing.assert_close(right(x), x @ right.weight.T, **EXACT64)
    assert right.weight.shape == (right.out_features, right.in_features) == (rank, d_in)


@given(dims, dims, st.integers(1, 6), gains, seeds)
def test_gradients_reach_all_three_parts(d_out: int, d_in: int, rank: int, gain: float, seed: int) -> None:
    """The closed-form gradients: G Qᵀ·ρλ for P, P_iᵀ G Q_i·ρ for λ, ρλ·Pᵀ G for Q, where G = ∂L/∂ΔW."""
    t = random_triplets(d_out, d_in, rank, seed=seed, gain=gain)
    x, upstream = randn(5, d_in, seed=seed + 1), randn(5, d_out, seed=seed + 2)
    t.forward(x).backward(upstream)
    g = upstream.T @ x
    torch.testing.assert_close(t.p.grad, gain * g @ t.q.T * t.lam, rtol=1e-10, atol=1e-10)  # longer sums than above
    torch.testing.assert_close(t.lam.grad, gain * (t.p * (g @ t.q.T)).sum(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(t.q.grad, gain * t.lam[:, None] * (t.p.T @ g), rtol=1e-10, atol=1e-10)


def test_no_triplets_compute_zero() -> None:
    """A matrix pruned to rank 0 adds nothing and passes no gradient back; both passes run."""
    t = random_triplets(4, 3, 0)
    x = randn(2, 3, seed=0).requires_grad_()
    y = t.forward(x)
    y.sum().backward()
    assert y.shape == (2, 4) and not y.any()
    assert x.grad is not None and not x.grad.any()
    assert t.rank == 0 and t.delta().shape == (4, 3) and not t.delta().any()
    assert t.is_resizable()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters(dtype: torch.dtype) -> None:
    """Half-precision adapters start, compute, slice and train in their own type."""
    t = Triplets.create("m", 12, 10, 4, dtype=dtype, gain=2.0)
    assert {w.dtype for w in t.parameters} == {dtype}
    # entries are rounded to the type's precision, so PᵀP is off by about that much
    torch.testing.assert_close((t.p.T @ t.p).float(), torch.eye(4), rtol=0, atol=4 * torch.finfo(dtype).eps)
    with torch.no_grad():
        t.lam.copy_(torch.tensor([0.5, 0.25, 1.0, 0.0]))
    x = randn(7, 10, seed=1, dtype=dtype)
    wide = x.double() @ t.delta().detach().double().T
    # three products and a sum of four, each rounded, of numbers up to about 5
    torch.testing.assert_close(t.forward(x).double(), wide, rtol=0, atol=20 * torch.finfo(dtype).eps)
    t.forward(x).sum().backward()
    t.keep(torch.tensor([0, 2]))
    assert all(w.dtype == dtype and w.grad is not None and w.grad.dtype == dtype for w in t.parameters)


# ------------------------------------------------------------------------------------------------ how it starts


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24))
def test_starts_orthonormal_with_no_update(d_out: int, d_in: int, rank: int) -> None:
    """Λ = 0; PᵀP = I and QQᵀ = I, or their transposes where the rank is above the dimension."""
    t = Triplets.create("m", d_out, d_in, rank)
    assert t.lam.shape == (rank,) and not t.lam.any() and not t.delta().any()
    for rows in (t.p.detach().T, t.q.detach()):
        short = rows if rows.shape[0] <= rows.shape[1] else rows.T
        # float32 QR: a few ulp for each of at most 40 terms
        torch.testing.assert_close(short @ short.T, torch.eye(short.shape[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("initialization", ["orthonormal", "gaussian"])
def test_reset_forgets_what_was_there(initialization: str) -> None:
    """reset() is a new draw with Λ = 0 in the same parameters, whatever they held."""
    t = random_triplets(8, 6, 3, dtype=torch.float32)
    before, parameters = t.p.detach().clone(), t.parameters
    t.reset(initialization)  # type: ignore[arg-type]
    assert not t.lam.any()
    assert not torch.equal(t.p, before)
    assert all(a is b for a, b in zip(parameters, t.parameters, strict=True))


def test_gaussian_has_the_authors_spread() -> None:
    """16 384 draws: the sample deviation is within 3 % (more than five standard errors) of 0.02."""
    t = Triplets.create("m", 256, 256, 64, initialization="gaussian")
    for vectors in (t.p, t.q):
        assert vectors.std().item() == pytest.approx(GAUSSIAN_STD, rel=0.03)
        assert abs(vectors.mean().item()) < 5 * GAUSSIAN_STD / math.sqrt(vectors.numel())


def test_unknown_initialization_says_what_is_known() -> None:
    t = Triplets.create("m", 4, 4, 2)
    before = t.p.detach().clone()
    with pytest.raises(ConfigError, match=r"'kaiming'.*'gaussian', 'gradient', 'orthonormal'"):
        t.reset("kaiming")  # type: ignore[arg-type]
    assert torch.equal(t.p, before)


def test_automatic_gain() -> None:
    """√(d_out/3): the ratio of the first steps of LoRA's B, lr √d_out √(1/3), and of λ, lr."""
    assert automatic_gain(768) == 16.0
    assert automatic_gain(3) == 1.0


# ------------------------------------------------------------------------------------------------ conversions


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@given(d_out=dims, d_in=dims, rank=st.integers(1, 9), seed=seeds)
def test_from_product_is_the_singular_value_decomposition(
    dtype: torch.dtype, tolerance: float, d_out: int, d_in: int, rank: int, seed: int
) -> None:
    """P Λ Q = B A up to rounding, with orthonormal P and Q, λ >= 0 in descending order, no triplet too many."""
    b, a = randn(d_out, rank, seed=seed, dtype=dtype), randn(rank, d_in, seed=seed + 1, dtype=dtype)
    p, lam, q = from_product(b, a)
    kept = min(rank, d_out, d_in)
    assert (p.shape, lam.shape, q.shape) == ((d_out, kept), (kept,), (kept, d_in))
    scale = max(1.0, float((b @ a).abs().max()))
    torch.testing.assert_close(p * lam @ q, b @ a, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(p.T @ p, torch.eye(kept, dtype=dtype), rtol=0, atol=tolerance)
    torch.testing.assert_close(q @ q.T, torch.eye(kept, dtype=dtype), rtol=0, atol=tolerance)
    assert (lam >= 0).all() and (lam.diff() <= 0).all()
    torch.testing.assert_close(lam, torch.linalg.svdvals(b @ a)[:kept], rtol=0, atol=tolerance * scale)


def test_from_product_of_half_precision_is_float32() -> None:
    """QR and SVD have no half kernels: the factors come back in float32, and B A is kept to its own precision."""
    b, a = randn(6, 3, seed=0, dtype=torch.bfloat16), randn(3, 5, seed=1, dtype=torch.bfloat16)
    factors = from_product(b, a)
    assert {part.dtype for part in factors} == {torch.float32}
    torch.testing.assert_close(factors.p * factors.lam @ factors.q, b.float() @ a.float(), **EXACT32)


@given(dims, dims, ranks, gains, seeds, st.lists(st.integers(0, 5), max_size=2))
def test_rows_and_products_are_inverse(
    d_out: int, d_in: int, rank: int, gain: float, seed: int, pruned: list[int]
) -> None:
    """B A -> triplets -> B A keeps every triplet where it is, ΔW with it; a pruned one stays pruned, without NaN."""
    b, a = randn(d_out, rank, seed=seed), randn(rank, d_in, seed=seed + 1)
    a[[i for i in pruned if i < rank]] = 0
    factors = from_rows(b, a / gain)
    again_b, again_a = to_product(factors, gain)
    assert torch.equal(again_b, b)
    torch.testing.assert_close(again_a, a, **EXACT64)
    assert (factors.lam >= 0).all() and torch.equal(factors.lam == 0, (a == 0).all(dim=1))
    torch.testing.assert_close(factors.q.norm(dim=1), (factors.lam > 0).double(), **EXACT64)


def test_a_row_of_zeros_is_a_triplet_of_zeros() -> None:
    """Not 0/0: a pruned triplet in a padded file has no direction."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        factors = from_rows(
            torch.ones(4, 2, dtype=dtype), torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]], dtype=dtype)
        )
        assert factors.lam.tolist() == [0.0, 5.0] and factors.q[0].tolist() == [0.0, 0.0, 0.0]
        tiny = from_rows(torch.ones(4, 1), torch.full((1, 3), 1e-45))
        assert all(bool(part.isfinite().all()) for part in tiny)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
def test_rows_of_any_size_survive(dtype: torch.dtype, size: float) -> None:
    """A trained row of A may be small; reading it as a triplet must not change the update."""
    a = (size * torch.tensor([[1.0, 2.0, 1.0], [3.0, -1.0, 0.5]])).to(dtype)
    _, again = to_product(from_rows(torch.ones(4, 2, dtype=dtype), a), 1.0)
    # λ and Q are rounded once each, and their product once; the spacing of subnormal float16 numbers is 6e-8
    torch.testing.assert_close(again.double(), a.double(), rtol=4 * torch.finfo(dtype).eps, atol=1.2e-7 * (size < 1e-3))


@given(dims, dims, st.integers(1, 6), gains, st.floats(0.1, 4), seeds)
def test_an_exported_pair_computes_the_update(
    d_out: int, d_in: int, rank: int, gain: float, scale: float, seed: int
) -> None:
    """B A of the exported pair is ΔW at LoRA's scale s."""
    t = random_triplets(d_out, d_in, rank, seed=seed, gain=gain)
    b, a = to_product(Factors(*t.parameters), scale * gain)
    torch.testing.assert_close(b @ a, t.delta(scale), **EXACT64)


# ------------------------------------------------------------------------------------------- other values, other ranks


@given(st.integers(1, 6), ranks, seeds)
def test_assign_takes_values_and_rank(before: int, after: int, seed: int) -> None:
    """assign() keeps the parameters' identity and type, takes copies, and drops gradients of the old values."""
    t = random_triplets(5, 4, before, dtype=torch.float32)
    parameters = t.parameters
    for w in parameters:
        w.grad = torch.ones_like(w)
    source = Factors(randn(5, after, seed=seed), randn(after, seed=seed), randn(after, 4, seed=seed))
    t.assign(source)
    assert t.rank == after and all(a is b for a, b in zip(parameters, t.parameters, strict=True))
    assert all(w.grad is None and w.requires_grad and w.dtype == torch.float32 for w in t.parameters)
    kept = [part.clone() for part in source]
    for w in t.parameters:
        w.data.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(source, kept, strict=True))  # nothing is shared


@given(dims, dims, st.integers(1, 6), gains, seeds, st.data())
def test_keeping_the_live_triplets_keeps_the_update(
    d_out: int, d_in: int, rank: int, gain: float, seed: int, data: st.DataObject
) -> None:
    """When the pruned λ are 0, keep() changes neither ΔW nor which objects the parameters are."""
    live = data.draw(st.lists(st.booleans(), min_size=rank, max_size=rank))
    t = random_triplets(d_out, d_in, rank, seed=seed, gain=gain)
    with torch.no_grad():
        t.lam.mul_(torch.tensor(live, dtype=torch.float64))
    before, parameters = t.delta().detach(), t.parameters
    t.keep(torch.tensor(live).nonzero().flatten())
    assert t.rank == sum(live)
    assert all(a is b for a, b in zip(parameters, t.parameters, strict=True))
    assert all(w.requires_grad and w.is_leaf and w.is_contiguous() for w in t.parameters)
    torch.testing.assert_close(t.delta(), before, **EXACT64)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda w: torch.optim.AdamW(w, lr=0.1),
    "AdamW, amsgrad": lambda w: torch.optim.AdamW(w, lr=0.1, amsgrad=True),
    "SGD": lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9),
    "Adagrad": lambda w: torch.optim.Adagrad(w, lr=0.1),
    "RMSprop": lambda w: torch.optim.RMSprop(w, lr=0.1, momentum=0.9, centered=True),
}


def _fit(t: Triplets, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
    optimizer.zero_grad()
    x = randn(9, t.q.shape[1], seed=step)
    loss = (t.forward(x) - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_and_gradients_are_sliced_along(optimizer: str) -> None:
    """After keep(), the kept triplets train exactly as they would have beside the pruned ones, old loss still held."""
    whole = random_triplets(7, 5, 4)
    index = torch.tensor([0, 3])
    optimizer_whole = OPTIMIZERS[optimizer](list(whole.parameters))
    for step in range(3):
        held = _fit(whole, optimizer_whole, step)
    with torch.no_grad():
        whole.lam[1:3] = 0
    cut, optimizer_cut = copy.deepcopy((whole, optimizer_whole))
    for w, original in zip(cut.parameters, whole.parameters, strict=True):
        assert original.grad is not None
        w.grad = original.grad.clone()
    held = _no_step(cut)  # the loop's last loss, and with it the accumulators of the old shapes
    gradients = [w.grad.clone() for w in cut.parameters if w.grad is not None]

    cut.keep(index, [optimizer_cut])

    assert held is not None
    for w, gradient, dim in zip(cut.parameters, gradients, (1, 0, 0), strict=True):
        assert w.grad is not None and torch.equal(w.grad, gradient.index_select(dim, index))
        assert {v.shape for v in optimizer_cut.state[w].values() if isinstance(v, Tensor) and v.ndim} == {w.shape}
    _fit(whole, optimizer_whole, 3)
    _fit(cut, optimizer_cut, 3)
    for w, original, dim in zip(cut.parameters, whole.parameters, (1, 0, 0), strict=True):
        # float64; the forward sums run over two triplets instead of four of which two are zero
        torch.testing.assert_close(w.detach(), original.detach().index_select(dim, index), **EXACT64)


def _no_step(t: Triplets) -> Tensor:
    loss = t.forward(randn(9, t.q.shape[1], seed=99)).square().mean()
    loss.backward()
    return loss


def test_training_goes_on_beside_a_held_loss() -> None:
    """A loop that keeps its last loss keeps nodes that accumulate into the old shapes; new gradients must not meet them

    (``parameter.data = smaller`` fails in the second backward pass).
    """
    t = random_triplets(6, 5, 4)
    losses = [_no_step(t)]
    t.keep(torch.tensor([1, 2]))
    for w in t.parameters:
        w.grad = None
    losses.append(_no_step(t))
    assert [tuple(w.grad.shape) for w in t.parameters if w.grad is not None] == [(6, 2), (2,), (2, 5)]
    t.keep(torch.tensor([0]))
    losses.append(_no_step(t))
    assert len(losses) == 3 and [tuple(w.shape) for w in t.parameters] == [(6, 1), (1,), (1, 5)]


def test_the_order_of_the_index_is_the_order_of_the_triplets() -> None:
    t = random_triplets(5, 4, 3)
    p, lam, q = (w.detach().clone() for w in t.parameters)
    t.keep(torch.tensor([2, 0]))
    assert torch.equal(t.p, p[:, [2, 0]]) and torch.equal(t.lam, lam[[2, 0]]) and torch.equal(t.q, q[[2, 0]])


def test_a_graph_that_is_still_needed_pins_the_shapes() -> None:
    """A loss before its backward pass holds the parameters; the same loss afterwards does not."""
    t = random_triplets(6, 5, 4)
    assert t.is_resizable()
    loss = t.forward(randn(3, 5, seed=0)).sum()
    assert not t.is_resizable()
    loss.backward(retain_graph=True)
    assert not t.is_resizable()
    loss.backward()
    assert t.is_resizable()
    del loss
    assert t.is_resizable()


def test_what_hangs_on_a_parameter_stays_there() -> None:
    """Attributes and ``requires_grad`` of a parameter outlive a change of its rank."""
    t = random_triplets(6, 5, 4)
    t.q.requires_grad_(False)
    t.p.note = "mine"  # type: ignore[attr-defined]
    t.keep(torch.tensor([1]))
    assert t.p.note == "mine"  # type: ignore[attr-defined]
    assert [w.requires_grad for w in t.parameters] == [True, True, False]


def test_hooks_outlive_a_change_of_rank() -> None:
    """A user's gradient hooks still run after compaction; losing them would change the training silently."""
    t = random_triplets(6, 5, 4)
    seen: list[str] = []
    t.p.register_hook(lambda gradient: seen.append("gradient"))
    t.p.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    t.keep(torch.tensor([1]))
    t.forward(randn(3, 5, seed=0)).sum().backward()
    assert sorted(seen) == ["accumulated", "gradient"]


def test_the_right_half_describes_itself() -> None:
    assert "rank=3" in repr(SingularProjection(torch.zeros(3, 7))) and "in_features=7" in repr(
        SingularProjection(torch.zeros(3, 7))
    )


def test_ranks_shrink_in_the_middle_of_autocast() -> None:
    """Autocast keeps casts of the parameters, with weak references that a change of shape does not go with."""
    t = random_triplets(6, 5, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        t.forward(torch.ones(2, 5)).sum().backward()
        t.keep(torch.tensor([0, 2]))
        assert t.rank == 2 and t.forward(torch.ones(2, 5)).shape == (2, 6)
