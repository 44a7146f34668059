"""Short trainings of tiny models by methods that move a budget, under a Trainer or by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from adalora import methods
from adalora.methods import Adapted, Job
from adalora.methods.budgeted import BudgetCallback
from adalora.recipe import validate

from ..hf.models import ARCHITECTURES, batch

STEPS, T_INIT, T_FINAL, DELTA_T = 24, 3, 8, 2
ALLOCATIONS = [*range(T_INIT + 1, STEPS - T_FINAL, DELTA_T), STEPS - T_FINAL]  # 4, 6, ... 14, 16


def job_for(method: str, folder: Path, architecture: str = "bert", accumulate: int = 1, **section: Any) -> Job:
    """A job of ``STEPS`` optimizer steps; ``section`` are keys of the recipe's section ``adalora``."""
    schedule = {"tinit": T_INIT, "tfinal": T_FINAL, "deltaT": DELTA_T, "target_r": 1, "init_r": 2}
    targets = {"target_modules": ARCHITECTURES[architecture][1]}
    raw = {
        "model": "tiny",
        "method": method,
        "data": {"train": "rows.csv"},
        "adalora": {**schedule, **targets, **section},
        "training": {"gradient_accumulation_steps": accumulate},
    }
    return Job(
        recipe=validate(raw, "test"),
        task_type=ARCHITECTURES[architecture][2],
        total_steps=STEPS,
        steps_per_epoch=STEPS // 2,
        batches=list,
        trace=folder / "trace.jsonl",
    )


def adapted_for(job: Job, architecture: str = "bert", dtype: torch.dtype = torch.float32) -> Adapted:
    """The same model at every call, made trainable by the job's method."""
    torch.manual_seed(3)
    model: Any = ARCHITECTURES[architecture][0]()
    adapted = methods.get(job.recipe.method).adapt(model.to(dtype), job)
    adapted.model.to(dtype)
    return adapted


def budgeted_of(adapted: Adapted) -> Any:
    """What the method's callback drives."""
    (callback,) = adapted.callbacks
    assert isinstance(callback, BudgetCallback)
    return callback.budgeted


def optimizer_for(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=lr)


def steps_by_hand(adapted: Adapted, architecture: str = "bert", last: int = STEPS) -> Iterator[int]:
    """A plain loop, with the two calls that a Trainer makes; yields after each step."""
    budgeted, optimizer = budgeted_of(adapted), optimizer_for(adapted.model)
    for step in range(1, last + 1):
        adapted.model(**batch(ARCHITECTURES[architecture][2], step)).loss.backward()
        budgeted.before_step()
        optimizer.step()
        budgeted.after_step()
        optimizer.zero_grad()
        yield step


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Enough for ``STEPS`` steps of 8 rows, in two epochs."""

    def __init__(self, task_type: str) -> None:
        self.inputs = batch(task_type, size=STEPS * 4)

    def __len__(self) -> int:
        return STEPS * 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.inputs.items()}


def train(
    adapted: Adapted,
    folder: Path,
    architecture: str = "bert",
    *,
    accumulate: int = 1,
    checkpoints: bool = True,
    resume: int | None = None,
    watch: TrainerCallback | None = None,
) -> None:
    """A whole training under a Trainer, with a checkpoint every 5 steps in ``folder``."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        save_strategy="steps" if checkpoints else "no",
        save_steps=5,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    callbacks = [*adapted.callbacks, *([watch] if watch else [])]
    rows: Any = Rows(ARCHITECTURES[architecture][2])
    trainer = Trainer(adapted.model, arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))


class Finished(NamedTuple):
    """A whole training under a Trainer."""

    folder: Path  # checkpoints/ and trace.jsonl; to be copied, not changed
    start: dict[str, int]  # ranks
    ranks: dict[str, int]
    weights: dict[str, torch.Tensor]
    watch: Any


def finished_run(method: str, folder: Path, watch: Callable[[Adapted], TrainerCallback] | None = None) -> Finished:
    adapted = adapted_for(job_for(method, folder))
    watching = watch(adapted) if watch else None
    start = adapted.ranks()
    train(adapted, folder / "checkpoints", watch=watching)
    return Finished(folder, start, adapted.ranks(), trained_weights(adapted.model), watching)


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in model.named_parameters() if w.requires_grad}


def check_resumed(method: str, finished: Finished, step: int, folder: Path) -> None:
    """Resumed from its checkpoint at ``step`` in the empty ``folder``, a finished training comes to the same weights,
    ranks, trace and checkpoints, to the bit."""
    shutil.copytree(finished.folder, folder, dirs_exist_ok=True)
    for later in (folder / "checkpoints").iterdir():
        if int(later.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(later)
    resumed = adapted_for(job_for(method, folder))
    train(resumed, folder / "checkpoints", resume=step)
    again = trained_weights(resumed.model)
    assert all(torch.equal(value, again[key]) for key, value in finished.weights.items())
    assert resumed.ranks() == finished.ranks
    assert (folder / "trace.jsonl").read_text() == (finished.folder / "trace.jsonl").read_text()
    states = list(finished.folder.glob("checkpoints/*/budget_state.safetensors"))
    assert states
    for place in states:
        before, after = load_file(place), load_file(folder / place.relative_to(finished.folder))
        assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
