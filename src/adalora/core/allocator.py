"""Owns the importance of all triplets of one model and does one optimizer step's work (paper, Algorithm 1).

Around each optimizer step t the training loop's hook calls

    before_step   adds the regulariser's gradient and updates Ī and Ū, at the weights before the update
    after_step    counts the step; when it is due, ranks all triplets and zeroes λ of those beyond the budget b(t)

Parameters belong to the layers; here, their entries are laid side by side, so the number of tensor operations does not
grow with the number of matrices, and nothing waits for the device except when an allocation is written to the trace.
"""

from __future__ import annotations

import copy
import operator
import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .copies import Origin
from .errors import ConfigError, ScheduleError, StateError
from .orthogonality import penalty
from .policy import POLICIES
from .regulariser import Regulariser
from .schedule import Schedule
from .scoring import Scoring
from .settings import Settings
from .sharded import like, whole
from .shares import Members, OpenStep, Share, entries_of, trained_ids
from .stacks import LAM, Parts, Stacks, split
from .state import STATE_VERSION, averages_of, check_fit, factors_of, last_scores_of, to_tensors
from .trace import Allocation, TraceFile
from .triplets import Triplets

LIVE: weakref.WeakSet[Allocator] = weakref.WeakSet()
"""Every allocator in this process, so that an optimizer's step can find those whose parameters it holds."""
_LIVE_LOCK = threading.RLock()  # models are made in threads, too


def live_allocators() -> list[Allocator]:
    """Those of :data:`LIVE`."""
    with _LIVE_LOCK:
        return list(LIVE)


def _enlist(allocator: Allocator) -> None:
    with _LIVE_LOCK:
        LIVE.add(allocator)


class Allocator:
    """Budget allocation over the triplets of one model.

    Args:
        triplets: one entry for each adapted matrix; the order is that of the trace.
        settings: see :class:`Settings`. Without ``total_step`` there, call :meth:`plan` before the first step.

    Raises:
        ConfigError: no matrices, two of one name, or an initial budget below the target.
        ScheduleError: the schedule leaves no step for pruning.
    """

    def __init__(self, triplets: Sequence[Triplets], settings: Settings) -> None:
        names = [t.name for t in triplets]
        if not names:
            raise ConfigError("there is no matrix to adapt.")
        if len(set(names)) < len(names):
            raise ConfigError(f"two matrices have the same name: {sorted({n for n in names if names.count(n) > 1})}.")
        self.triplets = list(triplets)
        self.settings = settings
        self.initial_ranks = [t.rank for t in triplets]
        self.schedule: Schedule | None = None
        self.step = 0  # optimizer steps counted so far
        self.open_step = OpenStep()
        self._members = Members(self.triplets)
        self.frozen = self.initial_budget <= self.target_budget  # from the final phase on the mask no longer changes
        self.hooked = False  # before_step and after_step are called by the optimizer's hooks
        self.manual = False  # update_and_allocate has taken over from the hook
        self.trace: list[Allocation] = []
        self.trace_file: TraceFile | None = None
        self.started: dict[str, Any] = {}  # what P and Q were found from, if the loss's gradient was looked at
        self._gradients: Tensor | None = None  # of the step that is going on, where they are asked for after it
        self._lam_before_load: list[Tensor] | None = None  # since weights have been loaded
        self._in_doubt = False  # other weights than these had been trained until this step
        self._settled = self.frozen  # nothing pruned is left in memory
        self._lam_before_mask: Tensor | None = None
        self._last_scores: Tensor | None = None  # that the final phase began with
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []  # that stepped last
        self.origin = Origin()
        self._remember()
        self._lay_out()
        self.mask = torch.ones(sum(self.sizes), dtype=torch.bool, device=self.triplets[0].lam.device)
        self._check_budget()
        self._plan_if_told()
        _enlist(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trace_file": None, "_optimizers": []}

    def __setstate__(self, state: dict[str, Any]) -> None:  # copies and unpickled models allocate, too
        self.__dict__.update(state)
        _enlist(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Allocator:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.origin = Origin(self)
        return twin

    # ---------------------------------------------------------------- what a caller may ask

    @property
    def sizes(self) -> list[int]:
        """Triplets held by each matrix, pruned ones included until they are compacted away."""
        return [t.rank for t in self.triplets]

    @property
    def is_sharded(self) -> bool:
        """Whether parameters lie in shards: whatever reads them must then be called in every process."""
        return any(t.is_sharded for t in self.triplets)

    def is_resizable(self, optimizers: Sequence[torch.optim.Optimizer] = ()) -> bool:
        """Whether ranks can be compacted in memory now. Distributed wrappers keep buffers of the parameters' sizes."""
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if not alone and torch.distributed.get_world_size() > 1:
            return False
        return all(t.is_resizable(optimizers) for t in self.triplets)

    @property
    def costs(self) -> list[int]:
        """What one triplet of each matrix takes of the budget, which counts triplets or parameters."""
        return self.settings.costs(self.triplets)

    @property
    def one_of_each(self) -> int:
        """What one triplet of each matrix takes of the budget; matrices whose λ is frozen stand outside it."""
        return sum(self._members.of(self.costs))

    @property
    def initial_budget(self) -> int:
        """b0, in the budget's unit, as all budgets are."""
        return sum(self._members.of([*map(operator.mul, self.initial_ranks, self.costs)]))

    @property
    def target_budget(self) -> int:
        """bT"""
        return self.settings.target(self.one_of_each)

    @property
    def budget(self) -> int:
        """b(t) at the present step."""
        return self.initial_budget if self.schedule is None else self.schedule.budget(self.step)

    @property
    def spent(self) -> int:
        """What the live triplets take of the budget."""
        return sum(self._members.of([*map(operator.mul, self.ranks().values(), self.costs)]))

    @property
    def live(self) -> int:
        """Triplets kept by the last allocation, all matrices under the budget together."""
        self._refresh()
        return sum(self._members.of(self._counts(self.mask.tolist())))

    @property
    def final_masks(self) -> list[Tensor] | None:
        """Of each matrix, which triplets the budget has left for good; None before, and after weights were loaded."""
        return split(self.mask, self._stacks.sizes) if self.frozen and self._lam_before_load is None else None

    @property
    def untrained(self) -> bool:
        """Whether every λ is 0, so that P and Q are free to choose."""
        return not any(bool(whole(t.lam).any()) for t in self.triplets)

    @property
    def awaits_start(self) -> bool:
        """Whether P and Q have still to be found from the loss's gradient. Those of a trained adapter stay."""
        return self.settings.gradient_start and not self.started and self.step == 0 and self.untrained

    def ranks(self) -> dict[str, int]:
        """Live triplets of each matrix, by name."""
        self._refresh()
        return dict(zip((t.name for t in self.triplets), self._counts(self.mask.tolist()), strict=True))

    def describe(self) -> str:
        """The schedule in words."""
        if self.schedule is None:
            unit = self.settings.budget_unit
            return f"{self.initial_budget} {unit} to start with, {self.target_budget} at the end; total steps unknown."
        return self.schedule.describe(self.one_of_each)

    def header(self) -> dict[str, Any]:
        """What a trace begins with: matrices, budgets, schedule."""
        return {
            "names": [t.name for t in self.triplets],
            "initial_ranks": self.initial_ranks,
            "triplet_parameters": [t.parameters_each for t in self.triplets],
            "budget": {"initial": self.initial_budget, "target": self.target_budget},
            "schedule": None if self.schedule is None else asdict(self.schedule),
            "budget_unit": self.settings.budget_unit,
            "rank_by": self.settings.rank_by,
            "importance": self.settings.metric,
            "policy": self.settings.policy,
            **({"start": self.started} if self.started else {}),
        }

    def plan(self, total_step: int, steps_per_epoch: float | None = None) -> None:
        """Fix the number of optimizer steps, and with it the schedule.

        Raises:
            ScheduleError: no step is left for pruning, or a length is in epochs and ``steps_per_epoch`` is missing.
        """
        self._look_what_is_trained()
        initial = max(self.initial_budget, self.target_budget)  # a second training may start below the target
        schedule = self.settings.schedule(initial, self.one_of_each, total_step, steps_per_epoch)
        if self.schedule is not None and self.schedule != schedule and self.step > 0 and not self.frozen:
            warnings.warn(
                f"the schedule changes at step {self.step} of training: {schedule.describe(self.one_of_each)}",
                stacklevel=2,
            )
        elif schedule.cannot_rank and schedule != self.schedule:
            warnings.warn(schedule.shortness(), stacklevel=2)
        self.schedule = schedule

    def scores(self) -> Tensor:
        """S of every triplet, matrix after matrix: [sum of sizes]. In the final phase, as at the last allocation.

        With ``rank_by="score_per_parameter"``, S over the parameters of the triplet.
        """
        self._refresh()
        return self._scoring.scores(self._stacks.parameters()) if self._last_scores is None else self._last_scores

    def orthogonality_error(self) -> float:
        """Mean over all P and Q of ‖XXᵀ - I‖_F."""
        self._refresh()
        return float(self._regulariser.errors(self._stacks.parameters()).mean())

    def penalty(self) -> Tensor:
        """γ·R as a differentiable scalar; :meth:`before_step` already adds its gradient, so do not add both."""
        return self.settings.orthogonality_weight * penalty(
            self.triplets, self.settings.orthogonality, self.settings.vector_norm
        )

    # ---------------------------------------------------------------- one optimizer step

    def before_step(self, grad_scale: Tensor | None = None, *, again: bool = False, share: Share = None) -> None:
        """Add the regulariser's gradient, once however many batches were accumulated, and update the importance.

        A step for which no trainable parameter of this model has a gradient is not this model's step: nothing happens.
        (An adapter that is not active is frozen; its gradients may be zeros of an earlier step.)

        Args:
            grad_scale: factor by which a loss scaler has multiplied the gradients, if they are still scaled.
            again: the gradients were computed anew within one step, as LBFGS does; they get the regulariser's, too.
            share: ids of the parameters that step now, if several optimizers share them; :meth:`after_step` too.

        Raises:
            ScheduleError: the total number of steps is still unknown.
            ConfigError: singular values are frozen while they are 0.
        """
        if self.open_step.has_begun(share) and not again:
            return  # an optimizer that wraps another runs the hooks of both
        parameters = self._stacks.parameters()
        if all(w.grad is None or not w.requires_grad for parts in parameters for w in parts):
            return
        self._refresh(parameters)
        if self._in_doubt:
            self._in_doubt = False
            warnings.warn(
                f"adapter weights were loaded without their training state: the budget's schedule goes on from step"
                f" {self.step}. To resume an interrupted training, load adalora_state.safetensors too"
                " (adalora.load_state(model, checkpoint), or AdaLoraCallback() under a Trainer), or what"
                " adalora.allocator(model).state_dict() gave, with its load_state_dict.",
                stacklevel=2,
            )
        self._look_what_is_trained(parameters)
        for t in self._stacks.empty:
            t.drop_gradients()  # some optimizers trip over empty parameters
        if self.schedule is None and not self.frozen and not (self.step == 0 and self.settings.may_be_by_hand):
            raise ScheduleError(
                "AdaLoRA does not know how many optimizer steps the training will take, so it cannot lay out its"
                " budget. Either give the number, AdaLoraConfig(total_step=...), or train with a Trainer and"
                " callbacks=[AdaLoraCallback()], which reads it there. (Lengths in epochs need"
                " adalora.allocator(model).plan(total_step, steps_per_epoch) in a loop of your own; loops that call"
                " update_and_allocate(step) after each optimizer step may give tfinal in steps instead.)"
            )
        if self.awaits_start:
            raise StateError(
                "this adapter's P and Q are to start from the loss's gradient, which nobody has looked at yet: call"
                " adalora.start(model, batches) before the first step (AdaLoraCallback does under a Trainer), or make"
                " the adapter with initialization='orthonormal'."
            )
        self.open_step.begin(share)
        trained = self._members.held(share)
        importance = not again and self._ranks_again and self._scoring.smooths
        before = importance and self.settings.sensitivity_at == "before_step"
        weights = self._scoring.gather(parameters) if before and self._scoring.of_all_entries else None
        if self.settings.orthogonality_weight:
            self._regulariser.add_gradient(
                parameters,
                self.settings.orthogonality_weight,
                self.settings.orthogonality,
                grad_scale,
                None if weights is None else self._stacks.split(weights)[1],
                trained,
            )
        if before:
            part = None if share is None else self._scoring.gather(entries_of(trained, parameters))
            weights = self._scoring.gather(parameters) if weights is None else weights
            self._scoring.update(weights, self._scoring.gradients(parameters, grad_scale), part)
        elif self.settings.sensitivity_at == "after_step" and self._ranks_again and self._scoring.smooths:
            # now, since the optimizer may unscale them in place, or not
            self._gradients = self._scoring.gradients(parameters, grad_scale)

    def after_step(self, optimizer: torch.optim.Optimizer | None = None, *, share: Share = None) -> None:
        """Count the step and allocate if it is due. ``optimizer``: its state is sliced along with the ranks."""
        if not self.open_step.has_begun(share):
            return
        if self._gradients is not None:
            parameters = self._stacks.parameters()
            part = None
            if share is not None:
                part = self._scoring.gather(entries_of(self._members.held(share), parameters))
            self._scoring.update(self._scoring.gather(parameters), self._gradients, part)
        self._gradients = None
        if not self.open_step.end(share, optimizer, trained_ids(self.triplets)):
            return
        self.step += 1
        self._optimizers = self.open_step.take_optimizers()
        if self.frozen or not self.manual:
            self._allocate(self.step, self._optimizers_left())

    def update_and_allocate(self, step: int) -> None:
        """Allocate by hand, as with PEFT, after ``optimizer.step()``; from the first call on the hook leaves it to you.

        Args:
            step: your step number; the schedule counts the first optimizer step as 1.

        Raises:
            StateError: no optimizer step has been seen, so there is no importance to rank by.
            ScheduleError: the total number of steps is unknown.
        """
        if self.step == 0:
            raise StateError(
                f"update_and_allocate({step}) came before any optimizer step of this model: call it after"
                " optimizer.step(), with an optimizer that holds the adapter's parameters."
            )
        if self.schedule is None:
            self._plan_by_hand(step)
        if not self.manual:
            self.manual = True
            if self._lam_before_mask is not None:  # the hook has masked at its own count of this very step
                for t, lam in zip(self.triplets, split(self._lam_before_mask, self.sizes), strict=True):
                    t.lam.data.copy_(like(t.lam, lam))
                self.mask.fill_(True)
                self.trace.clear()
        self.step = step
        self._allocate(step, self._optimizers_left())

    def compact(self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None) -> None:
        """Slice pruned triplets away for good: P, Λ, Q and the state of the optimizer (or of several) shrink in place.

        Raises:
            StateError: pruning is not over, so pruned triplets may still return; or something pins the shapes.
        """
        if not self.frozen:
            raise StateError(
                f"pruning goes on until {'the final phase' if self.schedule is None else self.schedule.final_step}"
                f" (now at step {self.step}) and pruned triplets may still return; what is saved is always compact."
            )
        optimizers = [] if optimizer is None else list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        if not self.is_resizable(optimizers):
            raise StateError(
                "the adapter's parameters are still held by a graph (a loss kept with retain_graph=True?) or by a"
                " distributed model, or the optimizer's state cannot be sliced (8-bit, LBFGS): their shapes are pinned;"
                " what is saved is always compact."
            )
        self._refresh()
        self._stacks.mask(self.mask)
        if self._last_scores is not None:
            self._last_scores = self._last_scores[self.mask]
        places = torch.tensor([i for size in self.sizes for i in range(size)], device=self.mask.device)
        kept = torch.split(places[self.mask], self._counts(self.mask.tolist()))
        self.origin.sliced = self.sizes, [*kept]
        for triplets, index in zip(self.triplets, kept, strict=True):
            triplets.keep(index, optimizers)
        self._lay_out()
        self.mask = torch.ones(sum(self.sizes), dtype=torch.bool, device=self.mask.device)
        self._settled = True

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-for-bit resumption needs, P Λ Q included: plain values, and ``tensors`` by name."""
        self._refresh()
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "frozen": self.frozen,
            "manual": self.manual,
            "metric": self.settings.metric,
            "budget_unit": self.settings.budget_unit,
            "initial_ranks": list(self.initial_ranks),
            "started": self.started,
            "schedule": None if self.schedule is None else asdict(self.schedule),
            "tensors": to_tensors(self.triplets, self.mask, self._last_scores, self._scoring.averages()),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, ranks included.

        Raises:
            StateError: it is of another model, metric or version; nothing has been changed then.
        """
        check_fit(state, self.triplets, self.settings)
        tensors: dict[str, Tensor] = state["tensors"]
        for t in self.triplets:
            t.assign(factors_of(tensors, t.name))
        self.step, self.frozen, self.manual = state["step"], state["frozen"], state["manual"]
        self.initial_ranks = list(state["initial_ranks"])
        self.started = state.get("started", {})  # states of 0.1 had no such start
        if state["schedule"] is not None:
            self.schedule = Schedule(**state["schedule"])
        self.trace = [allocation for allocation in self.trace if allocation.step <= self.step]
        self._lam_before_mask = None
        self._remember()
        self._lay_out()
        self._lam_before_load, self._in_doubt = None, False
        self.mask = torch.cat([tensors[f"{t.name}/mask"] for t in self.triplets]).to(self._stacks.device)
        self._last_scores = last_scores_of(tensors, self.triplets, self._stacks.device)
        self._settled = self.frozen and bool(self.mask.all())
        self._scoring.restore(averages_of(tensors))
        if self.frozen and not self._settled and self.settings.compact:
            self._hold_at_zero()

    def restart(self) -> None:
        """Begin the schedule anew with the present weights, for a second training of the same model."""
        self.step, self.schedule, self._last_scores = 0, None, None
        self.open_step = OpenStep()
        self._remember()
        self.initial_ranks = self.sizes
        self.frozen = self._settled = self.initial_budget <= self.target_budget
        self._lay_out()
        self.mask = torch.ones(sum(self.sizes), dtype=torch.bool, device=self._stacks.device)
        self.trace.clear()
        self._plan_if_told()

    def weights_replaced(self) -> None:
        """To be told before P, Λ, Q are loaded from elsewhere: live is then what is not zero.

        Weights that are what they were do not count, so state and weights may be loaded in either order.
        """
        if self._lam_before_load is None:
            self._lam_before_load = [t.lam.detach().clone() for t in self.triplets]

    # ---------------------------------------------------------------- inside

    def _refresh(self, parameters: Sequence[Parts] | None = None) -> None:
        """Catch up with weights, ranks or a device that changed behind the allocator's back."""
        lams = [whole(t.lam) for t in self.triplets] if parameters is None else [parts[LAM] for parts in parameters]
        replaced = self._lam_before_load is not None and not _equal(lams, self._lam_before_load)
        self._in_doubt |= replaced
        self._lam_before_load = None
        if replaced or self._stacks.sizes != [lam.shape[0] for lam in lams]:
            self._lay_out()
            self.mask = torch.cat([lam.detach() for lam in lams]) != 0
            self._last_scores = None
            self._settled = self.frozen and bool(self.mask.all())
        elif self._stacks.device != lams[0].device:
            averages = self._scoring.averages()
            self._lay_out()
            self.mask = self.mask.to(self._stacks.device)
            self._last_scores = None if self._last_scores is None else self._last_scores.to(self._stacks.device)
            self._scoring.restore(averages)

    def _remember(self) -> None:
        for t in self.triplets:
            t.remember()

    def _plan_if_told(self) -> None:
        """Lay out the schedule if the settings alone say how; epochs wait for a plan that knows their length."""
        if self.settings.total_step is not None and not self.settings.counts_epochs:
            self.plan(self.settings.total_step)

    def _plan_by_hand(self, step: int) -> None:
        """Without a total, ``tfinal`` is all that says when pruning ends: examples for PEFT are written so."""
        settings = self.settings
        if not settings.may_be_by_hand:
            raise ScheduleError(f"update_and_allocate({step}) needs AdaLoraConfig(total_step=...).")
        end = int(settings.t_final)
        self.schedule = replace(settings, t_final=0).schedule(self.initial_budget, self.one_of_each, end, None)
        warnings.warn(
            f"total_step is not given, so tfinal={end} is read as the step at which pruning ends, not as the length of"
            f" the final phase: {self.initial_budget} {settings.budget_unit} until step {self.schedule.t_init},"
            f" {self.target_budget} from step {end} on. Give total_step to say how long training is.",
            stacklevel=4,
        )

    def _check_budget(self) -> None:
        self.settings.check_budgets(self.initial_budget, self._members.of(self.costs))

    def _look_what_is_trained(self, parameters: Sequence[Parts] | None = None) -> None:
        """Take matrices that are frozen, or no longer, out of the budget or into it."""
        if not self._members.look(parameters):
            return
        self._check_budget()
        if self.step == 0:
            self.frozen = self._settled = self.initial_budget <= self.target_budget
        if self.schedule is not None:
            self.schedule = replace(self.schedule, initial_budget=self.initial_budget, target_budget=self.target_budget)

    def _optimizers_left(self) -> list[torch.optim.Optimizer]:
        """Those of the last step that are still there."""
        return [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]

    def _lay_out(self) -> None:
        """For the present ranks and device; without averages."""
        self._stacks = Stacks(self.triplets)
        self._regulariser = Regulariser(self._stacks, vector_norm=self.settings.vector_norm)
        self._scoring = Scoring.of(self._stacks, self.settings)

    def _counts(self, flags: Iterable[bool]) -> list[int]:
        """Of each matrix, how many of its triplets are flagged."""
        rest = iter(flags)
        return [sum(islice(rest, size)) for size in self._stacks.sizes]

    @property
    def _ranks_again(self) -> bool:
        """Whether an allocation is still to come: the importance rests from the step on that begins the final phase."""
        return not self.frozen and self.schedule is not None and self.step + 1 < self.schedule.final_step

    def _allocate(self, step: int, optimizers: list[torch.optim.Optimizer]) -> None:
        schedule = self.schedule
        self._lam_before_mask = None
        if self.frozen:
            self._settle(optimizers)
            return
        if schedule is None or not (schedule.allocates(step) or schedule.is_final(step)):
            return
        parameters = self._stacks.parameters()
        self._refresh(parameters)
        if self.step == 1 and not self.manual:
            self._lam_before_mask = self._stacks.gather_lam(parameters)
        budget, before, final = schedule.budget(step), self.mask, schedule.is_final(step)
        scores = self._scoring.for_allocation(parameters, final, told=schedule.cannot_rank)
        if scores is None:
            return
        policy = POLICIES[self.settings.policy]
        self.mask = self._members.choose(policy, scores, budget, self._stacks.sizes, self.costs, before)
        self._stacks.mask(self.mask)
        live, lived = torch.stack([self.mask, before]).tolist()  # one wait for the device, however many matrices
        ranks, returned = self._counts(live), self._counts(map(operator.gt, live, lived))
        error = float(self._regulariser.errors(parameters).mean())
        last = Allocation.rounded(split(scores, self._stacks.sizes)) if final else None
        allocation = Allocation(step, budget, ranks, returned, error, last)
        self.trace.append(allocation)
        if self.trace_file is not None:
            self.trace_file.append(allocation)
        if final:
            self.frozen, self._settled, self._last_scores = True, False, scores
            self._lay_out()  # the averages have done their work
            self._settle(optimizers)

    def _settle(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """In the final phase: compact as soon as nothing pins the shapes; until then hold what is pruned at 0.

        Pruned vectors are held at 0 as well where they should have been sliced away, so that a distributed training
        goes the way of one that is not. (``compact=False`` keeps them, as the paper does.)
        """
        if self._settled:
            return
        if not self.settings.compact:
            self._stacks.mask(self.mask, optimizers)  # its momentum has moved them
        elif self.is_resizable(optimizers):
            self.compact(optimizers)
        else:
            self._hold_at_zero(optimizers)

    def _hold_at_zero(self, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
        self._stacks.mask(self.mask, optimizers, vectors=True)
        if self._regulariser.counts_all:
            self._regulariser = Regulariser(self._stacks, self.mask, self.settings.vector_norm)


def _equal(lams: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    pairs = [(lam, whole(was)) for lam, was in zip(lams, before, strict=True)]  # in every process, if in any
    return all(not was.is_meta and torch.equal(lam, was.to(lam.device)) for lam, was in pairs)
