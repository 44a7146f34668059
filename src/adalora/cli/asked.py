"""What commands on a recipe take: the RECIPE, ``--set``, and a flag for each frequent key."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from ..recipe import Recipe


class _Flag(NamedTuple):
    key: str  # of the recipe
    kind: type
    names: tuple[str, ...]
    what: str


_FLAGS = [
    _Flag("model", str, ("--model",), "Folder or hub name of the model."),
    _Flag("task", str, ("--task",), "What is learned: classification, glue/mrpc, ..."),
    _Flag("method", str, ("--method",), "How: adalora, lora, full, ..."),
    _Flag("budget", str, ("--budget",), "Adapter parameters to end with, or as `rank 8` or `rank 0.25`."),
    _Flag("data.train", str, ("--train",), "Training rows: file, folder or hub name."),
    _Flag("data.eval", str, ("--eval",), "Held-out rows, as --train."),
    _Flag("data.holdout", float, ("--holdout",), "Or: training rows to hold out, or a share, 0.1."),
    _Flag("data.holdout_by", str, ("--holdout-by",), "Column whose equal rows stay together then."),
    _Flag("data.text", str, ("--text",), "Column with the text."),
    _Flag("data.text_pair", str, ("--text-pair",), "Column with the second text."),
    _Flag("data.label", str, ("--label",), "Column with the class or number."),
    _Flag("data.max_length", int, ("--max-length",), "Tokens kept of a row."),
    _Flag("adalora.target_r", float, ("--target-r",), "Average rank at the end, which may be a fraction."),
    _Flag("adalora.init_r", int, ("--init-r",), "Rank at the start."),
    _Flag("training.num_train_epochs", float, ("--epochs",), "Passes over the training rows."),
    _Flag("training.learning_rate", str, ("--lr",), "Highest learning rate, or auto."),
    _Flag("training.per_device_train_batch_size", int, ("--batch-size",), "Rows in a batch."),
    _Flag("output", str, ("--output", "-o"), "Folder of the run."),
    _Flag("seed", int, ("--seed",), "Seed of everything random."),
]
_FIRST: dict[str, Any] = {
    "recipe": Annotated[Path | None, typer.Argument(help="Recipe, a YAML file. Without one: the demo.")],
    "assignments": Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the recipe, such as adalora.tfinal=0.2."),
    ],
}


class Asked(NamedTuple):
    """A recipe as the command line says it."""

    file: Path | None
    values: dict[str, Any]  # by dotted key; of the flags
    assignments: list[str]  # of --set

    def recipe(self, resume: bool = False) -> Recipe:
        """The recipe: a file's, the interrupted run's own, or the demo's, changed by flags and --set."""
        from ..recipe import DEMO_MODEL, validate
        from ..recipe_text import assigned, demo_raw, read_raw, with_values
        from ..runs import RunFolder

        values = {**self.values, **assigned(self.assignments)}
        if self.file is not None:
            base, source = read_raw(self.file), str(self.file)
        elif resume:
            values.setdefault("output", demo_raw()["output"])
            folder = RunFolder(Path(str(values["output"])).expanduser())
            folder.read_recipe()
            base, source = read_raw(folder.recipe), str(folder.recipe)
        elif "data.train" in values:
            base, source = {"model": DEMO_MODEL}, "command line"
        else:
            base, source = demo_raw(), "command line"
        return validate(with_values(base, values), source)


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a command whose first parameter is an :class:`Asked`: it gets RECIPE, --set and all flags."""
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    keyword = inspect.Parameter.KEYWORD_ONLY
    first = [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in _FIRST.items()]
    flags = [
        inspect.Parameter(
            flag.key.replace(".", "_"),
            keyword,
            default=None,
            annotation=Annotated[
                flag.kind | None,
                typer.Option(*flag.names, help=f"{flag.what} ({flag.key})", show_default=False),
            ],
        )
        for flag in _FLAGS
    ]

    def asking(recipe: Path | None, assignments: list[str] | None, **given: Any) -> None:
        found = {flag.key: given.pop(flag.key.replace(".", "_")) for flag in _FLAGS}
        values = {key: value for key, value in found.items() if value is not None}
        if str(values.get("budget", "")).isdecimal():
            values["budget"] = int(values["budget"])
        command(Asked(recipe, values, assignments or []), **given)

    asking.__name__, asking.__doc__, asking.__annotations__ = command.__name__, command.__doc__, {}
    signature = inspect.Signature([*first, *flags, *(parameter.replace(kind=keyword) for parameter in own)])
    asking.__signature__ = signature  # type: ignore[attr-defined]
    return asking
