"""A recipe as text: YAML files, assignments on the command line, and the built-in demo, all as plain dictionaries that
``recipe.validate`` takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .recipe import DEMO_MODEL, DEMO_REVIEWS, POWER_OF_TEN, TRAIN_TYPE, TRAIN_TYPE_KEYS, RecipeError, in_sections


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where people expect it: ``no`` is a word, 1e-3 a number; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"([Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(*POWER_OF_TEN)


def parse_yaml(text: str, source: str) -> Any:
    """The value that ``text`` says; RecipeError naming ``source`` and the line when it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{source} is not valid YAML{where}: {reason}") from error


def read_raw(path: Path) -> dict[str, Any]:
    """A recipe file as plain dictionaries in our sections, not yet validated."""
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}: give the path of a YAML file, or none at all for the demo")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a recipe: a recipe is a YAML text file") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} is not a recipe: expected keys such as `model:` and `data:` at the top")
    return in_sections(raw, str(path))


def demo_raw() -> dict[str, Any]:
    """The built-in demo, which ``recipes/rotten_tomatoes.yaml`` spells out."""
    return {
        "model": DEMO_MODEL,
        "output": "runs/rotten_tomatoes",
        "data": {"train": DEMO_REVIEWS, "max_length": 128},
        "adalora": {"exclude_modules": ["pooler.dense"]},
        "training": {"learning_rate": 5e-3},
    }


def assigned(assignments: Iterable[str]) -> dict[str, Any]:
    """The value at each dotted key of ``key=value`` texts, values read as YAML.

    Those of ``TRAIN_TYPE_KEYS`` are named as ours are, so that they replace what a recipe says in either spelling.
    """
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        key = key.strip()
        if not equals or not key:
            raise RecipeError(f"--set {assignment}: expected KEY=VALUE, such as --set training.learning_rate=1e-3")
        place = key.replace("_", ".", 1) if key in TRAIN_TYPE_KEYS else key
        if spelled.setdefault(place, key) != key:
            raise RecipeError(f"--set {assignment}: {key} is the same as {spelled[place]}: give one of the two")
        if place != key:
            values.setdefault("train_type", TRAIN_TYPE)
        values[place] = parse_yaml(value, f"--set {assignment}")
    return values


def with_values(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``raw`` with the value at each dotted key replaced."""
    result = dict(raw)
    for key, value in values.items():
        head, _, rest = key.partition(".")
        if not rest:
            result[head] = value
            continue
        section = result.get(head) or {}
        if not isinstance(section, Mapping):
            raise RecipeError(f"{key}: `{head}` is a single value, not a section")
        result[head] = with_values(section, {rest: value})
    return result
