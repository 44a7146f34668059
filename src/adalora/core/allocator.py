"""Owns the importance of all triplets of one model and does one optimizer step's work (paper, Algorithm 1).

Around each optimizer step t the training loop's hook calls

    before_step   adds the regulariser's gradient and updates Ī and Ū, at the weights before the update
    after_step    counts the step; when it is due, ranks all triplets and zeroes λ of those beyond the budget b(t)

Parameters belong to the layers; here, equal shapes are stacked, so the number of tensor operations does not grow with
the number of matrices, and nothing waits for the device except when an allocation is written to the trace.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from . import orthogonality as orth
from .errors import ConfigError, ScheduleError, StateError
from .importance import METRICS, Magnitudes, Smoothed, all_finite, mean_over_vectors
from .policy import POLICIES
from .schedule import Schedule
from .settings import Settings
from .stacks import Stack, gradient_of, split, wide
from .trace import Allocation, TraceFile
from .triplets import Factors, Triplets

STATE_VERSION = 1

LIVE: weakref.WeakSet[Allocator] = weakref.WeakSet()
"""Every allocator in this process, so that an optimizer's step can find those whose parameters it holds."""


class Allocator:
    """Budget allocation over the triplets of one model.

    Args:
        triplets: one entry for each adapted matrix; the order is the order of ties and of the trace.
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
        self.frozen = self.initial_budget == self.target_budget  # from the final phase on the mask no longer changes
        self.hooked = False  # before_step and after_step are called by the optimizer's hooks
        self.manual = False  # update_and_allocate has taken over from the hook
        self.trace: list[Allocation] = []
        self.trace_file: TraceFile | None = None
        self._stepping = False
        self._weights_replaced = False
        self._stacks: list[Stack] = []
        self._lam_importance: Smoothed | None = None
        self._lam_before_mask: list[Tensor] | None = None
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None  # that stepped last
        self._lay_out()
        self.mask = torch.ones(sum(self.sizes), dtype=torch.bool, device=self.triplets[0].lam.device)
        if self.initial_budget < self.target_budget:
            raise ConfigError(
                f"the initial ranks sum to {self.initial_budget} triplets, below the target of {self.target_budget}"
                f" (target_r={settings.target_rank} x {len(names)} matrices): AdaLoRA only prunes. Raise init_r (or"
                " rank_pattern) or lower target_r."
            )
        if settings.total_step is not None:
            try:
                self.plan(settings.total_step)
            except ScheduleError:
                if not any(isinstance(s, str) for s in (settings.t_init, settings.t_final, settings.delta_t)):
                    raise  # else: epochs, which wait for a plan that knows their length
        LIVE.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trace_file": None, "_optimizer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:  # copies and unpickled models allocate, too
        self.__dict__.update(state)
        LIVE.add(self)

    # ---------------------------------------------------------------- what a caller may ask

    @property
    def sizes(self) -> list[int]:
        """Triplets held by each matrix, pruned ones included until they are compacted away."""
        return [t.rank for t in self.triplets]

    @property
    def is_resizable(self) -> bool:
        """Whether ranks can be compacted in memory now. Distributed wrappers keep buffers of the parameters' sizes."""
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        return (alone or torch.distributed.get_world_size() == 1) and all(t.is_resizable for t in self.triplets)

    @property
    def initial_budget(self) -> int:
        return sum(self.initial_ranks)

    @property
    def target_budget(self) -> int:
        return len(self.triplets) * self.settings.target_rank

    @property
    def budget(self) -> int:
        """b(t) at the present step."""
        return self.initial_budget if self.schedule is None else self.schedule.budget(self.step)

    @property
    def live(self) -> int:
        """Triplets kept by the last allocation, all matrices together."""
        self._refresh()
        return int(self.mask.sum())

    def ranks(self) -> dict[str, int]:
        """Live triplets of each matrix, by name."""
        self._refresh()
        return dict(zip((t.name for t in self.triplets), self._live_counts(), strict=True))

    def describe(self) -> str:
        """The schedule in words."""
        if self.schedule is None:
            return (
                f"{self.initial_budget} triplets to start with, {self.target_budget} at the end; total steps unknown."
            )
        return self.schedule.describe(len(self.triplets))

    def header(self) -> dict[str, Any]:
        """What a trace begins with: matrices, budgets, schedule."""
        return {
            "names": [t.name for t in self.triplets],
            "initial_ranks": self.initial_ranks,
            "budget": {"initial": self.initial_budget, "target": self.target_budget},
            "schedule": None if self.schedule is None else asdict(self.schedule),
            "importance": self.settings.metric,
            "policy": self.settings.policy,
        }

    def plan(self, total_step: int, steps_per_epoch: float | None = None) -> None:
        """Fix the number of optimizer steps, and with it the schedule.

        Raises:
            ScheduleError: no step is left for pruning, or a length is in epochs and ``steps_per_epoch`` is missing.
        """
        schedule = self.settings.schedule(self.initial_budget, len(self.triplets), total_step, steps_per_epoch)
        if self.schedule is not None and self.schedule != schedule and self.step > 0 and not self.frozen:
            warnings.warn(
                f"the schedule changes at step {self.step} of training: {schedule.describe(len(self.triplets))}",
                stacklevel=2,
            )
        self.schedule = schedule

    def scores(self) -> Tensor:
        """S of every triplet, matrix after matrix: [sum of sizes]."""
        metric = METRICS[self.settings.metric]
        if metric.value is not None:
            norms = {"p": torch.zeros_like(self._lam()), "q": torch.zeros_like(self._lam())}
            for stack in self._stacks:
                lengths = stack.values(self.triplets).norm(dim=-1).flatten()
                for side, into in norms.items():
                    ours = self._side_mask(stack, side)
                    into.index_add_(0, stack.positions[ours], lengths[ours])
            return metric.value(Magnitudes(self._lam().abs(), norms["p"], norms["q"]))
        assert metric.entry is not None
        if self._lam_importance is None:
            return torch.zeros_like(self._lam())
        scores = metric.entry(self._lam_importance)
        for stack in self._stacks:
            if stack.importance is not None:
                scores = scores.index_add(0, stack.positions, mean_over_vectors(metric.entry(stack.importance)))
        return scores

    def orthogonality_error(self) -> float:
        """Mean over all P and Q of ‖XXᵀ - I‖_F."""
        parts = [orth.errors(stack.values(self.triplets)) for stack in self._stacks]
        return float(torch.cat(parts).mean()) if parts else 0.0

    def penalty(self) -> Tensor:
        """γ·R as a differentiable scalar; :meth:`before_step` already adds its gradient, so do not add both."""
        return self.settings.orthogonality_weight * orth.penalty(self.triplets, self.settings.orthogonality)

    # ---------------------------------------------------------------- one optimizer step

    def before_step(self, grad_scale: Tensor | None = None, *, again: bool = False) -> None:
        """Add the regulariser's gradient, once however many batches were accumulated, and update the importance.

        A step for which no parameter of this model has a gradient is not this model's step: nothing happens.

        Args:
            grad_scale: factor by which a loss scaler has multiplied the gradients, if they are still scaled.
            again: the gradients were computed anew within one step, as LBFGS does; they get the regulariser's, too.

        Raises:
            ScheduleError: the total number of steps is still unknown.
        """
        if self._stepping and not again:
            return  # an optimizer that wraps another runs the hooks of both
        self._stepping = any(w.grad is not None for t in self.triplets for w in t.parameters)
        if not self._stepping:
            return
        if self._weights_replaced:
            warnings.warn(
                f"adapter weights were loaded without their training state: the budget's schedule goes on from step"
                f" {self.step}. To resume an interrupted training, load adalora_state.safetensors too"
                " (adalora.load_state(model, checkpoint), or AdaLoraCallback() under a Trainer).",
                stacklevel=2,
            )
        self._refresh()
        if self.schedule is None and not self.frozen:
            raise ScheduleError(
                "AdaLoRA does not know how many optimizer steps the training will take, so it cannot lay out its"
                " budget. Either give the number, AdaLoraConfig(total_step=...), or train with a Trainer and"
                " callbacks=[AdaLoraCallback()], which reads it there. (Lengths in epochs need"
                " adalora.allocator(model).plan(total_step, steps_per_epoch) in a loop of your own.)"
            )
        if self.settings.orthogonality_weight:
            self._add_orthogonality_gradient(grad_scale)
        if not again and self.settings.sensitivity_at == "before_step":
            self._update_importance(grad_scale)

    def after_step(self, optimizer: torch.optim.Optimizer | None = None, grad_scale: Tensor | None = None) -> None:
        """Count the step and allocate if it is due. ``optimizer``: its state is sliced along with the ranks."""
        if not self._stepping:
            return
        self._stepping = False
        if self.settings.sensitivity_at == "after_step":
            self._update_importance(grad_scale)
        self.step += 1
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        if not self.manual:
            self._allocate(self.step, optimizer)

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
            raise ScheduleError(f"update_and_allocate({step}) needs AdaLoraConfig(total_step=...).")
        if not self.manual:
            self.manual = True
            if self._lam_before_mask is not None:  # the hook has masked at its own count of this very step
                torch._foreach_copy_([t.lam.data for t in self.triplets], self._lam_before_mask)
        self.step = step
        self._allocate(step, None if self._optimizer is None else self._optimizer())

    def compact(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Slice pruned triplets away for good: P, Λ, Q and the optimizer's state shrink in place.

        Raises:
            StateError: pruning is not over, so pruned triplets may still return; or something pins the shapes.
        """
        if not self.frozen:
            raise StateError(
                f"pruning goes on until {'the final phase' if self.schedule is None else self.schedule.final_step}"
                f" (now at step {self.step}) and pruned triplets may still return; what is saved is always compact."
            )
        if not self.is_resizable:
            raise StateError(
                "the adapter's parameters are still held by a graph (a loss kept with retain_graph=True?) or by a"
                " compiled or distributed model, which pins their shapes; what is saved is always compact."
            )
        self._refresh()
        self._apply(self.mask)
        for triplets, mask in zip(self.triplets, split(self.mask, self.sizes), strict=True):
            triplets.keep(mask.nonzero().flatten(), optimizer)
        self._lay_out()
        self.mask = torch.ones(sum(self.sizes), dtype=torch.bool, device=self.mask.device)

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-for-bit resumption needs, P Λ Q included: plain values, and ``tensors`` by name."""
        self._refresh()
        tensors: dict[str, Tensor] = {}
        for triplets, mask in zip(self.triplets, split(self.mask, self.sizes), strict=True):
            for key, value in (*Factors(*triplets.parameters)._asdict().items(), ("mask", mask)):
                tensors[f"{triplets.name}/{key}"] = value.detach().clone()
        for name, smoothed in self._importance_by_factor().items():
            for key, value in smoothed._asdict().items():
                tensors[f"{name}.{key}"] = value.clone()
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "frozen": self.frozen,
            "manual": self.manual,
            "metric": self.settings.metric,
            "initial_ranks": list(self.initial_ranks),
            "schedule": None if self.schedule is None else asdict(self.schedule),
            "tensors": tensors,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, ranks included.

        Raises:
            StateError: it is of another model, metric or version; nothing has been changed then.
        """
        tensors: dict[str, Tensor] = state["tensors"]
        theirs, ours = {key.split("/")[0] for key in tensors}, {t.name for t in self.triplets}
        if state["version"] != STATE_VERSION:
            raise StateError(f"this state has version {state['version']}, this adalora reads {STATE_VERSION}.")
        if theirs != ours:
            raise StateError(
                f"this state is of another model or other target modules: it lacks {sorted(ours - theirs)[:3]} and has"
                f" {sorted(theirs - ours)[:3]} that are not adapted here."
            )
        if state["metric"] != self.settings.metric:
            raise StateError(
                f"this state was made with importance={state['metric']!r}, this model has {self.settings.metric!r};"
                " train with the same importance to resume."
            )
        for t in self.triplets:
            p, q = tensors[f"{t.name}/p"], tensors[f"{t.name}/q"]
            if (p.shape[0], q.shape[1]) != (t.p.shape[0], t.q.shape[1]):
                raise StateError(
                    f"the state's {t.name} is {p.shape[0]} x {q.shape[1]}, the model's {t.p.shape[0]} x {t.q.shape[1]}."
                )
        for t in self.triplets:
            t.assign(Factors(*(tensors[f"{t.name}/{key}"] for key in Factors._fields)))
        self.step, self.frozen, self.manual = state["step"], state["frozen"], state["manual"]
        self.initial_ranks = list(state["initial_ranks"])
        if state["schedule"] is not None:
            self.schedule = Schedule(**state["schedule"])
        self._lay_out()
        self._weights_replaced = False
        device = self.triplets[0].lam.device
        self.mask = torch.cat([tensors[f"{t.name}/mask"] for t in self.triplets]).to(device)
        if any(key.endswith(".sensitivity") for key in tensors):
            self._create_importance()
        for name, smoothed in self._importance_by_factor().items():
            for key, value in smoothed._asdict().items():
                value.copy_(tensors[f"{name}.{key}"])

    def restart(self) -> None:
        """Begin the schedule anew with the present weights, for a second training of the same model."""
        self.step, self._stepping = 0, False
        self.initial_ranks = self.sizes
        self.frozen = self.initial_budget == self.target_budget
        self._lay_out()
        self.mask = torch.ones_like(self.mask)
        self.trace.clear()

    def weights_replaced(self) -> None:
        """To be told when P, Λ, Q were loaded from elsewhere: live is then what is not zero."""
        self._weights_replaced = True

    # ---------------------------------------------------------------- inside

    def _refresh(self) -> None:
        """Catch up with weights, ranks or a device that changed behind the allocator's back."""
        device = self.triplets[0].lam.device
        if self.mask.device != device:
            self.mask = self.mask.to(device)
            self._lam_importance = None if self._lam_importance is None else self._lam_importance.to(device)
            for stack in self._stacks:
                stack.to(device)
        if self._weights_replaced or len(self.mask) != sum(self.sizes):
            self._weights_replaced = False
            self._lay_out()
            self.mask = torch.cat([t.lam.detach() for t in self.triplets]) != 0

    def _lay_out(self) -> None:
        """Group the factors by shape; forgets the importance."""
        sizes = self.sizes
        offsets = [sum(sizes[:k]) for k in range(len(sizes))]
        members: dict[tuple[int, int], list[tuple[int, str]]] = {}
        for k, t in enumerate(self.triplets):
            for side, d in (("p", t.p.shape[0]), ("q", t.q.shape[1])):
                if t.rank:
                    members.setdefault((t.rank, d), []).append((k, side))
        device = self.triplets[0].lam.device
        self._stacks = [Stack(group, offsets, rank, device) for (rank, _), group in members.items()]
        self._lam_importance = None

    def _side_mask(self, stack: Stack, side: str) -> Tensor:
        rank = len(stack.positions) // len(stack.members)
        ours = torch.tensor([s == side for _, s in stack.members], device=stack.positions.device)
        return ours.repeat_interleave(rank)

    def _lam(self) -> Tensor:
        return wide(torch.cat([t.lam.detach() for t in self.triplets]))

    def _live_counts(self) -> list[int]:
        return [int(part.sum()) for part in split(self.mask.cpu(), self.sizes)]

    @torch.no_grad()
    def _add_orthogonality_gradient(self, grad_scale: Tensor | None) -> None:
        weight = self.settings.orthogonality_weight
        for stack in self._stacks:
            update = orth.gradient(stack.values(self.triplets), self.settings.orthogonality, 2 * len(self.triplets))
            update *= weight if grad_scale is None else weight * grad_scale.to(update.dtype)
            parameters = stack.parameters(self.triplets)
            pairs = [
                (w, rows.mT if side == "p" else rows)
                for w, rows, (_, side) in zip(parameters, update.unbind(0), stack.members, strict=True)
                if w.requires_grad
            ]
            for w, _ in pairs:
                if w.grad is None:
                    w.grad = torch.zeros_like(w)
            if pairs:
                gradients = [gradient_of(w) for w, _ in pairs]
                torch._foreach_add_(
                    gradients, [rows.to(g.dtype) for g, (_, rows) in zip(gradients, pairs, strict=True)]
                )

    def _importance_is_due(self) -> bool:
        """The last update comes the step before the final phase begins."""
        return (
            not self.frozen
            and self.schedule is not None
            and self.schedule.prunes
            and METRICS[self.settings.metric].entries != "none"
            and self.step + 1 < self.schedule.final_step
        )

    @torch.no_grad()
    def _create_importance(self) -> None:
        self._lam_importance = Smoothed.zeros_like(self._lam())
        if METRICS[self.settings.metric].entries == "all":
            for stack in self._stacks:
                stack.importance = Smoothed.zeros_like(stack.values(self.triplets))

    @torch.no_grad()
    def _update_importance(self, grad_scale: Tensor | None) -> None:
        if not self._importance_is_due():
            return
        if self._lam_importance is None:
            self._create_importance()
        assert self._lam_importance is not None
        blocks = [(self._lam_importance, self._lam(), wide(torch.cat([gradient_of(t.lam) for t in self.triplets])))]
        for stack in self._stacks:
            if stack.importance is not None:
                blocks.append((stack.importance, stack.values(self.triplets), stack.gradients(self.triplets)))
        valid = all_finite([g for _, _, g in blocks])
        for smoothed, w, g in blocks:
            if grad_scale is not None:
                g = g / grad_scale.to(g.dtype)
            smoothed.update_(w, g, self.settings.beta1, self.settings.beta2, valid)

    def _allocate(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        schedule = self.schedule
        self._lam_before_mask = None
        if self.frozen:
            self._settle(optimizer)
            return
        if schedule is None or not (schedule.allocates(step) or schedule.is_final(step)):
            return
        if self.step == 1 and not self.manual:
            self._lam_before_mask = [t.lam.detach().clone() for t in self.triplets]
        budget = schedule.budget(step)
        self.mask = POLICIES[self.settings.policy](self.scores(), budget, self.sizes)
        self._apply(self.mask)
        allocation = Allocation(step, budget, self._live_counts(), self.orthogonality_error())
        self.trace.append(allocation)
        if self.trace_file is not None:
            self.trace_file.append(allocation)
        if schedule.is_final(step):
            self.frozen = True
            self._lay_out()  # the importance has done its work
            self._settle(optimizer)

    def _settle(self, optimizer: torch.optim.Optimizer | None) -> None:
        """In the final phase: compact as soon as nothing pins the shapes; until then hold pruned λ at 0."""
        if len(self.mask) == self.target_budget:
            return
        if self.settings.compact and self.is_resizable:
            self.compact(optimizer)
        else:
            self._apply(self.mask)  # the optimizer's momentum has moved them

    @torch.no_grad()
    def _apply(self, mask: Tensor) -> None:
        lams = [t.lam.data for t in self.triplets]
        torch._foreach_mul_(lams, split(mask.to(lams[0].dtype), self.sizes))

    def _importance_by_factor(self) -> dict[str, Smoothed]:
        """Views of the moving averages: "name/p", "name/lam", "name/q" -> [r, d] (singular vectors as rows) or [r]."""
        parts: dict[str, Smoothed] = {}
        if self._lam_importance is not None:
            blocks = [split(block, self.sizes) for block in self._lam_importance]
            for t, sensitivity, uncertainty in zip(self.triplets, *blocks, strict=True):
                parts[f"{t.name}/lam"] = Smoothed(sensitivity, uncertainty)
        for stack in self._stacks:
            if stack.importance is not None:
                for place, (k, side) in enumerate(stack.members):
                    parts[f"{self.triplets[k].name}/{side}"] = Smoothed(*(block[place] for block in stack.importance))
        return parts
