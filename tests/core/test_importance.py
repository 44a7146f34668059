"""Scores of triplets against the formulas written out, and a contract that every registered metric keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adalora.core.allocator import Allocator
from adalora.core.importance import METRICS, RATIO_EPSILON, Smoothed, sensitivity_
from adalora.core.triplets import Triplets
from tests.core.toys import feed, plan, randn, random_triplets

SHAPES = ((6, 5, 3), (4, 7, 2), (6, 5, 3), (5, 5, 1))  # (d_out, d_in, rank)
EXACT64 = {"rtol": 1e-12, "atol": 1e-15}  # float64, a handful of operations
STEPS = 4


def matrices(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Triplets]:
    return [
        random_triplets(d_out, d_in, rank, seed=seed + k, name=f"m{k}", dtype=dtype)
        for k, (d_out, d_in, rank) in enumerate(SHAPES)
    ]


def gradients(triplets: list[Triplets], seed: int = 0, scale: float = 1.0) -> list[list[Tensor]]:
    """[step][three a matrix]"""
    parameters = [w for t in triplets for w in t.parameters]
    return [
        [scale * randn(*w.shape, seed=seed + 1000 * step + k) for k, w in enumerate(parameters)]
        for step in range(STEPS)
    ]


def scoring(metric: str, triplets: list[Triplets]) -> Allocator:
    """An allocator far from its first allocation, so that only importance is at work."""
    return Allocator(
        triplets, plan(target_rank=1, metric=metric, t_init=50, t_final=10, total_step=100, orthogonality_weight=0.0)
    )


# ------------------------------------------------------------------------------------------------ one block of entries


@given(st.integers(0, 1000), st.floats(0, 0.99), st.floats(0, 0.99), st.integers(1, 5))
def test_update_follows_the_formulas(seed: int, beta1: float, beta2: float, steps: int) -> None:
    """Ī and Ū entry by entry in plain Python: Ū uses the new Ī."""
    smoothed = Smoothed.zeros_like(torch.zeros(2, 3, dtype=torch.float64))
    for step in range(steps):
        w, g = randn(2, 3, seed=seed + 2 * step), randn(2, 3, seed=seed + 2 * step + 1)
        expected = [[], []]  # type: ignore[var-annotated]
        products = [a * b for a, b in zip(w.flatten().tolist(), g.flatten().tolist(), strict=True)]
        for i in range(6):
            sensitivity = abs(products[i])
            mean = beta1 * float(smoothed.sensitivity.flatten()[i]) + (1 - beta1) * sensitivity
            deviation = beta2 * float(smoothed.uncertainty.flatten()[i]) + (1 - beta2) * abs(sensitivity - mean)
            expected[0].append(mean)
            expected[1].append(deviation)
        smoothed.update_(sensitivity_(w, g), beta1, beta2)
        for block, values in zip(smoothed, expected, strict=True):
            torch.testing.assert_close(block.flatten(), torch.tensor(values, dtype=torch.float64), **EXACT64)


@given(
    st.integers(0, 1000), st.integers(0, 5), st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.booleans()
)
def test_one_gradient_that_is_not_finite_leaves_every_bit(seed: int, place: int, bad: float, weightless: bool) -> None:
    """Wherever it is, also where the weight is 0, as every λ at the start; the next step counts again."""
    smoothed = Smoothed(randn(2, 3, seed=seed).abs(), randn(2, 3, seed=seed + 1).abs())
    before = [block.clone() for block in smoothed]
    w, g = randn(2, 3, seed=seed + 2), randn(2, 3, seed=seed + 3)
    g.view(-1)[place] = bad
    w.view(-1)[place] *= 0.0 if weightless else 1.0
    smoothed.update_(sensitivity_(w, g), 0.85, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(smoothed, before, strict=True))
    smoothed.update_(torch.ones(2, 3, dtype=w.dtype), 0.85, 0.7)
    assert not any(torch.equal(a, b) for a, b in zip(smoothed, before, strict=True))


def test_sensitivities_that_overflow_leave_every_bit() -> None:
    """Weight and gradient are finite, their product is not: as a gradient that is not finite itself."""
    smoothed = Smoothed(torch.ones(2), torch.ones(2))
    smoothed.update_(sensitivity_(torch.tensor([1e30, 1.0]), torch.tensor([1e30, 1.0])), 0.85, 0.85)
    assert all(torch.equal(block, torch.ones(2)) for block in smoothed)


def test_averages_may_be_wider_than_what_they_take_in() -> None:
    """A model that was converted in the middle of training."""
    smoothed = Smoothed.zeros_like(torch.zeros(2, dtype=torch.float64))
    smoothed.update_(torch.tensor([1.0, 2.0]), 0.5, 0.5)
    assert smoothed.sensitivity.tolist() == [0.5, 1.0] and smoothed.uncertainty.tolist() == [0.25, 0.5]


# ------------------------------------------------------------------------------------------------ whole models, by hand

ENTRY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sensitivity_uncertainty": lambda i, u: i * u,
    "sensitivity": lambda i, u: i,
    "uncertainty": lambda i, u: u,
    "ratio": lambda i, u: i / (u + RATIO_EPSILON),
    "singular": lambda i, u: i * u,
}


def by_hand(metric: str, triplets: list[Triplets], steps: list[list[Tensor]], beta: float = 0.85) -> Tensor:
    """S of each triplet from the module's docstring, one matrix and one parameter at a time."""
    scores = []
    for k, t in enumerate(triplets):
        p, lam, q = (w.detach() for w in t.parameters)
        if metric == "magnitude":
            scores.append(lam.abs())
            continue
        if metric == "norm_product":
            scores.append(p.norm(dim=0) * lam.abs() * q.norm(dim=1))
            continue
        parts = []
        for n, w in enumerate((p, lam, q)):
            mean, deviation = torch.zeros_like(w), torch.zeros_like(w)
            for step in steps:
                sensitivity = (w * step[3 * k + n]).abs()
                mean = beta * mean + (1 - beta) * sensitivity
                deviation = beta * deviation + (1 - beta) * (sensitivity - mean).abs()
            parts.append(ENTRY[metric](mean, deviation))
        of_p, of_lam, of_q = parts
        scores.append(of_lam if metric == "singular" else of_lam + of_p.mean(dim=0) + of_q.mean(dim=1))
    return torch.cat(scores)


@pytest.mark.parametrize("metric", [*ENTRY, "magnitude", "norm_product"])
@given(seed=st.integers(0, 1000))
def test_scores_follow_the_formulas(metric: str, seed: int) -> None:
    """Stacked arithmetic over matrices of mixed shapes and ranks gives each triplet its own score (float64)."""
    triplets = matrices(seed)
    steps = gradients(triplets, seed)
    allocator = scoring(metric, triplets)
    feed(allocator, steps)
    torch.testing.assert_close(allocator.scores(), by_hand(metric, triplets, steps), rtol=1e-11, atol=1e-15)


# ------------------------------------------------------------------------------------------- every registered metric


@pytest.fixture(params=list(METRICS))
def metric(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_metric_is_registered_under_its_name_and_is_complete(metric: str) -> None:
    """One way to score: of entries, or of present values."""
    registered = METRICS[metric]
    assert registered.name == metric
    assert (registered.entry is None) == (registered.entries == "none") == (registered.value is not None)


def test_scores_are_finite_and_not_negative(metric: str) -> None:
    """One number a triplet, at any time: before the first step, after some, and with all gradients zero."""
    triplets = matrices()
    allocator = scoring(metric, triplets)
    total = sum(rank for *_, rank in SHAPES)
    steps = gradients(triplets)
    for step in [[torch.zeros_like(g) for g in steps[0]], *steps, [1e-30 * g for g in steps[0]]]:
        scores = allocator.scores()
        assert scores.shape == (total,) and scores.isfinite().all() and (scores >= 0).all()
        assert not scores.requires_grad
        feed(allocator, [step])


def test_scores_follow_the_triplets(metric: str) -> None:
    """Renumbering the triplets of one matrix renumbers its scores, and changes no other matrix's."""
    triplets, permuted = matrices(), matrices()
    order, moved = torch.tensor([2, 0, 1]), 2
    steps = gradients(triplets)
    permuted[moved].keep(order)
    permuted_steps = [list(step) for step in steps]
    for step in permuted_steps:
        step[3 * moved : 3 * moved + 3] = [
            g.index_select(dim, order) for g, dim in zip(step[3 * moved : 3 * moved + 3], (1, 0, 0), strict=True)
        ]
    allocators = scoring(metric, triplets), scoring(metric, permuted)
    feed(allocators[0], steps)
    feed(allocators[1], permuted_steps)
    expected = [part.clone() for part in allocators[0].scores().split([t.rank for t in triplets])]
    expected[moved] = expected[moved][order]
    assert len(set(allocators[0].scores().tolist())) > 1
    torch.testing.assert_close(allocators[1].scores(), torch.cat(expected), **EXACT64)


DEGREE = {
    "sensitivity_uncertainty": 2, "singular": 2, "sensitivity": 1, "uncertainty": 1, "ratio": 0, "magnitude": 0,
    "norm_product": 0,
}  # fmt: skip


def test_the_loss_scale_does_not_change_the_order(metric: str) -> None:
    """A loss eight times as large ranks the triplets alike; known metrics scale by their degree."""
    triplets = matrices()
    allocators = scoring(metric, triplets), scoring(metric, triplets)
    feed(allocators[0], gradients(triplets))
    feed(allocators[1], gradients(triplets, scale=8.0))
    plain, scaled = (allocator.scores() for allocator in allocators)
    assert torch.equal(plain.argsort(stable=True), scaled.argsort(stable=True))
    if metric in DEGREE:
        # the epsilon of the ratio is 1e-12 beside uncertainties of 0.01 and more
        torch.testing.assert_close(scaled, 8.0 ** DEGREE[metric] * plain, rtol=1e-9, atol=0)


def test_a_triplet_without_gradients_or_size_scores_nothing(metric: str) -> None:
    """Zero gradients and λ = 0 from the start: nothing speaks for this triplet."""
    triplets = matrices()
    with torch.no_grad():
        triplets[0].lam[1] = 0
    steps = gradients(triplets)
    for step in steps:
        step[0][:, 1], step[1][1], step[2][1] = 0, 0, 0
    allocator = scoring(metric, triplets)
    feed(allocator, steps)
    assert allocator.scores()[1] == 0
    assert allocator.scores()[0] > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2, 5])
def test_one_bad_gradient_leaves_scores_and_state(metric: str, bad: float, place: int) -> None:
    """One entry that is not finite, in P, λ or Q of any matrix whose entries count: the step leaves no trace."""
    triplets = matrices()
    allocator = scoring(metric, triplets)
    steps = gradients(triplets)
    feed(allocator, steps[:2])
    scores, state = allocator.scores().clone(), allocator.state_dict()["tensors"]
    counts = METRICS[metric].entries == "all" or (METRICS[metric].entries == "singular_values" and place == 1)
    steps[2][place].view(-1)[0] = bad
    feed(allocator, steps[2:3])
    if METRICS[metric].entries == "none" or counts:
        after = allocator.state_dict()["tensors"]
        assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)
        assert torch.equal(allocator.scores(), scores)
    assert allocator.scores().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_do_not_underflow(metric: str, dtype: torch.dtype) -> None:
    """Products of half-precision numbers near 1e-4 are kept in float32: scores are as in wide arithmetic."""
    triplets = matrices(dtype=dtype)
    steps = [[g.to(dtype) for g in step] for step in gradients(triplets, scale=1e-4)]
    allocator = scoring(metric, triplets)
    feed(allocator, steps)
    wide = [
        Triplets(t.name, nn.Linear(1, 1), random_triplets(2, 2, 1).right) for t in triplets
    ]  # shells to hold the same values in float64
    for shell, t in zip(wide, triplets, strict=True):
        shell.left.weight = nn.Parameter(t.p.detach().double())
        shell.right.singular_values = nn.Parameter(t.lam.detach().double())
        shell.right.right_vectors = nn.Parameter(t.q.detach().double())
    reference = scoring(metric, wide)
    feed(reference, [[g.double() for g in step] for step in steps])
    assert allocator.scores().dtype == torch.float32
    assert (allocator.scores() > 0).all()
    # float32 throughout; Ū is a difference of numbers up to a hundred times its size
    torch.testing.assert_close(allocator.scores().double(), reference.scores(), rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------ what they cost


def held_tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that an object holds, other than modules and their parameters."""
    if id(thing) in seen or isinstance(thing, (nn.Module, nn.Parameter)):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from held_tensors(value, seen)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from held_tensors(value, seen)
    elif hasattr(thing, "__dict__"):
        yield from held_tensors(vars(thing), seen)


def state_bytes(metric: str, width: int, steps: int = STEPS) -> tuple[int, int]:
    """Bytes of floating-point state, and of everything else, in an allocator over two float32 matrices of rank 4."""
    triplets = [random_triplets(width, width, 4, seed=k, name=f"m{k}", dtype=torch.float32) for k in range(2)]
    allocator = scoring(metric, triplets)
    parameters = [w for t in triplets for w in t.parameters]
    feed(allocator, [[torch.ones_like(w) for w in parameters]] * steps)
    tensors = list(held_tensors(allocator, set()))
    floating = sum(t.numel() * t.element_size() for t in tensors if t.is_floating_point())
    return floating, sum(t.numel() * t.element_size() for t in tensors) - floating


def test_state_of_each_metric_is_as_small_as_its_entries_say(metric: str) -> None:
    """Two float32 numbers for each entry that is scored: all parameters, one λ a triplet, or none."""
    for width in (8, 32):
        n, vectors = 2 * 4, 2 * 2 * 4 * width
        expected = {"all": 2 * 4 * (n + vectors), "singular_values": 2 * 4 * n, "none": 0}[METRICS[metric].entries]
        assert state_bytes(metric, width)[0] == expected


def test_singular_keeps_two_numbers_a_triplet_whatever_the_width() -> None:
    """And nothing else that grows with the matrices."""
    assert state_bytes("singular", 8) == state_bytes("singular", 64)
    assert state_bytes("singular", 8)[0] == 2 * 4 * 8


def test_nothing_is_kept_before_the_first_step() -> None:
    assert state_bytes("sensitivity_uncertainty", 16, steps=0)[0] == 0
