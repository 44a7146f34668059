"""Interrupted anywhere and resumed, a training ends where it would have ended."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import adalora
from adalora import AdaLoraCallback, AdaLoraConfig, StateError

from .models import batch, bert, logits
from .test_loops import make, trainer

SCRIPT = Path(__file__).with_name("trainer_run.py")
STEPS = 40  # of the script; pruning from step 5 to 28, checkpoints every 4
RANDOM_STEPS = random.Random(os.environ.get("ADALORA_KILL_SEED", "2303.10512")).sample(range(5, STEPS), 2)


def run(directory: Path, *kill: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(directory), *map(str, kill)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    done = run(directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize(
    ("step", "moment"), [*((step, "step") for step in RANDOM_STEPS), (16, "save")], ids=lambda value: str(value)
)
@pytest.mark.compatibility("Saving, loading, resuming", "Interrupted training resumes bit for bit")
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    uninterrupted: Path, tmp_path: Path, step: int, moment: str
) -> None:
    """SIGKILL at a random step (ADALORA_KILL_SEED chooses others), and between the parts of a checkpoint."""
    killed = run(tmp_path, step, moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    last = (step - 1) // 4 * 4 if moment == "save" else step // 4 * 4 if step % 4 else step - 4
    assert resumed.stdout.split()[2].endswith(f"checkpoint-{last}"), resumed.stdout
    for name in ("adapter_model.safetensors", "adapter_config.json", "trace.jsonl"):
        assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes(), f"{name} differs"


@pytest.mark.parametrize("stop", [1, 4, 7, 8, 9, 11])
@pytest.mark.compatibility("Saving, loading, resuming", "Interrupted training resumes bit for bit")
def test_a_loop_of_ones_own_resumes_exactly(stop: int, tmp_path: Path) -> None:
    """Before pruning, between masks, where the final phase begins, and after ranks were compacted."""
    base = bert()
    config = AdaLoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "dense"], target_r=2, init_r=4, total_step=12, tinit=2, tfinal=4,
        deltaT=3,
    )  # fmt: skip

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = adalora.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
        return model, torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            model(**batch("SEQ_CLS", step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = build()
    train(model, optimizer, range(stop))
    adalora.save_state(model, tmp_path)
    head = {name: w.clone() for name, w in model.named_parameters() if w.requires_grad and "lora_" not in name}
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(stop, 12))

    resumed, optimizer = build()
    resumed.load_state_dict(head, strict=False)
    adalora.load_state(resumed, tmp_path)
    optimizer.load_state_dict(optimizer_state)
    train(resumed, optimizer, range(stop, 12))
    assert adalora.ranks(resumed) == adalora.ranks(model)
    assert torch.equal(logits(resumed, "SEQ_CLS"), logits(model, "SEQ_CLS"))


@pytest.mark.compatibility("Saving, loading, resuming", "resuming without AdaLoRA's state", refused=True)
def test_resuming_without_a_state_is_an_error_that_says_what_is_missing(tmp_path: Path) -> None:
    """Not a schedule that silently starts again."""
    trainer(make(), tmp_path, save_strategy="steps", save_steps=5).train()  # without AdaLoraCallback
    again = trainer(make(), tmp_path, callbacks=[AdaLoraCallback()])
    with pytest.raises(StateError, match=r"no adalora_state.safetensors in .*checkpoint-5"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    with pytest.warns(UserWarning, match="without their training state"):
        trainer(make(), tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_resuming_from_another_directory(tmp_path: Path) -> None:
    first = make()
    trainer(first, tmp_path / "a", callbacks=[AdaLoraCallback()], save_strategy="steps", save_steps=5).train()
    second = make()
    callback = AdaLoraCallback(resume_from=tmp_path / "a" / "checkpoint-5")
    trainer(second, tmp_path / "b", callbacks=[callback]).train(str(tmp_path / "a" / "checkpoint-5"))
    assert adalora.ranks(first) == adalora.ranks(second)


@pytest.mark.compatibility("Saving, loading, resuming", "`load_best_model_at_end` from before pruning ended")
def test_the_best_checkpoint_may_lie_before_pruning_ended(tmp_path: Path) -> None:
    """load_best_model_at_end: ranks grow back to what that checkpoint had."""
    model = make()
    run = trainer(
        model, tmp_path, callbacks=[AdaLoraCallback()], save_strategy="steps", save_steps=3, eval_strategy="steps",
        eval_steps=3, load_best_model_at_end=True, metric_for_best_model="steps_left", save_total_limit=5,
    )  # fmt: skip
    run.compute_metrics = lambda _: {"steps_left": -run.state.global_step}  # the first checkpoint is the best
    with pytest.warns(UserWarning, match="lies before pruning ended"):
        run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-3")
    best = make()
    adalora.load_state(best, tmp_path / "checkpoint-3")
    head = [(n, w) for n, w in model.named_parameters() if "modules_to_save" in n]
    best.load_state_dict(dict(head), strict=False)
    torch.testing.assert_close(logits(model, "SEQ_CLS"), logits(best, "SEQ_CLS"), rtol=0, atol=1e-5)
    assert adalora.allocator(model).live > 2 * len(adalora.ranks(model))


def test_last_checkpoint_skips_what_was_cut_short(tmp_path: Path) -> None:
    assert adalora.last_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert adalora.last_checkpoint(tmp_path) is None
    for step in (5, 10):
        adalora.save_state(make(), tmp_path / f"checkpoint-{step}")
    assert adalora.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_second_training_begins_the_schedule_anew(tmp_path: Path) -> None:
    """The first was stopped while pruning went on."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    model = make(total_step=None)
    with pytest.warns(UserWarning, match="before pruning did"):
        trainer(model, tmp_path, callbacks=[AdaLoraCallback(), Stop()]).train()
    trainer(model, tmp_path, callbacks=[AdaLoraCallback()]).train()
    allocator = adalora.allocator(model)
    assert allocator.step == 12 and allocator.live == 2 * len(allocator.triplets)
    assert allocator.trace[0].step < 5


def test_only_the_first_process_writes_a_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint-5"
    directory.mkdir()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    for first in (False, True):
        state = TrainerState(global_step=5, is_world_process_zero=first)
        AdaLoraCallback().on_save(arguments, state, TrainerControl(), model=make())
        assert (directory / "adalora_state.safetensors").is_file() == first
