"""An adapter in the form that an engine reads: plain LoRA, one merged model, llama.cpp's converter, Diffusers."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from .core.errors import ConfigError
from .hf.convert import read_peft_adalora
from .hf.files import replacing
from .hf.placing import ADVICE, fit_vocabulary, misplaced, place, tied, untie_adapted
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

# Of the largest output, between a model that was merged and saved and the one with its adapter beside it: rounding in
# half precision is below, a weight that is tied again or another scale of the outputs far above.
_SAME_ANSWER = 0.03

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
    shared = tied(model)
    try:
        fit_vocabulary(model, adapter)
        placed = place(model, adapter)
        expected = _answer(placed) if shared else None
        untie_adapted(placed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that weights are no longer tied, as is seen to below
            merged: Any = placed.merge_and_unload(safe_merge=True)
    except ConfigError as error:
        raise ConfigError(f"the adapter in {source} does not fit its base model: {error}") from error
    except _LOAD_ERRORS as error:
        raise ConfigError(f"the adapter in {source} does not fit its base model: {_first_line(error)}") from error
    if dtype is not None:
        merged.to(dtype)
        if not all(bool(value.isfinite().all()) for value in merged.state_dict().values() if value.is_floating_point()):
            raise ConfigError(f"the merged weights are too large for {str(dtype)[6:]}: use bfloat16 or float32.")
    still = tied(merged)
    if all(any(names <= group for group in still) for names in shared):
        merged.save_pretrained(folder)
    else:
        _save_untied(merged, expected, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _save_untied(merged: Any, expected: torch.Tensor | None, folder: Path) -> None:
    """Save a model some of whose weights were shared and are no more, so that ``from_pretrained`` does not tie them
    again.

    Not every kind of model can: what was saved is loaded and must answer as the adapter did.
    """
    for untie in (True, False):  # T5 takes "not tied" for another scale of its outputs, too
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = not untie
        merged.save_pretrained(folder)
        try:
            loaded = type(merged).from_pretrained(folder)
            found = _answer(loaded.float())
        except _LOAD_ERRORS:
            found = None
        if found is None or expected is None or found.shape != expected.shape:
            continue
        if float((found - expected).abs().max()) <= _SAME_ANSWER * float(expected.abs().max()):
            return
    raise ConfigError(
        f"{type(merged).__name__} shares a weight that the adapter changed in one place alone, and cannot be loaded"
        " with the two apart: serve the adapter beside its base model (--format lora)."
    )


def _answer(model: Any) -> torch.Tensor | None:
    """What the model says to a few tokens; None where it wants to be asked in another way."""
    tokens = torch.arange(2, 10).unsqueeze(0) % model.config.get_text_config().vocab_size
    asked = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})
    try:
        with torch.no_grad():
            said: torch.Tensor = model.eval()(**asked)[0]
    except Exception:  # any model of any modality may be here
        return None
    return said.float()


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
        where = locate(name)
    except RecipeError as error:
        raise ConfigError(f"{error}. --base MODEL says where it is.") from error
    try:
        config = AutoConfig.from_pretrained(where)
        head = _head_size(adapter)
        changes = {"num_labels": head} if head is not None and head != getattr(config, "num_labels", head) else {}
        kind = _model_class(source, adapter, config)
        model = kind.from_pretrained(where, ignore_mismatched_sizes=True, **changes)
    except ConfigError:
        raise
    except _LOAD_ERRORS as error:
        raise ConfigError(
            f"the base model {name} cannot be loaded: {_first_line(error)}. --base MODEL says where it is."
        ) from error
    try:
        return model, AutoTokenizer.from_pretrained(where)
    except _LOAD_ERRORS:
        return model, None  # a model of images, or a folder with the weights alone


def _model_class(source: Path, adapter: PlainAdapter, config: Any) -> Any:
    """Transformers' class whose modules are those that the adapter names: by its task, or else what the base model says
    that it is, or its body alone, as sentence encoders are trained."""
    task = adapter.config.task_type
    known = _MODEL_CLASSES.get(str(getattr(task, "value", task)))
    said = ""
    for name in dict.fromkeys(filter(None, [known, *(config.architectures or ()), "AutoModel"])):
        kind = getattr(transformers, name, None)
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                build: Any = getattr(kind, "from_config", getattr(kind, "_from_config", None))
                skeleton = build(copy.deepcopy(config))
        except (*_LOAD_ERRORS, TypeError, AttributeError):
            continue  # no such class, or none for models of this type
        wrong = misplaced(adapter, skeleton)
        if not wrong:
            return kind
        said = said or wrong
    if not said:
        raise ConfigError(f"Transformers has no class for a base model of type {config.model_type}.")
    raise ConfigError(f"the adapter in {source} does not fit its base model: {said} {ADVICE}")


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
