"""A training under Transformers' Trainer that kills itself where it is told: ``trainer_run.py DIR [STEP MOMENT]``.

Resumes from the last complete checkpoint if there is one. MOMENT is ``step`` (after the optimizer's step) or ``save``
(the Trainer has written its checkpoint, AdaLoRA's state is not there yet).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import adalora
from adalora import AdaLoraCallback, AdaLoraConfig


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, 64, (80, 10), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index, 0] % 2}


class Kill(TrainerCallback):
    def __init__(self, step: int, moment: str) -> None:
        self.step, self.moment = step, moment

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.moment == "step" and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.moment == "save" and state.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(directory: Path, kill: Kill | None) -> None:
    torch.set_num_threads(1)
    set_seed(4)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=2,
        hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = adalora.get_peft_model(
        BertForSequenceClassification(config),
        AdaLoraConfig(
            task_type="SEQ_CLS", target_modules="all-linear", target_r=2, init_r=4, lora_dropout=0.1, deltaT=3
        ),
    )
    callbacks: list[TrainerCallback] = [AdaLoraCallback(trace_path=directory / "trace.jsonl")]
    if kill is not None:
        callbacks.insert(0, kill)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(directory / "checkpoints"), num_train_epochs=4, per_device_train_batch_size=8,
            learning_rate=1e-2, save_strategy="steps", save_steps=4, save_total_limit=2, report_to="none",
            disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, logging_strategy="no", seed=4,
        ),
        train_dataset=Rows(),
        callbacks=callbacks,
    )  # fmt: skip
    last = adalora.last_checkpoint(directory / "checkpoints")
    print("resumes from", last)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    adalora.export_lora(model, directory)


if __name__ == "__main__":
    place, *rest = sys.argv[1:]
    main(Path(place), Kill(int(rest[0]), rest[1]) if rest else None)
