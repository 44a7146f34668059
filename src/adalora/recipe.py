"""A validated recipe: everything that one training run depends on, in one YAML file.

Field names are those of PEFT (section ``adalora``) and Transformers (section ``training``). A key that is not
a field is an error that names the nearest one; nothing is ever ignored. Recipes of trainers that have AdaLoRA as a
training type (``train_type: adalora``) are read too.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from .core.errors import AdaLoraError
from .facts import Facts

_M = TypeVar("_M", bound=BaseModel)

DEMO_MODEL = "demo:minilm"
DEMO_LANGUAGE_MODEL = "demo:smollm2"
DEMO_REVIEWS = "demo:rotten_tomatoes"


class RecipeError(AdaLoraError):
    """A recipe that cannot be run: what was given, what was expected, what to do."""


def _check_steps(value: object) -> object:
    """Let through what may be a length of training, for the schedule to judge; anything else gets one message."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        return value
    raise ValueError('should be a number of steps (200), a fraction of all steps (0.1) or epochs ("2 epochs")')


def _check_fraction_or_count(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("should be a whole number of steps, or a fraction of all steps below 1")
    return value


def _check_rate(value: object) -> object:
    """One message for what is neither of the two."""
    try:
        rate = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        rate = math.nan
    if value != "auto" and not 0 < rate < math.inf:
        raise ValueError("should be a number above 0, or auto: searched for before training")
    return value if value == "auto" else rate


def _as_list(value: object) -> object:
    """One name may stand without brackets."""
    return [value] if isinstance(value, str) else value


def _check_share_or_count(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("should be a whole number of rows, or a share of all rows below 1")
    return int(value) if value >= 1 else value


def _whole_if_it_is(rank: float) -> float:
    return int(rank) if rank == int(rank) else rank


Rank = Annotated[int | float, Field(gt=0), AfterValidator(_whole_if_it_is)]
"""An average rank, which may be a fraction."""

Steps = Annotated[int | float | str, BeforeValidator(_check_steps)]
"""Steps (int), a fraction of all steps (float below 1), or ``"2 epochs"``."""

Interval = Annotated[float, Field(ge=0), AfterValidator(_check_fraction_or_count)]
"""Steps (1 or more), or a fraction of all steps (below 1)."""

Rate = Annotated[float | Literal["auto"], BeforeValidator(_check_rate)]
"""A number above 0, or ``auto``."""

Rows = Annotated[float, Field(gt=0), AfterValidator(_check_share_or_count)]
"""Rows (1 or more), or a share of all rows (below 1)."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class DataSection(_Section):
    """Where the rows come from and which columns matter."""

    train: str = Field(
        description="Training rows: a CSV, TSV, JSON lines, Parquet or CoNLL file, a folder saved with save_to_disk or "
        "laid out as on the hub, the name of a data set on the hub, or "
        f"{DEMO_REVIEWS}. `${{VARIABLES}}` of the environment are filled in."
    )
    eval: str | None = Field(None, description="Held-out rows, as `train`. Default: another split of `train`.")
    holdout: Rows | None = Field(
        None,
        description="Instead of `eval`: hold so many of the training rows out, or such a share of them (0.1). The same "
        "rows for every seed; classes in proportion; rows that the model could not tell apart stay together.",
    )
    holdout_by: Annotated[list[str] | None, BeforeValidator(_as_list)] = Field(
        None,
        description="With `holdout`: instead, rows that share a value in one of these columns (a document, a premise, "
        "a user) stay together.",
    )
    config: str | None = Field(
        None, description="Configuration of a hub data set (sst2 of glue), or a folder inside a local one."
    )
    train_split: str = Field("train", description="Split to train on, where the source has splits.")
    eval_split: str = Field("validation", description="Split to evaluate on, where the source has splits.")
    more_eval_splits: list[str] = Field([], description="Further splits to measure when training is done.")
    text: str | None = Field(None, description="Column that the model reads. Default: the task's.")
    text_pair: str | None = Field(
        None, description="Second column that it reads, for tasks on pairs. Default: the task's."
    )
    label: str | None = Field(None, description="Column that it should answer. Default: the task's.")
    label_names: list[str] | None = Field(None, description="The classes, in the order of the model's outputs.")
    max_length: int | None = Field(None, ge=4, description="Tokens kept of each row. Default: the task's.")
    max_train_rows: int | None = Field(None, ge=1, description="Train on a fixed random sample of so many rows.")
    max_eval_rows: int | None = Field(None, ge=1, description="Evaluate on a fixed random sample of so many rows.")

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        if self.holdout is None and self.holdout_by is not None:
            raise ValueError("holdout_by says what stays together when rows are held out: give holdout, too")
        if self.holdout is not None and (self.eval is not None or self.eval_split != "validation"):
            given = "eval" if self.eval is not None else "eval_split"
            raise ValueError(f"holdout takes the held-out rows from the training rows: give it or {given}, not both")
        if self.holdout_by is not None and not self.holdout_by:
            raise ValueError("holdout_by names no column: leave it out, or name one")
        return self


class AdaLoraSection(_Section):
    """The method: the fields of ``adalora.AdaLoraConfig``, which checks their meaning."""

    target_r: Rank = Field(
        4, description="Average rank of a matrix at the end of training; 0.25: every fourth has one."
    )
    init_r: int | None = Field(
        None, ge=1, description="Rank of every matrix at the start. Default: 1.5 x target_r, rounded up."
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="The update's scale is alpha / init_r. Default: 2 x init_r."
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field("all-linear", description="Modules to adapt, as in PEFT.")
    exclude_modules: str | list[str] | None = Field(None, description="Modules to leave alone, as in PEFT.")
    modules_to_save: list[str] | None = Field(None, description="Further modules to train in full, as in PEFT.")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(init_r) instead.")
    tinit: Steps = Field(0.1, description="Length of the start, at full budget.")
    tfinal: Steps = Field(0.3, description="Length of the end, at the target budget with ranks fixed.")
    deltaT: Steps = Field(0.01, description="Time between two allocations.")  # noqa: N815 (PEFT's name)
    beta1: float = Field(0.85, ge=0, lt=1, description="Smoothing of the sensitivity.")
    beta2: float = Field(0.85, ge=0, lt=1, description="Smoothing of the uncertainty.")
    orth_reg_weight: float = Field(0.1, ge=0, description="Weight of the orthogonality penalty.")
    orthogonality: str = Field("squared", description="Form of the penalty: squared or frobenius.")
    importance: str = Field("sensitivity_uncertainty", description="Which importance metric ranks the triplets.")
    policy: str = Field("global_topk", description="How the budget is divided among matrices.")
    budget_unit: Literal["triplets", "parameters"] = Field(
        "triplets",
        description="What the budget counts. In parameters, the target is what LoRA of rank target_r has, and what is "
        "saved is never more. The recipe's own `budget` sets both.",
    )
    rank_by: Literal["score", "score_per_parameter"] = Field(
        "score", description="What triplets are ranked by: their score, or that over their number of parameters."
    )
    schedule: str = Field("cubic", description="How the budget falls: cubic, linear or constant.")
    initialization: str = Field(
        "orthonormal",
        description="P and Q at the start: orthonormal, gaussian, or gradient (the largest singular triplets of the "
        "loss's gradient on a few training batches).",
    )
    start_batches: int = Field(8, ge=1, description="Training batches that the gradient start looks at.")
    start_sweeps: int = Field(4, ge=2, multiple_of=2, description="How often it goes through them; even.")
    singular_gain: float | Literal["auto"] = Field(
        "auto", description="Gain on the singular values; 1.0 is the paper's."
    )
    vector_norm: float = Field(1.0, gt=0, description="Length of the vectors in P and Q: shorter ones turn faster.")
    sensitivity_at: str = Field("before_step", description="Weights that the sensitivity is taken at.")
    compact: bool = Field(True, description="Slice pruned triplets away in memory when the final phase begins.")
    kernel: Literal["fused", "reference"] = Field(
        "fused", description="How linear layers compute their update: in few passes, or term by term as PEFT does."
    )

    @model_validator(mode="after")
    def _fill_in(self) -> AdaLoraSection:
        if self.init_r is None:
            self.init_r = math.ceil(round(1.5 * self.target_r, 6))
        if self.lora_alpha is None:
            self.lora_alpha = 2.0 * self.init_r
        return self


class LoraSection(_Section):
    """Fixed ranks: the methods lora, rslora, dora, pissa and eva, with the fields of ``peft.LoraConfig``."""

    r: int = Field(4, ge=1, description="Rank of every matrix.")
    lora_alpha: float | None = Field(
        None, gt=0, description="The update's scale is alpha / r (rslora: alpha / sqrt(r)). Default: 2 x r."
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field("all-linear", description="Modules to adapt, as in PEFT.")
    exclude_modules: str | list[str] | None = Field(None, description="Modules to leave alone, as in PEFT.")
    modules_to_save: list[str] | None = Field(None, description="Further modules to train in full, as in PEFT.")

    @model_validator(mode="after")
    def _fill_in(self) -> LoraSection:
        if self.lora_alpha is None:
            self.lora_alpha = 2.0 * self.r
        return self


class BottleneckSection(_Section):
    """Bottleneck adapters: the methods houlsby and pfeiffer."""

    width: int = Field(16, ge=1, description="Hidden units of an adapter.")
    activation: str = Field("gelu", description="Between its two layers: a name that Transformers knows.")


class TrainingSection(_Section):
    """The optimisation: fields of ``transformers.TrainingArguments``."""

    num_train_epochs: float = Field(2.0, gt=0, description="Passes over the training rows.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps; when above 0, replaces num_train_epochs.")
    learning_rate: Rate = Field(
        1e-3,
        description="Highest learning rate; auto: found by a short search on a part of the training rows and steps.",
    )
    lr_scheduler_type: str = Field(
        "linear",
        description="How the learning rate changes, by a name in Transformers that needs no settings of its own: "
        "linear, cosine, constant_with_warmup, ...",
    )
    warmup_steps: Interval = Field(0.06, description="Steps, or fraction of all steps, of rising learning rate.")
    optim: str = Field("adamw_torch", description="Optimizer, by its name in Transformers.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient to this norm; 0: never.")
    per_device_train_batch_size: int = Field(32, ge=1, description="Rows in a training batch.")
    per_device_eval_batch_size: int = Field(64, ge=1, description="Rows in an evaluation batch.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Batches in an optimizer step.")
    gradient_checkpointing: bool = Field(False, description="Less memory for more time.")
    bf16: bool = Field(False, description="Mixed precision with bfloat16.")
    fp16: bool = Field(False, description="Mixed precision with float16.")
    group_by_length: bool = Field(True, description="Batches of rows of like length: less padding, faster.")
    eval_strategy: Literal["no", "steps", "epoch"] = Field("epoch", description="When to evaluate on the way.")
    eval_steps: Interval | None = Field(None, description="With eval_strategy steps: how often.")
    eval_rows: int | None = Field(
        None,
        ge=1,
        description="Evaluations on the way are on so many of the held-out rows, always the same ones; the last is on "
        "all.",
    )
    logging_steps: int = Field(10, ge=1, description="Steps between two values of the training loss.")
    report_to: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        [],
        description="Where metrics and ranks are reported to, by names that Transformers knows: tensorboard (its "
        "files lie in the run's folder), wandb, trackio, mlflow, ...",
    )
    save_steps: Interval = Field(0.1, gt=0, description="Steps, or fraction of all steps, between two checkpoints.")
    save_total_limit: int = Field(2, ge=2, description="Checkpoints to keep; resuming needs two.")

    @model_validator(mode="after")
    def _check(self) -> TrainingSection:
        if self.max_steps == 0:
            raise ValueError("max_steps should be 1 or more, or -1 to go by num_train_epochs (given: 0)")
        if self.eval_strategy == "steps" and not self.eval_steps:
            raise ValueError("eval_strategy is steps, so eval_steps must say how often")
        return self


class Recipe(_Section):
    """One training run."""

    model: str = Field(
        description=f"Model to adapt: a folder, a GGUF file, a name on the hub, {DEMO_MODEL} or {DEMO_LANGUAGE_MODEL}."
    )
    task: str = Field("classification", description="What is learned: see Tasks below.")
    method: str = Field("adalora", description="How it is learned: see Methods below.")
    budget: int | str | None = Field(
        None,
        description="Parameters of the adapter as saved, from which the method finds its rank or width; `rank 8`: "
        "as many as LoRA of rank 8 has on the same matrices. A rank may be a fraction. The method adalora takes it as "
        "it is, in parameters; others come as near as they can.",
    )
    output: str = Field("runs/adalora", description="Folder of the run.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of everything random.")
    data: DataSection = Field(description="The rows.")
    options: dict[str, Any] = Field({}, description="Settings of the task that others do not have.")
    adalora: AdaLoraSection = Field(AdaLoraSection.model_validate({}), description="AdaLoRA and its variants.")
    lora: LoraSection = Field(LoraSection.model_validate({}), description="LoRA and its variants.")
    bottleneck: BottleneckSection = Field(BottleneckSection.model_validate({}), description="Bottleneck adapters.")
    training: TrainingSection = Field(TrainingSection.model_validate({}), description="The optimisation.")
    facts: Facts | None = Field(None, description="Filled in by the run.")


METHOD_SECTIONS = ("adalora", "lora", "bottleneck")
_SECTIONS = ("data", *METHOD_SECTIONS, "training")

TRAIN_TYPE = "adalora"
TRAIN_TYPE_KEYS: dict[str, int | float] = {
    "adalora_target_r": 8,
    "adalora_init_r": 12,
    "adalora_tinit": 0,
    "adalora_tfinal": 0,
    "adalora_deltaT": 1,
    "adalora_beta1": 0.85,
    "adalora_beta2": 0.85,
    "adalora_orth_reg_weight": 0.5,
}
"""Top-level keys of trainers that choose AdaLoRA by ``train_type: adalora``, and what they default to there."""


def in_sections(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A copy of ``raw`` whose keys of ``TRAIN_TYPE_KEYS`` are where ours are; those left out get their defaults.

    Raises:
        RecipeError: another training type, or one value in both spellings.
    """
    result = dict(raw)
    flat = {_field(key): result.pop(key) for key in TRAIN_TYPE_KEYS if key in raw}
    if "train_type" not in raw and not flat:
        return result
    if result.pop("train_type", TRAIN_TYPE) != TRAIN_TYPE:
        raise RecipeError(
            f"{source}: train_type should be {TRAIN_TYPE}, the one method here (given: {_short(raw['train_type'])})"
        )
    section = result.get("adalora")
    if section is not None and not isinstance(section, Mapping):
        return result  # validation says what a section is
    section = section or {}
    for name in flat:
        if name in section:
            raise RecipeError(f"{source}: adalora.{name} is the same as adalora_{name}: give one of the two")
    defaults = {_field(key): value for key, value in TRAIN_TYPE_KEYS.items()}
    result["adalora"] = {**defaults, **section, **flat}
    return result


def _field(key: str) -> str:
    return key.removeprefix("adalora_")


# --- from and to plain values ------------------------------------------------------------------------


def validate(raw: Mapping[str, Any], source: str) -> Recipe:
    """The recipe that ``raw`` describes; RecipeError with one line for each fault."""
    return validated(Recipe, in_sections(raw, source), source)


def validated(kind: type[_M], raw: Any, source: str, prefix: str = "") -> _M:
    """``raw`` as a ``kind``; RecipeError with one line for each fault, whose keys start with ``prefix``."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        faults = [_explain(detail, kind, prefix) for detail in error.errors()]
    if len(faults) == 1:
        raise RecipeError(f"{source}: {faults[0]}")
    raise RecipeError("\n  ".join([f"{source} has {len(faults)} faults:", *faults]))


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that ``recipe_text.read_raw`` and ``validate`` turn back into an equal one. Sections of
    methods that were not given are left out: the recipe's own method may have no use for them."""
    absent = {section for section in METHOD_SECTIONS if section not in recipe.model_fields_set}
    values = recipe.model_dump(exclude_none=True, exclude=absent)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Puts texts in quotes that YAML 1.1 or ``recipe_text`` would take for something else."""


POWER_OF_TEN = ("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
"""How YAML 1.2 has numbers such as 1e-3, which are words in 1.1: the arguments of ``add_implicit_resolver``."""
_Dumper.add_implicit_resolver(*POWER_OF_TEN)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if "\x85" in text else None  # a line break that PyYAML loses in its other styles
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def differences(before: Recipe, after: Recipe, ignore: Iterable[str] = ()) -> list[str]:
    """The dotted keys whose values differ, each with both values, apart from those in ``ignore``."""
    old, new = dict(flat(before.model_dump())), dict(flat(after.model_dump()))
    ignored = tuple(f"{key}." for key in ignore)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key) and not f"{key}.".startswith(ignored)]
    return [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested sections, each with its value."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- faults in words --------------------------------------------------------------------------------


def _explain(detail: ErrorDetails, kind: type[BaseModel], prefix: str) -> str:
    """One fault that pydantic found in a ``kind``, in a sentence that starts with the dotted key."""
    keys = [str(part) for part in detail["loc"]]
    if detail["type"] == "extra_forbidden":
        return _unknown_key(keys, kind, prefix)
    where = prefix + ".".join(key for key in keys if not _is_union_branch(key))
    if detail["type"] == "missing":
        return f"{where} is missing"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if detail["type"] == "model_type":
        message = "should be a section with keys of its own"
    whole_section = detail["type"] == "value_error" and isinstance(detail["input"], Mapping)
    given = "" if "(given" in message or whole_section else f" (given: {_short(detail['input'])})"
    return f"{where}: {message}{given}" if where else message + given


def _is_union_branch(key: str) -> bool:
    """Pydantic adds the member of a union that it tried, such as ``list[str]``, to the place of a fault."""
    return key in {"str", "int", "float", "bool"} or bool(re.match(r"(list|literal|constrained|function)[-\[]", key))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_key(keys: list[str], kind: type[BaseModel], prefix: str) -> str:
    """Name the nearest key of the same section, or the section where the key does belong."""
    *parents, key = keys
    section = _section(kind, parents)
    is_recipe = kind is Recipe
    known = [*section.model_fields, *(TRAIN_TYPE_KEYS if is_recipe and not parents else [])]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    homes = [name for name in _SECTIONS if is_recipe and key in _section(kind, [name]).model_fields]
    if homes:
        advice = f"it belongs in the section {' or '.join(f'`{name}`' for name in homes)}"
    elif near:
        advice = f"did you mean `{prefix}{'.'.join([*parents, near[0]])}`?"
    elif is_recipe and key in Recipe.model_fields:
        advice = f"`{key}` belongs at the top"
    else:
        advice = (
            f"known keys are {', '.join(section.model_fields)}" if section.model_fields else "there are no keys here"
        )
    return f"unknown key `{prefix}{'.'.join(keys)}`: {advice}"


def _section(kind: type[BaseModel], keys: list[str]) -> type[BaseModel]:
    for key in keys:
        annotation = kind.model_fields[key].annotation
        candidates = [annotation, *get_args(annotation)]
        kind = next(found for found in candidates if isinstance(found, type) and issubclass(found, BaseModel))
    return kind
