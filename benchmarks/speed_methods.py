"""The shapes and the methods that ``speed.py`` measures, each ready to take a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

import adalora

INITIAL_RANK, TARGET_RANK = 12, 8  # LoRA and DoRA have the initial rank
Batch = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------ shapes


@dataclass(frozen=True)
class Shape:
    """A model with random weights and the size of its batches.

    Args:
        kind: ``bert`` (classification) or ``llama`` (next token).
        share: of the time for all shapes, relative to the others'.
        turn: steps that a method takes when its turn comes in a round; the median of them counts.
    """

    kind: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    rows: int
    length: int
    share: float
    turn: int = 1
    vocabulary: int = 1000
    key_value_heads: int | None = None
    gpu: bool = False

    @property
    def is_small(self) -> bool:
        """Whether steps are so short that all methods fit into the short form."""
        return self.turn > 1 and not self.gpu

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def model(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The base model, frozen."""
        sizes: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": max(self.length, 128),
        }
        make: Any = AutoModelForSequenceClassification
        if self.kind == "bert":
            config: Any = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # two labels
        else:
            make = AutoModelForCausalLM
            config = LlamaConfig(**sizes, num_key_value_heads=self.key_value_heads, use_cache=False)
        with device:
            base: nn.Module = make.from_config(config, dtype=dtype)
        return base.requires_grad_(False)

    def batch(self, seed: int, device: torch.device) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.vocabulary, (self.rows, self.length), generator=generator)
        labels = ids[:, 0] % 2 if self.kind == "bert" else ids
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {name: tensor.to(device) for name, tensor in batch.items()}


def _matrices(layers: int) -> Shape:
    """Six tiny matrices a layer, where the cost is that of dispatching operations and not of computing."""
    return Shape("bert", layers, hidden=64, intermediate=256, heads=4, rows=4, length=16, share=layers / 20, turn=4)


_LLAMA_1B = Shape(
    "llama", 16, 2048, 8192, 32, rows=4, length=1024, share=1, turn=3, vocabulary=32000, key_value_heads=8, gpu=True
)
_LLAMA_7B = Shape("llama", 32, 4096, 11008, 32, rows=1, length=1024, share=2, turn=3, vocabulary=32000, gpu=True)
SHAPES = {
    "bert-small-16x64": Shape("bert", 6, 384, 1536, 12, rows=16, length=64, share=1.5),
    "bert-small-4x128": Shape("bert", 6, 384, 1536, 12, rows=4, length=128, share=1),
    "bert-base-4x128": Shape("bert", 12, 768, 3072, 12, rows=4, length=128, share=4),
    "llama-small-4x128": Shape("llama", 8, 512, 1376, 8, rows=4, length=128, share=2),
    "matrices-12": _matrices(2),
    "matrices-72": _matrices(12),
    "matrices-216": _matrices(36),
    "llama-1b-1024": _LLAMA_1B,
    "llama-1b-2048": Shape(**{**vars(_LLAMA_1B), "rows": 2, "length": 2048}),
    "llama-7b-1024": _LLAMA_7B,
    "llama-7b-2048": Shape(**{**vars(_LLAMA_7B), "length": 2048}),
}


# ------------------------------------------------------------------------------------------------ methods


@dataclass
class Subject:
    """One method on one shape.

    Args:
        optimizer: None where nothing is trained.
        allocate: called with the step's number after ``optimizer.step()``, as PEFT's AdaLoRA asks for.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    allocate: Callable[[int], None] | None = None
    steps: int = 0

    def step(self, batch: Batch) -> None:
        """``zero_grad``, forward, backward, ``optimizer.step`` (our allocator is driven by it), PEFT's allocation."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self.called(**batch).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.steps += 1
        if self.allocate is not None:
            self.allocate(self.steps)

    @property
    def called(self) -> nn.Module:
        """What computes: PEFT's tuner rather than its wrapper, which leaves AdaLoRA's regulariser out unless a task is
        given, and with a task trains the head."""
        return self.model.base_model if isinstance(self.model, peft.PeftModel) else self.model

    @property
    def trained(self) -> dict[str, Tensor]:
        return {name: w for name, w in self.model.named_parameters() if w.requires_grad}


@dataclass(frozen=True)
class Situation:
    """What all methods share."""

    total_step: int  # more than any method takes: with a warm-up and a final phase of 0 steps, all of it is pruning
    kind: str  # of the shape
    dropout: float = 0.0

    def lora(self, model: nn.Module, **settings: Any) -> nn.Module:
        return peft.get_peft_model(model, peft.LoraConfig(r=INITIAL_RANK, **self._common(), **settings))

    def ours(self, model: nn.Module, delta_t: int = 1, **settings: Any) -> nn.Module:
        config = adalora.AdaLoraConfig(**self._budget(delta_t), **self._common(), **settings)
        return peft.get_peft_model(model, config)

    def peft_adalora(self, model: nn.Module, delta_t: int) -> nn.Module:
        return peft.get_peft_model(model, peft.AdaLoraConfig(**self._budget(delta_t), **self._common()))

    def _common(self) -> dict[str, Any]:
        besides = ["pooler.dense", "classifier"] if self.kind == "bert" else None  # PEFT knows Llama's head itself
        where = {"target_modules": "all-linear", "exclude_modules": besides}
        return {**where, "lora_alpha": INITIAL_RANK, "lora_dropout": self.dropout}

    def _budget(self, delta_t: int) -> dict[str, Any]:
        ranks = {"init_r": INITIAL_RANK, "target_r": TARGET_RANK}
        return {**ranks, "tinit": 0, "tfinal": 0, "deltaT": delta_t, "total_step": self.total_step}


def _our_kernels(model: nn.Module, situation: Situation) -> nn.Module:
    from adalora.hf.kernels import fuse_layers

    adapted = situation.lora(model)
    fuse_layers(adapted)
    return adapted


def _frozen(model: nn.Module, situation: Situation) -> nn.Module:
    """Nothing is trained, but the gradient is taken through all layers, down to the input's embeddings."""
    model.enable_input_require_grads()  # type: ignore[operator]
    return model


def _full(model: nn.Module, situation: Situation) -> nn.Module:
    return model.requires_grad_(True)


@dataclass(frozen=True)
class Method:
    """Args:
    adapt: base model, situation -> the model to train.
    essential: False: the short form measures it on the small shapes only.
    timed: False: its state alone is of interest.
    inference: False: it infers as another method does.
    """

    adapt: Callable[[nn.Module, Situation], nn.Module]
    essential: bool = True
    timed: bool = True
    inference: bool = True

    def prepare(self, base: nn.Module, situation: Situation) -> Subject:
        model = self.adapt(base, situation).train()
        trained = [w for w in model.parameters() if w.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
        inner = getattr(model, "base_model", None)
        by_hand = inner.update_and_allocate if isinstance(inner, peft.AdaLoraModel) else None
        return Subject(model, optimizer, by_hand)


METHODS = {
    "adalora": Method(lambda model, situation: situation.ours(model)),
    "adalora deltaT=10": Method(lambda model, situation: situation.ours(model, 10), essential=False, inference=False),
    "adalora reference": Method(lambda model, situation: situation.ours(model, kernel="reference"), essential=False),
    "adalora singular": Method(lambda model, situation: situation.ours(model, importance="singular"), timed=False),
    "lora, our kernels": Method(_our_kernels),
    "peft lora": Method(lambda model, situation: situation.lora(model)),
    "peft dora": Method(lambda model, situation: situation.lora(model, use_dora=True)),
    "peft adalora": Method(lambda model, situation: situation.peft_adalora(model, 1)),
    "peft adalora deltaT=10": Method(
        lambda model, situation: situation.peft_adalora(model, 10), essential=False, inference=False
    ),
    "peft adalora deltaT=100": Method(
        lambda model, situation: situation.peft_adalora(model, 100), essential=False, inference=False
    ),
    "full": Method(_full, inference=False),
    "frozen": Method(_frozen),
}


def copy_of(base: nn.Module, method: str) -> nn.Module:
    """A model of its own around the same frozen weights; full fine-tuning gets its own weights, too."""
    shared = () if method == "full" else (*base.parameters(), *base.buffers())
    return copy.deepcopy(base, {id(tensor): tensor for tensor in shared})


def allocator_of(model: nn.Module) -> adalora.Allocator | None:
    """Ours, if this is a model of ours."""
    config = getattr(model, "peft_config", {}).get("default")
    return adalora.allocator(model) if isinstance(config, adalora.AdaLoraConfig) else None


def state_bytes(model: nn.Module) -> int | None:
    """Bytes that an allocator keeps of its own from step to step: the moving averages. None: there is no allocator."""
    inner = getattr(model, "base_model", None)
    if isinstance(inner, peft.AdaLoraModel):
        kept = inner.rankallocator
        return sum(t.nbytes for part in (kept.ipt, kept.exp_avg_ipt, kept.exp_avg_unc) for t in part.values())
    ours = allocator_of(model)
    if ours is None:
        return None
    tensors: dict[str, Tensor] = ours.state_dict()["tensors"]
    return sum(t.nbytes for name, t in tensors.items() if name.endswith((".sensitivity", ".uncertainty")))
