"""What commands say: nothing of other libraries, nothing wider than the terminal, and what a run will do."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adalora.announcement import Phase, phases
from adalora.core.schedule import Schedule
from adalora.report.terminal import clock, duration, print_lines

from .conftest import Finished

Run = Callable[..., Finished]

COMMANDS = """
plan --set model=MODEL --set data.train=TRAIN --set data.eval=EVAL
train --model MODEL --train TRAIN --eval EVAL --target-r 2 --batch-size 8 -o run --set training.max_steps=8
train --resume -o run
train --model MODEL --train TRAIN --eval EVAL --method lora -o lora --set training.max_steps=2 --json
evaluate run
predict run --text great --json
export run plain
export run merged --format merged
export run padded --max-rank-pad
convert OLD converted
"""
FOREIGN = re.compile(r"warn|deprecat|%\||it/s\]|{'loss'|LOAD REPORT|https?://|huggingface|\x1b", re.IGNORECASE)
EACH = """
import shlex, sys
from adalora.cli import main

for line in sys.stdin.read().strip().splitlines():
    for stream in (sys.stdout, sys.stderr):
        print("$", line, file=stream, flush=True)
    sys.argv = ["adalora", *shlex.split(line)]
    try:
        main()
    except SystemExit as finish:
        print("exit code", finish.code, flush=True)
"""


@pytest.fixture
def peft_checkpoint(tmp_path: Path, tiny_model: Path) -> Path:
    """What PEFT's own AdaLoRA saves."""
    from peft import AdaLoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(str(tiny_model))
    config = AdaLoraConfig(target_modules=["query", "value"], init_r=4, target_r=2, total_step=10, tinit=2, tfinal=2)
    get_peft_model(base, config).save_pretrained(str(tmp_path / "old"))
    return tmp_path / "old"


def test_nothing_of_other_libraries_is_said(
    tiny_model: Path, files: Path, peft_checkpoint: Path, tmp_path: Path
) -> None:
    """The commands in one process of their own; all that is written to stdout and stderr is caught as a shell would."""
    places = {"MODEL": tiny_model, "TRAIN": files / "train.csv", "EVAL": files / "test.csv", "OLD": peft_checkpoint}
    commands = COMMANDS
    for name, place in places.items():
        commands = commands.replace(name, shlex.quote(str(place)))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHONWARN")}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        input=commands, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
    )  # fmt: skip
    said, complaints = by_command(done.stdout), by_command(done.stderr)
    assert [words.splitlines()[-1] for words in said.values()] == ["exit code 0"] * 10, done.stderr
    for command, words in complaints.items():
        if "--json" in command and command.startswith("train"):
            assert json.loads(said[command].splitlines()[0])["method"] == "lora"
            assert words.startswith("reading data and model ...") and "Result   a plain LoRA adapter in lora" in words
            said[command] = words
        else:
            assert words == "", command
    for command, words in said.items():
        assert not FOREIGN.search(words), command


def by_command(text: str) -> dict[str, str]:
    """What was said after each line ``$ COMMAND``."""
    blocks = text.split("$ ")[1:]
    return {block.splitlines()[0]: block.partition("\n")[2] for block in blocks}


# ------------------------------------------------------------------------------------------------ before training


def test_a_plan_says_what_will_happen_in_a_narrow_terminal(
    adalora: Run, tiny_run: list[object], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert adalora("train", *tiny_run, "--set", "training.max_steps=12").code == 0
    said = io.StringIO()
    narrow = Console(file=said, width=60, highlight=False)
    monkeypatch.setattr("adalora.report.terminal.console", lambda stderr=False: narrow)
    done = adalora("plan", "run/recipe.yaml", "--set", "training.max_steps=-1", "--set", "output=elsewhere")
    assert done.code == 0, done.err
    assert not Path("elsewhere").exists()
    lines = said.getvalue().splitlines()
    assert max(len(line) for line in lines if str(tiny_model.parent.parent) not in line) <= 60
    assert all(line == line.rstrip() for line in lines)
    text = " ".join(said.getvalue().split())
    for words in (
        "Method adalora on 12 matrices, rank 3 each at first, 2 on average at the end",
        "parameters at first, ",
        "Steps 36 of 8 rows each, learning rate 0.02, seed 0",
        "Phases steps 1-4 warm-up, all 36 triplets steps 5-25 pruning to 24 triplets, every step",
        "steps 26-36 final, 24 triplets, ranks fixed",
        "Result a plain LoRA adapter in elsewhere, 11 kB to 13 kB",
    ):
        assert words in text


def test_a_plan_for_machines(adalora: Run, tiny_run: list[object], finished: Path) -> None:
    """What was planned is what came of it."""
    done = adalora("plan", finished / "recipe.yaml", "--set", "output=elsewhere", "--json")
    facts = json.loads(done.out)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert facts["parameters"]["adapter_start"] == metrics["parameters"]["adapter_start"]
    sizes, saved = facts["parameters"], metrics["parameters"]["adapter_saved"]
    assert sizes["adapter_end"] == pytest.approx(saved, rel=0.2)
    assert sizes["adapter_end_least"] <= saved <= sizes["adapter_end_most"] < 1.5 * saved
    written = metrics["saved_bytes"]["adapter_model.safetensors"]
    assert 0.97 * facts["result_bytes_least"] <= written <= 1.03 * facts["result_bytes_most"]  # names take some
    whole = {"initial": metrics["initial_triplets"], "target": metrics["live_triplets"]}
    assert facts["budget"] == {**whole, "unit": "triplets"} and facts["warning"] is None
    assert facts["steps"] == facts["phases"][-1]["last"] == metrics["steps"]
    assert [phase["name"] for phase in facts["phases"]] == ["warm-up", "pruning", "final"]


@pytest.mark.parametrize(
    ("schedule", "after", "expected"),
    [
        ((216, 144, 500, 50, 150, 1), 0, [("warm-up", 1, 50, 216, 216), ("pruning", 51, 350, 216, 144)]),
        ((216, 144, 500, 50, 150, 1), 60, [("pruning", 61, 350, None, 144), ("final", 351, 500, 144, 144)]),
        ((216, 144, 500, 0, 0, 1), 0, [("pruning", 1, 500, 216, 144)]),
        ((144, 144, 500, 50, 150, 1), 0, [("fixed", 1, 500, 144, 144)]),
        ((216, 144, 500, 50, 150, 1), 500, []),
    ],
)
def test_phases_cover_the_steps_that_are_left(
    schedule: tuple[int, ...], after: int, expected: list[tuple[Any, ...]]
) -> None:
    plan = Schedule(*schedule)
    found = phases(plan, after)
    steps = [step for phase in found for step in range(phase.first, phase.last + 1)]
    assert steps == list(range(after + 1, plan.total_step + 1))
    for phase, wanted in zip(found, expected, strict=False):
        before = plan.budget(after) if wanted[3] is None else wanted[3]
        assert phase == Phase(*wanted[:3], before, wanted[4])
        assert phase.before == plan.budget(phase.first - 1) and phase.after == plan.budget(phase.last)
    assert bool(found) == bool(expected)


def test_times_and_facts_for_people() -> None:
    assert [clock(seconds) for seconds in (0.4, 7, 750, 10800)] == ["0:00", "0:07", "12:30", "3:00:00"]
    in_words = {0.4: "0 s", 45: "45 s", 59.6: "1 min", 750: "12 min 30 s", 12007: "3 h 20 min"}
    assert {seconds: duration(seconds) for seconds in in_words} == in_words
    out = io.StringIO()
    print_lines(Console(file=out, width=30), {"Name": "one two three four five six seven", "Longer": "a\nb"})
    styled = io.StringIO()
    print_lines(Console(file=styled, force_terminal=True, color_system="truecolor", width=30), {"Name": "one"})
    assert styled.getvalue() == "\x1b[1mName  \x1b[0mone\n\n"
    assert out.getvalue() == "Name    one two three four\n        five six seven\nLonger  a\n        b\n\n"


# --------------------------------------------------------------------------------------- training.report_to


def test_a_run_reports_to_tensorboard_in_its_folder(adalora: Run, tiny_run: list[object]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    short = [
        "--set",
        "training.max_steps=12",
        "--set",
        "training.eval_strategy=no",
        "--set",
        "training.logging_steps=2",
    ]
    done = adalora("train", *tiny_run, *short, "--set", "training.report_to=tensorboard", "--method", "lora_pruned")
    assert done.code == 0, done.err
    events = accumulator.EventAccumulator("run/tensorboard")
    events.Reload()
    metrics = json.loads(Path("run/metrics.json").read_text())
    (accuracy,) = events.Scalars("eval/accuracy")  # at the end, before the writer closes
    assert (accuracy.step, accuracy.value) == (12, pytest.approx(metrics["metrics"]["accuracy"]))
    assert events.Scalars("train/adalora/live")[-1].value == metrics["live_triplets"] == 24
    assert events.Scalars("train/adalora/budget")[0].value > 24
    assert len(events.Images("train/adalora/ranks")) > 2
    assert len(list(Path("run/tensorboard").iterdir())) == 1
    assert not Path("run/checkpoints/runs").exists()

    again = adalora("train", *tiny_run, *short, "--overwrite")
    assert again.code == 0, again.err
    assert not list(Path("run").rglob("events.out.*")), "another run's curves"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("tensorbord", "training.report_to: 'tensorbord' is none of azure_ml, .* tensorboard, .*leave the key out"),
        ("neptune", "training.report_to: neptune is not installed here: pip install neptune"),
    ],
)
def test_where_a_run_cannot_report_to(name: str, complaint: str, adalora: Run, tiny_run: list[object]) -> None:
    done = adalora("train", *tiny_run, "--set", f"training.report_to=[{name}]")
    assert done.code == 2 and re.search(complaint, done.err), done.err
    assert not Path("run").exists()


# ------------------------------------------------------------------------------------------------ completion


@pytest.mark.parametrize(
    ("asked", "offered"),
    [
        ({"_ADALORA_COMPLETE": "complete_bash", "COMP_WORDS": "adalora in", "COMP_CWORD": "1"}, {"inspect"}),
        ({"_ADALORA_COMPLETE": "complete_bash", "COMP_WORDS": "adalora plan --ta", "COMP_CWORD": "2"},
         {"--task", "--target-r"}),
        ({"_ADALORA_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "adalora export --ov"}, {"--overwrite"}),
    ],
)  # fmt: skip
def test_shells_complete_commands_and_options(asked: dict[str, str], offered: set[str]) -> None:
    """What bash and zsh get when they ask, as their completion scripts do."""
    command = [sys.executable, "-c", "from adalora.cli import main; main()"]
    shell = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    done = subprocess.run(command, env={**shell, **asked}, capture_output=True, text=True, check=False)
    assert set(re.findall(r"--[a-z-]+|inspect", done.stdout)) == offered, done.stderr
