"""Nothing to call: allocators are driven by the optimizer step itself.

PyTorch runs global hooks before and after ``step`` of every optimizer. Ours look up which allocators' parameters the
optimizer holds, so gradient accumulation, skipped steps and any training loop come out right by themselves.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..core.allocator import Allocator, live_allocators
from ..core.errors import StateError
from ..core.shares import Share, trained_ids

PATIENCE = 20
"""Steps that an optimizer of a part takes without the others, if they have stepped before: a loss scaler may skip these
for a while."""
_known: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[Any, list[tuple[weakref.ref[Allocator], Share]]]]
_known = weakref.WeakKeyDictionary()
_installed = False
_STEP = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__
"""What PyTorch wraps around the step of every optimizer; the hooks are called from it."""


def _driven_by(optimizer: torch.optim.Optimizer) -> list[tuple[Allocator, Share]]:
    """The allocators whose parameters this optimizer holds, and what it holds of each; looked up again when either side
    changes."""
    allocators = live_allocators()
    if not allocators:
        return []
    key = (sum(len(group["params"]) for group in optimizer.param_groups), frozenset(map(id, allocators)))
    known = _known.get(optimizer)
    if known is None or known[0] != key:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        known = key, []
        for allocator in allocators:
            ours = {id(w) for t in allocator.triplets for w in t.parameters}
            if allocator.hooked and ours & held:  # one that is not active yet is frozen for the time being
                share = None if trained_ids(allocator.triplets) <= held else frozenset(ours & held)
                known[1].append((weakref.ref(allocator), share))
        _known[optimizer] = known
    return [(found, share) for reference, share in known[1] if (found := reference()) is not None]


def _before(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    driven = _driven_by(optimizer)
    for allocator, share in driven:
        _get_ready(optimizer, allocator, share)
    if driven and (wrapped := _with_closure(args, kwargs, driven)) is not None:
        return wrapped  # there are gradients only once the closure has run
    if driven and not _found_inf(optimizer):
        for allocator, share in driven:
            allocator.before_step(_grad_scale(optimizer), share=share)
    return None


def _after(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for allocator, share in _driven_by(optimizer):
        allocator.after_step(optimizer, share=share)
        if share is not None and allocator.step == 0 and allocator.open_step.is_over(share):
            gradients = [w.grad for w in _others(allocator, share) if w.grad is not None]
            allocator.open_step.others_overflow |= not all(bool(gradient.isfinite().all()) for gradient in gradients)


def _others(allocator: Allocator, share: frozenset[int]) -> list[Tensor]:
    """What is trained and not of this share."""
    return [w for t in allocator.triplets for w in t.parameters if w.requires_grad and id(w) not in share]


def _get_ready(optimizer: torch.optim.Optimizer, allocator: Allocator, share: Share) -> None:
    """Before a step begins: what became of the one before?

    Raises:
        StateError: this optimizer holds a part of the adapter, and the others have not stepped.
    """
    step = allocator.open_step
    if step.is_over(share):
        assert share is not None
        if step.again >= PATIENCE or (allocator.step == 0 and not step.others_overflow):
            raise StateError(_lacks(optimizer, allocator, set(map(id, _others(allocator, share)))))
        step.repeat(share)
    elif step.has_begun(share) and not _is_within_a_step():
        step.forget(share)  # it has raised an error


def _lacks(optimizer: torch.optim.Optimizer, allocator: Allocator, missing: set[int]) -> str:
    names = sorted({t.name for t in allocator.triplets for w in t.parameters if id(w) in missing})
    return (
        f"this {type(optimizer).__name__} holds only a part of the adapter, and no other optimizer has stepped with the"
        f" rest: it lacks parameters of {len(names)} of {len(allocator.triplets)} matrices ({', '.join(names[:3])},"
        " ...). All triplets compete for one budget, so a step counts when all of them have stepped: give every"
        " trained parameter to one optimizer (parameter groups for different learning rates) or to several that step"
        " in turn, or freeze what should not be trained (requires_grad_(False))."
    )


def _is_within_a_step() -> bool:
    """Whether the optimizer that steps now is called by the step of another, which wraps it, or of itself."""
    frame, steps = inspect.currentframe(), 0
    while frame is not None:
        steps += frame.f_code is _STEP
        frame = frame.f_back
    return steps > 1


def _with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], driven: list[tuple[Allocator, Share]]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of ``step`` with ours around the closure, wherever and under whatever name it is; None without one.

    The first of the arguments is the optimizer itself.
    """
    for place, value in enumerate(args[1:], 1):
        if callable(value):
            return (*args[:place], _with_allocators(value, driven), *args[place + 1 :]), kwargs
    for name, value in kwargs.items():
        if callable(value):
            return args, {**kwargs, name: _with_allocators(value, driven)}
    return None


def _with_allocators(closure: Callable[..., Any], driven: list[tuple[Allocator, Share]]) -> Callable[..., Any]:
    """The closure, followed by ``before_step``; optimizers like LBFGS call it several times for one step."""
    calls = 0

    @functools.wraps(closure)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        loss = closure(*args, **kwargs)
        for allocator, share in driven:
            allocator.before_step(again=calls > 0, share=share)
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
