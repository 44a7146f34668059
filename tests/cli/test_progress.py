"""What a person sees while a run trains: a terminal is a pseudo-terminal here, and what was drawn on it is read."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from adalora.progress import Budget, ShowProgress

METRICS = ("accuracy", "macro_f1", "mcc")
STEPS, WARMUP, FINAL = 40, 10, 30
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def budget_at(step: int) -> int:
    return 216 if step <= WARMUP else max(144, 216 - 4 * (step - WARMUP))


def budget() -> Budget:
    def phase(step: int) -> str:
        return "warm-up" if step <= WARMUP else "pruning" if step <= FINAL else "final"

    return Budget(at=budget_at, phase=phase, live=lambda: 150)


def watch(console: Console, budget: Budget | None) -> None:
    """A training of 40 steps: a log every 5, an evaluation after 20 and at the end."""
    progress: Any = ShowProgress(console, METRICS, "accuracy", budget)
    args, control = SimpleNamespace(), TrainerControl()
    state = TrainerState(max_steps=STEPS, epoch=0.0)
    progress.on_train_begin(args, state, control)
    for step in range(1, STEPS + 1):
        state.global_step, state.epoch = step, step / 20
        progress.on_step_end(args, state, control)
        if step % 5 == 0:
            progress.on_log(args, state, control, logs={"loss": 1 / step})
        if step % 20 == 0:
            figures = {f"eval_{name}": 0.5 + step / 100 for name in METRICS}
            progress.on_evaluate(args, state, control, metrics=figures)
        progress._line.refresh()  # what the clock does ten times a second
    progress.on_train_end(args, state, control)


@contextmanager
def terminal(columns: int) -> Iterator[tuple[Any, list[str]]]:
    """A file that is a terminal of so many columns, and what was written to it, when it is closed."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    drawn: list[str] = []

    def read() -> None:
        data = b""
        try:
            while chunk := os.read(leader, 65536):
                data += chunk
        except OSError:  # the other end is closed
            pass
        drawn.append(data.decode())

    reader = Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w") as file:
        yield file, drawn
    reader.join(10)
    os.close(leader)


def draw(columns: int, budget: Budget | None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every line as it was ever drawn on a terminal of so many columns."""
    monkeypatch.setenv("COLUMNS", str(columns))  # rich asks standard output, which is not the terminal here
    for name in ("NO_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    with terminal(columns) as (file, drawn):
        console = Console(file=file, highlight=False)
        assert console.is_interactive and console.width == columns
        watch(console, budget)
    return [CONTROL.sub("", line).rstrip() for line in re.split(r"[\r\n]+", drawn[0]) if CONTROL.sub("", line).strip()]


def test_a_terminal_has_one_line_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = draw(100, budget(), monkeypatch)
    assert any(re.search(r"━ +5/40  warm-up  budget 216  live 150  loss 0\.200  0:0\d left$", line) for line in lines)
    assert any(
        re.search(r" 25/40  pruning  budget 156  live 150  loss 0\.040  accuracy 0\.700", line) for line in lines
    )
    assert re.search(r" 40/40  final  budget 144  live 150  loss 0\.025  accuracy 0\.900  took 0:0\d$", lines[-1])
    assert "  epoch 1, step 20 of 40: held-out accuracy 0.700, macro_f1 0.700, mcc 0.700" in lines


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_the_line_never_wraps(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for all, step, time left, loss and budget are the last to go."""
    lines = [line for line in draw(columns, budget(), monkeypatch) if "/40" in line]
    assert len(lines) >= STEPS
    assert max(map(len, lines)) < columns
    middle = next(line for line in lines if " 25/40" in f" {line}")
    assert ("live 150" in middle) == (columns >= 60)
    assert ("accuracy 0.700" in middle) == (columns >= 80)
    assert ("budget 156" in middle and "loss 0.040" in middle) or columns < 60
    assert all(re.search(r"\d+/40", line) for line in lines)


def test_a_method_without_a_budget_has_the_same_line_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = draw(80, None, monkeypatch)
    assert re.search(r"40/40  loss 0\.025  accuracy 0\.900  took 0:0\d$", lines[-1])
    assert not any("budget" in line or "live" in line for line in lines)


@pytest.mark.parametrize("term", ["dumb", None])
def test_elsewhere_there_is_a_line_now_and_then(term: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if term is None:
        file, force = io.StringIO(), False
    else:
        monkeypatch.setenv("TERM", term)
        file, force = io.StringIO(), True
    watch(Console(file=file, force_terminal=force, highlight=False, width=110, color_system=None), budget())
    lines = CONTROL.sub("", file.getvalue()).splitlines()
    assert "  epoch 0.5, step 10 of 40: loss 0.100, budget 216, live 150, warm-up" in lines
    assert lines[-2] == "  epoch 2, step 40 of 40: loss 0.025, budget 144, live 150, final"
    assert lines[-1].startswith("  epoch 2, step 40 of 40: held-out accuracy 0.900")
    assert len(lines) == 8 + 2


def test_a_real_run_draws_its_own_budget(adalora: Any, tiny_run: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line, on a terminal of 80 columns, with a method that is not ours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with terminal(80) as (file, drawn):
        monkeypatch.setattr(
            "adalora.report.terminal.console", lambda stderr=False: Console(file=file, highlight=False, width=80)
        )
        logs = ["--set", "training.logging_steps=4", "--set", "training.max_steps=12"]
        done = adalora("train", *tiny_run, *logs, "--method", "lora_pruned")
    assert done.code == 0, done.err
    lines = [CONTROL.sub("", line).strip() for line in re.split(r"[\r\n]+", drawn[0])]
    ends = [line for line in lines if "12/12" in line]
    assert re.search(r"12/12  final  budget 24  live 24  loss \d\.\d+  accuracy \d\.\d+  took", ends[-1]), ends
    assert any(re.match(r"Phases   step 1 +warm-up, all 36 doublets$", line) for line in lines)
    assert Path("run/metrics.json").is_file()
