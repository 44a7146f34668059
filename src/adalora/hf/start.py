"""The gradient start: P and Q from the loss's gradient on a few training batches (see :mod:`adalora.core.start`).

Nothing of the model is touched while it is looked at: hooks on the adapted layers hand their outputs on, unchanged, and
see the gradients come back. Parameters stand still, and their ``.grad`` is afterwards what it was.
"""

from __future__ import annotations

import copy
import functools
import inspect
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)
from transformers import Trainer, TrainerCallback

from ..core.errors import ConfigError, StateError
from ..core.sharded import like, whole
from ..core.start import SWEEPS, Directions, Look, Sketch, find_directions, over_processes
from .adapters import allocator
from .kernels import NOT_LINEAR
from .layers import CONVOLUTIONS, adapted_layers, adapter_names, projection

Loss = Callable[[nn.Module, Any], Tensor]
IGNORED = -100  # label of a token that has no loss


class Seen(NamedTuple):
    """What a look at the gradient found."""

    directions: dict[str, Directions]  # of each adapted module that has a gradient, by its name
    without: list[str]  # names of those that have none on these batches, or whose update is no product
    rows: int  # that had a loss, of all processes
    batches: int  # of this process
    sweeps: int

    @property
    def share(self) -> float:
        """Of ‖G‖_F² of all matrices, what their triplets hold."""
        held = sum(float(found.values.square().sum()) for found in self.directions.values())
        return held / max(held, sum(found.square for found in self.directions.values()))


def look_at_gradient(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    adapter_name: str,
    ranks: Mapping[str, int],
    batches: Sequence[Any],
    loss: Loss | None = None,
    sweeps: int = SWEEPS,
) -> Seen:
    """The largest singular triplets of ∂L/∂W0 of layers that have a LoRA adapter; the model is left as it was.

    Dropout is off while it looks. L is the mean of the batches' losses, in a distributed training of all processes'.

    Args:
        layers: by the names that the result has.
        ranks: triplets wanted of each.
        batches: looked at ``sweeps`` times over.
        loss: (model, batch) -> the batch's loss; by default ``model(**batch).loss``.

    Raises:
        StateError: no batch has a loss, one is not finite, or no layer a gradient.
    """
    sketched = {name: _sketch(layer, adapter_name, ranks[name]) for name, layer in layers.items()}
    sketches = {name: sketch for name, sketch in sketched.items() if sketch is not None}
    anchor = torch.zeros((), requires_grad=True)
    loss = loss or _loss_of_model
    rows = 0

    def look(scale: float) -> int:
        nonlocal rows
        count = rows = 0
        for batch in batches:
            value = loss(model, batch)
            _check_loss(value)
            if not bool(torch.isfinite(value.detach()).all()):
                if _without_labels(batch):
                    continue
                raise StateError(
                    f"the loss of a batch is {float(value.detach()):.3g} before the first step, so there is no gradient"
                    " to start from. Look at the batch and the loss; the model is as it was."
                )
            (value * scale).backward()  # type: ignore[no-untyped-call]
            count, rows = count + 1, rows + _rows(batch)
        return count

    with _standing_still(model), _hooks(layers, sketches, anchor), torch.enable_grad():
        found = find_directions(list(sketches.values()), look, sweeps)
    directions = {name: part for name, part in zip(sketches, found, strict=True) if part is not None}
    if not directions:
        raise StateError(
            "no adapted layer has a gradient on these batches: is the adapter part of what the loss depends on?"
        )
    without = [name for name in layers if name not in directions]
    (rows,) = over_processes([rows], next(iter(sketches.values())).device)
    return Seen(directions, without, rows, len(batches), sweeps)


def start(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    adapter_name: str | None = None,
    number: int | None = None,
    sweeps: int | None = None,
) -> dict[str, Any]:
    """Let an AdaLoRA adapter's P and Q start as the largest singular triplets of the loss's gradient.

    Call it before the first optimizer step; ``AdaLoraCallback`` does under a Trainer. Λ stays 0, so the model computes
    to the bit what it did. It costs ``sweeps`` forward and backward passes over the batches, and the memory of an
    adapter of rank ``init_r`` + 6. Modes, gradients, random states and the order of a data loader stay as they were.

    Args:
        model: with the adapter in it, where it will train (device, autocast, gradient checkpointing); of a
            distributed training also the wrapped one, in every process with batches of its own.
        batches: training batches, such as a data loader's; the first ``number`` are looked at. Those that a generator
            has given are gone.
        loss: (model, batch) -> the batch's loss; by default ``model(**batch).loss``.
        adapter_name: may be left out when the model has one AdaLoRA adapter.
        number: of batches; by default the configuration's ``start_batches``.
        sweeps: by default the configuration's ``start_sweeps``.

    Returns:
        what was done, as the trace's header has it: ``rows``, ``batches``, ``sweeps``, the ``share`` of ‖G‖² that the
        triplets hold, and the singular ``values`` of each matrix.

    Raises:
        StateError: training has begun already, no batch has a loss, or one is not finite; the model is as it was.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    ours = allocator(model, adapter_name)
    name = adapter_name or adapter_names(model)[0]
    config = _config(model, name)
    number = config.start_batches if number is None else number
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ConfigError(f"number={number!r} of batches must be a whole number, at least 1.")
    if ours.step or not ours.untrained:
        raise StateError(
            "adalora.start comes before the first optimizer step: this adapter has been trained already, and its"
            " triplets would be lost."
        )
    c = config.vector_norm
    layers = dict(adapted_layers(model, name))
    if all(name not in layer.active_adapters for layer in layers.values()):
        raise StateError(f"the adapter {name!r} is not active: model.set_adapter({name!r}) before adalora.start.")
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise StateError(f"batches is a {type(batches).__name__}, not a data loader or a list of batches.")
    parameters = list(model.parameters())
    with _random_states(parameters), _order_kept(batches):
        chosen = list(islice(batches, number))
    if not chosen:
        raise StateError(
            "adalora.start was given no batches: give those of the training, and not a generator that has been used up."
        )
    members = dict(zip(layers, ours.triplets, strict=True))
    ranks = {full: t.rank for full, t in members.items()}
    seen = look_at_gradient(model, layers, name, ranks, chosen, loss, config.start_sweeps if sweeps is None else sweeps)
    for full, found in seen.directions.items():
        p, _, q = members[full].parameters
        k = len(found.values)
        with torch.no_grad():
            for parameter, vectors, dim in ((p, -c * found.left, 1), (q, c * found.right, 0)):  # λ > 0 lowers the loss
                values = whole(parameter).detach().clone()
                values.narrow(dim, 0, k).copy_(vectors.reshape(values.narrow(dim, 0, k).shape))
                parameter.copy_(like(parameter, values))
    if seen.without:
        names = [members[full].name for full in seen.without]
        warnings.warn(
            f"{len(names)} of {len(layers)} matrices have no gradient of their own on the {seen.rows} rows looked"
            f" at, so their directions start at random: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}.",
            stacklevel=2,
        )
    ours.started = {
        "rows": seen.rows,
        "batches": seen.batches,
        "sweeps": seen.sweeps,
        "share": round(seen.share, 4),
        "values": {members[full].name: _rounded(found.values) for full, found in seen.directions.items()},
    }
    return ours.started


def start_under(trainer: Trainer, model: nn.Module, adapter_name: str | None = None) -> dict[str, Any]:
    """:func:`start` on a Trainer's own training batches, with its own loss. Which rows it will train on, and in which
    order, stays as it was.

    Raises:
        StateError: as :func:`start`.
    """
    rows = trainer.train_dataset
    if rows is not None and isinstance(rows, Iterator):
        raise StateError(
            "the training set can be gone through once, and initialization='gradient' would take its first rows away"
            " from the training: give a data set that can be begun again, or call adalora.start(model, batches) with"
            " rows of your choice before training."
        )
    figures = {key: copy.deepcopy(value) for key, value in vars(trainer).items() if _is_figures(value)}
    prepared = list(trainer.accelerator._dataloaders)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with trainer.compute_loss_context_manager():
            found: Tensor = trainer.compute_loss(model, trainer._prepare_inputs(copy.copy(batch)))  # type: ignore[assignment]
        return found

    with _random_states(list(model.parameters())):
        loader: Any = trainer.get_train_dataloader()
        try:
            return start(model, loader, loss, adapter_name=adapter_name)
        finally:
            trainer.accelerator._dataloaders[:] = prepared
            if hasattr(loader, "end"):  # Accelerate counts a loader as being gone through until it ends
                loader.end()
            vars(trainer).update(figures)  # TRL's trainers log what they see of every batch


def _is_figures(value: Any) -> bool:
    """Whether this is numbers and containers of numbers alone, which a trainer counts and logs."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_figures(part) for key, part in value.items())
    if isinstance(value, (list, tuple, deque)):
        return all(map(_is_figures, value))
    return isinstance(value, (int, float))


def trainer_of(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that is calling this callback: callbacks are not told, but it stands on the stack above them."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    return None


# ----------------------------------------------------------------------------------------------------------- inside


def _sketch(layer: LoraLayer, adapter_name: str, rank: int) -> Sketch | None:
    """None for a layer whose update is not a product with its input."""
    base: Any = layer
    if adapter_name in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        return Sketch(b.shape[0], a.shape[1:], rank, _looked_up, b.device, is_linear=False)
    if isinstance(layer, NOT_LINEAR):
        return None
    a, b = base.lora_A[adapter_name], base.lora_B[adapter_name].weight
    shape = a.weight.shape[1:]
    if len(shape) == 1:
        return Sketch(b.shape[0], shape, rank, F.linear, b.device)
    if type(a) in CONVOLUTIONS:  # plain LoRA's
        apply: Any = functools.partial(CONVOLUTIONS[type(a)], stride=a.stride, padding=a.padding)
    else:
        apply = projection(layer, adapter_name).apply_vectors
    return Sketch(b.shape[0], shape, rank, apply, b.device, is_linear=False)


def _looked_up(x: Tensor, right: Tensor) -> Tensor:
    return F.embedding(x, right.T)


@contextmanager
def _hooks(layers: Mapping[str, LoraLayer], sketches: Mapping[str, Sketch], anchor: Tensor) -> Iterator[None]:
    def hook(sketch: Sketch) -> Callable[..., Any]:
        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # the first pass of reentrant checkpointing
                return y
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            looked: Tensor = Look.apply(y, anchor.to(y.device), sketch, x.detach())  # type: ignore[no-untyped-call]
            return looked

        return after

    with ExitStack() as stack:
        for name, sketch in sketches.items():
            layer: Any = layers[name]
            stack.callback(layer.register_forward_hook(hook(sketch), with_kwargs=True).remove)
        yield


@contextmanager
def _standing_still(model: nn.Module) -> Iterator[None]:
    """Without dropout. Modes, gradients, random states come back as they were.

    What requires a gradient stays so: checkpointing and FSDP rely on it, and PEFT turns it on again whenever an adapter
    has been disabled for a while, as DPO does.
    """
    parameters = list(model.parameters())
    with ExitStack() as stack:
        stack.enter_context(_random_states(parameters))
        if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()) or any(
            type(module).__name__ == "OptimizedModule" for module in model.modules()
        ):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code does not see new hooks
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            # what recomputes its activations does so in training mode alone
            keeps = module.training and bool(vars(module).get("gradient_checkpointing", False))
            # on some processors bitsandbytes packs weights anew in evaluation mode, and no gradient is right then
            module.training = keeps or type(module).__module__.startswith("bitsandbytes")
            for place in (module, getattr(module, "config", None)) if keeps else ():
                for key in [key for key, rate in vars(place or nn).items() if "drop" in key and type(rate) is float]:
                    stack.callback(setattr, place, key, getattr(place, key))
                    setattr(place, key, 0.0)
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past the layers that hold them
        for parameter in parameters:
            stack.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
            for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks):  # an optimizer's, maybe
                if hooks:
                    stack.callback(hooks.update, dict(hooks))
                    hooks.clear()
        yield


@contextmanager
def _random_states(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Python's, NumPy's and torch's, on every device of the model, come back as they were."""
    import numpy as np

    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.random.set_rng_state, torch.random.get_rng_state())
        for device in {parameter.device for parameter in parameters if parameter.device.type not in ("cpu", "meta")}:
            known: Any = torch.get_device_module(device)
            place = () if device.type == "mps" else (device,)  # there is one
            stack.callback(known.set_rng_state, known.get_rng_state(*place), *place)
        yield


@contextmanager
def _order_kept(batches: Any) -> Iterator[None]:
    """The generators that a data loader draws its order from come back as they were."""
    holders = (
        batches,
        getattr(batches, "sampler", None),
        getattr(getattr(batches, "batch_sampler", None), "sampler", None),
    )
    with ExitStack() as stack:
        for generator in {id(g): g for g in (getattr(holder, "generator", None) for holder in holders)}.values():
            if isinstance(generator, torch.Generator):
                stack.callback(generator.set_state, generator.get_state())
        yield


def _config(model: nn.Module, adapter_name: str) -> Any:
    """The adapter's configuration, wherever within the model PEFT keeps it."""
    known = (getattr(module, "peft_config", {}) for module in model.modules())
    return next(found[adapter_name] for found in known if adapter_name in found)


def _check_loss(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        what = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        how = " that depends on nothing trained" if isinstance(value, Tensor) and value.numel() == 1 else ""
        raise StateError(f"the loss of a batch is {what}{how}, not one number with a gradient.")


def _loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise StateError(
            f"a batch is a {type(batch).__name__}, not a mapping: give adalora.start a loss(model, batch)."
        )
    device = next(parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    outputs = model(**moved)
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(found, Tensor):
        raise StateError(
            f"{type(model).__name__} gives no loss for a batch of {', '.join(map(str, batch))}: give adalora.start a"
            " loss(model, batch), or batches with labels."
        )
    return found


def _without_labels(batch: Any) -> bool:
    """Whether no label counts; the first of a sequence may have no place to be predicted from."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    return bool((labels == IGNORED).all()) or (labels.ndim > 1 and bool((labels[..., 1:] == IGNORED).all()))


def _rows(batch: Any) -> int:
    """Of a batch: the length of the first thing in it that has one."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    return next((len(v) for v in values if isinstance(v, (list, tuple)) or (isinstance(v, Tensor) and v.ndim)), 1)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
