"""Builds docs/recipes.md from the recipe's own fields: ``python -m tests.docs.recipes_page > docs/recipes.md``."""

from __future__ import annotations

import types
import typing

from pydantic import BaseModel

from adalora import methods, tasks
from adalora.recipe import (
    TRAIN_TYPE_KEYS,
    AdaLoraSection,
    BottleneckSection,
    DataSection,
    LoraSection,
    Recipe,
    TrainingSection,
)

INTRODUCTION = """# Recipes

A recipe is a YAML file with everything that one training depends on. `adalora train RECIPE.yaml` runs it;
`--set training.learning_rate=5e-4` changes one key, and the frequent ones have flags of their own
(`adalora train --help`). A key that is not listed here is an error that names the nearest one.

[`recipes/`](../recipes) holds commented examples. A run writes its recipe as resolved into its folder; that
file is a recipe, too.
"""

SECTIONS: list[tuple[str, str, type[BaseModel]]] = [
    ("At the top", "", Recipe),
    ("`data`", "Which rows, and which of their columns.", DataSection),
    ("`adalora`", "Fields of `AdaLoraConfig`. A length is steps (`500`), a fraction of all steps (`0.1`) or epochs "
     "(`\"2 epochs\"`); the [guide](guide.md) has the rest.", AdaLoraSection),
    ("`lora`", "Ranks that stay as they are.", LoraSection),
    ("`bottleneck`", "", BottleneckSection),
    ("`training`", "Fields of Transformers' `TrainingArguments`.", TrainingSection),
]  # fmt: skip


TRAIN_TYPE = """## `train_type: adalora`

Trainers that offer AdaLoRA as a training type have its keys at the top of their recipes. They are read here, too, from
a file and from `--set`. As soon as one of them or `train_type: adalora` is given, those left out have the defaults of
this table instead of those of the section `adalora`. A run writes the section alone. It may stand beside them for
everything else, such as `target_modules`; one value in both spellings is an error.

```yaml
model: demo:minilm
train_type: adalora
adalora_target_r: 4
adalora_init_r: 6
adalora_tinit: "0.5 epochs"
data:
  train: demo:rotten_tomatoes
```

| key | default | is |
|---|---|---|"""


def kind(annotation: object) -> str:
    """A type as a reader writes it."""
    if typing.get_origin(annotation) is typing.Annotated:
        return kind(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        if {int, float, str} <= set(typing.get_args(annotation)):
            return "length"
        return " or ".join(kind(part) for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is list:
        return "list"
    names: dict[object, str] = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, "section")


def default(section: type[BaseModel], name: str) -> str:
    field = section.model_fields[name]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel):
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def keys(section: type[BaseModel]) -> list[str]:
    rows = ["| key | value | default | meaning |\n|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if name != "facts":  # written by a run
            words = field.description or ""
            rows.append(f"| `{name}` | {kind(field.annotation)} | {default(section, name)} | {words} |")
    return [*rows, ""]


def summary(thing: object) -> str:
    """The first sentence of a docstring."""
    return " ".join((thing.__doc__ or "").partition("\n\n")[0].split())


def of_tasks() -> list[str]:
    parts = ["## Tasks\n", "| task | what | columns read | column answered | metrics, the headline first |"]
    parts.append("|---|---|---|---|---|")
    for name in tasks.names():
        task = tasks.get(name)
        read = ", ".join(f"`{column}`" for column in task.columns.of_text())
        metrics = ", ".join(sorted(task.metric_names, key=lambda metric: metric != task.headline))
        parts.append(f"| `{name}` | {summary(task)} | {read} | `{task.columns.label}` | {metrics} |")
    parts.append("")
    owners: dict[type[BaseModel], list[str]] = {}
    for name in tasks.names():
        if tasks.get(name).options.model_fields:
            owners.setdefault(tasks.get(name).options, []).append(f"`{name}`")
    for options, names in owners.items():
        parts.append(f"### `options` of {', '.join(names)}\n")
        parts.extend(keys(options))
    return parts


def of_methods() -> list[str]:
    parts = ["## Methods\n", "| method | what | section | takes a budget |\n|---|---|---|---|"]
    for name in methods.names():
        method = methods.get(name)
        section = f"`{method.section}`" if method.section else "–"
        parts.append(f"| `{name}` | {summary(method)} | {section} | {'yes' if method.takes_budget else 'no'} |")
    return [*parts, ""]


def page() -> str:
    parts = [INTRODUCTION]
    for title, words, section in SECTIONS:
        parts.append(f"## {title}\n")
        if words:
            parts.append(f"{words}\n")
        parts.extend(keys(section))
    parts.extend(of_tasks())
    parts.extend(of_methods())
    parts.append(TRAIN_TYPE)
    for key, value in TRAIN_TYPE_KEYS.items():
        parts.append(f"| `{key}` | `{value}` | `adalora.{key.removeprefix('adalora_')}` |")
    parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
