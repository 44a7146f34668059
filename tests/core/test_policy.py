"""A contract that every registered policy keeps, in both units, and brute-force versions of the two we have."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adalora.core.policy import POLICIES, global_topk, spread, uniform

policies = pytest.mark.parametrize("policy", list(POLICIES))
ANY_COST = st.integers(1, 9)
VALUES = [0.0, 1e-30, 0.5, 1.0, 2.0, 1e30]


class Case(NamedTuple):
    scores: Tensor
    budget: int
    sizes: list[int]  # triplets of each matrix
    costs: list[int]  # of one of them

    @property
    def each(self) -> list[int]:
        """What every triplet costs."""
        return [cost for cost, size in zip(self.costs, self.sizes, strict=True) for _ in range(size)]

    def mask(self, policy: str, budget: int | None = None) -> Tensor:
        return POLICIES[policy](self.scores, self.budget if budget is None else budget, self.sizes, self.costs)

    def ranks(self, policy: str) -> list[int]:
        return [int(part.sum()) for part in self.mask(policy).split(self.sizes)]


@st.composite
def cases(draw: st.DrawFn, costs: st.SearchStrategy[int] = ANY_COST, distinct: bool = False) -> Case:
    """Any budget, matrices at rank 0 included; scores with many ties (and the zeros of an underflow), or with none."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    n = sum(sizes)
    if distinct:
        values = draw(st.permutations([float(k) for k in range(1, n + 1)]))
    else:
        values = draw(st.lists(st.sampled_from(VALUES), min_size=n, max_size=n))
    costing = draw(st.lists(costs, min_size=len(sizes), max_size=len(sizes)))
    whole = sum(map(int.__mul__, sizes, costing))
    return Case(torch.tensor(values), draw(st.integers(0, whole + 3)), sizes, costing)


in_triplets = cases(costs=st.just(1))


def best(scores: list[float], count: int) -> set[int]:
    """Indices of the ``count`` highest scores; of equal ones, the first."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


@policies
@given(case=cases())
def test_the_budget_is_never_exceeded_and_nothing_that_fits_is_left_out(policy: str, case: Case) -> None:
    """Within one triplet of the budget: what is left is less than any pruned triplet costs."""
    before = case.scores.clone()
    mask = case.mask(policy)
    assert mask.dtype == torch.bool and mask.shape == case.scores.shape
    left = case.budget - sum(cost for cost, lives in zip(case.each, mask.tolist(), strict=True) if lives)
    assert left >= 0
    assert all(left < cost for cost, lives in zip(case.each, mask.tolist(), strict=True) if not lives)
    assert torch.equal(case.scores, before)


@policies
@given(case=in_triplets)
def test_a_budget_in_triplets_is_met_exactly(policy: str, case: Case) -> None:
    assert int(case.mask(policy).sum()) == min(case.budget, len(case.scores))


@policies
@given(case=cases())
def test_no_triplet_lives_instead_of_a_better_one_of_its_matrix(policy: str, case: Case) -> None:
    """However matrices share the budget, within one the best live, and of equals the first."""
    mask = case.mask(policy)
    for of_matrix, lives in zip(case.scores.split(case.sizes), mask.split(case.sizes), strict=True):
        assert set(lives.nonzero().flatten().tolist()) == best(of_matrix.tolist(), int(lives.sum()))


@given(case=cases())
def test_no_triplet_lives_instead_of_a_better_one_of_its_cost(case: Case) -> None:
    lives, scores, each = case.mask("global_topk").tolist(), case.scores.tolist(), case.each
    for cost in set(each):
        kept = [s for s, c, flag in zip(scores, each, lives, strict=True) if c == cost and flag]
        gone = [s for s, c, flag in zip(scores, each, lives, strict=True) if c == cost and not flag]
        assert not kept or not gone or min(kept) >= max(gone)


@given(case=cases(distinct=True))
def test_global_topk_walks_down_by_score(case: Case) -> None:
    """Written out: from the best to the worst, each triplet that still fits."""
    left, expected = case.budget, set()
    for i in sorted(range(len(case.scores)), key=lambda i: -float(case.scores[i])):
        if case.each[i] <= left:
            expected.add(i)
            left -= case.each[i]
    assert set(case.mask("global_topk").nonzero().flatten().tolist()) == expected


@given(case=in_triplets)
def test_in_triplets_global_topk_keeps_the_b_best(case: Case) -> None:
    """The paper's: no score that was pruned is above one that was kept."""
    mask = case.mask("global_topk")
    kept, gone = case.scores[mask], case.scores[~mask]
    assert not len(kept) or not len(gone) or kept.min() >= gone.max()


@policies
@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf")])
def test_all_scores_equal(policy: str, value: float) -> None:
    """Scores that underflowed to 0 (or worse) once pruned every layer to rank 0; here the budget holds."""
    for budget in range(13):
        mask = POLICIES[policy](torch.full((12,), value), budget, [4, 4, 4], [1, 1, 1])
        assert int(mask.sum()) == budget


@policies
@given(case=in_triplets, data=st.data())
def test_a_smaller_budget_keeps_a_subset(policy: str, case: Case, data: st.DataObject) -> None:
    """Where triplets have one cost. (Among several, a smaller one may fill what a larger one leaves.)"""
    fewer = case.mask(policy, data.draw(st.integers(0, case.budget)))
    assert not (fewer & ~case.mask(policy)).any()


@policies
@given(case=cases(costs=st.just(7)))
def test_one_cost_for_all_is_a_budget_in_triplets(policy: str, case: Case) -> None:
    plain = POLICIES[policy](case.scores, case.budget // 7, case.sizes, [1] * len(case.sizes))
    assert torch.equal(case.mask(policy), plain)


# ------------------------------------------------------------------------------------------------ ties


@policies
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=9), value=st.sampled_from([0.0, 3.0]), data=st.data())
def test_equal_scores_are_shared_out_evenly(policy: str, sizes: list[int], value: float, data: st.DataObject) -> None:
    """No matrix that has triplets left is more than one behind another."""
    case = Case(torch.full((sum(sizes),), value), data.draw(st.integers(0, sum(sizes))), sizes, [1] * len(sizes))
    ranks = case.ranks(policy)
    with_room = [rank for rank, size in zip(ranks, sizes, strict=True) if rank < size]
    assert not with_room or max(ranks) - min(with_room) <= 1


def test_what_is_tied_goes_to_matrices_with_fewer_better_triplets() -> None:
    """The first has two triplets of importance; what is left is for those that have none."""
    scores = torch.tensor([9.0, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert Case(scores, 6, [3, 3, 3], [1, 1, 1]).ranks("global_topk") == [2, 2, 2]
    assert Case(scores, 4, [3, 3, 3], [1, 1, 1]).ranks("global_topk") == [2, 1, 1]


@policies
def test_less_than_a_triplet_a_matrix_is_spread_over_the_depth(policy: str) -> None:
    """A quarter of a triplet for each of 36 matrices, six a layer: every third of the model gets three of nine."""
    ranks = Case(torch.zeros(72), 9, [2] * 36, [1] * 36).ranks(policy)
    assert set(ranks) == {0, 1}
    assert [sum(ranks[k : k + 12]) for k in (0, 12, 24)] == [3, 3, 3]
    assert len({k % 6 for k, rank in enumerate(ranks) if rank}) >= 5, "nor on one kind of module"


@given(st.integers(0, 300))
def test_turns_are_a_permutation_whose_beginnings_are_spread(count: int) -> None:
    turns = spread(count)
    assert sorted(turns) == list(range(count))
    for few in (count // 16, count // 4):
        chosen = [k for k, turn in enumerate(turns) if turn < few]
        gaps = [b - a for a, b in zip([-1, *chosen], [*chosen, count], strict=True)]
        assert few == 0 or max(gaps) <= 3 * -(-count // few)


def test_scores_of_minus_infinity_never_live() -> None:
    """Doublets that were pruned for good, of which zeros are left, must not fill up what is left of a budget."""
    scores = torch.tensor([3.0, -torch.inf, 2.0, -torch.inf])
    for policy in POLICIES:
        assert Case(scores, 100, [2, 2], [5, 3]).mask(policy).tolist() == [True, False, True, False]


# ------------------------------------------------------------------------------------------------ uniform


@settings(max_examples=200)
@given(case=in_triplets)
def test_uniform_deals_one_at_a_time(case: Case) -> None:
    """Round after round, to the matrices that still have triplets, in the order of their turns."""
    dealt, left = [0] * len(case.sizes), min(case.budget, len(case.scores))
    turns = spread(len(case.sizes))
    while left:
        for k in sorted(range(len(case.sizes)), key=turns.__getitem__):
            if left and dealt[k] < case.sizes[k]:
                dealt[k] += 1
                left -= 1
    assert case.ranks("uniform") == dealt


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
def test_uniform_by_example(budget: int, sizes: list[int], shares: list[int]) -> None:
    assert Case(torch.rand(sum(sizes)), budget, sizes, [1] * len(sizes)).ranks("uniform") == shares


def test_uniform_in_parameters_is_one_rank_as_far_as_it_goes() -> None:
    """Three matrices whose triplets have 10, 30 and 10 parameters: rank 2 each takes 100; 125 leaves a third for two of
    them, which the larger is passed over for."""
    case = Case(torch.rand(12), 125, [4, 4, 4], [10, 30, 10])
    assert case.ranks("uniform") == [3, 2, 3]
    assert Case(case.scores, 100, case.sizes, case.costs).ranks("uniform") == [2, 2, 2]


def test_matrices_compete_only_globally() -> None:
    """The difference between the paper's policy and its ablation."""
    scores, sizes, costs = torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0]), [3, 3], [1, 1]
    assert global_topk(scores, 3, sizes, costs).tolist() == [True, True, True, False, False, False]
    assert uniform(scores, 4, sizes, costs).tolist() == [True, True, False, False, True, True]
