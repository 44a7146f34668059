"""What the files of an adapter may hold, which may be a stranger's: settings of the right kinds, numbers that are
numbers, tensors that are what their file can hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, bfloat16, float16, float32, float64, strided

from ..core.errors import ConfigError

MOST = 2**31 - 1  # of a rank, a size, an index
_PADDING = 2**27  # numbers that padding may add to any adapter; more to one whose own tensors are large
_NAME = re.compile(r"[\w\-]+(\.[\w\-]+)*")
# They change what B A means, or the model around it, in ways that only PEFT knows.
_UNKNOWN = (
    "layer_replication",
    "megatron_config",
    "use_bdlora",
    "use_qalora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value)) and abs(value) < 1e30
    except OverflowError:
        return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _dict_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def _or(*kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(kind(value) for kind in kinds)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


_TEXTS = (_or(_is_text, _list_of(_is_text)), "a text or a list of texts")
_FLAG = (_is_flag, "true or false")
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number, at least 1"),
    "init_r": (_is_rank, "a whole number, at least 1"),
    "target_r": (_is_rank, "a whole number, at least 1"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_number, "a number"),
    "alpha_pattern": (_dict_of(_is_number), "numbers by module"),
    "target_modules": _TEXTS,
    "exclude_modules": _TEXTS,
    "layers_pattern": _TEXTS,
    "modules_to_save": (_list_of(_is_name), "a list of names"),
    "layers_to_transform": (_or(_is_index, _list_of(_is_index)), "whole numbers"),
    "trainable_token_indices": (_or(_list_of(_is_index), _dict_of(_list_of(_is_index))), "whole numbers"),
    "alora_invocation_tokens": (_list_of(_is_index), "whole numbers"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    **dict.fromkeys(("task_type", "base_model_name_or_path", "revision", "peft_version"), (_is_text, "a text")),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"), _FLAG),
    "auto_mapping": (lambda value: isinstance(value, dict), "texts by name"),
}
_RANKS = {
    "LORA": (_dict_of(_is_rank), "whole numbers by module, at least 1"),
    "ADALORA": (_dict_of(_list_of(_is_flag)), "lists of true and false by module"),
}


def check_settings(settings: Mapping[str, Any], file: Path) -> None:
    """ConfigError naming the first key of ``adapter_config.json`` whose value is of the wrong kind."""
    for key, (fits, words) in _KINDS.items():
        value = settings.get(key)
        if value is not None and not fits(value):
            raise ConfigError(f"{file}: {key} is {short(value)}, but should be {words}.")
    for key in _UNKNOWN:
        if settings.get(key):
            raise ConfigError(f"{file}: {key} makes this another kind of adapter than A and B alone; leave it to PEFT.")


def check_rank_pattern(settings: Mapping[str, Any], file: Path) -> None:
    """The same of ``rank_pattern``, which is another thing to each type of adapter."""
    fits, words = _RANKS[settings["peft_type"]]
    value = settings.get("rank_pattern")
    if value is not None and not fits(value):
        raise ConfigError(f"{file}: rank_pattern is {short(value)}, but should be {words}.")


def check_tensors(tensors: Mapping[str, Any], file: Path) -> None:
    """ConfigError naming the first tensor that is not one, is larger than what is in the file, or is not finite."""
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ConfigError(f"{file} is not a state dict: it should map names to tensors.")
        if value.layout != strided or value.device.type != "cpu" or value.is_quantized:
            raise ConfigError(f"{file}: {key} is no ordinary tensor ({value.layout}, {value.device.type}).")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ConfigError(f"{file}: {key} says it is {list(value.shape)}, which is more than there is of it.")
        if value.is_floating_point():
            if value.dtype not in (float16, bfloat16, float32, float64):
                raise ConfigError(f"{file}: {key} is of type {value.dtype}, in which nothing can be computed here.")
            if not bool(value.isfinite().all()):
                raise ConfigError(f"{file}: {key} holds numbers that are not finite. Did the training diverge?")


def check_pruned(value: Any, file: Path) -> dict[str, tuple[list[int], list[int], bool]]:
    """The shapes of modules of rank 0, as metadata has them; ConfigError where it has something else."""

    def fits(entry: Any) -> bool:
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[2], bool):
            return False
        b, a, _ = entry
        if not (_list_of(_is_index)(b) and _list_of(_is_index)(a) and 2 <= len(b) == len(a) <= 5):
            return False
        return bool(b[1] == a[0] == 0 and b[0] and all(a[1:]) and all(size == 1 for size in b[2:]))

    found: dict[str, tuple[list[int], list[int], bool]] = _by_module(value, fits, "the shapes of pruned modules", file)
    return found


def check_scores(value: Any, file: Path) -> dict[str, list[float]]:
    """The importance of triplets, as metadata has it; ConfigError where it has something else."""
    found: dict[str, list[float]] = _by_module(value, _list_of(_is_number), "the importance of triplets", file)
    return found


def _by_module(value: Any, fits: Callable[[Any], bool], words: str, file: Path) -> Any:
    wrong = next((key for key, entry in value.items() if not fits(entry)), None) if isinstance(value, dict) else ""
    if wrong is not None:
        raise ConfigError(
            f"{file}: its metadata should have {words}{f', but {short(wrong)} is none' if wrong else ''}."
        )
    return value


def check_padding(added: int, held: int) -> None:
    """ConfigError when padding would make far more numbers than the adapter has: of sizes that a file only claims."""
    if added > max(_PADDING, 64 * held):
        raise ConfigError(
            f"padding would add {added:,} numbers to an adapter of {held:,}, for modules that its metadata says were"
            " pruned: do these sizes belong to its base model?"
        )


def short(value: Any) -> str:
    """A value for people, not longer than a part of a line."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of very many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
