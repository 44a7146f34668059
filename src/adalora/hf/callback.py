"""The Trainer's side: it knows how long training is, and where checkpoints lie."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.allocator import Allocator
from ..core.errors import StateError
from ..core.trace import TraceFile
from .adapters import STATE_NAME, allocator, load_state, save_state
from .layers import adapter_names
from .start import start_under, trainer_of

UNSEEN_STEPS = 20  # a loss scaler may skip the first few
LOW_RATE = 1e-4
SHORT_WAY = 0.1  # rate x steps, the farthest that Adam can move a weight


class AdaLoraCallback(TrainerCallback):
    """Gives a Trainer's number of steps to the allocator, keeps its state in checkpoints and logs the budget.

    Args:
        trace_path: also write every allocation to this file, as JSON lines.
        resume_from: checkpoint to restore the AdaLoRA state from; found by itself when ``Trainer.train`` resumes from a
            checkpoint in its own output directory.
        adapter_name: which adapter, when the model has several.

    Each log line of the Trainer gains ``adalora/budget``, ``adalora/live`` (triplets kept),
    ``adalora/spent`` (what they take of a budget in parameters) and
    ``adalora/orthogonality`` (mean ‖XXᵀ - I‖_F). What a Trainer reports to (its ``report_to``) is called before these
    callbacks and does not see them: ``adalora.monitoring.ReportRanks`` sends them there, with the ranks.
    """

    def __init__(
        self,
        trace_path: str | os.PathLike[str] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        adapter_name: str | None = None,
    ) -> None:
        self.trace_path = trace_path
        self.resume_from = resume_from
        self.adapter_name = adapter_name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = _trained(kwargs["model"])
        ours = allocator(model, self.adapter_name)
        if state.global_step > 0:
            self._resume(model, args, state)
        elif ours.step > 0 and not ours.frozen:
            ours.restart()
        planned = ours.settings.total_step
        if planned not in (None, state.max_steps):
            warnings.warn(
                f"total_step={planned} in the AdaLoraConfig, but this Trainer takes {state.max_steps} optimizer steps:"
                f" the schedule is laid out over {state.max_steps}. Leave total_step out when you use AdaLoraCallback.",
                stacklevel=2,
            )
        if ours.awaits_start:
            self._start(model)
        ours.plan(state.max_steps, _steps_per_epoch(args, state, kwargs.get("train_dataloader")))
        check_rate(ours, kwargs.get("optimizer"), state.max_steps)
        if self.trace_path is not None and state.is_world_process_zero:
            ours.trace_file = TraceFile(self.trace_path)
            ours.trace_file.start(ours.header(), after_step=ours.step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ours = allocator(_trained(kwargs["model"]), self.adapter_name)
        if ours.step == 0 and state.global_step >= UNSEEN_STEPS:
            raise StateError(
                f"{state.global_step} optimizer steps have passed and none of them was the adapter's: the optimizer"
                f" ({type(kwargs.get('optimizer')).__name__}) holds no AdaLoRA parameter with a gradient. Was it made"
                " from another copy of the model, or is the adapter not active?"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        ours = allocator(_trained(kwargs["model"]), self.adapter_name)
        figures = {
            "adalora/budget": ours.budget,
            "adalora/live": ours.live,
            "adalora/orthogonality": ours.orthogonality_error(),
        }
        if ours.settings.budget_unit != "triplets":
            figures["adalora/spent"] = ours.spent
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After everything else is written: its presence says that the checkpoint is complete."""
        directory = _checkpoint(args, state)
        model = _trained(kwargs["model"])
        sharded = allocator(model, self.adapter_name).is_sharded  # then all gather, and the first writes
        if sharded or (state.is_world_process_zero and directory.is_dir()):
            save_state(model, directory, self.adapter_name)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        ours = allocator(_trained(kwargs["model"]), self.adapter_name)
        unit = ours.settings.budget_unit
        if not ours.frozen:
            warnings.warn(
                f"training ended at step {ours.step}, before pruning did: {ours.spent} {unit} are live and the budget"
                f" was {ours.target_budget}. The adapter is saved with the rank it has.",
                stacklevel=2,
            )
        elif ours.spent > ours.target_budget:
            warnings.warn(
                f"the best checkpoint, {state.best_model_checkpoint}, lies before pruning ended: as asked for, it was"
                f" loaded, with {ours.spent} {unit} where the budget was {ours.target_budget}. To stay within the"
                " budget, train without load_best_model_at_end, or evaluate in the final phase alone.",
                stacklevel=2,
            )

    def _start(self, model: nn.Module) -> None:
        trainer = trainer_of(self)
        if trainer is None:
            raise StateError(
                "initialization='gradient' looks at training batches before the first step, and no Trainer that calls"
                " this callback can be found: call adalora.start(model, batches) before training."
            )
        start_under(trainer, model, self.adapter_name)

    def _resume(self, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        given = (self.resume_from, args.resume_from_checkpoint)
        candidates = [Path(place) for place in given if isinstance(place, (str, os.PathLike))]
        candidates.append(_checkpoint(args, state))
        found = next((place for place in candidates if (place / STATE_NAME).is_file()), None)
        if found is None:
            raise StateError(
                f"the Trainer resumes at step {state.global_step}, but there is no {STATE_NAME} in"
                f" {', '.join(str(place) for place in candidates)}. Give AdaLoraCallback(resume_from=CHECKPOINT) the"
                " checkpoint you resume from; one without that file was not saved with AdaLoraCallback (or was cut"
                " short), and its schedule cannot be resumed."
            )
        load_state(model, found, self.adapter_name)
        ours = allocator(model, self.adapter_name)
        if ours.step != state.global_step and not ours.manual:
            warnings.warn(
                f"{found} has seen {ours.step} updates of the adapter, the Trainer {state.global_step} steps"
                " (steps skipped by a loss scaler, or another checkpoint's state).",
                stacklevel=2,
            )


def _trained(model: Any) -> nn.Module:
    """The model that a Trainer hands to its callbacks; of a wrapper that is no module (SetFit's), the part that has an
    adapter."""
    if isinstance(model, nn.Module):
        return model
    parts = [part for part in vars(model).values() if isinstance(part, nn.Module) and adapter_names(part)]
    if len(parts) != 1:
        found = "none of whose parts has" if not parts else f"{len(parts)} of whose parts have"
        raise StateError(
            f"this Trainer gives its callbacks a {type(model).__name__}, {found} an AdaLoRA adapter: add one to the"
            " model that is trained, with its add_adapter(AdaLoraConfig(...)) or adalora.get_peft_model, before the"
            " Trainer is made."
        )
    return parts[0]


def check_rate(ours: Allocator, optimizer: Any, steps: int) -> None:
    """Warn of a rate at which an adapter hardly moves: the Trainer's default is one for whole models.

    Adam moves a weight by about the rate in a step, whatever the gradient. docs/results.md has what was measured.
    """
    kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
    if optimizer is None or "adam" not in kind.lower():
        return
    own = {id(parameter) for triplets in ours.triplets for parameter in triplets.parameters}
    groups = [group for group in optimizer.param_groups if any(id(parameter) in own for parameter in group["params"])]
    rate = max((float(group.get("initial_lr", group["lr"])) for group in groups), default=LOW_RATE)
    if rate < LOW_RATE and rate * steps < SHORT_WAY:
        warnings.warn(
            f"the learning rate is {rate:g}: with {kind}, an adapter learns next to nothing at that rate in {steps}"
            " steps. Rates from 1e-3 to 1e-2 are usual here; TrainingArguments' default, 5e-5, is for whole models.",
            stacklevel=3,
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _steps_per_epoch(args: TrainingArguments, state: TrainerState, dataloader: Any) -> float:
    try:
        return max(1, math.ceil(len(dataloader) / args.gradient_accumulation_steps))
    except TypeError:  # a stream has no length
        return state.max_steps / max(1, state.num_train_epochs)
