"""Tiny random language models of four kinds, with a tokenizer trained on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from adalora import tasks
from adalora.tasks import Setup, Task

KINDS = ("bart", "t5", "gpt2", "llama")
PAD, START, END = 0, 1, 2
_SPECIAL = ["<pad>", "<s>", "</s>"]
_TEMPLATES = {"bart": "<s> $A </s>", "t5": "$A </s>", "gpt2": "$A", "llama": "<s> $A"}
_IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}


def tokenizer_of(kind: str, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the words of ``texts``, with the special tokens that models of this kind expect."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=_TEMPLATES[kind], special_tokens=[("<s>", START), ("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )


def model_of(kind: str, vocabulary: int) -> PreTrainedModel:
    """A random model with two layers (of each sort) that reads 128 tokens."""
    if kind == "bart":
        layers = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128}
        extra = {"decoder_start_token_id": END, "forced_eos_token_id": END, "dropout": 0.0}
        return BartForConditionalGeneration(BartConfig(vocab_size=vocabulary, **_IDS, **layers, **sizes, **extra))
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
        return T5ForConditionalGeneration(T5Config(vocab_size=vocabulary, **_IDS, **sizes, decoder_start_token_id=PAD))
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
        none = dict.fromkeys(["embd_pdrop", "attn_pdrop", "resid_pdrop"], 0.0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **_IDS, **sizes, **none))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **_IDS, **sizes, max_position_embeddings=128))


def task_of(name: str, max_length: int = 48, **options: Any) -> Any:
    """A task with its own columns, which fits the models above."""
    kind = tasks.get(name)
    return kind(Setup(kind.columns, None, max_length, kind.options(**{"max_target_length": 40} | options)))


def overfit(task: Task, model: PreTrainedModel, tokenizer: Any, rows: Dataset, steps: int) -> float:
    """Train on all of ``rows`` at once; the last loss."""
    features = task.features(rows, tokenizer, model)
    batch = task.collator(tokenizer, model)([features[index] for index in range(len(features))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()
