"""The configuration of an ordinary LoRA adapter with given ranks and a scale of 1."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from peft import LoraConfig

from .patterns import as_keys

# They say how training begins, not what was learned.
ONLY_AT_THE_START = {"init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config"}


def plain_config(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """The configuration of an ordinary LoRA adapter with these ranks and a scale of 1.

    Args:
        config: whatever else the adapter is.
        ranks: rank of each module by name relative to the base model; modules with rank 0 are excluded.
    """
    values: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init}
    kept = {name: rank for name, rank in ranks.items() if rank}
    r = max(kept.values(), default=1)
    keys = as_keys(kept) if set(kept.values()) != {r} else {}
    pattern = {key: kept[name] for name, key in keys.items()}
    values.update(dict.fromkeys(ONLY_AT_THE_START), init_lora_weights=True, loftq_config={})
    values.update(
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        use_rslora=False,
        exclude_modules=_excluding(config.exclude_modules, sorted(set(ranks) - set(kept)), kept),
    )
    return LoraConfig(**values)


def _excluding(excluded: Any, names: list[str], kept: Collection[str]) -> Any:
    """``exclude_modules`` with these names added. A name excludes whatever ends with it, which may be too much: then
    all is written as one regular expression, which PEFT matches from end to end."""
    if not names:
        return excluded
    too_much = any(other.endswith(f".{name}") for name in names for other in kept)
    if isinstance(excluded, str):
        return "|".join([f"(?:{excluded})", *map(re.escape, names)])
    if too_much:
        return "|".join([*(rf"(?:.*\.)?{re.escape(name)}" for name in sorted(excluded or ())), *map(re.escape, names)])
    return sorted({*(excluded or ()), *names})


def including(excluded: Any, names: Collection[str]) -> Any:
    """``exclude_modules`` without what :func:`_excluding` added."""
    if not isinstance(excluded, str):
        return [name for name in sorted(excluded or ()) if name not in names] or None
    for name in names:
        excluded = re.sub(rf"(^|\|){re.escape(re.escape(name))}(?=\||$)", "", excluded)
    return excluded.removeprefix("|") or None


def rank_owner(name: str) -> str:
    """The module whose entry in a rank pattern counts: PEFT gives both projections of an attention layer the same."""
    return name.removesuffix(".base_layer.out_proj")
