"""Builds docs/recipes.md from the recipe's own fields: ``python -m tests.docs.recipes_page > docs/recipes.md``."""

from __future__ import annotations

import json
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

TASKS = {
    "classification": "one class for each text, or pair of texts",
    "regression": "one number for each text, or pair of texts",
    "multi_label": "any number of labels for each text, or pair of texts",
    "token_classification": "one tag for each word, and the entities that tags spell",
    "question_answering": "the part of a context that answers a question: SQuAD 1.1 and 2.0",
    "summarization": "a short text that says what a long one says: XSum, CNN/DailyMail",
    "data_to_text": "a text that says what another says: columns of your own",
    "data_to_text/e2e": "E2E: the attributes of a restaurant as a text",
    "data_to_text/webnlg": "WebNLG 2017: triples as a text; the four metrics also of seen and of unseen categories",
    "data_to_text/dart": "DART: triples as a text",
    "instruction": "conversations: the assistant's answers are learned",
    "glue/cola": "is a sentence acceptable?",
    "glue/sst2": "is a sentence positive or negative?",
    "glue/mrpc": "do two sentences say the same?",
    "glue/qqp": "do two questions ask the same?",
    "glue/stsb": "how alike are two sentences, from 0 to 5?",
    "glue/mnli": "does a premise entail a hypothesis?",
    "glue/qnli": "does a sentence answer a question?",
    "glue/rte": "does one sentence entail another?",
    "glue/wnli": "does a sentence follow when a pronoun in the first is resolved?",
}
"""Every task in words."""

METHODS = {
    "adalora": "AdaLoRA: P Λ Q under a budget that goes where it matters",
    "svd_lora": "P Λ Q at the target rank throughout, without allocation",
    "lora_pruned": "LoRA whose doublets are pruned under the same budget",
    "lora_squeeze": "LoRA at a larger rank, squeezed to the target by SVD, the same rank everywhere",
    "peft_adalora": "PEFT's own AdaLoRA, driven as it must be",
    "lora": "LoRA",
    "rslora": "LoRA at the scale alpha / sqrt(r)",
    "dora": "LoRA with a trained norm for each output",
    "pissa": "LoRA that starts from the largest singular triplets of the weights",
    "lora_gradient": "LoRA whose A starts from the right singular vectors of the loss's gradient, B = 0",
    "eva": "LoRA that starts from the main directions of the inputs, which also spread the ranks",
    "houlsby": "bottleneck adapters, two a layer",
    "pfeiffer": "bottleneck adapters, one a layer",
    "bitfit": "every bias",
    "head": "the output layer alone",
    "full": "every parameter",
}
"""Every method in words."""

OF_ADALORA = """Fields of `AdaLoraConfig`, for the methods `adalora`, `svd_lora`, `lora_pruned`, `lora_squeeze` and
`peft_adalora`. A length is steps (`500`), a fraction of all steps (`0.1`) or epochs (`"2 epochs"`);
[Choosing settings](choosing.md) says more."""

OF_LORA = "Ranks that stay as they are: the methods `lora`, `rslora`, `dora`, `pissa` and `eva`."

SECTIONS: list[tuple[str, str, type[BaseModel]]] = [
    ("At the top", "", Recipe),
    ("`data`", "Which rows, and which of their columns.", DataSection),
    ("`adalora`", OF_ADALORA, AdaLoraSection),
    ("`lora`", OF_LORA, LoraSection),
    ("`bottleneck`", "The methods `houlsby` and `pfeiffer`.", BottleneckSection),
    ("`training`", "Fields of Transformers' `TrainingArguments`.", TrainingSection),
]


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
    if value in (None, "", {}) or isinstance(value, BaseModel):
        return "–"
    if isinstance(value, str):
        return f"`{json.dumps(value)}`" if "\n" in value else f"`{value}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def keys(section: type[BaseModel]) -> list[str]:
    rows = ["| key | value | default | meaning |\n|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if name != "facts":  # written by a run
            words = field.description or ""
            rows.append(f"| `{name}` | {kind(field.annotation)} | {default(section, name)} | {words} |")
    return [*rows, ""]


def of_tasks() -> list[str]:
    parts = [
        "## Tasks\n",
        "[tasks.md](tasks.md) has the data format of each, and commands that run. Columns and tokens are the defaults;",
        "a model that reads fewer tokens has its own limit.\n",
        "| task | what | columns read | column answered | tokens | metrics, the headline first |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(tasks.names(), key=list(TASKS).index):
        task = tasks.get(name)
        read = ", ".join(f"`{column}`" for column in task.columns.of_text())
        of_parts = ("_seen", "_unseen")  # TASKS says that they are there
        shown = [metric for metric in task.metric_names if not metric.endswith(of_parts)]
        metrics = ", ".join(sorted(shown, key=lambda metric: metric != task.headline))
        row = [f"`{name}`", TASKS[name], read, f"`{task.columns.label}`", str(task.max_length), metrics]
        parts.append(f"| {' | '.join(row)} |")
    parts.append("")
    owners: dict[type[BaseModel], list[str]] = {}
    for name in sorted(tasks.names(), key=list(TASKS).index):
        if tasks.get(name).options.model_fields:
            owners.setdefault(tasks.get(name).options, []).append(f"`{name}`")
    for options, names in owners.items():
        parts.append(f"### `options` of {', '.join(names)}\n")
        parts.extend(keys(options))
    return parts


def of_methods() -> list[str]:
    parts = [
        "## Methods\n",
        "[methods.md](methods.md) says what each trains and saves, how large it is, and how a budget finds its size.\n",
        "| method | what | section | takes a budget |",
        "|---|---|---|---|",
    ]
    for name in sorted(methods.names(), key=list(METHODS).index):
        method = methods.get(name)
        section = f"`{method.section}`" if method.section else "–"
        parts.append(f"| `{name}` | {METHODS[name]} | {section} | {'yes' if method.takes_budget else 'no'} |")
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
