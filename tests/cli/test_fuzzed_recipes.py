"""Mutated recipes through ``plan`` and ``train``: whatever they say, they are carried out or refused in words."""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from adalora import methods, tasks

from .conftest import Finished

Run = Callable[..., Finished]
RECIPES = int(os.environ.get("ADALORA_FUZZED_RECIPES", "500"))
STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 0.1, 0.5, 1.5, -0.5, 1e-30, 1e30, 10**30, float("inf"), float("nan"), "", " ",
    "-", "no", "1e-3", "3 epochs", "0 epochs", "x" * 300, "a\0b", "\x1b[31m", "ä\u2028ö", "*", ".*", "(a+)+$", "[",
    "..", "/", "~", "all-linear", "query", "rank 2", "rank -1", "rank 1000", "linear", "cosine", "text", "label", [],
    [""], ["text"], [None], [1, 2], ["query", "value"], {}, {"a": 1}, {"x": {"y": []}}, [[]], "2026-11-28", "$HOME",
    "${NONE}", "demo:minilm",
]  # fmt: skip
SLIPS = [":", "\t", "[", "- ", "'", "\0", "&a", "*a", "!!python/object:os.system", "%"]


def keys_of(value: Any, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [before] if before else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += keys_of(inner, (*before, key))
    return found


def mutated(recipe: dict[str, Any], draw: random.Random) -> str:
    """A recipe as YAML with one to three faults, or at least changes, in its keys, values or letters."""
    result = copy.deepcopy(recipe)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        place = draw.choice(keys_of(result) or [("model",)])
        section: Any = result
        for key in place[:-1]:
            section = section[key]
        how = draw.random()
        if how < 0.6:
            section[place[-1]] = draw.choice(STRANGE)
        elif how < 0.7:
            del section[place[-1]]
        elif how < 0.8:
            section[draw.choice(["zzz", "", "model", "r", "seed", place[-1] + "s"])] = draw.choice(STRANGE)
        elif how < 0.9:
            result["task"] = draw.choice(tasks.names())
        else:
            result["method"] = draw.choice(methods.names())
    text = yaml.safe_dump(result, allow_unicode=True, sort_keys=False)
    if draw.random() < 0.15:  # a slip of the keyboard
        at = draw.randrange(len(text))
        text = (
            text[:at]
            + draw.choice([":", "\t", "[", "- ", "'", "\0", "&a", "*a", "!!python/object:os.system", "%"])
            + text[at:]
        )
    return text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mutated_recipes_are_carried_out_or_refused(adalora: Run, tiny_model: Path, files: Path) -> None:
    recipe = {
        "model": str(tiny_model),
        "task": "classification",
        "method": "adalora",
        "output": "run",
        "seed": 0,
        "data": {
            "train": str(files / "train.csv"), "eval": str(files / "test.csv"), "text": "text", "label": "label",
            "text_pair": None, "max_length": 16, "max_train_rows": 48, "max_eval_rows": 8, "holdout": None,
            "label_names": None, "train_split": "train", "eval_split": "validation", "more_eval_splits": [],
        },
        "adalora": {
            "target_r": 2, "init_r": 3, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear",
            "exclude_modules": ".*pooler.*", "tinit": 0.1, "tfinal": 0.3, "deltaT": 1, "beta1": 0.85,
            "orth_reg_weight": 0.1, "importance": "sensitivity", "policy": "global_topk", "schedule": "cubic",
            "initialization": "orthonormal", "singular_gain": "auto", "compact": True, "kernel": "fused",
        },
        "training": {
            "max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "warmup_steps": 0.1,
            "lr_scheduler_type": "linear", "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 1.0,
            "gradient_accumulation_steps": 1, "eval_strategy": "no", "logging_steps": 2, "save_steps": 3,
            "save_total_limit": 2, "group_by_length": True, "bf16": False, "report_to": [],
        },
    }  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in files.iterdir()}
    raw: list[str] = []
    for number in range(RECIPES):
        draw = random.Random(number)
        Path("recipe.yaml").write_text(mutated(recipe, draw), encoding="utf-8")
        planned = adalora("plan", "recipe.yaml")
        commands = [("plan", planned)]
        if planned.code == 0:  # few steps, whatever it says
            few = ["--set", "training.max_steps=6", "--set", "output=run"]
            commands.append(("train", adalora("train", "recipe.yaml", *few)))
            shutil.rmtree("run", ignore_errors=True)
        for command, done in commands:
            words = done.code in {0, 2} or (done.code == 1 and "the training loss became" in done.err)
            if not words or "ADALORA_DEBUG=1" in done.err or "Traceback" in done.err or "\x1b" in done.err:
                raw.append(f"{number} {command}: {done.code} {done.err[-500:]}")
    assert raw == []
    assert {path: path.stat().st_mtime_ns for path in files.iterdir()} == before
    assert sorted(path.name for path in Path().iterdir()) == ["recipe.yaml"]
