"""The gradient start: P and Q from the loss's gradient on a few training batches (see :mod:`adalora.core.start`).

Nothing of the model is touched while it is looked at: hooks on the adapted layers hand their outputs on, unchanged, and
see the gradients come back. Parameters stand still, so no ``.grad`` is made.
"""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)
from transformers import Trainer, TrainerCallback

from ..core.errors import StateError
from ..core.sharded import is_sharded, like, whole
from ..core.start import SWEEPS, Directions, Look, Sketch, find_directions
from .adapters import allocator
from .kernels import NOT_LINEAR
from .layers import CONVOLUTIONS, adapted_layers, adapter_names, projection

Loss = Callable[[nn.Module, Any], Tensor]
IGNORED = -100  # label of a token that has no loss


class Seen(NamedTuple):
    """What a look at the gradient found."""

    directions: dict[str, Directions]  # of each adapted module that has a gradient, by its name
    without: list[str]  # names of those that have none on these batches
    rows: int
    batches: int
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

    def look(scale: float) -> int:
        count = 0
        for batch in batches:
            value = loss(model, batch)
            if not bool(torch.isfinite(value.detach()).all()):
                if _without_labels(batch):
                    continue
                raise StateError(
                    f"the loss of a batch is {float(value.detach()):.3g} before the first step, so there is no gradient"
                    " to start from. Look at the batch and the loss; the model is as it was."
                )
            (value * scale).backward()  # type: ignore[no-untyped-call]
            count += 1
        if not count:
            raise StateError("none of the batches has a label that counts, so there is no gradient to start from.")
        return count

    with _standing_still(model), _hooks(layers, sketches, anchor):
        found = find_directions(list(sketches.values()), look, sweeps)
    directions = {name: part for name, part in zip(sketches, found, strict=True) if part is not None}
    if not directions:
        raise StateError(
            "no adapted layer has a gradient on these batches: is the adapter part of what the loss depends on?"
        )
    without = [name for name in layers if name not in directions]
    return Seen(directions, without, sum(map(_rows, batches)), len(batches), sweeps)


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
    adapter of rank ``init_r`` + 6.

    Args:
        model: with the adapter in it, where it will train (device, autocast, gradient checkpointing).
        batches: training batches, such as a data loader's; the first ``number`` are looked at.
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
    ours = allocator(model, adapter_name)
    name = adapter_name or adapter_names(model)[0]
    config: Any = model.peft_config[name]  # type: ignore[index]
    if ours.step or any(bool(t.lam.any()) for t in ours.triplets):
        raise StateError(
            "adalora.start comes before the first optimizer step: this adapter has been trained already, and its"
            " triplets would be lost."
        )
    chosen = list(islice(batches, config.start_batches if number is None else number))
    if not chosen:
        raise StateError("adalora.start was given no batches.")
    layers = dict(adapted_layers(model, name))
    members = dict(zip(layers, ours.triplets, strict=True))
    ranks = {full: t.rank for full, t in members.items()}
    seen = look_at_gradient(model, layers, name, ranks, chosen, loss, sweeps or config.start_sweeps)
    for full, found in seen.directions.items():
        p, _, q = members[full].parameters
        k = len(found.values)
        with torch.no_grad():
            for parameter, vectors, dim in ((p, -found.left, 1), (q, found.right, 0)):  # a positive λ lowers the loss
                values = whole(parameter).detach().clone()
                values.narrow(dim, 0, k).copy_(vectors.reshape(values.narrow(dim, 0, k).shape))
                parameter.copy_(like(parameter, values))
    if seen.without:
        names = [members[full].name for full in seen.without]
        warnings.warn(
            f"{len(names)} of {len(layers)} matrices have no gradient on the {seen.rows} rows looked at, so their"
            f" directions start at random: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}.",
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
    seen_so_far = copy.deepcopy(getattr(trainer, "_metrics", None))  # TRL's trainers log what they see of every batch
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
            if seen_so_far is not None:
                vars(trainer)["_metrics"] = seen_so_far


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
        kind, stride, padding = CONVOLUTIONS[type(a)], a.stride, a.padding
        return Sketch(
            b.shape[0], shape, rank, lambda x, q: kind(x, q, stride=stride, padding=padding), b.device, 1, False
        )
    return Sketch(b.shape[0], shape, rank, projection(layer, adapter_name).apply_vectors, b.device, 1, False)


def _looked_up(x: Tensor, right: Tensor) -> Tensor:
    return F.embedding(x, right.T)


@contextmanager
def _hooks(layers: Mapping[str, LoraLayer], sketches: Mapping[str, Sketch], anchor: Tensor) -> Iterator[None]:
    def hook(sketch: Sketch) -> Callable[..., Any]:
        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # the first pass of reentrant checkpointing
                return y
            x = args[0] if args else next(iter(kwargs.values()))
            looked: Tensor = Look.apply(y, x, anchor.to(y.device), sketch)  # type: ignore[no-untyped-call]
            return looked

        return after

    handles = [
        layer.register_forward_hook(hook(sketches[name]), with_kwargs=True)  # type: ignore[attr-defined]
        for name, layer in layers.items()
        if name in sketches
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _standing_still(model: nn.Module) -> Iterator[None]:
    """Without dropout, and without gradients of parameters. Modes, gradients, random states come back as they were."""
    modules = [(module, module.training) for module in model.modules()]
    dropped: list[tuple[nn.Module, str, Any]] = []
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [parameter.grad for parameter in trained]
    sharded = any(map(is_sharded, parameters))  # FSDP learns at its first pass what is trained
    try:
        for module, training in modules:
            # what recomputes its activations does so in training mode alone
            keeps = training and bool(getattr(module, "gradient_checkpointing", False))
            module.training = keeps
            if keeps:
                rates = [key for key, value in vars(module).items() if "drop" in key and isinstance(value, float)]
                dropped += [(module, key, getattr(module, key)) for key in rates]
                for key in rates:
                    setattr(module, key, 0.0)
        for parameter in trained:
            parameter.grad = None
            if not sharded:
                parameter.requires_grad_(False)
        with _random_states(parameters):
            yield
    finally:
        for module, key, rate in dropped:
            setattr(module, key, rate)
        for module, training in modules:
            module.training = training
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(True)
            parameter.grad = gradient


@contextmanager
def _random_states(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Python's, NumPy's and torch's, on every device of the model, come back as they were."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    kinds = {parameter.device.type for parameter in parameters} - {"cpu", "meta"}
    try:
        with torch.random.fork_rng(enabled=True, device_type=next(iter(kinds), "cuda")):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


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
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels == IGNORED).all())


def _rows(batch: Any) -> int:
    """Of a batch: the length of the first thing in it that has one."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    return next((len(v) for v in values if isinstance(v, (list, tuple)) or (isinstance(v, Tensor) and v.ndim)), 1)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
