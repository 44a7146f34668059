"""Nothing to call: allocators are driven by the optimizer step itself.

PyTorch runs global hooks before and after ``step`` of every optimizer. Ours look up which allocators' parameters the
optimizer holds, so gradient accumulation, skipped steps and any training loop come out right by themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..core.allocator import LIVE, Allocator
from ..core.errors import StateError

_known: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[Any, list[weakref.ref[Allocator]]]]
_known = weakref.WeakKeyDictionary()
_installed = False


def _driven_by(optimizer: torch.optim.Optimizer) -> list[Allocator]:
    """The allocators whose parameters this optimizer holds; looked up again when either side changes."""
    if not LIVE:
        return []
    key = (sum(len(group["params"]) for group in optimizer.param_groups), frozenset(map(id, LIVE)))
    known = _known.get(optimizer)
    if known is None or known[0] != key:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        known = key, [weakref.ref(a) for a in LIVE if a.hooked and _drives(optimizer, held, a)]
        _known[optimizer] = known
    return [allocator for reference in known[1] if (allocator := reference()) is not None]


def _drives(optimizer: torch.optim.Optimizer, held: set[int], allocator: Allocator) -> bool:
    everything = [(t.name, w) for t in allocator.triplets for w in t.parameters]
    missing = sorted({name for name, w in everything if w.requires_grad and id(w) not in held})
    some = any(id(w) in held for _, w in everything)  # an adapter that is not active yet is frozen for the time being
    if some and missing:
        raise StateError(
            f"this {type(optimizer).__name__} holds only a part of the adapter: it lacks parameters of"
            f" {len(missing)} of {len(allocator.triplets)} matrices ({', '.join(missing[:3])}, ...). All triplets"
            " compete for one budget, so one optimizer must hold them all; use parameter groups for different"
            " learning rates."
        )
    return some


def _before(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    allocators = _driven_by(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if allocators and closure is not None:
        # args begins with the optimizer itself; there are gradients only once the closure has run
        return args[:1], {**kwargs, "closure": _with_allocators(closure, allocators)}
    if allocators and not _found_inf(optimizer):
        for allocator in allocators:
            allocator.before_step(_grad_scale(optimizer))
    return None


def _after(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for allocator in _driven_by(optimizer):
        allocator.after_step(optimizer, _grad_scale(optimizer))


def _with_allocators(closure: Callable[[], Any], allocators: list[Allocator]) -> Callable[[], Any]:
    """The closure, followed by ``before_step``; optimizers like LBFGS call it several times for one step."""
    calls = 0

    def evaluate() -> Any:
        nonlocal calls
        loss = closure()
        for allocator in allocators:
            allocator.before_step(again=calls > 0)
        calls += 1
        return loss

    return evaluate


def _grad_scale(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Set by GradScaler on optimizers that unscale in their own kernel (fused Adam)."""
    return getattr(optimizer, "grad_scale", None)


def _found_inf(optimizer: torch.optim.Optimizer) -> bool:
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def drive(allocator: Allocator) -> None:
    """Let the optimizer's steps drive this allocator, and its copies. Without any, the hooks cost next to nothing."""
    global _installed
    allocator.hooked = True
    if not _installed:
        register_optimizer_step_pre_hook(_before)
        register_optimizer_step_post_hook(_after)
        _installed = True
