"""PEFT's LoRA layers with the fused product, where that is what they would compute.

The class of a layer is replaced by a subclass of it whose ``forward`` takes the common case (one active adapter, not
merged, a linear layer, no variant such as DoRA) and leaves everything else to PEFT's. Nothing else of the layer
changes. docs/decisions/007 says why this is not one of PEFT's variants.

A layer that has come to rank 0 is its base layer alone, convolutions and embeddings too: nothing of the adapter is
computed, forwards or backwards.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.lora.tp_layer import LoraParallelLinear
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from ..core.fused import adapted_linear, add_update, computed_in
from ..core.triplets import SingularProjection

NOT_LINEAR = (MultiheadAttention, ParamWrapper, LoraParallelLinear)


def fuse(layer: LoraLayer) -> bool:
    """Let a layer use the fused product, if it is linear; whether it is."""
    kind = type(layer)
    if issubclass(kind, NOT_LINEAR) or not layer.lora_B or any(type(b) is not nn.Linear for b in layer.lora_B.values()):
        return False
    if not issubclass(kind, _FusedLayer):
        layer.__class__ = _fused(kind)
    return True


def pass_when_empty(layer: LoraLayer) -> None:
    """Let a convolution or an embedding be its base layer alone while its rank is 0. (There is no convolution with no
    outputs: PEFT's forward raises.)"""
    kind = type(layer)
    if not issubclass(kind, (*NOT_LINEAR, _FusedLayer, _PassingLayer)):
        layer.__class__ = _fused(kind, _PassingLayer)


def fuse_layers(model: nn.Module) -> None:
    """Let all LoRA layers of a model use the fused product, plain LoRA's too (to measure what a budget costs)."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            fuse(module)


class _FusedLayer:
    """Comes before PEFT's class of layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self
        name = None if args or kwargs or not _is_plain(x) else _only_adapter(layer)
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        right, left, base = layer.lora_A[name], layer.lora_B[name], layer.base_layer
        if not left.weight.shape[1]:
            return base(x)
        weight = _constant_weight(base, x)
        y = base(x) if weight is None else x  # whose type is that of the product
        if type(right) is nn.Linear:
            a, b, alpha = right.weight, left.weight, layer.scaling[name]
        else:
            (a, b), alpha = right.fused(computed_in(y)), right.gain * layer.scaling[name]
        dropout = layer.lora_dropout[name]
        z = dropout(x) if type(dropout) is not nn.Identity and dropout.training else None
        if weight is None:
            return add_update(y, x if z is None else z, a, b, alpha)
        return adapted_linear(x, z, weight, base.bias, a, b, alpha)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__mro__[2],), self.__dict__


class _PassingLayer:
    """Comes before PEFT's class of layer, where the product is not a linear one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self
        if not args and not kwargs and _is_empty(layer):
            return layer.base_layer(x)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__mro__[2], _PassingLayer), self.__dict__


def _is_empty(layer: Any) -> bool:
    """Whether what is active in the layer has rank 0, and nothing beside it: no bias, no variant."""
    if layer._disable_adapters or layer.merged_adapters:
        return False
    for name in layer.active_adapters:
        if name in layer.lora_variant or (name in layer.lora_B and layer.lora_B[name].bias is not None):
            return False
        left = layer.lora_B[name].weight if name in layer.lora_B else layer.lora_embedding_B.get(name)
        if left is not None and left.shape[1]:
            return False
    return True


def _is_plain(x: Tensor) -> bool:
    """An ordinary tensor in ordinary execution. Tracers and function transforms see PEFT's own forward."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def _only_adapter(layer: Any) -> str | None:
    """The one adapter whose update the layer adds to its base, if it is an ordinary one."""
    if layer._disable_adapters or layer.merged_adapters:
        return None
    rights, lefts, names = layer.lora_A._modules, layer.lora_B._modules, layer._active_adapter
    if not isinstance(names, str):
        names = [name for name in names if name in rights]
        if len(names) != 1:
            return None
        names = names[0]
    right, left = rights.get(names), lefts.get(names)
    if type(left) is not nn.Linear or names in layer.lora_variant or _is_watched(left) or _is_watched(right):
        return None
    if not _is_bare(left) or not (_is_bare(right) if type(right) is nn.Linear else _is_triplets(right)):
        return None
    return names  # type: ignore[no-any-return]


def _is_bare(linear: nn.Module) -> bool:
    """Whether a linear layer has no bias, and its weight is its own parameter, not what a wrapper put in its place."""
    parameters = linear._parameters
    return parameters.get("bias") is None and type(parameters.get("weight")) is nn.Parameter


def _is_triplets(right: Any) -> bool:
    parameters = right._parameters
    return (
        type(right) is SingularProjection
        and right.fused is not None
        and type(parameters.get("right_vectors")) is type(parameters.get("singular_values")) is nn.Parameter
    )


def _constant_weight(base: Any, x: Tensor) -> Tensor | None:
    """W0, [d_out, d_in], if the base layer does nothing but multiply x by constants, unwatched.

    Compilers see the base layer itself.
    """
    kind = type(base)
    if torch.compiler.is_compiling() or kind not in (nn.Linear, Conv1D) or _is_watched(base):
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if weight.dtype is not x.dtype and not torch.is_autocast_enabled(x.device.type):
        return None  # the base layer says what is wrong
    return weight.T if kind is Conv1D else weight


def _is_watched(module: Any) -> bool:
    """Whether someone wants to see what goes in or comes out (hooks), or has taken over (Accelerate's offloading)."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


@functools.cache
def _fused(kind: Any, before: type = _FusedLayer) -> Any:
    """The subclass of a class of layers, named as its parent: a layer prints as before."""
    return type(kind.__name__, (before, kind), {"__module__": kind.__module__})


def _blank(kind: Any, before: type = _FusedLayer) -> Any:
    """A layer to be filled by copy or pickle."""
    return _fused(kind, before).__new__(_fused(kind, before))
