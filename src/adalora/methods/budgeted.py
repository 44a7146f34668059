"""What methods share that move a budget while they train and are not AdaLoRA's own allocator.

Their share of a Trainer's work: a step that a loss scaler skipped is not counted, accumulated batches are one step, and
a checkpoint holds what its weights do not say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..core.errors import StateError
from ..core.schedule import Schedule
from ..core.settings import Settings
from ..core.trace import Allocation, TraceFile
from ..files import replacing
from ..recipe import AdaLoraSection, RecipeError

ADAPTER = "default"
"""PEFT's name of the adapter."""
STATE_NAME = "budget_state.safetensors"


class Budgeted(Protocol):
    """Moves the budget of one model."""

    step: int  # optimizer steps counted so far

    def header(self) -> dict[str, Any]:
        """What its trace begins with: see :func:`header`."""
        ...

    def before_step(self) -> None:
        """Gradients are there, clipped; the weights are those that they were taken at."""
        ...

    def after_step(self) -> Allocation | None:
        """The optimizer has moved the weights; gradients are still there. Counts the step; the allocation it did."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that a bit-for-bit resumption needs beside the weights and the step."""
        ...

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` gave at ``step``."""
        ...


class BudgetCallback(TrainerCallback):
    """Drives ``budgeted`` under a Trainer, writes its trace, and keeps its state in checkpoints."""

    def __init__(self, budgeted: Budgeted, trace: Path) -> None:
        self.budgeted = budgeted
        self.trace = TraceFile(trace)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            restore_state(self.budgeted, _checkpoint(args, state))
        if state.is_world_process_zero:
            self.trace.start(self.budgeted.header(), after_step=self.budgeted.step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.budgeted.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):  # by the loss scaler, for gradients of inf
            return
        allocation = self.budgeted.after_step()
        if allocation is not None and state.is_world_process_zero:
            self.trace.append(allocation)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_state(self.budgeted, _checkpoint(args, state))


def save_state(budgeted: Budgeted, checkpoint: Path) -> None:
    """Write the state into a checkpoint, whole or not at all."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in budgeted.tensors().items()}
    with replacing(checkpoint / STATE_NAME) as beside:
        save_file(tensors, beside, metadata={"step": str(budgeted.step)})


def restore_state(budgeted: Budgeted, checkpoint: Path) -> None:
    """Take over what :func:`save_state` wrote.

    Raises:
        StateError: the checkpoint has no such state.
    """
    path = checkpoint / STATE_NAME
    if not path.is_file():
        raise StateError(
            f"{checkpoint} cannot be resumed: there is no {STATE_NAME} in it, so its writing was interrupted, or it is"
            " of another method. Resume from an earlier checkpoint, or start over."
        )
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        budgeted.restore(int(file.metadata()["step"]), tensors)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


# --- the section adalora, for methods that do not have all of it --------------------------------------


def check_keys(section: AdaLoraSection, method: str, own: Mapping[str, object]) -> None:
    """Refuse keys that would change nothing.

    Args:
        own: what the method does in place of a choice, by key: a recipe may say this, or leave the key out.

    Raises:
        RecipeError: a key says something else.
    """
    for key, value in own.items():
        given = getattr(section, key)
        if given not in (AdaLoraSection.model_fields[key].default, value):
            raise RecipeError(
                f"adalora.{key}: the method {method} has no such choice (what it does is {value!r}): leave the key out"
                f" (given: {given!r})"
            )


def settings_of(section: AdaLoraSection) -> Settings:
    """What the section says about importance, policy and schedule; ConfigError for what is not known."""
    return Settings(
        target_rank=section.target_r,
        t_init=section.tinit,
        t_final=section.tfinal,
        delta_t=section.deltaT,
        curve=section.schedule,
        beta1=section.beta1,
        beta2=section.beta2,
        metric=section.importance,
        policy=section.policy,
        budget_unit=section.budget_unit,
        rank_by=section.rank_by,
    )


def scale_of(section: AdaLoraSection) -> float:
    """s, which the update is multiplied by at every rank."""
    assert section.init_r is not None and section.lora_alpha is not None  # filled in when it was validated
    return section.lora_alpha / (math.sqrt(section.init_r) if section.use_rslora else section.init_r)


def header(sizes: Mapping[str, int], initial_rank: int, schedule: Schedule, settings: Settings) -> dict[str, Any]:
    """What a trace begins with, as :meth:`adalora.Allocator.header` has it.

    Args:
        sizes: parameters of one triplet, or doublet, of each matrix, by its name.
    """
    return {
        "names": list(sizes),
        "initial_ranks": [initial_rank] * len(sizes),
        "triplet_parameters": list(sizes.values()),
        "budget": {"initial": schedule.initial_budget, "target": schedule.target_budget},
        "schedule": asdict(schedule),
        "budget_unit": settings.budget_unit,
        "rank_by": settings.rank_by,
        "importance": settings.metric,
        "policy": settings.policy,
    }
