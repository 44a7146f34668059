"""TRL's trainers whose data or models are of another shape than those of ``test_trainers``: KTO, Reward, GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import adalora
from adalora import AdaLoraCallback

from .models import VOCABULARY, batch, logits
from .test_trainers import AREA, assert_budget_reached, conversations, language_model, tokenizer, trl_config

trl: Any = pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*KTO.*", "ignore:.*experimental.*", "ignore:.*pad_token.*", "ignore:.*generation flags.*"
)


def judge() -> nn.Module:
    torch.manual_seed(13)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            num_labels=1,
            pad_token_id=0,
        )
    )


def arguments(output: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output), "per_device_train_batch_size": 4, "max_steps": 12, "learning_rate": 1e-2,
        "bf16": False, "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "dataloader_pin_memory": False, "seed": 4, "gradient_checkpointing": False,
    }  # fmt: skip


def kto(output: Path) -> Any:
    rows = conversations(("prompt", "completion"))
    return trl.KTOTrainer(
        model=language_model(),
        args=trl.KTOConfig(**arguments(output), max_length=24),
        train_dataset=rows.add_column("label", [index % 2 == 0 for index in range(len(rows))]),
        processing_class=tokenizer(),
        peft_config=trl_config(),
        callbacks=[AdaLoraCallback()],
    )


def reward(output: Path) -> Any:
    return trl.RewardTrainer(
        model=judge(),
        args=trl.RewardConfig(**arguments(output), max_length=24),
        train_dataset=conversations(("prompt", "chosen", "rejected")),
        processing_class=tokenizer(),
        peft_config=trl_config(task_type="SEQ_CLS", modules_to_save=["score"]),
        callbacks=[AdaLoraCallback()],
    )


def grpo(output: Path) -> Any:
    def longer(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(completion[0]["content"])) for completion in completions]

    return trl.GRPOTrainer(
        model=language_model(),
        reward_funcs=longer,
        args=trl.GRPOConfig(**arguments(output), num_generations=4, max_completion_length=6, beta=0.04),
        train_dataset=conversations(("prompt",)),
        processing_class=tokenizer(),
        peft_config=trl_config(),
        callbacks=[AdaLoraCallback()],
    )


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=pytest.mark.compatibility(AREA, f"TRL's `{name}Trainer`"))
        for name, make in (("KTO", kto), ("Reward", reward), ("GRPO", grpo))
    ],
)
def test_trl(make: Any, tmp_path: Path) -> None:
    run = make(tmp_path)
    model = run.model
    run.train()
    assert_budget_reached(model, steps=12)
    run.save_model(str(tmp_path / "adapter"))
    kind, base = ("SEQ_CLS", judge) if make is reward else ("CAUSAL_LM", language_model)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    if make is reward:
        rows = {"input_ids": batch("CAUSAL_LM")["input_ids"]}
        found, expected = loaded.eval()(**rows).logits, model.eval()(**rows).logits
    else:
        found, expected = logits(loaded, kind), logits(model, kind)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert sum(adalora.ranks(model).values()) == 2 * len(adalora.ranks(model))
