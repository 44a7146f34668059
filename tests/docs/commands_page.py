"""Builds docs/reference/commands.md from the commands' own help:
``python -m tests.docs.commands_page > docs/reference/commands.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from adalora.cli import app

INTRODUCTION = """# Command line

`adalora --help` and `adalora COMMAND --help` say what stands here. It needs `pip install "adalora[train]"`.
[Errors and exit codes](errors.md) has what a command says when something is wrong.

`adalora --install-completion` completes commands and options in bash, zsh and fish from the next shell on;
`adalora --show-completion` prints the script.
"""

HELP = {"--help", "-h"}


def commands() -> dict[str, Any]:
    """Every command by its name, in the order of the help."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def parse(name: str, arguments: list[str]) -> None:
    """Read a command's arguments as the command line does, and do nothing.

    Raises:
        KeyError: there is no such command.
        click.UsageError: it has no such option, or an argument is missing.
    """
    commands()[name].make_context(name, list(arguments))


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def value_of(parameter: Any) -> str:
    """What stands for a parameter's value: nothing for a switch."""
    if getattr(parameter, "is_flag", False):
        return ""
    return str(parameter.metavar or max(parameter.opts, key=len).lstrip("-").upper().replace("-", "_"))


def rows(parameters: list[Any]) -> Iterator[str]:
    for parameter in parameters:
        is_argument = parameter.param_type_name == "argument"
        names = "" if is_argument else ", ".join([*parameter.opts, *parameter.secondary_opts])
        default, told = parameter.default, getattr(parameter, "show_default", True)
        plain = isinstance(default, (int, float, str)) and not isinstance(default, bool)
        known = f" Default: `{default}`." if plain and told else ""
        yield f"| `{f'{names} {value_of(parameter)}'.strip()}` | {cell(parameter.help or '')}{known} |"


def usage_of(argument: Any) -> str:
    shown = value_of(argument) + (" ..." if argument.nargs == -1 else "")
    return shown if argument.required else f"[{shown}]"


def of_command(name: str, command: Any) -> Iterator[str]:
    paragraphs = [" ".join(part.split()) for part in command.help.replace("\b", "").split("\n\n")]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not HELP & set(one.opts)]
    yield f"## adalora {name}\n"
    yield f"`{' '.join(['adalora', name, *map(usage_of, arguments), '[OPTIONS]'])}`\n"
    yield "\n\n".join(paragraphs) + "\n"
    yield "| | |\n|---|---|"
    yield from rows([*arguments, *options])
    yield ""
    examples = [line for line in (command.epilog or "").splitlines() if line.startswith("adalora ")]
    if examples:
        yield "<!-- not run: the files and runs that are named here are the reader's -->\n```bash"
        yield "\n".join(examples)
        yield "```\n"


def page() -> str:
    found = commands()
    parts = [INTRODUCTION, "| command | |\n|---|---|"]
    for name, command in found.items():
        parts.append(f"| [`{name}`](#adalora-{name}) | {cell(command.help.strip().split(chr(10) * 2)[0])} |")
    parts.append("")
    for name, command in found.items():
        parts.extend(of_command(name, command))
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
