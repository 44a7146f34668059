"""A contract that every registered policy keeps, and brute-force versions of the two we have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adalora.core.policy import POLICIES, equal_shares, global_topk, uniform

policies = pytest.mark.parametrize("policy", list(POLICIES))
models = st.lists(st.integers(0, 6), min_size=1, max_size=6)  # triplets of each matrix


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int, list[int]]:
    """Scores with many ties (and the zeros of an underflow), any budget, matrices at rank 0 included."""
    sizes = draw(models)
    n = sum(sizes)
    values = draw(st.lists(st.sampled_from([0.0, 1e-30, 0.5, 1.0, 2.0, 1e30]), min_size=n, max_size=n))
    return torch.tensor(values), draw(st.integers(0, n + 3)), sizes


def best(scores: list[float], count: int) -> set[int]:
    """Indices of the ``count`` highest scores; of equal ones, the first."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


@policies
@given(case=cases())
def test_exactly_the_budget_lives(policy: str, case: tuple[Tensor, int, list[int]]) -> None:
    """min(budget, n) of a boolean mask, whatever the ties; the scores are left as they were."""
    scores, budget, sizes = case
    before = scores.clone()
    mask = POLICIES[policy](scores, budget, sizes)
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    assert int(mask.sum()) == min(budget, len(scores))
    assert torch.equal(scores, before)


@policies
@given(case=cases())
def test_no_triplet_lives_instead_of_a_better_one_of_its_matrix(
    policy: str, case: tuple[Tensor, int, list[int]]
) -> None:
    """However matrices share the budget, within one the best live, and of equals the first."""
    scores, budget, sizes = case
    mask = POLICIES[policy](scores, budget, sizes)
    for of_matrix, lives in zip(scores.split(sizes), mask.split(sizes), strict=True):
        assert set(lives.nonzero().flatten().tolist()) == best(of_matrix.tolist(), int(lives.sum()))


@policies
@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf")])
def test_all_scores_equal(policy: str, value: float) -> None:
    """Scores that underflowed to 0 (or worse) once pruned every layer to rank 0; here the budget holds."""
    for budget in range(13):
        mask = POLICIES[policy](torch.full((12,), value), budget, [4, 4, 4])
        assert int(mask.sum()) == budget


@policies
@given(case=cases(), data=st.data())
def test_a_smaller_budget_keeps_a_subset(policy: str, case: tuple[Tensor, int, list[int]], data: st.DataObject) -> None:
    scores, budget, sizes = case
    fewer = POLICIES[policy](scores, data.draw(st.integers(0, budget)), sizes)
    assert not (fewer & ~POLICIES[policy](scores, budget, sizes)).any()


@given(case=cases())
def test_global_topk_is_the_b_best(case: tuple[Tensor, int, list[int]]) -> None:
    scores, budget, sizes = case
    assert set(global_topk(scores, budget, sizes).nonzero().flatten().tolist()) == best(scores.tolist(), budget)


@given(case=cases())
def test_uniform_is_the_best_of_each_matrix(case: tuple[Tensor, int, list[int]]) -> None:
    scores, budget, sizes = case
    expected = [
        best(part.tolist(), share) for part, share in zip(scores.split(sizes), equal_shares(budget, sizes), strict=True)
    ]
    mask = uniform(scores, budget, sizes)
    assert [set(part.nonzero().flatten().tolist()) for part in mask.split(sizes)] == expected


@settings(max_examples=200)
@given(models, st.integers(0, 40))
def test_equal_shares_are_as_even_as_can_be(sizes: list[int], budget: int) -> None:
    """Dealt one at a time, round after round, to the matrices that still have room, the first ones first."""
    dealt = [0] * len(sizes)
    left = min(budget, sum(sizes))
    while left:
        for k, size in enumerate(sizes):
            if left and dealt[k] < size:
                dealt[k] += 1
                left -= 1
    shares = equal_shares(budget, sizes)
    assert sum(shares) == min(budget, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    with_room = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    assert not with_room or max(shares) - min(with_room) <= 1
    assert shares == dealt


@pytest.mark.parametrize(
    ("budget", "sizes", "shares"),
    [
        (6, [4, 4, 4], [2, 2, 2]),
        (7, [4, 4, 4], [3, 2, 2]),
        (7, [1, 4, 4], [1, 3, 3]),
        (5, [1, 5, 5], [1, 2, 2]),
        (3, [0, 4, 1], [0, 2, 1]),
        (99, [1, 2], [1, 2]),
        (0, [4, 4], [0, 0]),
        (3, [], []),
    ],
)
def test_equal_shares_by_example(budget: int, sizes: list[int], shares: list[int]) -> None:
    assert equal_shares(budget, sizes) == shares


def test_matrices_compete_only_globally() -> None:
    """The difference between the paper's policy and its ablation."""
    scores, sizes = torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0]), [3, 3]
    assert global_topk(scores, 3, sizes).tolist() == [True, True, True, False, False, False]
    assert uniform(scores, 4, sizes).tolist() == [True, True, False, False, True, True]
