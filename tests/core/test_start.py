"""The gradient start against dense singular value decompositions of matrices that are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from adalora.core.errors import ConfigError, StateError
from adalora.core.start import SCALE, Directions, Look, Sketch, find_directions

from .toys import randn

CPU = torch.device("cpu")
dims = st.integers(1, 12)
seeds = st.integers(0, 1000)


def looking(sketch: Sketch, pairs: list[tuple[Tensor, Tensor]]) -> Callable[[float], int]:
    """Backward passes through one linear layer: of each batch, its inputs and the gradients of its outputs."""

    def look(scale: float) -> int:
        for x, g in pairs:
            sketch.add(x, g * scale)
        return len(pairs)

    return look


def found_in(d_out: int, d_in: int, rank: int, pairs: list[tuple[Tensor, Tensor]], sweeps: int = 4) -> Directions:
    sketch = Sketch(d_out, (d_in,), rank, F.linear, CPU)
    (found,) = find_directions([sketch], looking(sketch, pairs), sweeps)
    assert found is not None
    return found


def with_spectrum(d_out: int, d_in: int, values: Tensor) -> Tensor:
    """A matrix that has these singular values."""
    u = torch.linalg.qr(randn(d_out, len(values), seed=1)).Q
    v = torch.linalg.qr(randn(d_in, len(values), seed=2)).Q
    return u @ torch.diag(values) @ v.T


@given(dims, dims, st.integers(1, 8), st.integers(1, 3), st.sampled_from([2, 4]), seeds)
def test_a_matrix_of_low_rank_is_found_exactly(
    d_out: int, d_in: int, rank: int, batches: int, sweeps: int, seed: int
) -> None:
    """K covers the whole rank (of at most three inputs a batch), so nothing is left to converge: the mean over batches
    of gᵀx has these triplets, and this norm."""
    pairs = [
        (randn(2, d_in, seed=seed + i).float(), randn(2, d_out, seed=seed + 50 + i).float()) for i in range(batches)
    ]
    dense = torch.stack([g.T @ x for x, g in pairs]).mean(0)
    u, values, vh = torch.linalg.svd(dense.double(), full_matrices=False)
    found = found_in(d_out, d_in, rank, pairs, sweeps)
    k = min(rank, d_out, d_in)
    assert found.left.shape == (d_out, k) and found.values.shape == (k,) and found.right.shape == (k, d_in)
    within = {"rtol": 2e-4, "atol": 2e-4 * max(1.0, float(values[0]))}  # float32 products
    torch.testing.assert_close(found.values.double(), values[:k], **within)
    for basis in (found.left.T @ found.left, found.right @ found.right.T):  # also where G's rank is below k
        torch.testing.assert_close(basis, torch.eye(k), rtol=0, atol=1e-4)
    approximated = found.left @ torch.diag(found.values) @ found.right
    torch.testing.assert_close(approximated.double(), (u[:, :k] * values[:k]) @ vh[:k], **within)
    assert found.share <= 1 + 1e-6
    if sweeps > 2 or 2 * batches >= min(d_out, d_in):
        assert found.square == pytest.approx(float(dense.square().sum()), rel=1e-2)


def test_more_sweeps_come_closer() -> None:
    """A spectrum that falls off slowly is the hard case; the share of Σσ that is found only grows, to all of it."""
    dense = with_spectrum(60, 80, torch.arange(1.0, 61.0).double() ** -0.7).float()
    best = torch.linalg.svdvals(dense)[:4].sum()
    shares = []
    for sweeps in (2, 4, 6, 8):
        found = found_in(60, 80, 4, [(torch.eye(80), dense.T.contiguous())], sweeps)
        by_hand = torch.diagonal(found.left.T @ dense @ found.right.T)
        torch.testing.assert_close(by_hand, found.values, rtol=1e-4, atol=1e-5)
        shares.append(float(by_hand.sum() / best))
    assert shares == sorted(shares) and shares[0] < 0.97 < 0.99 < shares[2] <= 1 + 1e-5


def test_the_norm_is_estimated_without_bias_and_closely_once_the_large_directions_are_known() -> None:
    """‖G‖²: two sweeps leave it to random rows, whose mean over many draws is right; four know the large part."""
    values = torch.tensor([8.0, 4.0, 2.0, *[0.3] * 40]).double()
    square = float(values.square().sum())
    rough, fine = [], []
    for seed in range(40):
        mixed = torch.linalg.qr(randn(64, 64, seed=100 + seed)).Q  # other random rows, seen from G
        dense = (with_spectrum(50, 64, values) @ mixed).float()
        pairs = [(torch.eye(64), dense.T.contiguous())]
        rough.append(found_in(50, 64, 3, pairs, 2).square / square)
        fine.append(found_in(50, 64, 3, pairs, 4).square / square)
    assert torch.tensor(fine).sub(1).abs().max() < 0.04  # P still knows the rows a little
    # the rows alone would be off by a third or so; what P holds is a floor that pulls the mean up a little
    assert 0.9 < torch.tensor(rough).mean() < 1.3


def test_every_process_of_half_precision_is_summed_in_float32() -> None:
    """A thousand contributions of 1 to a sum near 4096: bfloat16 would stop counting at 256."""
    x, g = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # of a loop that calls adalora.start within it
        found = found_in(1, 1, 1, [(x, g)] * 1000)
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values, torch.ones(1), rtol=1e-6, atol=0)


def test_where_the_scaled_loss_overflows_a_smaller_scale_is_taken() -> None:
    x, g = torch.ones(1, 2), torch.tensor([[3.0, 4.0]])
    sketch = Sketch(2, (2,), 1, F.linear, CPU)
    scales: list[float] = []

    def look(scale: float) -> int:
        scales.append(scale)
        sketch.add(x, (g.half() * scale * 8).float())  # inf in float16 at the first scale: 4 * 4096 * 8 > 65504
        return 1

    (found,) = find_directions([sketch], look, 2)
    assert found is not None
    assert scales == [SCALE, SCALE / 16, SCALE / 16]
    torch.testing.assert_close(found.values, torch.tensor([8 * 5.0 * 2**0.5]), rtol=1e-3, atol=0)


def test_a_gradient_that_is_never_finite_is_an_error() -> None:
    with pytest.raises(StateError, match="not finite"):
        found_in(2, 2, 1, [(torch.ones(1, 2), torch.full((1, 2), float("nan")))])


def test_batches_without_a_loss_are_an_error() -> None:
    with pytest.raises(StateError, match="none of the batches has a label that counts"):
        found_in(2, 2, 1, [])


@pytest.mark.parametrize("sweeps", [0, 1, 3, -2, 4.0, True])
def test_sweeps_come_in_pairs(sweeps: int) -> None:
    with pytest.raises(ConfigError, match="must be an even number"):
        found_in(2, 2, 1, [(torch.ones(1, 2), torch.ones(1, 2))], sweeps)


def test_a_matrix_without_a_gradient_is_told_apart() -> None:
    silent, seen = Sketch(3, (4,), 2, F.linear, CPU), Sketch(3, (4,), 2, F.linear, CPU)
    pairs = [(randn(5, 4, seed=3).float(), randn(5, 3, seed=4).float())]
    found = find_directions([silent, seen], looking(seen, pairs), 2)
    assert found[0] is None and found[1] is not None
    assert find_directions([], looking(seen, pairs), 2) == []


def test_no_random_state_moves_and_every_call_finds_the_same() -> None:
    pairs = [(randn(5, 9, seed=3).float(), randn(5, 8, seed=4).float())]
    state = torch.get_rng_state()
    first, second = found_in(8, 9, 2, pairs), found_in(8, 9, 2, pairs)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.left, second.left) and torch.equal(first.right, second.right)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_type_of_the_program_is_not_taken_for_ours(dtype: torch.dtype) -> None:
    pairs = [(randn(5, 9, seed=3).float(), randn(5, 8, seed=4).float())]
    expected = found_in(8, 9, 2, pairs)
    torch.set_default_dtype(dtype)
    try:
        found = found_in(8, 9, 2, pairs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.values, expected.values) and torch.equal(found.left, expected.left)


CONVOLUTIONS: list[tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], dict[str, object]]] = [
    (F.conv1d, (3, 5), (2, 3, 17), {"stride": 2, "padding": 2}),
    (F.conv2d, (3, 3, 2), (2, 3, 8, 7), {"stride": (2, 1), "padding": (1, 0)}),
    (F.conv2d, (3, 3, 3), (2, 3, 6, 6), {"stride": 1, "padding": "same"}),
    (F.conv2d, (3, 3, 3), (3, 6, 6), {"stride": 1, "padding": 1}),  # one image, without a dimension of batches
    (F.conv3d, (2, 2, 2, 2), (2, 2, 4, 5, 4), {"stride": 2, "padding": 0}),
]


@pytest.mark.parametrize(("kind", "shape", "size", "settings"), CONVOLUTIONS)
def test_convolutions(
    kind: Callable[..., Tensor], shape: tuple[int, ...], size: tuple[int, ...], settings: dict[str, object]
) -> None:
    """The product is the convolution's own, and its transpose autograd's."""
    d_out, rank = 6, 3
    x, weight = randn(*size, seed=1).float(), torch.zeros(d_out, *shape, requires_grad=True)
    y = kind(x, weight, **settings)
    g = randn(*y.shape, seed=2).float()
    (dense,) = torch.autograd.grad(y, weight, g)
    sketch = Sketch(d_out, shape, rank, lambda x, q: kind(x, q, **settings), CPU, is_linear=False)
    (found,) = find_directions([sketch], looking(sketch, [(x, g)]), 4)
    assert found is not None
    u, values, vh = torch.linalg.svd(dense.flatten(1))
    torch.testing.assert_close(found.values, values[:rank], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.left @ torch.diag(found.values) @ found.right, (u[:, :rank] * values[:rank]) @ vh[:rank],
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip


def test_look_hands_on_the_same_bits_and_lets_what_follows_write_into_them() -> None:
    sketch = Sketch(3, (4,), 1, F.linear, CPU)
    sketch.begin(torch.Generator().manual_seed(0))
    sketch.clear()
    x, y = randn(2, 4, seed=1).float(), torch.tensor([[-0.0, 1e-40, float("inf")], [1.0, 2.0, 3.0]])
    looked = Look.apply(y, torch.zeros((), requires_grad=True), sketch, x)
    assert looked.detach().numpy().tobytes() == y.numpy().tobytes()
    F.relu_(looked).sum().backward()
    expected = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]).T @ (x @ sketch.right.T)
    torch.testing.assert_close(sketch.sum, expected)
