"""An adapter in the form that an engine reads: plain LoRA, one merged model, llama.cpp's converter, Diffusers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from .core.errors import ConfigError
from .hf.convert import read_peft_adalora
from .hf.files import replacing
from .hf.plain import DTYPES, PlainAdapter
from .pretrained import load_model, load_tokenizer, locate
from .reading import completed, task_of
from .recipe import RecipeError
from .runs import RunError, RunFolder

FORMATS = ("lora", "merged", "gguf-ready", "diffusers")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

# What an earlier export leaves, and an engine would load instead of the new files, or beside them.
_STALE = (
    "adapter_model.*", "adapter_config.json", "adalora_state.safetensors", DIFFUSERS_FILE, "model*.safetensors",
    "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
)  # fmt: skip

_MODEL_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

# The part of a Diffusers pipeline whose topmost modules have such names.
_COMPONENTS = {
    "unet": {"down_blocks", "mid_block", "up_blocks"},
    "transformer": {"transformer_blocks", "single_transformer_blocks", "joint_transformer_blocks"},
    "text_encoder": {"text_model"},
}

# What Transformers and PEFT raise when files do not hold what was hoped for.
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError)


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    files: dict[str, int]  # name -> bytes
    ranks: dict[str, int]  # of each module; of a merged model, as they were merged
    triplets: int  # without padding


def export(
    source: Path,
    out: Path,
    form: str = "lora",
    *,
    rank: float | None = None,
    pad: bool = False,
    dtype: str | None = None,
    base: str | None = None,
    component: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write the adapter in ``source`` (a run, a checkpoint, any LoRA adapter) to ``out``.

    Args:
        source: folder with the adapter.
        out: a folder that is empty or not there; with ``overwrite``, what an engine would load from it is replaced.
        form: one of ``FORMATS``.
        rank: keep only the best triplets, so many a matrix on average.
        pad: bring every module to the largest rank with zeros (``gguf-ready`` always does).
        dtype: ``float32``, ``float16`` or ``bfloat16``; otherwise as it is.
        base: folder or hub name of the base model, where another is meant than the adapter names.
        component: the part of a Diffusers pipeline that was trained, ``unet`` say.
        overwrite: see ``out``.

    Raises:
        AdaLoraError: something that cannot be meant, or a model that cannot be had; nothing has been written then.
    """
    if form not in FORMATS:
        raise ConfigError(f"format {form!r} is not known: choose one of {', '.join(FORMATS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known: choose one of {', '.join(DTYPES)}.")
    if component is not None and form != "diffusers":
        raise ConfigError(f"a component is a part of a Diffusers pipeline, and the format is {form}.")
    if pad and form == "merged":
        raise ConfigError("a merged model has no ranks to pad.")
    adapter = _read(source)
    _check_target(source, out, overwrite)
    adapter = adapter if rank is None else adapter.truncate(rank)
    if base is not None:
        adapter.config.base_model_name_or_path = base
    number = None if dtype is None else DTYPES[dtype]
    with replacing(out) as beside:
        if form == "merged":
            _write_merged(source, adapter, base, number, beside)
        else:
            adapter = _for_llama_cpp(adapter) if form == "gguf-ready" else adapter.padded() if pad else adapter
            adapter = adapter if number is None else adapter.to(number)
            if form == "diffusers":
                _write_diffusers(adapter, component, beside)
            else:
                adapter.write(beside)
        written = sorted(file.name for file in beside.iterdir())
        _remove_stale(out, overwrite)
    return _exported(out, written, adapter)


def convert(source: Path, out: Path, *, overwrite: bool = False) -> Exported:
    """Write the checkpoint of PEFT's AdaLoRA in ``source`` to ``out`` as plain LoRA.

    Raises:
        ConfigError: there is no such checkpoint, or ``out`` is not empty.
    """
    adapter = read_peft_adalora(source)
    _check_target(source, out, overwrite)
    with replacing(out) as beside:
        adapter.write(beside)
        written = sorted(file.name for file in beside.iterdir())
        _remove_stale(out, overwrite)
    return _exported(out, written, adapter)


# -------------------------------------------------------------------------------------------------- engines by name


def _for_llama_cpp(adapter: PlainAdapter) -> PlainAdapter:
    """What ``convert_lora_to_gguf.py`` of llama.cpp reads, and llama.cpp computes rightly from.

    It takes one lora_alpha for all tensors and divides it by each tensor's own rank, so ranks must be uniform; it stops
    at any tensor but lora_A and lora_B, and drops trained norms; and it turns the kernels of GPT-2's Conv1D around,
    which PEFT's A and B are already.
    """
    config = adapter.config
    advice = "llama.cpp reads a merged model: --format merged."
    others = sorted(adapter.rest)
    if config.use_dora:
        raise ConfigError(f"llama.cpp knows no DoRA, which scales the merged weights. {advice}")
    if others:
        raise ConfigError(
            f"llama.cpp's converter reads lora_A and lora_B alone, but {others[0]} was trained too. {advice}"
        )
    if config.fan_in_fan_out:
        raise ConfigError(
            f"llama.cpp's converter transposes the factors of Conv1D (GPT-2), which need no more. {advice}"
        )
    convolutions = [name for name, pair in adapter.pairs.items() if pair.a.ndim > 2]
    if convolutions:
        raise ConfigError(f"llama.cpp adapts no convolutions, and {convolutions[0]} is one. {advice}")
    if not config.base_model_name_or_path:
        raise ConfigError(
            "llama.cpp's converter needs the base model's configuration, and the adapter does not name its base model:"
            " --base MODEL does."
        )
    return adapter.padded()


def _write_diffusers(adapter: PlainAdapter, component: str | None, folder: Path) -> None:
    """``pytorch_lora_weights.safetensors``, with the configuration in its metadata as Diffusers keeps it.

    The settings are those of ``LoraConfig`` that Diffusers would otherwise guess from the tensors.
    """
    others = sorted(key for key in adapter.rest if ".lora_" not in key)
    others += [name for name, pair in adapter.pairs.items() if pair.embedding]
    if others:
        raise ConfigError(f"Diffusers reads LoRA of linear layers and convolutions, but {others[0]} was trained too.")
    name = component or _component(adapter)
    whole = adapter.unscaled()
    config = whole.config
    settings: dict[str, Any] = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "target_modules": sorted(adapter.pairs),
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
    }
    metadata = {f"{name}.{key}": value for key, value in settings.items()}
    save_file(
        {f"{name}.{key}": value.contiguous() for key, value in whole.state_dict().items()},
        folder / DIFFUSERS_FILE,
        metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata, sort_keys=True)},
    )


def _component(adapter: PlainAdapter) -> str:
    tops = {name.partition(".")[0] for name in adapter.pairs}
    found = [name for name, known in _COMPONENTS.items() if tops & known]
    if len(found) != 1:
        raise ConfigError(
            f"which part of a pipeline has modules like {min(adapter.pairs)}? Say --component unet, transformer,"
            " text_encoder, or what your pipeline calls it."
        )
    return found[0]


def _write_merged(
    source: Path, adapter: PlainAdapter, base: str | None, dtype: torch.dtype | None, folder: Path
) -> None:
    """The base model with the adapter in its weights, and its tokenizer."""
    model, tokenizer = _base_model(source, adapter, base)
    with tempfile.TemporaryDirectory() as files:
        adapter.write(files)
        try:
            merged: Any = PeftModel.from_pretrained(model, files).merge_and_unload(safe_merge=True)
        except _LOAD_ERRORS as error:
            raise ConfigError(f"the adapter in {source} does not fit its base model: {_first_line(error)}") from error
    if dtype is not None:
        merged.to(dtype)
        if not all(bool(value.isfinite().all()) for value in merged.state_dict().values() if value.is_floating_point()):
            raise ConfigError(f"the merged weights are too large for {str(dtype)[6:]}: use bfloat16 or float32.")
    merged.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _base_model(source: Path, adapter: PlainAdapter, base: str | None) -> tuple[nn.Module, Any]:
    """The model that the adapter was trained on, with a head like the trained one, and its tokenizer if it has one."""
    folder = source.resolve()
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    try:
        if _is_run(run):
            recipe = completed(RunFolder(run).read_recipe())
            task = task_of(recipe)
            tokenizer = load_tokenizer(base or recipe.model, recipe.data.max_length)
            return load_model(base or recipe.model, task, tokenizer), tokenizer
        name = base or adapter.config.base_model_name_or_path
        if not name:
            raise ConfigError(f"the adapter in {source} does not name its base model: --base MODEL does.")
        place = locate(name)
    except RecipeError as error:
        raise ConfigError(f"{error}. --base MODEL says where it is.") from error
    try:
        config = AutoConfig.from_pretrained(place)
        head = _head_size(adapter)
        changes = {"num_labels": head} if head is not None and head != getattr(config, "num_labels", head) else {}
        model = _model_class(adapter, config).from_pretrained(place, ignore_mismatched_sizes=True, **changes)
    except _LOAD_ERRORS as error:
        raise ConfigError(
            f"the base model {name} cannot be loaded: {_first_line(error)}. --base MODEL says where it is."
        ) from error
    try:
        return model, AutoTokenizer.from_pretrained(place)
    except _LOAD_ERRORS:
        return model, None  # a model of images, or a folder with the weights alone


def _model_class(adapter: PlainAdapter, config: Any) -> Any:
    """Transformers' class by the adapter's task, or else what the base model says that it is."""
    task = adapter.config.task_type
    known = _MODEL_CLASSES.get(str(getattr(task, "value", task)))
    name = known or next(iter(config.architectures or ()), "AutoModel")
    return getattr(transformers, name)


def _head_size(adapter: PlainAdapter) -> int | None:
    """Outputs of a trained classifier."""
    heads = [
        value.shape[0]
        for key, value in adapter.rest.items()
        if value.ndim == 2 and key.endswith(".weight") and {"classifier", "score"} & set(key.split("."))
    ]
    return heads[-1] if heads else None


# ------------------------------------------------------------------------------------------------------------ folders


def _is_run(folder: Path) -> bool:
    try:
        RunFolder(folder).read_recipe()
    except (RunError, RecipeError):
        return False
    return True


def _read(source: Path) -> PlainAdapter:
    if _is_run(source) and not (source / "adapter_config.json").is_file():
        method = RunFolder(source).check_trained().method  # says what to do
        raise ConfigError(
            f"the run in {source} was trained by method {method}, which leaves no LoRA adapter to export: "
            "a `full` run is a whole model already, and the others are for comparison."
        )
    return PlainAdapter.read(source)


def _check_target(source: Path, out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: give the name of a folder.")
    if out.resolve() == source.resolve():
        raise ConfigError(f"{out} is the adapter itself: give another folder to write to.")
    if _is_run(out):
        raise ConfigError(f"{out} is the folder of a run: give another folder to write to.")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: --overwrite replaces what an engine would load from it.")


def _remove_stale(out: Path, overwrite: bool) -> None:
    for pattern in _STALE if overwrite else ():
        for file in out.glob(pattern):
            file.unlink()


def _exported(out: Path, written: list[str], adapter: PlainAdapter) -> Exported:
    return Exported(out, {name: (out / name).stat().st_size for name in written}, adapter.ranks, adapter.live)


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
    return line if len(line) < 200 else line[:197] + "..."
