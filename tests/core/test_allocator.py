"""One model's budget from the first step to the last, driven step by step."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import Tensor, nn

from adalora.core import orthogonality as orth
from adalora.core.allocator import LIVE, Allocator
from adalora.core.errors import ConfigError, ScheduleError, StateError
from adalora.core.importance import METRICS
from adalora.core.policy import POLICIES
from adalora.core.schedule import CURVES
from adalora.core.settings import RANKINGS, Settings
from adalora.core.triplets import Triplets
from tests.core.toys import Toy, adamw, feed, momentum, plan, randn, random_triplets, train

STEPS = range(1, 17)  # of plan(): pruning from step 3, allocations at 4, 6, 8, 10 and 12

# ------------------------------------------------------------------------------------------------ the budget holds


@given(
    ranks=st.lists(st.integers(2, 5), min_size=3, max_size=3),
    metric=st.sampled_from(sorted(METRICS)),
    policy=st.sampled_from(sorted(POLICIES)),
    curve=st.sampled_from(sorted(CURVES)),
    delta_t=st.integers(1, 5),
    t_init=st.integers(0, 5),
    t_final=st.integers(0, 5),
    compact=st.booleans(),
    sensitivity_at=st.sampled_from(["before_step", "after_step"]),
)
def test_the_budget_holds_after_every_step(ranks: list[int], compact: bool, **layout: Any) -> None:
    """Whatever the layout: live triplets follow b(t) at every allocation, and are exactly the target at the end."""
    toy = Toy(ranks)
    allocator = Allocator(toy.triplets, plan(compact=compact, **layout))
    schedule = allocator.schedule
    assert schedule is not None
    wanted = schedule.initial_budget

    def after(step: int) -> None:
        nonlocal wanted
        if schedule.allocates(step):
            wanted = schedule.budget(step)
            assert sum(int(t.lam.count_nonzero()) for t in toy.triplets) <= wanted
        assert allocator.step == step and allocator.budget == schedule.budget(step)
        assert allocator.live == wanted == sum(allocator.ranks().values())
        assert allocator.frozen == (not schedule.prunes or step >= schedule.final_step)

    train(toy, allocator, adamw(toy.parameters()), STEPS, after)
    assert allocator.live == 6
    assert allocator.sizes == (list(allocator.ranks().values()) if compact else ranks)
    assert [a.step for a in allocator.trace] == [s for s in STEPS if schedule.allocates(s)]


@given(
    ranks=st.lists(st.integers(2, 5), min_size=3, max_size=3),
    metric=st.sampled_from(sorted(METRICS)),
    policy=st.sampled_from(sorted(POLICIES)),
)
def test_an_allocation_zeroes_the_worst_and_touches_nothing_else(ranks: list[int], metric: str, policy: str) -> None:
    """λ of what the policy leaves out is exactly 0; every other number of the model keeps its bits."""
    toy = Toy(ranks)
    allocator = Allocator(toy.triplets, plan(metric=metric, policy=policy, compact=False))
    optimizer = adamw(toy.parameters())
    for step in range(1, 13):
        optimizer.zero_grad()
        toy.loss(step).backward()
        allocator.before_step()
        optimizer.step()
        before, scores = toy.values(), allocator.scores()
        allocator.after_step(optimizer)
        assert allocator.schedule is not None
        if allocator.schedule.allocates(step):
            mask = POLICIES[policy](scores, allocator.schedule.budget(step), ranks, [1, 1, 1])
            expected = list(before)
            for k, lives in enumerate(mask.split(ranks)):
                expected[3 * k + 1] = torch.where(lives, before[3 * k + 1], 0.0)
            assert allocator.ranks() == {f"m{k}": int(lives.sum()) for k, lives in enumerate(mask.split(ranks))}
        else:
            expected = before
        assert all(torch.equal(a, b) for a, b in zip(toy.values(), expected, strict=True))


SIZES = ((6, 5), (4, 7), (20, 12), (3, 30))  # triplets of 11, 11, 32 and 33 parameters


@given(
    target=st.integers(40, 340),
    ranks=st.lists(st.integers(4, 6), min_size=4, max_size=4),
    metric=st.sampled_from(sorted(METRICS)),
    policy=st.sampled_from(sorted(POLICIES)),
    rank_by=st.sampled_from(RANKINGS),
    compact=st.booleans(),
)
def test_a_budget_in_parameters_holds_after_every_allocation(target: int, ranks: list[int], **layout: Any) -> None:
    """Never more than b(t), and within the smallest pruned triplet of it; so is what is left in memory at the end."""
    toy = Toy(ranks, SIZES)
    allocator = Allocator(toy.triplets, plan(target_rank=None, budget=target, budget_unit="parameters", **layout))
    schedule, costs = allocator.schedule, [11, 11, 32, 33]
    assert schedule is not None and allocator.costs == costs
    assert schedule.initial_budget == sum(map(int.__mul__, ranks, costs)) == allocator.spent

    def after(step: int) -> None:
        if schedule.allocates(step):
            live = list(allocator.ranks().values())
            left = schedule.budget(step) - sum(map(int.__mul__, live, costs))
            assert 0 <= left == schedule.budget(step) - allocator.spent
            assert left < min(cost for cost, rank, size in zip(costs, live, ranks, strict=True) if rank < size)

    train(toy, allocator, adamw(toy.parameters()), STEPS, after)
    assert target - 33 < allocator.spent <= target == allocator.trace[-1].budget
    in_memory = sum(w.numel() for t in toy.triplets for w in (t.p, t.q))
    assert in_memory == (allocator.spent if layout["compact"] else schedule.initial_budget)


def test_scores_per_parameter_are_scores_over_sizes() -> None:
    plain, by_size = (
        Allocator(Toy((4,) * 4, SIZES).triplets, plan(rank_by=rank_by, budget_unit="parameters"))
        for rank_by in RANKINGS
    )
    for allocator in (plain, by_size):
        shapes = [w.shape for t in allocator.triplets for w in t.parameters]
        feed(allocator, [[randn(*shape, seed=7 * k) for k, shape in enumerate(shapes)]] * 2)
    each = torch.tensor([11.0, 11.0, 32.0, 33.0], dtype=torch.float64).repeat_interleave(4)
    assert bool(plain.scores().any())
    torch.testing.assert_close(by_size.scores(), plain.scores() / each, rtol=1e-12, atol=0)


def test_a_fraction_leaves_most_matrices_without_a_triplet() -> None:
    """A quarter of a triplet for each of eight matrices: two live, the others are empty in memory."""
    toy = Toy((1,) * 8, ((6, 5),) * 8)
    allocator = Allocator(toy.triplets, plan(target_rank=0.25))
    assert (allocator.initial_budget, allocator.target_budget) == (8, 2)
    train(toy, allocator, adamw(toy.parameters()), STEPS)
    assert sorted(allocator.sizes) == [0] * 6 + [1] * 2
    assert sum(w.numel() for w in toy.parameters()) == 2 * 12
    with pytest.raises(ConfigError, match=r"target_r=0.25 x 3 matrices\) leaves nothing to train"):
        Allocator(Toy((1, 1, 1)).triplets, plan(target_rank=0.25))


def test_allocations_wait_until_a_triplet_has_a_score() -> None:
    """Λ starts at 0, so the loss has no gradient in P and Q, and λ times its own is 0, too. What the regulariser adds
    says nothing, be it large, where P and Q cannot be orthonormal, or a rounding."""
    toy = Toy((5, 5, 2))
    with torch.no_grad():
        for t in toy.triplets:
            t.lam.zero_()
    allocator = Allocator(toy.triplets, plan(t_init=0, t_final=10, delta_t=1))  # allocations from step 1 to step 6
    live: list[int] = []
    train(toy, allocator, adamw(toy.parameters()), range(1, 7), lambda step: live.append(allocator.live))
    assert [a.step for a in allocator.trace] == [2, 3, 4, 5, 6]
    assert live[0] == 12 > live[1] and live[-1] == 6 and bool(allocator.scores().any())


def test_a_last_allocation_among_zeros_shares_evenly_and_says_so() -> None:
    allocator = Allocator(
        Toy((4,) * 4, SIZES).triplets, plan(t_init=0, t_final=14, delta_t=1, target_rank=1.5, total_step=18)
    )
    with torch.no_grad():
        for t in allocator.triplets:
            t.lam.zero_()
    ones = [torch.ones_like(w) for t in allocator.triplets for w in t.parameters]
    feed(allocator, [ones] * 3)
    assert allocator.trace == [] and allocator.live == 16 and bool(allocator.scores().any())
    with pytest.warns(UserWarning, match="at the last allocation no gradient had told triplets apart"):
        feed(allocator, [ones])
    assert sorted(allocator.ranks().values()) == [1, 1, 2, 2] and allocator.frozen


@pytest.mark.parametrize(("t_final", "told"), [(1, True), (0, False)])
def test_a_training_too_short_to_rank_says_so_before_it_starts(t_final: int, told: bool) -> None:
    """Four steps, of which the last allocation follows the third: gradients have said nothing before."""
    allocator = Allocator(Toy().triplets, plan(t_init=0, t_final=t_final, delta_t=1, total_step=None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        allocator.plan(4)
        allocator.plan(4)  # a Trainer plans again: once is enough
    assert [str(warning.message)[:30] for warning in caught] == ["Too few steps to rank anything"] * told
    assert told == ("Too few steps to rank anything" in allocator.describe())


def test_a_state_of_another_unit_is_refused() -> None:
    allocator = Allocator(Toy().triplets, plan(budget_unit="parameters"))
    with pytest.raises(StateError, match="made with budget_unit='parameters', this model has 'triplets'"):
        Allocator(Toy().triplets, plan()).load_state_dict(allocator.state_dict())


def test_a_second_training_starts_from_what_the_first_has_left() -> None:
    """Less than the target by a part of a triplet: there is nothing to prune then."""
    toy = Toy((4,) * 4, SIZES)
    allocator = Allocator(toy.triplets, plan(target_rank=None, budget=130, budget_unit="parameters"))
    train(toy, allocator, adamw(toy.parameters()), STEPS)
    spent = allocator.spent
    assert 97 < spent < 130
    allocator.restart()
    assert allocator.initial_budget == spent and allocator.frozen
    allocator.plan(16)
    assert "nothing to prune" in allocator.describe()
    train(toy, allocator, adamw(toy.parameters()), STEPS)
    assert allocator.spent == spent


def test_pruned_triplets_can_return_while_pruning_goes_on() -> None:
    """One budget of one: the first triplet matters early, the second later; the second was pruned and comes back."""
    t = random_triplets(4, 4, 2)
    with torch.no_grad():
        t.lam.copy_(torch.tensor([1.0, 1.0]))
    p, q = t.p.detach().clone(), t.q.detach().clone()
    settings = plan(
        target_rank=1, curve="constant", t_init=1, t_final=2, delta_t=4, total_step=16, metric="singular",
        beta1=0.5, beta2=0.5, orthogonality_weight=0.0,
    )  # fmt: skip
    allocator = Allocator([t], settings)
    optimizer = torch.optim.SGD(t.parameters, lr=0.1)
    ranks: dict[int, list[bool]] = {}
    for step in range(1, 17):
        early = step <= 4
        for w in t.parameters:
            w.grad = torch.zeros_like(w)
        assert t.lam.grad is not None
        t.lam.grad.copy_(torch.tensor([1.0, 0.01] if early else [0.01, -1.0])[: t.rank])
        allocator.before_step()
        optimizer.step()
        allocator.after_step(optimizer)
        ranks[step] = (t.lam != 0).tolist()
        if step == 4:
            assert ranks[4] == [True, False]  # pruned
        if step == 8:
            assert ranks[8] == [False, True]  # back, and with the vectors that it had
            assert torch.equal(t.p, p) and torch.equal(t.q, q)
            assert float(t.lam[1].detach()) == pytest.approx(0.4)  # what four steps of SGD have made of its 0
    assert t.rank == 1 and torch.equal(t.p, p[:, 1:]) and torch.equal(t.q, q[1:])


@pytest.mark.parametrize("optimizer", [adamw, momentum])
@pytest.mark.parametrize("compact", [True, False])
def test_the_final_phase_keeps_the_mask(optimizer: Callable[[Any], torch.optim.Optimizer], compact: bool) -> None:
    """Momentum pushes pruned λ on; after every step of the final phase they are 0 again, and the ranks are the same."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan(compact=compact))
    masks: list[Tensor] = []

    def after(step: int) -> None:
        if step >= 12:
            masks.append(torch.cat([t.lam.detach() for t in toy.triplets]) != 0)
            assert int(masks[-1].sum()) == 6 == allocator.live

    train(toy, allocator, optimizer(toy.parameters()), STEPS, after)
    assert len(masks) == 5 and all(torch.equal(mask, masks[0]) for mask in masks)
    assert sum(allocator.sizes) == (6 if compact else 12)


@pytest.mark.parametrize("optimizer", [adamw, momentum])
def test_compaction_does_not_change_the_training(optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Compact or masked, live triplets go the same way (without the regulariser, through which pruned ones act)."""
    toys = Toy(), Toy()
    for toy, compact in zip(toys, (True, False), strict=True):
        allocator = Allocator(toy.triplets, plan(compact=compact, orthogonality_weight=0.0))
        train(toy, allocator, optimizer(toy.parameters()), STEPS)
    assert [t.rank for t in toys[0].triplets] != [t.rank for t in toys[1].triplets]
    for small, large in zip(toys[0].triplets, toys[1].triplets, strict=True):
        # float64; sums over fewer terms, followed for four steps
        torch.testing.assert_close(small.delta(), large.delta(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", orth.KINDS)
@pytest.mark.parametrize("optimizer", [adamw, momentum])
def test_pinned_shapes_do_not_change_the_training(
    optimizer: Callable[[Any], torch.optim.Optimizer], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under DDP: what cannot be sliced away is 0 altogether, so neither the regulariser nor the norm of gradients
    sees it. One process or several, the update ends the same."""
    toys = Toy(), Toy()
    for toy, pinned in zip(toys, (False, True), strict=True):
        allocator = Allocator(toy.triplets, plan(orthogonality_weight=0.5, orthogonality=kind))
        if pinned:
            monkeypatch.setattr(allocator, "is_resizable", lambda *_: False)
        ours = optimizer(toy.parameters())
        for step in STEPS:
            ours.zero_grad()
            toy.loss(step).backward()
            nn.utils.clip_grad_norm_(toy.parameters(), 0.05)
            allocator.before_step()
            ours.step()
            allocator.after_step(ours)
    assert toys[0].triplets[0].rank != 4 == toys[1].triplets[0].rank
    for small, large in zip(toys[0].triplets, toys[1].triplets, strict=True):
        # float64; sums over fewer terms, followed for four steps
        torch.testing.assert_close(small.delta(), large.delta(), rtol=1e-9, atol=1e-12)
    resumed = Toy()
    again = Allocator(resumed.triplets, plan(orthogonality_weight=0.5, orthogonality=kind))
    monkeypatch.setattr(again, "is_resizable", lambda *_: False)
    again.load_state_dict(allocator.state_dict())
    for which in (allocator, again):  # the state says that pruned vectors do not count
        for w in (w for t in which.triplets for w in t.parameters):
            w.grad = torch.zeros_like(w)
        which.before_step()
    for a, b in zip(toys[1].triplets, resumed.triplets, strict=True):
        assert all(torch.equal(v.grad, w.grad) for v, w in zip(a.parameters, b.parameters, strict=True))


def factored(parameters: Any) -> torch.optim.Optimizer:
    """Its second moments are one number a row and one a column, in tensors of one dimension."""
    from transformers.optimization import Adafactor

    return Adafactor(list(parameters), lr=0.05, relative_step=False, scale_parameter=False)


ADAPTIVE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adafactor": lambda w: torch.optim.Adafactor(list(w)),
    "Adafactor of transformers": factored,
    "Adagrad": lambda w: torch.optim.Adagrad(w, lr=0.05),
    "AMSGrad": lambda w: torch.optim.AdamW(w, lr=0.05, amsgrad=True),
    "NAdam": lambda w: torch.optim.NAdam(w, lr=0.05),
    "Rprop": lambda w: torch.optim.Rprop(w, lr=0.05),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_any_optimizer_trains_through_the_whole_schedule(name: str) -> None:
    """Whatever shape an optimizer's state has, the step after the ranks have shrunk works and the budget holds."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    train(toy, allocator, ADAPTIVE[name](toy.parameters()), STEPS)
    assert allocator.live == 6 and sum(int(t.lam.count_nonzero()) for t in toy.triplets) <= 6
    assert all(bool(value.isfinite().all()) for value in toy.values())


@pytest.mark.parametrize("name", ["AdamW", *ADAPTIVE])
def test_a_matrix_that_loses_every_triplet(name: str) -> None:
    """Rank 0 leaves parameters without entries, over which some optimizers would take means; training goes on."""
    toy = Toy(shapes=((6, 5), (8, 7), (6, 5)))
    with torch.no_grad():  # this matrix has nothing to learn, so nothing speaks for its triplets
        toy.triplets[1].lam.zero_()
        toy.wanted[1].zero_()
    allocator = Allocator(toy.triplets, plan())
    train(toy, allocator, {"AdamW": adamw, **ADAPTIVE}[name](toy.parameters()), STEPS)
    assert allocator.ranks()["m1"] == 0 == toy.triplets[1].rank and allocator.live == 6 == sum(allocator.sizes)


class Blockwise(torch.optim.Optimizer):
    """SGD whose momentum is kept in eight bits, with one scale for every sixteen entries of the flat tensor."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for w in (w for group in self.param_groups for w in group["params"] if w.grad is not None):
            state = self.state[w]
            momentum = w.grad.clone()
            if state:
                scales = state["scales"].repeat_interleave(16)[: w.numel()].view_as(w)
                momentum += 0.9 * state["momentum"].to(w.dtype) * scales
            blocks = nn.functional.pad(momentum.flatten(), (0, -w.numel() % 16)).view(-1, 16)
            state["scales"] = (blocks.abs().amax(dim=1) / 127).clamp_min(1e-30)
            state["momentum"] = (
                (blocks / state["scales"].unsqueeze(1)).round().to(torch.int8).flatten()[: w.numel()].view_as(w)
            )
            w -= self.param_groups[0]["lr"] * momentum


class Packed(Tensor):
    """A tensor by its looks, codes and scales inside; it knows one operation, to unpack itself."""

    @staticmethod
    def __new__(cls, value: Tensor) -> Packed:
        packed: Packed = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype)  # type: ignore[attr-defined]
        packed.scale = value.abs().max().clamp_min(1e-30) / 127
        packed.codes = (value / packed.scale).round().to(torch.int8)
        return packed

    scale: Tensor
    codes: Tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of a packed tensor")


class PackedMomentum(torch.optim.Optimizer):
    """SGD whose momentum is such a tensor, as low-bit optimizers have it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for w in (w for group in self.param_groups for w in group["params"] if w.grad is not None):
            old = self.state[w].get("momentum")
            momentum = w.grad if old is None else w.grad + 0.9 * old.codes.to(w.dtype) * old.scale
            self.state[w]["momentum"] = Packed(momentum)
            w -= self.param_groups[0]["lr"] * momentum


@pytest.mark.parametrize("optimizer", [Blockwise, PackedMomentum])
def test_state_that_cannot_be_sliced_keeps_the_shapes(optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Eight-bit optimizers scale blocks of the flat tensor: cut, their state would mean something else.

    The ranks are fixed by the mask then, and the optimizer goes on with the state that it had.
    """
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    train(toy, allocator, optimizer(toy.parameters()), STEPS)
    assert allocator.live == 6 == sum(int(t.lam.count_nonzero()) for t in toy.triplets)
    assert allocator.sizes == [4, 4, 4]


def test_lbfgs_trains_through_the_whole_schedule() -> None:
    """Its closure is evaluated several times a step, and its history is one flat vector of all parameters."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    optimizer = torch.optim.LBFGS(toy.parameters(), lr=0.1, max_iter=3)
    for step in STEPS:
        calls = itertools.count()

        def closure(step: int = step, calls: itertools.count[int] = calls) -> Tensor:
            optimizer.zero_grad()
            loss = toy.loss(step)
            loss.backward()
            allocator.before_step(again=next(calls) > 0)
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        allocator.after_step(optimizer)
    assert allocator.step == 16 and allocator.live == 6


# ------------------------------------------------------------------------------------------ what is and is not a step


def test_without_gradients_nothing_happens() -> None:
    """A step of some other model, or with this adapter switched off, is not this model's step."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    before = toy.values()
    for _ in range(20):
        allocator.before_step()
        allocator.after_step()
    assert allocator.step == 0 and allocator.live == 12
    assert all(torch.equal(a, b) for a, b in zip(toy.values(), before, strict=True))
    assert all(w.grad is None for t in toy.triplets for w in t.parameters)


def test_one_step_however_often_it_is_announced() -> None:
    """An optimizer that wraps another announces each step twice: one regulariser, one update, one count."""
    twice, once = Toy(), Toy()
    allocators = Allocator(twice.triplets, plan()), Allocator(once.triplets, plan())
    for toy, allocator, times in zip((twice, once), allocators, (2, 1), strict=True):
        toy.loss(1).backward()
        for _ in range(times):
            allocator.before_step()
        for _ in range(times):
            allocator.after_step()
    assert [a.step for a in allocators] == [1, 1]
    states = [a.state_dict()["tensors"] for a in allocators]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    for a, b in zip(twice.triplets, once.triplets, strict=True):
        assert all(torch.equal(v.grad, w.grad) for v, w in zip(a.parameters, b.parameters, strict=True))


def test_the_regulariser_comes_once_however_many_batches() -> None:
    """Four accumulated batches: the step's gradient is their sum and one ∂(γR)."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan(orthogonality_weight=0.7))
    with torch.no_grad():
        for t in toy.triplets:
            t.p.add_(0.1)
            t.q.add_(0.1)
    for batch in range(4):
        toy.loss(batch).backward()
    parameters = [w for t in toy.triplets for w in t.parameters]
    accumulated = [w.grad.clone() for w in parameters if w.grad is not None]
    regulariser = torch.autograd.grad(0.7 * orth.penalty(toy.triplets), parameters, allow_unused=True)
    allocator.before_step()
    for w, gradient, extra in zip(parameters, accumulated, regulariser, strict=True):
        # closed form against autograd, float64
        torch.testing.assert_close(w.grad, gradient if extra is None else gradient + extra, rtol=1e-11, atol=1e-12)
    assert float(allocator.penalty().detach()) == pytest.approx(0.7 * float(orth.penalty(toy.triplets).detach()))


def test_new_gradients_within_a_step_get_the_regulariser_again() -> None:
    """``again``, for optimizers that evaluate several times: the importance is updated by the first alone."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    with torch.no_grad():
        toy.triplets[0].p.add_(0.1)
    toy.loss(1).backward()
    plain = toy.triplets[0].p.grad.clone()
    allocator.before_step()
    regularised = toy.triplets[0].p.grad.clone()
    state = allocator.state_dict()["tensors"]
    toy.triplets[0].p.grad.copy_(plain)
    allocator.before_step(again=True)
    assert torch.equal(toy.triplets[0].p.grad, regularised) and not torch.equal(plain, regularised)
    after = allocator.state_dict()["tensors"]
    assert all(torch.equal(after[key], state[key]) for key in state)
    allocator.after_step()
    assert allocator.step == 1


@pytest.mark.parametrize("orthogonality", orth.KINDS)
def test_no_weight_no_regulariser(orthogonality: str) -> None:
    """γ = 0 leaves the loss's gradients bit for bit, and makes none where there were none."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan(orthogonality_weight=0.0, orthogonality=orthogonality))
    toy.loss(1).backward()
    toy.triplets[0].q.grad = None
    before = [None if w.grad is None else w.grad.clone() for t in toy.triplets for w in t.parameters]
    allocator.before_step()
    for w, gradient in zip((w for t in toy.triplets for w in t.parameters), before, strict=True):
        assert w.grad is None if gradient is None else torch.equal(w.grad, gradient)
    assert allocator.penalty() == 0


def test_frozen_parameters_get_no_gradient() -> None:
    """A part with requires_grad=False stays as it is, the other parts get the regulariser as ever."""
    toy = Toy()
    with torch.no_grad():
        for t in toy.triplets:
            t.p.add_(0.1)
            t.q.add_(0.1)
    toy.triplets[0].p.requires_grad_(False)
    toy.triplets[1].q.requires_grad_(False)
    allocator = Allocator(toy.triplets, plan())
    optimizer = adamw(toy.parameters())
    before = toy.triplets[0].p.detach().clone(), toy.triplets[1].q.detach().clone()
    toy.loss(1).backward()
    plain = toy.triplets[2].p.grad.clone()
    allocator.before_step()
    assert toy.triplets[0].p.grad is None and toy.triplets[1].q.grad is None
    assert not torch.equal(toy.triplets[2].p.grad, plain)
    optimizer.step()
    allocator.after_step(optimizer)
    assert torch.equal(toy.triplets[0].p, before[0]) and torch.equal(toy.triplets[1].q, before[1])
    train(toy, allocator, optimizer, range(2, 17))
    assert allocator.live == 6 and toy.triplets[0].p.grad is None and not toy.triplets[0].p.requires_grad


@pytest.mark.parametrize("sensitivity_at", ["before_step", "after_step"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_the_importance(sensitivity_at: Any, bad: float) -> None:
    """Such a step must not poison the averages for good: its state is bit for bit that of the step before."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan(sensitivity_at=sensitivity_at))
    optimizer = adamw(toy.parameters())
    train(toy, allocator, optimizer, [1])
    moving = {k: v for k, v in allocator.state_dict()["tensors"].items() if k.endswith(("sensitivity", "uncertainty"))}
    assert len(moving) == 18 and any(bool(v.any()) for v in moving.values())
    optimizer.zero_grad()
    toy.loss(2).backward()
    toy.triplets[1].q.grad[0, 0] = bad
    allocator.before_step()
    allocator.after_step()
    after = allocator.state_dict()["tensors"]
    assert all(torch.equal(after[key], value) for key, value in moving.items())
    optimizer.zero_grad()
    toy.loss(3).backward()
    allocator.before_step()
    allocator.after_step()
    assert all(bool(v.isfinite().all()) for v in allocator.state_dict()["tensors"].values())
    assert not torch.equal(allocator.state_dict()["tensors"]["m0/lam.sensitivity"], moving["m0/lam.sensitivity"])


@pytest.mark.parametrize("sensitivity_at", ["before_step", "after_step"])
@pytest.mark.parametrize("scaled_again", [False, True])  # PyTorch's fused optimizers leave them as they used them
def test_scaled_gradients_give_the_same_result(sensitivity_at: Any, scaled_again: bool) -> None:
    """Gradients that a loss scaler has multiplied, with its factor: the regulariser and importance are as without."""
    plain, scaled = Toy(), Toy()
    factor = torch.tensor(1024.0)  # a power of two, as scalers use: exact
    allocators = [
        Allocator(toy.triplets, plan(sensitivity_at=sensitivity_at, orthogonality_weight=0.5))
        for toy in (plain, scaled)
    ]
    optimizers = [adamw(toy.parameters()) for toy in (plain, scaled)]
    for step in STEPS:
        for toy, allocator, optimizer, scale in zip(
            (plain, scaled), allocators, optimizers, (None, factor), strict=True
        ):
            optimizer.zero_grad()
            (toy.loss(step) * (1.0 if scale is None else factor.double())).backward()
            allocator.before_step(scale)
            for w in toy.parameters():
                if scale is not None and w.grad is not None:
                    w.grad.div_(scale)  # as a fused optimizer does in its own kernel
            optimizer.step()
            for w in toy.parameters() if scaled_again else ():
                if scale is not None and w.grad is not None:
                    w.grad.mul_(scale)
            allocator.after_step(optimizer)
        states = [allocator.state_dict()["tensors"] for allocator in allocators]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            torch.testing.assert_close(states[1][key], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sensitivity_at", ["before_step", "after_step"])
def test_which_weights_the_sensitivity_sees(sensitivity_at: Any) -> None:
    """The paper's: those that the gradient was taken at. The authors' code: those the optimizer has just made."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan(sensitivity_at=sensitivity_at))
    old = toy.values()
    train(toy, allocator, momentum(toy.parameters()), [1])
    tensors = allocator.state_dict()["tensors"]
    for k, t in enumerate(toy.triplets):
        for n, (side, w) in enumerate(zip(("p", "lam", "q"), t.parameters, strict=True)):
            seen = old[3 * k + n] if sensitivity_at == "before_step" else w.detach()
            assert w.grad is not None and not torch.equal(old[3 * k + n], w.detach())
            expected = 0.15 * (seen * w.grad).abs()
            expected = expected.T if side == "p" else expected  # singular vectors are rows in the state
            # float64; 1 - β1 is one rounding away from 0.15
            torch.testing.assert_close(tensors[f"m{k}/{side}.sensitivity"], expected, rtol=1e-12, atol=0)


def test_the_importance_rests_in_the_final_phase() -> None:
    """Its last update is that of the step before pruning ends; then it is dropped, and with it its memory."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    optimizer = adamw(toy.parameters())
    kept: dict[int, Tensor | None] = {}
    train(toy, allocator, optimizer, [*range(1, 12)])
    before = allocator.scores()
    optimizer.zero_grad()
    toy.loss(12).backward()
    allocator.before_step()
    assert torch.equal(allocator.scores(), before)
    optimizer.step()
    allocator.after_step(optimizer)
    kept[12] = allocator.state_dict()["tensors"].get("m0/lam.sensitivity")
    train(toy, allocator, optimizer, range(13, 17))
    assert kept[12] is None
    assert not any(key.endswith("y") and "." in key for key in allocator.state_dict()["tensors"])


# ------------------------------------------------------------------------------------------------ what makes no sense


def test_equal_ranks_are_lora_in_svd_form() -> None:
    """init == target: no schedule is needed, nothing is pruned, nothing is kept about importance."""
    toy = Toy((2, 2, 2))
    allocator = Allocator(toy.triplets, Settings(target_rank=2))
    before, addresses = toy.values(), [w.data_ptr() for w in toy.parameters()]
    train(toy, allocator, adamw(toy.parameters()), STEPS)
    assert [w.data_ptr() for w in toy.parameters()] == addresses
    assert allocator.step == 16 and allocator.ranks() == {"m0": 2, "m1": 2, "m2": 2} and allocator.trace == []
    assert not any(torch.equal(a, b) for a, b in zip(toy.values(), before, strict=True))
    assert {key.split("/")[1] for key in allocator.state_dict()["tensors"]} == {"p", "lam", "q", "mask"}
    allocator.compact()
    assert allocator.sizes == [2, 2, 2]


def test_an_average_of_unequal_ranks_is_pruned_to_the_target() -> None:
    """Ranks 1, 2 and 6 with a target of 2 a matrix: nine triplets compete for six places."""
    toy = Toy((1, 2, 6))
    allocator = Allocator(toy.triplets, plan())
    assert (allocator.initial_budget, allocator.target_budget) == (9, 6)
    train(toy, allocator, adamw(toy.parameters()), STEPS)
    assert allocator.live == 6 == sum(allocator.sizes)


def test_a_target_above_the_start() -> None:
    with pytest.raises(ConfigError, match=r"sum to 9 triplets.*target of 12.*target_r=4 x 3.*Raise init_r"):
        Allocator(Toy((4, 4, 1)).triplets, plan(target_rank=4))


def test_models_that_cannot_be_meant() -> None:
    with pytest.raises(ConfigError, match="no matrix"):
        Allocator([], plan())
    with pytest.raises(ConfigError, match=r"same name: \['m'\]"):
        Allocator([random_triplets(4, 4, 4), random_triplets(4, 4, 4), random_triplets(4, 4, 4, name="x")], plan())
    with pytest.raises(ScheduleError, match="no step is left"):
        Allocator(Toy().triplets, plan(total_step=6))


def test_a_refused_allocator_is_not_driven() -> None:
    """What raised in its making must not be found by an optimizer's step later."""
    before = set(LIVE)
    for settings in (plan(target_rank=9), plan(total_step=6)):
        with pytest.raises(ConfigError):
            Allocator(Toy().triplets, settings)
    assert set(LIVE) <= before


@pytest.mark.parametrize("compact", [True, False])
def test_the_final_phase_remembers_the_scores_of_the_last_allocation(compact: bool) -> None:
    """Sliced along with the ranks, saved, restored, and gone when a schedule begins anew."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan(compact=compact))
    optimizer, seen = adamw(toy.parameters()), []
    for step in range(1, 17):
        toy.loss(step).backward()
        allocator.before_step()
        if step == 12:  # the last allocation ranks by what is known then
            seen = allocator.scores()
        optimizer.step()
        allocator.after_step(optimizer)
        optimizer.zero_grad()
    kept = torch.zeros_like(seen, dtype=torch.bool)
    kept[seen.sort(descending=True, stable=True).indices[: allocator.target_budget]] = True
    expected = seen[kept] if compact else seen
    assert torch.equal(allocator.scores(), expected) and bool(expected.any())
    other = Allocator(Toy().triplets, plan(compact=compact))
    other.load_state_dict(allocator.state_dict())
    assert torch.equal(other.scores(), expected)
    other.restart()
    assert not other.scores().any()


def test_without_a_number_of_steps_t_final_is_where_pruning_by_hand_ends() -> None:
    """A length of the final phase in steps leaves room for one step, after which a loop by hand shows itself."""
    toy, reference = Toy(), Toy()
    allocator = Allocator(toy.triplets, plan(total_step=None, t_final=8))
    planned = Allocator(reference.triplets, plan(total_step=8, t_final=0))
    for step in range(1, 11):
        for model, ours in ((toy, allocator), (reference, planned)):
            model.loss(step).backward()
            ours.before_step()
            ours.after_step()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                ours.update_and_allocate(step)
            expected = ["tfinal=8 is read as the step at which pruning ends"] if (step, ours) == (1, allocator) else []
            assert [text for text in expected if text in str(caught[0].message)] == expected
            assert len(caught) == len(expected)
    masks = [[line._replace(scores=None) for line in ours.trace] for ours in (allocator, planned)]
    assert masks[0] == masks[1] and allocator.live == allocator.target_budget and allocator.frozen


def test_a_loop_that_turns_out_not_to_be_by_hand_is_told_at_its_second_step() -> None:
    toy = Toy()
    allocator = Allocator(toy.triplets, plan(total_step=None, t_final=8))
    toy.loss(1).backward()
    allocator.before_step()
    allocator.after_step()
    with pytest.raises(ScheduleError, match=r"AdaLoraConfig\(total_step=.*update_and_allocate"):
        allocator.before_step()


def test_without_a_number_of_steps_the_first_one_explains_itself() -> None:
    """Both ways to give it are named, and nothing has happened: given the number, the very same step can be taken."""
    toy, planned = Toy(), Toy()
    allocator = Allocator(toy.triplets, plan(total_step=None, t_final=0.25))
    reference = Allocator(planned.triplets, plan())
    assert "unknown" in allocator.describe() and allocator.budget == 12 and allocator.header()["schedule"] is None
    toy.loss(1).backward()
    gradients = [w.grad.clone() for w in toy.parameters() if w.grad is not None]
    for _ in range(2):
        with pytest.raises(ScheduleError, match=r"AdaLoraConfig\(total_step=.*callbacks=\[AdaLoraCallback\(\)\]"):
            allocator.before_step()
        assert all(torch.equal(w.grad, g) for w, g in zip(toy.parameters(), gradients, strict=True) if g is not None)
    assert allocator.step == 0
    allocator.plan(16)
    allocator.before_step()
    allocator.after_step()
    planned.loss(1).backward()
    reference.before_step()
    reference.after_step()
    ours, theirs = (a.state_dict()["tensors"] for a in (allocator, reference))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(toy.parameters(), planned.parameters(), strict=True)
        if a.grad is not None
    )


def test_lengths_in_epochs_wait_for_their_unit() -> None:
    toy = Toy()
    allocator = Allocator(toy.triplets, plan(t_init="1 epoch", t_final="0.5 epochs"))
    assert allocator.schedule is None
    toy.loss(1).backward()
    with pytest.raises(ScheduleError, match="steps_per_epoch"):
        allocator.before_step()
    with pytest.raises(ScheduleError, match="epochs"):
        allocator.plan(16)
    allocator.plan(16, steps_per_epoch=4)
    assert allocator.schedule is not None and (allocator.schedule.t_init, allocator.schedule.final_step) == (4, 14)
    assert allocator.describe() == allocator.schedule.describe(3)


def test_a_schedule_that_changes_in_training_says_so() -> None:
    """The same plan again is silent; another one warns, and is followed."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    optimizer = adamw(toy.parameters())
    allocator.plan(20)  # before the first step: nothing has changed
    allocator.plan(16)
    train(toy, allocator, optimizer, range(1, 5))
    allocator.plan(16)
    with pytest.warns(UserWarning, match="changes at step 4 .*24 optimizer steps"):
        allocator.plan(24)
    train(toy, allocator, optimizer, range(5, 20))
    assert not allocator.frozen
    train(toy, allocator, optimizer, range(20, 25))
    assert allocator.frozen and allocator.live == 6
    allocator.plan(99)  # in the final phase there is nothing left to change


# ------------------------------------------------------------------------------------------------ by hand, as with PEFT


def manually(toy: Toy, allocator: Allocator, optimizer: torch.optim.Optimizer, step: int, *, tell: bool = True) -> None:
    optimizer.zero_grad()
    toy.loss(step).backward()
    allocator.before_step()
    optimizer.step()
    allocator.after_step(optimizer)
    if tell:
        allocator.update_and_allocate(step)


def test_by_hand_is_as_by_the_hook() -> None:
    """Calling update_and_allocate after every step with the same numbers changes nothing."""
    toys = Toy(), Toy()
    allocators = [Allocator(toy.triplets, plan()) for toy in toys]
    train(toys[0], allocators[0], adamw(toys[0].parameters()), STEPS)
    optimizer = adamw(toys[1].parameters())
    for step in STEPS:
        manually(toys[1], allocators[1], optimizer, step)
    assert allocators[1].manual and allocators[0].trace == allocators[1].trace
    assert all(torch.equal(a, b) for a, b in zip(toys[0].values(), toys[1].values(), strict=True))


@given(calls=st.sets(st.integers(2, 16), max_size=6))
def test_no_step_is_magic(calls: set[int]) -> None:
    """Called at any steps at all: the first call from T - t_final on ends the pruning at the target."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    optimizer = adamw(toy.parameters())
    manually(toy, allocator, optimizer, 1)  # from here on the hook leaves it to us
    for step in range(2, 17):
        manually(toy, allocator, optimizer, step, tell=step in calls)
    late = [step for step in calls if step >= 12]
    assert allocator.frozen == bool(late)
    if late:
        assert allocator.live == 6 == sum(allocator.sizes) and allocator.trace[-1].step == min(late)
    else:
        assert sum(allocator.sizes) == 12
    assert {a.step for a in allocator.trace} <= calls


@pytest.mark.parametrize("compact", [True, False])
def test_by_hand_and_no_longer_than_needed(compact: bool) -> None:
    """PEFT's signature has no optimizer: its state follows nevertheless. Nor need one go on calling after pruning."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan(compact=compact))
    optimizer = adamw(toy.parameters())
    for step in STEPS:
        manually(toy, allocator, optimizer, step, tell=False)
        if step <= 13:
            allocator.update_and_allocate(step)
    assert allocator.live == 6
    assert sum(int(t.lam.count_nonzero()) for t in toy.triplets) <= 6


def test_taking_over_after_the_hook_has_masked_the_first_step() -> None:
    """A loop that counts from 0 and allocates at every step: the hook's own first mask is undone."""
    settings = plan(t_init=0, delta_t=1, curve="constant")
    toy, untouched = Toy(), Toy()
    allocator = Allocator(toy.triplets, settings)
    optimizers = adamw(toy.parameters()), adamw(untouched.parameters())
    unmasked = Allocator(untouched.triplets, plan())
    train(untouched, unmasked, optimizers[1], [1])
    manually(toy, allocator, optimizers[0], 1, tell=False)
    assert allocator.live == 6
    allocator.update_and_allocate(0)  # this loop's step 0: no allocation yet
    assert all(torch.equal(a.lam, b.lam) for a, b in zip(toy.triplets, untouched.triplets, strict=True))
    assert allocator.live == 12 and allocator.ranks() == {"m0": 4, "m1": 4, "m2": 4}
    assert allocator.trace == []


def test_calls_at_the_wrong_time() -> None:
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    with pytest.raises(StateError, match=r"update_and_allocate\(1\) came before any optimizer step"):
        allocator.update_and_allocate(1)
    with pytest.raises(StateError, match=r"pruning goes on until 12 \(now at step 0\)"):
        allocator.compact()
    assert not allocator.manual
    equal = Allocator(Toy((2, 2, 2)).triplets, Settings(target_rank=2))
    equal.triplets[0].p.grad = torch.zeros_like(equal.triplets[0].p)
    equal.before_step()
    equal.after_step()
    with pytest.raises(ScheduleError, match="total_step"):
        equal.update_and_allocate(1)


# ------------------------------------------------------------------------------------------------ compaction


def test_compaction_waits_for_what_holds_the_shapes() -> None:
    """A graph that is still needed at the last allocation: masked until it is gone, compact at the next step."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    optimizer = adamw(toy.parameters())
    train(toy, allocator, optimizer, range(1, 12))
    held = toy.loss(99)
    train(toy, allocator, optimizer, [12])
    assert allocator.frozen and sum(allocator.sizes) == 12 and allocator.live == 6
    with pytest.raises(StateError, match="held by a graph"):
        allocator.compact(optimizer)
    del held
    train(toy, allocator, optimizer, [13])
    assert sum(allocator.sizes) == 6 == allocator.live


def test_compaction_by_hand() -> None:
    """compact=False keeps the shapes until asked; optimizer state follows, training goes on."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan(compact=False))
    optimizer = adamw(toy.parameters())
    train(toy, allocator, optimizer, range(1, 14))
    before, ranks = [t.delta().detach() for t in toy.triplets], allocator.ranks()
    parameters = list(toy.parameters())
    allocator.compact(optimizer)
    assert allocator.sizes == list(ranks.values()) and allocator.ranks() == ranks
    assert all(a is b for a, b in zip(parameters, toy.parameters(), strict=True))
    for t, delta in zip(toy.triplets, before, strict=True):
        torch.testing.assert_close(t.delta(), delta, rtol=1e-12, atol=1e-14)  # float64, fewer terms to sum
    train(toy, allocator, optimizer, [14, 15, 16])
    allocator.compact(optimizer)  # again: nothing to do
    assert allocator.ranks() == ranks


def test_compaction_is_done_once() -> None:
    """Parameters whose rank is settled are left in peace, also when the target has been changed since."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    optimizer = adamw(toy.parameters())
    train(toy, allocator, optimizer, range(1, 14))
    state = allocator.state_dict()
    other = Toy()
    resumed = Allocator(other.triplets, plan(target_rank=1))
    resumed.load_state_dict(state)
    optimizer = adamw(other.parameters())
    train(other, resumed, optimizer, [14])
    addresses = [w.data_ptr() for w in other.parameters()]
    train(other, resumed, optimizer, [15, 16])
    assert [w.data_ptr() for w in other.parameters()] == addresses
    assert resumed.ranks() == allocator.ranks()


# ------------------------------------------------------------------------------------------------ checkpoints


@functools.cache
def run_to_the_end(settings: Settings, optimizer: Callable[[Any], torch.optim.Optimizer]) -> tuple[Toy, Allocator]:
    toy = Toy()
    allocator = Allocator(toy.triplets, settings)
    train(toy, allocator, optimizer(toy.parameters()), STEPS)
    return toy, allocator


@pytest.mark.parametrize("optimizer", [adamw, momentum])
@profile(max_examples=15)
@given(
    at=st.integers(0, 16),
    metric=st.sampled_from(sorted(METRICS)),
    compact=st.booleans(),
    sensitivity_at=st.sampled_from(["before_step", "after_step"]),
)
def test_a_resumed_training_is_the_uninterrupted_one(
    optimizer: Callable[[Any], torch.optim.Optimizer], at: int, metric: str, compact: bool, sensitivity_at: Any
) -> None:
    """Stopped after any step, restored in a fresh model (with the initial ranks): the same bits at the end."""
    settings = plan(metric=metric, compact=compact, sensitivity_at=sensitivity_at)
    whole, expected = run_to_the_end(settings, optimizer)

    first = Toy()
    allocator = Allocator(first.triplets, settings)
    first_optimizer = optimizer(first.parameters())
    train(first, allocator, first_optimizer, range(1, at + 1))
    state, optimizer_state = copy.deepcopy((allocator.state_dict(), first_optimizer.state_dict()))
    train(first, allocator, first_optimizer, range(at + 1, 17))  # the saved state is a copy: this changes nothing in it

    second = Toy(seed=5)  # other values, to be replaced
    second.wanted = whole.wanted
    resumed = Allocator(second.triplets, plan(metric=metric, compact=compact, sensitivity_at=sensitivity_at))
    second_optimizer = optimizer(second.parameters())
    resumed.load_state_dict(state)
    second_optimizer.load_state_dict(optimizer_state)
    assert resumed.step == at and resumed.budget == allocator.schedule.budget(at)  # type: ignore[union-attr]
    train(second, resumed, second_optimizer, range(at + 1, 17))
    assert all(torch.equal(a, b) for a, b in zip(second.values(), whole.values(), strict=True))
    assert resumed.ranks() == expected.ranks() and resumed.sizes == expected.sizes
    assert resumed.trace == [a for a in expected.trace if a.step > at]


@given(at=st.integers(0, 16), again=st.integers(0, 16))
def test_a_state_survives_its_own_saving(at: int, again: int) -> None:
    """Loaded into any other moment of the same training and saved again, it is what it was."""
    toys = Toy(), Toy()
    allocators = [Allocator(toy.triplets, plan()) for toy in toys]
    for toy, allocator, steps in zip(toys, allocators, (at, again), strict=True):
        train(toy, allocator, adamw(toy.parameters()), range(1, steps + 1))
    state = allocators[0].state_dict()
    allocators[1].load_state_dict(state)
    loaded = allocators[1].state_dict()
    assert {k: v for k, v in loaded.items() if k != "tensors"} == {k: v for k, v in state.items() if k != "tensors"}
    assert loaded["tensors"].keys() == state["tensors"].keys()
    assert all(torch.equal(loaded["tensors"][key], value) for key, value in state["tensors"].items())


def test_a_state_is_plain() -> None:
    """Tensors beside values that JSON knows: no pickle is needed to store it, and nothing is shared with the model."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    train(toy, allocator, adamw(toy.parameters()), range(1, 7))
    state = allocator.state_dict()
    assert all(isinstance(v, Tensor) and not v.requires_grad for v in state["tensors"].values())
    assert state["schedule"] == asdict(allocator.schedule)  # type: ignore[arg-type]
    assert all(isinstance(v, (int, bool, str, list, dict)) for k, v in state.items() if k != "tensors")
    before = toy.values(), allocator.scores()
    for value in state["tensors"].values():
        value.zero_()
    assert all(torch.equal(a, b) for a, b in zip(toy.values(), before[0], strict=True))
    assert torch.equal(allocator.scores(), before[1])


def _other_matrices() -> tuple[Allocator, str]:
    names = [
        random_triplets(6, 5, 4, name="m0"),
        random_triplets(4, 7, 4, name="m1"),
        random_triplets(6, 5, 4, name="z"),
    ]
    return Allocator(names, plan()), r"another model.*lacks \['z'\].*has \['m2'\]"


def _other_shapes() -> tuple[Allocator, str]:
    return Allocator(Toy(shapes=((6, 5), (4, 8), (6, 5))).triplets, plan()), "m1 is 4 x 7, the model's 4 x 8"


def _other_metric() -> tuple[Allocator, str]:
    return Allocator(Toy(seed=1).triplets, plan(metric="singular")), "importance='sensitivity_uncertainty'.*'singular'"


@pytest.mark.parametrize("other", [_other_matrices, _other_shapes, _other_metric])
def test_a_state_of_something_else_is_refused(other: Callable[[], tuple[Allocator, str]]) -> None:
    """The message says what differs, and the allocator it was offered to has not changed."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    train(toy, allocator, adamw(toy.parameters()), range(1, 8))
    offered, words = other()
    _refuses(offered, allocator.state_dict(), words)


def test_a_state_of_another_version_is_refused() -> None:
    toy = Toy()
    state = {**Allocator(Toy().triplets, plan()).state_dict(), "version": 99}
    _refuses(Allocator(toy.triplets, plan()), state, "version 99")


def test_a_state_does_not_meet_a_held_graph() -> None:
    """Ranks that cannot be changed now are a StateError, too, and then no other matrix has been changed either."""
    source = Toy()
    allocator = Allocator(source.triplets, plan())
    train(source, allocator, adamw(source.parameters()), range(1, 14))
    toy = Toy(seed=7)
    held = toy.triplets[2].forward(randn(3, 5, seed=0)).sum()
    _refuses(Allocator(toy.triplets, plan()), allocator.state_dict(), "held")
    held.backward()


def _refuses(offered: Allocator, state: dict[str, Any], words: str) -> None:
    before = offered.state_dict()
    with pytest.raises(StateError, match=words):
        offered.load_state_dict(state)
    after = offered.state_dict()
    assert all(after[key] == before[key] for key in before if key != "tensors")
    assert after["tensors"].keys() == before["tensors"].keys()
    assert all(torch.equal(after["tensors"][key], value) for key, value in before["tensors"].items())


@pytest.mark.parametrize("at", [0, 5, 14])
def test_a_deep_copy_is_another_model(at: int) -> None:
    """Modules and allocator copied together at any time: the copy trains as the original would, and leaves it alone."""
    whole, expected = run_to_the_end(plan(), adamw)
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    optimizer = adamw(toy.parameters())
    train(toy, allocator, optimizer, range(1, at + 1))
    twin, twin_allocator, twin_optimizer = copy.deepcopy((toy, allocator, optimizer))
    assert twin_allocator in LIVE  # an optimizer's step finds the copy as it finds the original
    assert not {id(w) for w in toy.parameters()} & {id(w) for t in twin_allocator.triplets for w in t.parameters}
    before = toy.values(), allocator.state_dict()
    train(twin, twin_allocator, twin_optimizer, range(at + 1, 17))
    assert all(torch.equal(a, b) for a, b in zip(twin.values(), whole.values(), strict=True))
    assert twin_allocator.ranks() == expected.ranks()
    after = allocator.state_dict()
    assert allocator.step == at and all(torch.equal(a, b) for a, b in zip(toy.values(), before[0], strict=True))
    assert all(torch.equal(after["tensors"][key], value) for key, value in before[1]["tensors"].items())


def test_a_pickled_model_goes_on() -> None:
    """torch.save of a whole model, or another process: what comes out trains like what went in."""
    whole, expected = run_to_the_end(plan(), adamw)
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    optimizer = adamw(toy.parameters())
    train(toy, allocator, optimizer, range(1, 6))
    twin, twin_allocator, twin_optimizer = pickle.loads(pickle.dumps((toy, allocator, optimizer)))
    assert twin_allocator in LIVE
    train(twin, twin_allocator, twin_optimizer, range(6, 17))
    assert all(torch.equal(a, b) for a, b in zip(twin.values(), whole.values(), strict=True))
    assert twin_allocator.ranks() == expected.ranks()


def test_weights_from_elsewhere() -> None:
    """Loaded behind the allocator's back: live is what is not zero; the next step says that the state is missing."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    optimizer = adamw(toy.parameters())
    train(toy, allocator, optimizer, range(1, 6))
    for _ in range(2):  # told of each of several parts
        allocator.weights_replaced()
    with torch.no_grad():
        toy.triplets[0].lam[1:] = 0
    assert allocator.ranks()["m0"] == 1 and allocator.live == sum(int(t.lam.count_nonzero()) for t in toy.triplets)
    with pytest.warns(UserWarning, match=r"without their training state.*from step 5.*adalora_state.safetensors"):
        train(toy, allocator, optimizer, [6])
    train(toy, allocator, optimizer, range(7, 17))  # once is enough
    assert allocator.live == 6


def test_ranks_from_elsewhere_are_noticed() -> None:
    """Another rank in one matrix, without a word: the next question or step counts what is there."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan())
    toy.triplets[1].keep(torch.tensor([0, 1, 3]))
    assert allocator.live == 11 and allocator.ranks() == {"m0": 4, "m1": 3, "m2": 4}
    train(toy, allocator, adamw(toy.parameters()), STEPS)
    assert allocator.live == 6


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("at", [7, 16])
def test_a_second_training_of_the_same_model(compact: bool, at: int) -> None:
    """restart(): counts from 0 with the present ranks and weights, and ends at the target again."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan(compact=compact))
    train(toy, allocator, adamw(toy.parameters()), range(1, at + 1))
    values = toy.values()
    allocator.restart()
    assert all(torch.equal(a, b) for a, b in zip(toy.values(), values, strict=True))
    assert allocator.step == 0 and allocator.trace == [] and allocator.budget == sum(allocator.sizes) == allocator.live
    allocator.plan(16)
    train(toy, allocator, adamw(toy.parameters()), STEPS)
    assert allocator.step == 16 and allocator.live == 6


def test_a_second_training_waits_for_the_length_of_its_epochs() -> None:
    """restart() with lengths in epochs: as at first, the schedule waits for a plan that knows them."""
    toy = Toy()
    allocator = Allocator(toy.triplets, plan(t_init="1 epoch"))
    allocator.plan(16, steps_per_epoch=4)
    train(toy, allocator, adamw(toy.parameters()), range(1, 6))
    allocator.restart()
    allocator.plan(16, steps_per_epoch=2)
    train(toy, allocator, adamw(toy.parameters()), STEPS)
    assert allocator.step == 16 and allocator.live == 6


# ------------------------------------------------------------------------------------ what it reports, what it costs


def test_the_orthogonality_error_is_the_mean_deviation() -> None:
    toy = Toy()
    with torch.no_grad():
        for t in toy.triplets:
            t.p.mul_(1.5)
    allocator = Allocator(toy.triplets, plan())
    factors = [x for t in toy.triplets for x in (t.p.detach().T, t.q.detach())]
    norms = [float((x @ x.T - torch.eye(len(x), dtype=x.dtype)).norm()) for x in factors]
    assert allocator.orthogonality_error() == pytest.approx(sum(norms) / len(norms), rel=1e-12)  # float64
    assert max(norms) == pytest.approx(1.25 * math.sqrt(4), rel=1e-6)  # four columns of length 1.5 (float32 QR)


def test_triplets_made_without_peft_are_enough() -> None:
    """The documented way without PEFT: create, train, read the update."""
    matrix = Triplets.create("only", 5, 4, 3, dtype=torch.float64)
    allocator = Allocator([matrix], plan(target_rank=1))
    optimizer = adamw(matrix.parameters)
    wanted = torch.outer(randn(5, seed=1), randn(4, seed=2))
    losses = []
    for _ in range(16):
        optimizer.zero_grad()
        loss = (matrix.delta() - wanted).square().mean()
        loss.backward()
        losses.append(loss.item())
        allocator.before_step()
        optimizer.step()
        del loss
        allocator.after_step(optimizer)
    assert losses[-1] < losses[0] and allocator.ranks() == {"only": 1} and isinstance(matrix.p, nn.Parameter)


def test_gradients_given_by_hand_are_enough() -> None:
    """The allocator asks for nothing but parameters with gradients."""
    triplets = [random_triplets(4, 4, 3, seed=k, name=f"m{k}") for k in range(2)]
    allocator = Allocator(triplets, plan(target_rank=1))
    feed(allocator, [[randn(*w.shape, seed=s) for t in triplets for w in t.parameters] for s in range(11)])
    assert allocator.step == 11 and allocator.live == allocator.schedule.budget(10)  # type: ignore[union-attr]
