"""The gradient start under trainers: what they train on, draw and log is what it would have been without."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import adalora
from adalora import AdaLoraCallback, AdaLoraConfig
from adalora.core.errors import StateError

from . import test_loops as loops
from .models import bert, t5
from .test_trainers import Pairs, conversations, language_model, tokenizer

AREA = "Trainers and loops"


class Watch(TrainerCallback):
    """P and Q as training begins: noted, or put there. And the random states at every step."""

    def __init__(self, given: list[torch.Tensor] | None = None) -> None:
        self.given, self.begun = given, list[torch.Tensor]()
        self.states: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = [p for t in adalora.allocator(kwargs["model"]).triplets for p in (t.p, t.q)]
        if self.given is not None:
            with torch.no_grad():
                for parameter, value in zip(parameters, self.given, strict=True):
                    parameter.copy_(value)
        self.begun = [p.detach().clone() for p in parameters]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))  # type: ignore[index]


def config(initialization: Any, **settings: Any) -> AdaLoraConfig:
    defaults: dict[str, Any] = {
        "target_modules": ["q_proj", "v_proj", "query", "value", "q", "v"], "target_r": 2, "init_r": 4, "tinit": 2,
        "tfinal": 3, "deltaT": 1, "lora_dropout": 0.2, "initialization": initialization, "start_batches": 3,
        "start_sweeps": 2,
    }  # fmt: skip
    return AdaLoraConfig(**{**defaults, **settings})


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows that draw a random number each time they are asked for: an augmentation."""

    def __init__(self, size: int = 64) -> None:
        self.ids = torch.randint(2, 64, (size, 10), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index].clone()
        ids[-1] = 2 + int(np.random.randint(60)) % 60
        ids[-2] = 2 + int(torch.randint(60, ()))
        return {"input_ids": ids, "labels": self.ids[index, 0] % 2}


def dropping_bert() -> nn.Module:
    torch.manual_seed(11)
    model: Any = bert()
    model.config.hidden_dropout_prob = 0.2
    return type(model)(model.config)  # type: ignore[no-any-return]


ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 1e-2, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "seed": 4, "logging_steps": 1,
}  # fmt: skip


def stock(initialization: str, callbacks: list[Any], output: Path, **arguments: Any) -> Trainer:
    rows = arguments.pop("rows", None) or Rows()
    model = adalora.get_peft_model(dropping_bert(), config(initialization, task_type="SEQ_CLS"))
    return Trainer(
        model=model, args=TrainingArguments(output_dir=str(output), **{**ARGUMENTS, **arguments}), train_dataset=rows,
        callbacks=callbacks,
    )  # fmt: skip


def seq2seq(initialization: str, callbacks: list[Any], output: Path) -> Trainer:
    torch.manual_seed(3)
    base: Any = t5()
    base.config.dropout_rate = 0.2
    model = adalora.get_peft_model(type(base)(base.config), config(initialization, task_type="SEQ_2_SEQ_LM"))
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(output_dir=str(output), label_smoothing_factor=0.1, **ARGUMENTS),
        train_dataset=Pairs(), data_collator=DataCollatorForSeq2Seq(tokenizer(), model.get_base_model()),
        callbacks=callbacks,
    )  # fmt: skip


def trl(kind: str, initialization: str, callbacks: list[Any], output: Path, **arguments: Any) -> Any:
    module = pytest.importorskip("trl", reason="trl is not installed")
    columns = ("prompt", "completion") if kind == "SFT" else ("prompt", "chosen", "rejected")
    settings = {**ARGUMENTS, "max_length": 24, "bf16": False, **arguments}
    return getattr(module, f"{kind}Trainer")(
        model=language_model(), args=getattr(module, f"{kind}Config")(output_dir=str(output), **settings),
        train_dataset=conversations(columns), processing_class=tokenizer(),
        peft_config=config(initialization, task_type="CAUSAL_LM"), callbacks=callbacks,
    )  # fmt: skip


KINDS: dict[str, Callable[..., Any]] = {
    "Trainer": stock,
    "Trainer, accumulation, workers": lambda *a: stock(*a, gradient_accumulation_steps=2, dataloader_num_workers=1),
    "Trainer, persistent workers": lambda *a: stock(
        *a, dataloader_num_workers=1, dataloader_persistent_workers=True, dataloader_prefetch_factor=2
    ),
    "Trainer, bf16, checkpointing": lambda *a: stock(*a, bf16=True, gradient_checkpointing=True),
    "Trainer, fewer rows than it would look at": lambda *a: stock(*a, rows=Rows(6)),
    "Seq2SeqTrainer, label smoothing": seq2seq,
    "SFTTrainer": lambda *a: trl("SFT", *a),
    "SFTTrainer, packing": lambda *a: trl("SFT", *a, packing=True, packing_strategy="wrapped"),
    "DPOTrainer": lambda *a: trl("DPO", *a),
    "DPOTrainer, reference computed before": lambda *a: trl("DPO", *a, precompute_ref_log_probs=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays")  # TRL's packing does
@pytest.mark.compatibility(
    AREA, "the gradient start under `Trainer`, `Seq2SeqTrainer`, TRL's `SFTTrainer`, `DPOTrainer`"
)
def test_the_training_is_the_one_that_it_would_have_been(kind: str, tmp_path: Path) -> None:
    """With the same P and Q put there by hand: the same rows in the same order, random states at every step, losses and
    every other figure in the log, and the same weights at the end."""
    seen: list[tuple[Watch, Any]] = []
    for initialization in ("gradient", "orthonormal"):
        watch = Watch(seen[0][0].begun if seen else None)
        run = KINDS[kind](initialization, [AdaLoraCallback(), watch], tmp_path / initialization)
        run.train()
        seen.append((watch, run))
    (watch, run), (other, without) = seen
    ours = adalora.allocator(run.model)
    assert ours.started["batches"] == min(3, len(run.get_train_dataloader()))
    assert len(ours.started["values"]) == len(ours.triplets)
    assert adalora.allocator(without.model).started == {}
    for now, then in zip(watch.states, other.states, strict=True):
        assert now == then
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")

    def logged(run: Any) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k not in timed} for line in run.state.log_history]

    assert logged(run) == logged(without)
    for p, q in zip(run.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(p, q)
    loaders = [r.accelerator.gradient_state.dataloader_references for r in (run, without)]
    assert len(loaders[0]) == len(loaders[1])  # the training's own, which max_steps has cut short


def test_a_resumed_training_looks_at_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    keeping = {"save_strategy": "steps", "save_steps": 2, "rows": loops.Rows()}
    first = stock("gradient", [AdaLoraCallback(), Stop()], tmp_path, **keeping)
    with pytest.warns(UserWarning, match="training ended at step 4"):
        first.train()
    whole = stock("gradient", [AdaLoraCallback()], tmp_path / "whole", rows=loops.Rows())
    whole.train()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it looked again")

    monkeypatch.setattr("adalora.hf.callback.start_under", never)
    again = stock("gradient", [AdaLoraCallback(tmp_path / "trace.jsonl")], tmp_path, **keeping)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert '"start": {"rows": 12' in (tmp_path / "trace.jsonl").read_text().splitlines()[0]
    for p, q in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)


class Stream(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rows = Rows()
        yield from (rows[i] for i in range(len(rows)))


class Once(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """A stream that is its own iterator."""

    def __init__(self) -> None:
        self.rows = iter(Stream())

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        return next(self.rows)


def test_streams(tmp_path: Path) -> None:
    run = stock("gradient", [AdaLoraCallback()], tmp_path, rows=Stream())
    run.train()
    assert adalora.allocator(run.model).started["rows"] == 12
    once = stock("gradient", [AdaLoraCallback()], tmp_path, rows=Once())
    with pytest.raises(StateError, match="can be gone through once"):
        once.train()


def test_a_callback_that_nobody_can_find_a_trainer_for_says_what_to_do() -> None:
    model = adalora.get_peft_model(dropping_bert(), config("gradient", task_type="SEQ_CLS"))
    state: Any = type("State", (), {"global_step": 0, "max_steps": 8, "num_train_epochs": 1})()
    with pytest.raises(StateError, match=r"call adalora.start\(model, batches\) before training"):
        AdaLoraCallback().on_train_begin(TrainingArguments("x", use_cpu=True), state, None, model=model)  # type: ignore[arg-type]
