"""Change in magnitude against change in direction of each weight, after DoRA (Liu et al. 2024, arXiv 2402.09353, 3.2).

    W = m · V / ‖V‖         ΔM_t = mean_n |m_t,n - m_0,n|         ΔD_t = mean_n (1 - cos(V_t,n, W_0,n))

The paper's columns n are those of x W; in PyTorch's layout, [d_out, d_in], they are rows: one vector for each output,
as in DoRA's own layers (PEFT's and the authors'). A convolution's kernel is read as [out, in · kernel].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import methods
from .checkpoints import MANIFEST
from .core.errors import AdaLoraError, ConfigError
from .files import write_json
from .hf.convert import read_peft_adalora
from .hf.files import ADAPTER_FILES, read_settings
from .hf.plain import PlainAdapter
from .pretrained import load_model, load_tokenizer
from .reading import completed, task_of
from .report.run import Run

_MAGNITUDE = "lora_magnitude_vector"
_WHOLE = "full"  # the method that saves all weights


class Outcome(NamedTuple):
    """What came of an analysis."""

    path: Path | None
    reason: str  # why there is none; empty otherwise


def write_directions(run: Run) -> Outcome:
    """Write ``directions.json`` into a run's folder, from the adapters or weights that it kept: every checkpoint, and
    the end. The base model is in memory once; of whole models that were saved, one matrix at a time.

    ``{"method", "steps": [...], "layers": [module, ...], "magnitude": [[of each step], ...], "direction": [...]}``.
    What is there already for the same steps stays as it is.
    """
    try:
        with ExitStack() as files:
            saved = _saved(run, files)
            if not _is_there(run, list(saved)):
                write_json(run.folder.directions, _measured(run, saved))
    except (AdaLoraError, SafetensorError, OSError) as error:
        return Outcome(None, str(error))
    return Outcome(run.folder.directions, "")


def change(before: Tensor, after: Tensor) -> tuple[float, float]:
    """(ΔM, ΔD) of one weight, both [d_out, d_in]. A vector that was zero has no direction, and counts as unturned."""
    before, after = before.double(), after.double()
    m_0, m_t = before.norm(dim=1), after.norm(dim=1)
    # 1 - cos(a, b) = ½ ‖a/‖a‖ - b/‖b‖‖²; the difference of two numbers near 1 would be rounding alone
    turned = (_units(before, m_0) - _units(after, m_t)).square().sum(dim=1) / 2
    turned = torch.where((m_0 > 0) & (m_t > 0), turned, torch.zeros_like(turned))
    return float((m_t - m_0).abs().mean()), float(turned.mean())


def _units(vectors: Tensor, norms: Tensor) -> Tensor:
    return vectors / norms.clamp_min(torch.finfo(norms.dtype).tiny).unsqueeze(1)


def _measured(run: Run, saved: Mapping[int, Saved]) -> dict[str, Any]:
    """The content of the file."""
    model = _base_model(run)
    names = list(dict.fromkeys(name for state in saved.values() for name in state.names(model)))
    changes = []
    for name in names:
        before = _matrix(model, name, None)
        changes.append([change(before, state.weight(model, name, before)) for state in saved.values()])
    return {
        "method": run.recipe.method,
        "steps": list(saved),
        "layers": names,
        "magnitude": [[magnitude for magnitude, _ in row] for row in changes],
        "direction": [[direction for _, direction in row] for row in changes],
    }


def _is_there(run: Run, steps: list[int]) -> bool:
    try:
        found = json.loads(run.folder.directions.read_text(encoding="utf-8"))
        return bool(found["steps"] == steps)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _base_model(run: Run) -> nn.Module:
    """As it was before training, new layers included."""
    recipe = completed(run.recipe)
    tokenizer = load_tokenizer(recipe.model, recipe.data.max_length)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        precision = methods.get(recipe.method).base_precision
        return load_model(recipe.model, task_of(recipe), tokenizer, precision)


def _matrix(model: nn.Module, name: str, weight: Tensor | None) -> Tensor:
    """The weight of a module of the base model, or one that was saved for it, as [d_out, d_in]."""
    try:
        module: Any = model.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(f"the base model {type(model).__name__} has no module {name}") from error
    found: Tensor = module.weight.detach() if weight is None else weight
    turned = isinstance(module, Conv1D | nn.Embedding)  # [d_in, d_out] in memory
    return found.mT if turned else found.flatten(1)


# -------------------------------------------------------------------------------------------------- what a run saved


class Saved(Protocol):
    """What a run saved at one step."""

    def names(self, model: nn.Module) -> list[str]:
        """Modules of the base model whose weights it changes."""
        ...

    def weight(self, model: nn.Module, name: str, before: Tensor) -> Tensor:
        """W_t, [d_out, d_in], where ``before`` is W_0."""
        ...


class _Adapter:
    """LoRA, DoRA, or PEFT's AdaLoRA."""

    def __init__(self, folder: Path) -> None:
        from_peft = read_settings(folder).get("peft_type") == "ADALORA"
        self._adapter = read_peft_adalora(folder) if from_peft else PlainAdapter.read(folder)

    def names(self, model: nn.Module) -> list[str]:
        return [*self._adapter.pairs, *self._adapter.pruned]

    def weight(self, model: nn.Module, name: str, before: Tensor) -> Tensor:
        """W_0 + scale · B A; of DoRA, each row brought to the length of its magnitude."""
        pair = self._adapter.pairs.get(name)
        if pair is None:
            return before
        update = pair.b.flatten(1).double() @ pair.a.flatten(1).double()
        after: Tensor = before.double() + self._adapter.scale(name) * update
        magnitude = self._adapter.rest.get(f"{name}.{_MAGNITUDE}")
        if magnitude is not None:
            after = after * (magnitude.double().flatten() / after.norm(dim=1)).unsqueeze(1)
        return after


class _Model:
    """All weights, read from their files one at a time."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        shards = sorted(folder.glob("model*.safetensors"))
        opened = [files.enter_context(safe_open(shard, framework="pt")) for shard in shards]
        self._folder = folder
        self._files = {key: file for file in opened for key in file.keys()}  # noqa: SIM118

    def names(self, model: nn.Module) -> list[str]:
        """Linear layers and convolutions, without the output layer: what LoRA adapts by ``all-linear``."""
        heads = tuple(f"{name}." for name in methods.head_modules(model))  # type: ignore[arg-type]
        output = model.get_output_embeddings()  # type: ignore[operator]
        kinds = (nn.Linear, Conv1D, nn.Conv2d)
        found = [name for name, module in model.named_modules() if isinstance(module, kinds) and module is not output]
        return [name for name in found if not f"{name}.".startswith(heads)]

    def weight(self, model: nn.Module, name: str, before: Tensor) -> Tensor:
        key = f"{name}.weight"
        if key not in self._files:
            raise ConfigError(f"{self._folder} holds no {key}")
        saved: Tensor = self._files[key].get_tensor(key)
        return _matrix(model, name, saved)


def _saved(run: Run, files: ExitStack) -> dict[int, Saved]:
    """What can be read, by step: complete checkpoints, and the end of a finished run.

    Raises:
        ConfigError: nothing can, and why.
    """
    folders = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in run.folder.checkpoints.glob("checkpoint-*")
        if (path / MANIFEST).is_file()
    }
    if run.metrics is not None:
        folders[int(run.metrics["steps"])] = run.folder.path
    reason = "the run has saved nothing yet"
    found: dict[int, Saved] = {}
    for step, folder in sorted(folders.items()):
        try:
            if (folder / ADAPTER_FILES[1]).is_file():
                found[step] = _Adapter(folder)
            elif run.recipe.method == _WHOLE:
                found[step] = _Model(folder, files)
            else:
                reason = f"method {run.recipe.method} saves neither LoRA nor whole weights"
        except ConfigError as error:  # such as a checkpoint of PiSSA, whose base was changed
            reason = str(error)
    if not found:
        raise ConfigError(reason)
    return found
