"""What a step dispatches and what it keeps: as much for many matrices as for few, nothing without need.

Operations on a list of tensors count once; views, reshapes and allocations not at all.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.operations import OperationCounter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adalora.core import orthogonality as orth
from adalora.core.allocator import Allocator
from adalora.core.importance import METRICS
from adalora.core.regulariser import FILLING, common_ranks
from adalora.core.settings import Settings
from adalora.core.triplets import Triplets
from tests.core.toys import adamw, random_triplets

MOST = 60  # of allocation, importance and regulariser together
BERT = [(8, 8)] * 4 + [(32, 8), (8, 32)]  # (d_out, d_in): two lengths of singular vectors
LLAMA = [(8, 8), (6, 8), (6, 8), (8, 8), (20, 8), (8, 20)]  # three
PHASES = {"warm-up": 2, "pruning": 5, "masked": 12, "compact": 12}  # its name -> a step of it, of 14


def model(matrices: int, shapes: list[tuple[int, int]], ranks: tuple[int, ...] = (4,)) -> list[Triplets]:
    return [
        random_triplets(*shapes[k % len(shapes)], ranks[k % len(ranks)], seed=k, name=f"m{k}", dtype=torch.float32)
        for k in range(matrices)
    ]


def every_step(**changes: Any) -> Settings:
    """Fourteen steps with an allocation at each from 4 to 10."""
    wanted = {"target_rank": 2, "t_init": 3, "t_final": 4, "delta_t": 1, "total_step": 14, **changes}
    return Settings(**wanted)


def give_gradients(triplets: list[Triplets]) -> None:
    for w in (w for t in triplets for w in t.parameters if w.numel()):
        w.grad = torch.ones_like(w) if w.grad is None or w.grad.shape != w.shape else w.grad.neg_()


def step_of(phase: str, triplets: list[Triplets], counter: TorchDispatchMode, **changes: Any) -> Allocator:
    """Train to a step of this phase; of its last step, the allocator's part runs under the counter."""
    allocator = Allocator(triplets, every_step(compact=phase == "compact", **changes))
    for _ in range(PHASES[phase] - 1):
        give_gradients(triplets)
        allocator.before_step()
        allocator.after_step()
    give_gradients(triplets)
    with counter:
        allocator.before_step()
        allocator.after_step()
    assert allocator.step == PHASES[phase] and (phase in ("masked", "compact")) == allocator.frozen
    return allocator


def operations(phase: str, matrices: int, shapes: list[tuple[int, int]], **changes: Any) -> OperationCounter:
    counter = OperationCounter()
    ranks = changes.pop("ranks", (4,))
    step_of(phase, model(matrices, shapes, ranks), counter, **changes)
    return counter


@pytest.mark.parametrize("shapes", [BERT, LLAMA], ids=["two lengths", "three lengths"])
@pytest.mark.parametrize("ranks", [(4,), (4, 2, 3)], ids=["equal", "unequal"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_step_takes_at_most_sixty_operations(
    phase: str, ranks: tuple[int, ...], shapes: list[tuple[int, int]]
) -> None:
    """By default settings, with an allocation at every step: as many at 216 matrices as at 12, whatever their ranks."""
    few, many = (operations(phase, matrices, shapes, ranks=ranks) for matrices in (12, 216))
    assert few.by_name == many.by_name
    assert 0 < many.total <= MOST


class ViewCounter(TorchDispatchMode):
    """What the other counter leaves out because it computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.views += func.is_view
        return func(*args, **(kwargs or {}))


def test_what_the_readme_says_of_a_step() -> None:
    """49 operations for two lengths of vectors, 56 for three, 7 more for a fourth; 4 to 8 views a matrix."""
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    two, three, four = (operations("pruning", 24, shapes).total for shapes in (BERT, LLAMA, [*LLAMA, (10, 8)]))
    assert f"{two} tensor operations on BERT's matrices and {three} on Llama's" in readme
    assert three - two == four - three == 7 and "(7 for each length of singular vectors)" in readme
    for ranks in ((4,), (4, 2, 3)):
        counter = ViewCounter()
        step_of("pruning", model(216, LLAMA, ranks), counter)
        assert 4 <= counter.views / 216 <= 8 and "views, 4 to 8 a matrix" in readme


@pytest.mark.parametrize("orthogonality", orth.KINDS)
@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("phase", PHASES)
def test_no_setting_makes_the_operations_grow(phase: str, metric: str, orthogonality: str) -> None:
    few, many = (operations(phase, matrices, BERT, metric=metric, orthogonality=orthogonality) for matrices in (12, 48))
    assert few.by_name == many.by_name and 0 < many.total <= MOST


@pytest.mark.filterwarnings("ignore:at the last allocation")  # by λ, where no λ has a gradient
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("part", [0, 1, 2])
def test_missing_gradients_do_not_make_the_operations_grow(phase: str, part: int) -> None:
    """Frozen parts have none, and those that the loss has not reached have none yet."""

    def counted(matrices: int) -> OperationCounter:
        triplets = model(matrices, BERT)
        for t in triplets[::2]:
            t.parameters[part].requires_grad_(False)
        counter = OperationCounter()
        allocator = Allocator(triplets, every_step(compact=phase == "compact"))
        for step in range(1, PHASES[phase] + 1):
            give_gradients(triplets)
            for t in triplets:
                t.parameters[part].grad = None
            with counter if step == PHASES[phase] else contextlib.nullcontext():
                allocator.before_step()
                allocator.after_step()
        for k, t in enumerate(triplets):
            assert (t.parameters[part].grad is None) == (k % 2 == 0 or part == 1 or not t.rank)
        return counter

    few, many = counted(12), counted(48)
    assert few.by_name == many.by_name and 0 < many.total <= MOST


def test_a_phase_does_only_what_it_needs() -> None:
    """No importance in the final phase, no more than λ is read for its metrics, and nothing when nothing is due."""
    pruning, final = (operations(phase, 12, BERT) for phase in ("pruning", "compact"))
    assert "aten::addcmul_" in pruning.by_name and "aten::sort.stable" in pruning.by_name  # Ī and Ū; ranking
    assert not {"aten::addcmul_", "aten::sort.stable", "aten::_foreach_mul_.List"} & set(final.by_name)
    assert final.total <= 15
    assert operations("compact", 12, BERT, orthogonality_weight=0.0).total == 0
    of_lam = operations("pruning", 12, BERT, metric="singular")
    assert of_lam.total < pruning.total and "aten::mean.dim" not in of_lam.by_name
    assert "aten::index.Tensor" not in operations("pruning", 12, BERT, metric="magnitude").by_name  # norms of vectors
    assert operations("warm-up", 12, BERT, metric="magnitude", orthogonality_weight=0.0).total == 0


class NoWaiting(TorchDispatchMode):
    """Refuses whatever needs a value from the device, or brings one there from a list."""

    waits = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "lift_fresh")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not any(name.startswith(wait) for wait in self.waits), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad_scale", [False, True])
@pytest.mark.parametrize("orthogonality", orth.KINDS)
@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("phase", ["warm-up", "masked", "compact"])
def test_a_step_without_an_allocation_never_waits_for_the_device(
    phase: str, metric: str, orthogonality: Any, grad_scale: bool
) -> None:
    """On a GPU a value that is read back stops the queue of work; gradients that are missing make no exception."""
    triplets = model(3, LLAMA, (4, 2, 3))
    allocator = Allocator(triplets, every_step(metric=metric, orthogonality=orthogonality, compact=phase == "compact"))
    scale = torch.tensor(2.0) if grad_scale else None
    for step in range(1, PHASES[phase] + 1):
        give_gradients(triplets)
        triplets[1].p.grad = None
        if step < PHASES[phase]:
            allocator.before_step(scale)
            allocator.after_step()
    with NoWaiting():
        allocator.before_step(scale)
        allocator.after_step()


def test_an_allocation_is_the_one_that_waits() -> None:
    """It is written to the trace as numbers; so the guard above would see it."""
    with pytest.raises(AssertionError, match="waits for the device"):
        step_of("pruning", model(3, BERT), NoWaiting())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(4,), (4, 2, 3)])
def test_the_state_is_two_numbers_an_entry(dtype: torch.dtype, ranks: tuple[int, ...]) -> None:
    """In float32 whatever the adapter's type: eight bytes a parameter, also where ranks differ."""
    triplets = model(6, BERT, ranks)
    for t in triplets:
        t.right.to(dtype)
        t.left.to(dtype)  # type: ignore[attr-defined]
    allocator = step_of("warm-up", triplets, OperationCounter())
    moving = [v for k, v in allocator.state_dict()["tensors"].items() if k.endswith(("sensitivity", "uncertainty"))]
    entries = sum(w.numel() for t in triplets for w in t.parameters)
    assert {v.dtype for v in moving} == {torch.float32}
    assert sum(v.numel() * v.element_size() for v in moving) == 8 * entries
    smoothed = allocator._scoring.smoothed  # what lies in memory, not what is saved
    assert smoothed is not None and sum(v.untyped_storage().nbytes() for v in smoothed) == 8 * entries


# ---------------------------------------------------------------------------------------------------- unequal ranks


def reference(triplets: list[Triplets], kind: orth.Orthogonality, weight: float) -> list[Tensor]:
    """γ·∂R/∂w of each P and Q by the plain formula, one factor at a time."""
    gradients = []
    for t in triplets:
        p, _, q = (w.detach() for w in t.factors)
        gradients.append(weight * orth.gradient(p.mT.unsqueeze(0), kind, 2 * len(triplets)).squeeze(0).mT)
        gradients.append(weight * orth.gradient(q.unsqueeze(0), kind, 2 * len(triplets)).squeeze(0))
    return gradients


RANKS = [(4, 1, 3, 2), (1, 6, 1, 1), (0, 3, 3, 2), (30, 1, 1, 1, 1, 1, 1, 1), (0, 0, 4)]  # the fourth: filled up apart


@pytest.mark.parametrize("metric", ["sensitivity_uncertainty", "singular", "magnitude"])
@pytest.mark.parametrize("kind", orth.KINDS)
@pytest.mark.parametrize("ranks", RANKS)
def test_factors_of_unequal_ranks_each_get_their_own_gradient(
    ranks: tuple[int, ...], kind: orth.Orthogonality, metric: str
) -> None:
    """With gradients there are or without; errors are those of the factors, rows of zeros not counted."""
    shapes = [(32, 40), (40, 32), (32, 32)]
    triplets = [
        random_triplets(*shapes[k % 3], rank, seed=k, name=f"m{k}", dtype=torch.float64) for k, rank in enumerate(ranks)
    ]
    settings = every_step(target_rank=1, metric=metric, orthogonality=kind, orthogonality_weight=0.3)
    allocator = Allocator(triplets, settings)
    factors = [(t.p, t.q) for t in triplets]
    for k, t in enumerate(triplets):
        t.lam.grad = torch.ones_like(t.lam)
        if k % 2:
            t.p.grad, t.q.grad = torch.ones_like(t.p), torch.ones_like(t.q)
    allocator.before_step()
    expected = reference(triplets, kind, 0.3)
    for k, both in enumerate(factors):
        for w, gradient in zip(both, expected[2 * k : 2 * k + 2], strict=True):
            if w.numel():
                assert w.grad is not None
                # float64, sums in another order
                torch.testing.assert_close(w.grad, gradient + k % 2, rtol=1e-12, atol=1e-12)
    norms = [orth.errors(x.detach().unsqueeze(0)) for t in triplets if t.rank for x in (t.factors.p.mT, t.factors.q)]
    assert allocator.orthogonality_error() == pytest.approx(float(torch.cat(norms).mean()), rel=1e-12)


def test_few_high_ranks_do_not_fill_up_all_others() -> None:
    """One rank far above many: they are filled up apart, so that what is multiplied stays near what there is."""
    assert common_ranks([12] * 36 + [3, 7, 8] * 12) == [12]
    ranks = [256, *[8] * 400]
    assert common_ranks(ranks) == [256, 8]
    for ranks in ([256, *[8] * 400], [64, 32, *[16] * 20, *[1] * 300], [1], [5, 5], []):
        levels = common_ranks(ranks)
        filled = sum(min(level for level in levels if level >= rank) for rank in ranks)
        assert filled <= FILLING * sum(ranks) and levels == sorted(set(levels), reverse=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(4,), (4, 2, 3)])
def test_half_precision_factors_get_the_gradient_of_wide_arithmetic(dtype: torch.dtype, ranks: tuple[int, ...]) -> None:
    """Computed in float32, rounded once, to the type of the gradients."""
    triplets = model(6, LLAMA, ranks)
    for t in triplets:
        t.right.to(dtype)
        t.left.to(dtype)  # type: ignore[attr-defined]
    wide = model(6, LLAMA, ranks)
    for t, w in zip(triplets, wide, strict=True):
        w.assign(t.factors)  # the same values, in float32
        t.lam.grad = torch.ones_like(t.lam)
    Allocator(triplets, every_step(orthogonality_weight=0.3)).before_step()
    for k, gradient in enumerate(reference(wide, "squared", 0.3)):
        ours = (triplets[k // 2].p, triplets[k // 2].q)[k % 2].grad
        assert ours is not None and ours.dtype == dtype
        # one rounding to the short type: half a unit in its last place
        torch.testing.assert_close(ours.float(), gradient, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("ranks", [(4,), (4, 2, 3)])
def test_types_may_differ_between_matrices(ranks: tuple[int, ...]) -> None:
    """Each gradient is as exact as its own type allows, whichever types lie beside it in a block."""
    types = (torch.bfloat16, torch.float32, torch.float64)
    triplets = model(6, LLAMA, ranks)
    for k, t in enumerate(triplets):
        t.right.to(types[k % 3])
        t.left.to(types[k % 3])  # type: ignore[attr-defined]
        t.lam.grad = torch.ones_like(t.lam)
    wide = model(6, LLAMA, ranks)
    for t, w in zip(triplets, wide, strict=True):
        w.assign(t.factors)
    allocator = Allocator(triplets, every_step(orthogonality_weight=0.3))
    allocator.before_step()
    allocator.after_step()
    for k, gradient in enumerate(reference(wide, "squared", 0.3)):
        ours = (triplets[k // 2].p, triplets[k // 2].q)[k % 2].grad
        assert ours is not None and ours.dtype == types[k // 2 % 3]
        rtol = torch.finfo(torch.bfloat16).eps if ours.dtype == torch.bfloat16 else 1e-5  # float32: the reference
        torch.testing.assert_close(ours.float(), gradient, rtol=rtol, atol=1e-6)


def test_an_optimizer_that_steps_sees_gradients_laid_as_its_parameters() -> None:
    """Gradients that are made here have the parameters' layout, so fused and foreach optimizers stay fast."""
    triplets = model(6, BERT)
    for t in triplets:
        t.lam.grad = torch.ones_like(t.lam)
    optimizer = adamw([w for t in triplets for w in t.parameters])
    allocator = Allocator(triplets, every_step())
    allocator.before_step()
    for w in (w for t in triplets for w in t.parameters):
        assert w.grad is not None and w.grad.stride() == w.stride()
    optimizer.step()
    allocator.after_step(optimizer)
    assert allocator.step == 1
