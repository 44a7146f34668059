"""The house stays as it was drawn: which room may know which, what is public, how it fails."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adalora
from adalora.core.errors import AdaLoraError

SOURCE = Path(adalora.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# A room may import from rooms to its left, and from its neighbours: core <- hf <- WORKSHOPS <- DOORS. PLAIN ones know
# neither PEFT nor the allocator and serve workshops and doors. Every room may use adalora.core.errors.
PLAIN = {
    *("tasks", "report", "recipe", "recipe_text", "data", "facts", "files", "pretrained", "progress", "quiet", "runs"),
    *("checkpoints", "processes"),
}
WORKSHOPS = {
    "announcement",
    "directions",
    "inference",
    "inspection",
    "methods",
    "monitoring",
    "preparation",
    "reading",
    "reporters",
    "scanning",
    "serving",
    "trainer",
    "training",
    "tuning",
}
DOORS = {"bench", "cli", "__main__"}
ARROWS: dict[str, set[str]] = {
    "core": set(),
    "hf": {"core"},
    **dict.fromkeys(PLAIN, PLAIN),
    **dict.fromkeys(WORKSHOPS, {"core", "hf"} | PLAIN | WORKSHOPS),
    **dict.fromkeys(DOORS, {"core", "hf"} | PLAIN | WORKSHOPS | DOORS),
    "__init__": {"core", "hf"},
}
KNOW_PEFT = {"hf", "methods", "serving"}  # methods compare with PEFT's own, serving loads what anyone can


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a file imports, wherever in the file."""
    package = ["adalora", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_what_only_unix_has_is_imported_with_care(path: Path) -> None:
    """At the top of a module such an import ends every command that needs the module on other systems."""
    unix = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"}
    plain = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in plain for alias in node.names}
    assert not unix & (names | {node.module for node in plain if isinstance(node, ast.ImportFrom)})


def complaints(path: Path) -> list[str]:
    """Every arrow of this file that runs back."""
    room, found = room_of(path), []
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "adalora":
            target = parts[1] if len(parts) > 1 else "__init__"
            if parts[1:3] in (["core", "errors"], ["__version__"]) or target == room:
                continue
            is_room = target in ARROWS and target != "__init__"
            # else it is a public name, straight from adalora: for rooms that may know what lies behind it
            allowed = target in ARROWS[room] if is_room else "hf" in ARROWS[room] and room != "__init__"
            if not allowed:
                found.append(f"{path.relative_to(SOURCE)}:{line}: {room} imports {name}")
        elif room == "core" and parts[0] != "torch" and parts[0] not in sys.stdlib_module_names:
            found.append(f"{path.relative_to(SOURCE)}:{line}: core imports {name}, which is neither torch nor stdlib")
        elif parts[0] == "peft" and room not in KNOW_PEFT:
            found.append(f"{path.relative_to(SOURCE)}:{line}: {room} imports {name}; {sorted(KNOW_PEFT)} alone may")
    return found


def test_every_file_is_in_a_room() -> None:
    """A new room needs a place in the table above, so that its arrows are drawn on purpose."""
    assert {room_of(path) for path in FILES} <= set(ARROWS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_arrow_runs_back(path: Path) -> None:
    assert complaints(path) == []


@pytest.mark.parametrize(
    ("room", "line", "fine"),
    [
        ("core", "from ..hf import layers", False),
        ("core", "import adalora.hf.layers", False),
        ("core", "import numpy", False),
        ("core", "import torch.nn.functional as F", True),
        ("core", "from . import orthogonality", True),
        ("core", "from .errors import ConfigError", True),
        ("hf", "def f():\n    from ..training import run", False),
        ("hf", "from adalora.core.allocator import Allocator", True),
        ("tasks", "from adalora.core.errors import AdaLoraError", True),
        ("tasks", "from adalora.core.allocator import Allocator", False),
        ("tasks", "from adalora import Allocator", False),
        ("report", "import peft.tuners", False),
        ("methods", "from adalora.bench import grid", False),
        ("cli", "from adalora.bench import grid", True),
    ],
)
def test_the_walk_sees_arrows(
    room: str, line: str, fine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above can fail: relative, absolute and late imports are all read."""
    file = tmp_path / room / "example.py"
    file.parent.mkdir()
    file.write_text(line)
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    assert (complaints(file) == []) == fine


# ------------------------------------------------------------------------------------------------ the surface

PUBLIC = [
    "AdaLoraCallback",
    "AdaLoraConfig",
    "AdaLoraError",
    "Allocator",
    "ConfigError",
    "ScheduleError",
    "StateError",
    "allocator",
    "compact",
    "convert",
    "export_lora",
    "get_peft_model",
    "last_checkpoint",
    "load_state",
    "ranks",
    "save_state",
    "start",
    "upgrade",
]


def test_the_public_names_are_these() -> None:
    """Adding or removing a public name is a decision: it is made here, too."""
    assert sorted(adalora.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(adalora))
    ours = {
        name
        for name, value in vars(adalora).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("adalora")
    }
    assert ours <= set(PUBLIC)
    with pytest.raises(AttributeError, match=r"adalora.*'no_such_name'"):
        adalora.no_such_name  # noqa: B018


def test_what_is_not_used_is_not_imported() -> None:
    """``import adalora`` costs nothing, and the method needs torch alone."""
    program = """
import sys, adalora
assert not {"torch", "peft", "transformers"} & set(sys.modules), "adalora"
import adalora.core.allocator, adalora.core.errors
assert not {"peft", "transformers", "datasets"} & set(sys.modules), "core"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name: str) -> None:
    """A docstring of its own, not one inherited or generated."""
    value = getattr(adalora, name)
    text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert text and text.strip() and not text.startswith(f"{name}(")


# ------------------------------------------------------------------------------------------------ errors


def error_classes() -> list[tuple[str, str]]:
    """(module, class) of every exception that the package defines."""
    found = []
    for path in FILES:
        parts = ["adalora", *path.relative_to(SOURCE).with_suffix("").parts]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                if any(name.endswith(("Error", "Exception")) for name in (node.name, *bases)):
                    found.append((".".join(p for p in parts if p != "__init__"), node.name))
    return found


@pytest.mark.parametrize(("module", "name"), error_classes())
def test_there_is_one_error_tree(module: str, name: str) -> None:
    """``except AdaLoraError`` catches whatever this library raises on purpose."""
    assert issubclass(getattr(importlib.import_module(module), name), AdaLoraError)


def test_errors_can_be_caught_as_what_they_are() -> None:
    assert issubclass(adalora.ConfigError, ValueError) and issubclass(adalora.StateError, RuntimeError)
    assert issubclass(adalora.ScheduleError, adalora.ConfigError)


@pytest.mark.parametrize("room", ["core", "hf"])
def test_the_method_raises_its_own_errors_alone(room: str) -> None:
    """Every ``raise X(...)`` names a class of the tree."""
    tree = {name for _, name in error_classes()}
    foreign = [
        f"{path.name}:{node.lineno}: {ast.unparse(node.exc.func)}"
        for path in (SOURCE / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        if ast.unparse(node.exc.func).split(".")[-1] not in tree
    ]
    assert foreign == []


def test_the_core_trains_where_only_torch_is_installed() -> None:
    """Decision 004: no other package can be imported here, and a whole schedule runs."""
    script = """
import sys
sys.modules.update(dict.fromkeys(["peft", "transformers", "accelerate", "safetensors", "datasets", "pydantic"]))
import torch
from adalora.core.allocator import Allocator
from adalora.core.settings import Settings
from adalora.core.triplets import Triplets

matrices = [Triplets.create(f"m{k}", 8, 6, 3) for k in range(4)]
allocator = Allocator(matrices, Settings(target_rank=1, total_step=30, t_init=2, t_final=5, delta_t=1))
optimizer = torch.optim.AdamW([w for t in matrices for w in t.parameters], lr=1e-2)
for step in range(30):
    x = torch.randn(16, 6)
    sum((t.forward(x) - (k + 1) * x[:, :1]).square().mean() for k, t in enumerate(matrices)).backward()
    allocator.before_step()
    optimizer.step()
    allocator.after_step(optimizer)
    optimizer.zero_grad()
assert allocator.live == 4 == sum(t.rank for t in matrices)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
