"""What an adapter changes, read from its folder alone: no base model, no GPU, no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .core.errors import AdaLoraError, ConfigError
from .hf.convert import read_peft_adalora
from .hf.files import ADAPTER_FILES, PICKLED, read_settings
from .hf.plain import Pair, PlainAdapter, decomposed
from .report.updates import Adapter, Update
from .runs import RunFolder

WEIGHTS, CONFIG = ADAPTER_FILES
_LARGEST = 1e100  # of a singular value, whose square is summed up
_SHOWN: dict[str, Any] = {  # settings of LoRA that change what ΔW is, with what goes without saying
    "r": None, "lora_alpha": None, "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
    "target_r": None, "init_r": None, "task_type": None,
}  # fmt: skip


def inspect(source: Path) -> Adapter:
    """What the adapter in a folder changes: a run of ours or a checkpoint of one, LoRA by PEFT, or PEFT's AdaLoRA.

    Singular values come from QR of B and Aᵀ and the SVD of a core of r x r, in float64; the update itself is never
    formed. A convolution's kernel is read as a matrix, [out, in · kernel].

    Raises:
        ConfigError: there is no such adapter, or it cannot be read; it says what to do.
    """
    _check(source)
    settings = read_settings(source)
    from_peft = settings.get("peft_type") == "ADALORA"
    adapter = read_peft_adalora(source) if from_peft else PlainAdapter.read(source)
    updates = [_update(adapter, name, pair, source) for name, pair in (adapter.pairs | adapter.pruned).items()]
    return Adapter(
        folder=str(source),
        base_model=settings.get("base_model_name_or_path"),
        method=_method(settings),
        settings=_settings(settings, from_peft),
        other_parameters=sum(value.numel() for value in adapter.rest.values()),
        notes=_notes(source, adapter, from_peft),
        updates=updates,
    )


def _update(adapter: PlainAdapter, name: str, pair: Pair, source: Path) -> Update:
    kind = "embedding" if pair.embedding else "linear" if pair.a.ndim == 2 else "convolution"
    b, a = pair.b.flatten(1).double(), pair.a.flatten(1).double()
    values: list[float] = []
    if pair.rank:
        values = (adapter.scale(name) * decomposed(pair._replace(b=b, a=a)).lam).tolist()
    if any(abs(value) > _LARGEST for value in values):
        raise ConfigError(f"{source}: {name} has a singular value of {max(values):.3g}. Did the training diverge?")
    return Update(name, kind, (len(b), a.shape[1]), pair.rank, b.numel() + a.numel(), values)


def _settings(settings: dict[str, Any], from_peft: bool) -> dict[str, Any]:
    """Those that say more than their defaults; PEFT's AdaLoRA goes by ``init_r``, and ``r`` means nothing there."""
    found = {key: settings[key] for key, usual in _SHOWN.items() if settings.get(key) not in (None, usual)}
    return {key: value for key, value in found.items() if not (from_peft and key in {"r", "rank_pattern"})}


def _method(settings: dict[str, Any]) -> str:
    if settings["peft_type"] == "ADALORA":
        return "AdaLoRA, as PEFT saves it"
    return " with ".join(
        filter(None, ["DoRA" if settings.get("use_dora") else "LoRA", settings.get("use_rslora") and "rsLoRA's scale"])
    )


def _notes(source: Path, adapter: PlainAdapter, from_peft: bool) -> list[str]:
    """What the figures do not say by themselves."""
    notes = []
    if adapter.config.use_dora:
        notes.append("DoRA: ΔW is scale · B A, before the magnitudes rescale each output of W + ΔW.")
    if from_peft:
        notes.append("Triplets with λ = 0 change nothing, and are left out of the ranks.")
    if others := _adapters_below(source):
        notes.append(f"Further adapters are in {', '.join(others)}.")
    return notes


# ------------------------------------------------------------------------------------------------------ what it is not


def _check(source: Path) -> None:
    """ConfigError where the folder holds something else than an adapter, or weights that could run as code."""
    if source.is_file():
        raise ConfigError(f"{source} is a file: give the folder that it lies in, {source.parent}.")
    if not source.is_dir():
        raise ConfigError(f"there is no folder {source}.")
    if not (source / CONFIG).is_file():
        raise ConfigError(_not_an_adapter(source))
    if not (source / WEIGHTS).is_file() and (source / PICKLED).is_file():
        command = "convert" if read_settings(source).get("peft_type") == "ADALORA" else "export"
        raise ConfigError(
            f"{source} keeps its weights as a pickle, {PICKLED}, which is not opened here: adalora {command} {source}"
            f" OUT, which reads tensors alone, writes {WEIGHTS}."
        )


def _not_an_adapter(source: Path) -> str:
    """What a folder without an adapter's configuration is."""
    below = _adapters_below(source)
    if below:
        return f"{source} holds {len(below)} adapters in folders of their own, {', '.join(below)}: give one of them."
    if said := _of_run(source):
        return said
    if (source / WEIGHTS).is_file():
        return (
            f"{source} has {WEIGHTS}, but no {CONFIG}, which says its scale: copy it from where the weights came from."
        )
    if (source / "config.json").is_file():
        try:
            kind = json.loads((source / "config.json").read_text(encoding="utf-8")).get("model_type", "unknown")
        except (ValueError, AttributeError, RecursionError):
            kind = "unknown"
        return f"{source} is a whole model (of type {kind}), not an adapter: there is no update in it to look at."
    return f"{source} is not the folder of an adapter: there is no {CONFIG} in it."


def _of_run(source: Path) -> str:
    """Why a run of ours has no adapter; empty where it is none."""
    folder = RunFolder(source)
    try:
        recipe = folder.read_recipe()
    except AdaLoraError:
        return ""
    checkpoint = folder.last_checkpoint()
    if not folder.metrics.is_file() and checkpoint is not None and (checkpoint / CONFIG).is_file():
        return f"the run in {source} is not finished, but its last checkpoint can be inspected: {checkpoint}"
    if not folder.metrics.is_file():
        return f"the run in {source} is not finished: adalora train --resume --output {source}"
    return (
        f"the run in {source} was trained by method {recipe.method}, which leaves no LoRA adapter to inspect: "
        "adalora compare and adalora report show such runs."
    )


def _adapters_below(source: Path) -> list[str]:
    """Folders in this one that hold an adapter, but for the checkpoints of a run."""
    return sorted(f.parent.name for f in source.glob(f"*/{CONFIG}"))
