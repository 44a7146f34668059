"""``adalora train``, ``evaluate`` and ``predict`` from end to end, on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from .conftest import Finished, write_csv

Run = Callable[..., Finished]
RUN_FILES = {
    ".lock",
    "adapter_config.json",
    "adapter_model.safetensors",
    "checkpoints",
    "metrics.json",
    "ranks.png",
    "report.html",
    "recipe.yaml",
    "trace.jsonl",
}


def adapter_bytes(folder: str | Path) -> bytes:
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_run_from_training_to_answers(adalora: Run, tiny_run: list[object], files: Path) -> None:
    done = adalora("train", *tiny_run)
    assert done.code == 0, done.err
    folder = Path("run")
    assert {path.name for path in folder.iterdir()} == RUN_FILES

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["metrics"]["accuracy"] > 0.8 > metrics["baseline"]["metrics"]["accuracy"] == 0.5
    assert metrics["live_triplets"] == 2 * 12 == sum(metrics["ranks"].values())
    assert len(set(metrics["ranks"].values())) > 1
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG")
    for words in (
        "96 training rows",
        "40 held-out rows",
        "pruning to 24 triplets",
        "24 of 36 triplets kept, 2 on average in 12 matrices",
        "report.html",
    ):
        assert words in " ".join(done.out.split())
    assert "adalora evaluate run" in done.out

    evaluated = adalora("evaluate", "run", "--json")
    assert json.loads(evaluated.out)["metrics"] == metrics["metrics"]
    table = adalora("evaluate", "run", "--data", files / "train.csv")
    assert "96 rows of" in table.out and "accuracy" in table.out

    answered = adalora(
        "predict", "run", "--text", "great funny superb film", "--text", "dull flat awful film", "--json"
    )
    first, second = map(json.loads, answered.out.splitlines())
    assert (first["label"], second["label"]) == ("fresh", "rotten")
    assert first["score"] == first["scores"]["fresh"] and sum(first["scores"].values()) == pytest.approx(1)
    Path("texts.txt").write_text("great funny\u2028superb film\n\ndull flat awful film\n")
    assert adalora("predict", "run", "--file", "texts.txt").out.count("fresh") == 1
    assert len(adalora("predict", "run", "--file", files / "test.csv", "--json").out.splitlines()) == 40


def test_a_run_that_starts_from_the_gradient(adalora: Run, tiny_run: list[object]) -> None:
    """Plan, trace, metrics and report say so; an accumulated batch is part of a step."""
    gradient = ["adalora.initialization=gradient", "adalora.start_batches=4", "training.gradient_accumulation_steps=2"]
    flags = [*tiny_run, *(word for setting in gradient for word in ("--set", setting))]
    plan = adalora("plan", *flags, "--json")
    assert json.loads(plan.out)["start"] == {"what": "P and Q", "rows": 32, "sweeps": 4, "start_steps": 8}
    done = adalora("train", *flags)
    assert done.code == 0, done.err
    said = "P and Q start from the loss's gradient on 32 training rows, 4 times over: as long as 8 steps"
    assert said in " ".join(done.out.split())
    header = json.loads(Path("run/trace.jsonl").read_text().splitlines()[0])
    start = header["start"]
    assert (start["rows"], start["batches"], start["sweeps"]) == (32, 4, 4) and 0.5 < start["share"] <= 1
    assert start["values"].keys() == set(header["names"])
    assert json.loads(Path("run/metrics.json").read_text())["start_steps"] == 8
    said = f"on 32 rows, of whose square the triplets hold {start['share']:.0%}"
    assert said in Path("run/report.html").read_text()
    flags = [*flags, "--output", "another"]
    fixed = adalora("plan", *flags, "--method", "svd_lora")
    assert "P and Q start from the loss's gradient on 32 training rows" in " ".join(fixed.out.split())
    for method in ("lora_pruned", "peft_adalora"):
        refused = adalora("plan", *flags, "--method", method)
        assert refused.code == 2 and f"adalora.initialization: the method {method} has no such choice" in refused.err


def test_other_rows_are_measured_whole_and_a_file_has_no_splits(
    adalora: Run, tiny_run: list[object], files: Path
) -> None:
    done = adalora("train", *tiny_run, "--set", "training.max_steps=2", "--set", "data.max_eval_rows=8")
    assert done.code == 0, done.err
    measured = {"own": [], "others": ["--data", files / "test.csv"]}
    rows = {
        name: json.loads(adalora("evaluate", "run", *given, "--json").out)["rows"] for name, given in measured.items()
    }
    assert rows == {"own": 8, "others": 40}
    for given in measured.values():
        refused = adalora("evaluate", "run", *given, "--split", "test")
        assert refused.code == 2 and "test.csv holds no splits, so no 'test'" in refused.err


def test_the_adapter_loads_with_stock_peft_where_adalora_is_not(adalora: Run, finished: Path, tiny_model: Path) -> None:
    program = """
import sys; sys.modules["adalora"] = None
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base, folder, text = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), folder)
scores = model.eval()(**AutoTokenizer.from_pretrained(base)(text, return_tensors="pt")).logits.softmax(-1)
print(scores[0].tolist())
"""
    text = "a very moving film"
    there = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tiny_model), str(finished), text],
        capture_output=True,
        text=True,
        check=True,
    )
    here = json.loads(adalora("predict", finished, "--text", text, "--json").out)
    assert json.loads(there.stdout) == pytest.approx([here["scores"]["fresh"], here["scores"]["rotten"]], abs=1e-6)


def test_the_resolved_recipe_gives_the_same_run_again(adalora: Run, finished: Path) -> None:
    again = adalora("train", finished / "recipe.yaml", "--output", "again")
    assert again.code == 0, again.err
    assert adapter_bytes("again") == adapter_bytes(finished)


def test_evaluating_on_the_way_does_not_change_the_training(
    adalora: Run, tiny_run: list[object], finished: Path
) -> None:
    often = ["--set", "training.eval_strategy=steps", "--set", "training.eval_steps=5"]
    assert adalora("train", *tiny_run, *often).code == 0
    assert adapter_bytes("run") == adapter_bytes(finished)
    assert len(json.loads(Path("run/metrics.json").read_text())["evaluations"]) == 8


# --- interrupted runs -------------------------------------------------------------------------------


def test_a_killed_run_resumes_to_the_same_bits(adalora: Run, tiny_run: list[object], finished: Path) -> None:
    command = [sys.executable, "-m", "adalora", "train", *map(str, tiny_run)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = Path("said.txt")
    with (
        said.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=alone) as process,
    ):
        while len(list(Path("run").glob("checkpoints/*/adalora_state.safetensors"))) < 2:
            assert process.poll() is None, said.read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not Path("run/metrics.json").exists()
    resumed = adalora("train", "--resume", "--output", "run")
    assert resumed.code == 0, resumed.err
    assert "after step" in resumed.out
    assert adapter_bytes("run") == adapter_bytes(finished)
    assert Path("run/trace.jsonl").read_text() == (finished / "trace.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="forks, and kills by signals")
def test_forty_kills_are_resumed_to_the_same_bits(tiny_run: list[object]) -> None:
    """By SIGKILL, SIGTERM and SIGINT, alone and of two processes, at any moment; half of them are killed twice."""
    command = [sys.executable, "-m", "tests.cli.kills", "40", *map(str, tiny_run)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=alone, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 40


def test_batches_of_mixed_length_resume_to_the_same_bits(adalora: Run, tiny_run: list[object]) -> None:
    mixed = ["--set", "training.group_by_length=false", "--set", "training.save_total_limit=20"]
    assert adalora("train", *tiny_run, *mixed).code == 0
    whole = adapter_bytes("run")
    interrupt(after=20)
    assert adalora("train", "--resume", "--output", "run").code == 0
    assert adapter_bytes("run") == whole


@pytest.mark.parametrize("step", [4, 12, 20, 32])
def test_any_checkpoint_resumes_to_the_same_bits(adalora: Run, finished: Path, step: int) -> None:
    """Before pruning, at the end of an epoch, while pruning, in the final phase."""
    interrupted_copy(finished, after=step)
    resumed = adalora("train", "--resume", "--output", "run")
    assert resumed.code == 0, resumed.err
    assert f"after step {step}" in resumed.out
    assert adapter_bytes("run") == adapter_bytes(finished)


def test_the_training_time_is_that_of_all_parts(adalora: Run, finished: Path) -> None:
    times = [seconds_at(finished, step) for step in (4, 20, 36)]
    assert 0 <= times[0] <= times[1] <= times[2] <= json.loads((finished / "metrics.json").read_text())["seconds"] + 0.1
    interrupted_copy(finished, after=20)
    manifest = Path("run/checkpoints/checkpoint-20/manifest.json")
    said = json.loads(manifest.read_text())
    said["progress"]["seconds"] = 1000.0
    manifest.write_text(json.dumps(said))
    assert adalora("train", "--resume", "--output", "run").code == 0
    assert 1000 < json.loads(Path("run/metrics.json").read_text())["seconds"] < 1500
    assert 1000 <= seconds_at(Path("run"), 36) < 1500


def seconds_at(run: Path, step: int) -> float:
    manifest = json.loads((run / f"checkpoints/checkpoint-{step}/manifest.json").read_text())
    return float(manifest["progress"]["seconds"])


def test_an_incomplete_checkpoint_is_not_resumed_from(adalora: Run, finished: Path) -> None:
    interrupted_copy(finished, after=20)
    Path("run/checkpoints/checkpoint-20/manifest.json").unlink()
    resumed = adalora("train", "--resume", "--output", "run")
    assert resumed.code == 0 and "after step 16" in resumed.out
    assert adapter_bytes("run") == adapter_bytes(finished)


def test_without_a_checkpoint_resuming_starts_over(adalora: Run, finished: Path) -> None:
    interrupted_copy(finished, after=0)
    resumed = adalora("train", "--resume", "--output", "run")
    assert resumed.code == 0 and "from the beginning" in resumed.out
    assert adapter_bytes("run") == adapter_bytes(finished)


def test_resuming_refuses_what_is_another_run(adalora: Run, tiny_run: list[object], files: Path) -> None:
    own = write_csv(Path("own.csv"), [{"text": f"great film {i}", "label": str(i % 2)} for i in range(32)])
    arguments = [*tiny_run, "--train", own, "--eval", own]
    assert adalora("train", *arguments).code == 0
    interrupt(after=4)
    before = listing(Path("run"))
    changed = adalora("train", "--resume", *arguments, "--lr", "1e-2")
    assert changed.code == 2 and "training.learning_rate was 0.02, is 0.01" in changed.err
    own.write_text(own.read_text().replace("great film 3,", "dull film 3,"))
    other_data = adalora("train", "--resume", "--output", "run")
    assert other_data.code == 2 and "facts.train_digest" in other_data.err
    assert listing(Path("run")) == before


def test_resuming_a_finished_run_has_nothing_to_do(adalora: Run, finished: Path) -> None:
    shutil.copytree(finished, "run")
    again = adalora("train", "--resume", "--output", "run")
    assert again.code == 0 and "finished already" in again.out
    assert adapter_bytes("run") == adapter_bytes(finished)


def interrupted_copy(finished: Path, after: int) -> None:
    """The folder ``run`` as a run that died after this step leaves it."""
    shutil.copytree(finished, "run")
    interrupt(after)


def interrupt(after: int) -> None:
    for name in ("metrics.json", "adapter_model.safetensors", "adapter_config.json", "ranks.png"):
        Path("run", name).unlink()
    for checkpoint in Path("run/checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > after:
            shutil.rmtree(checkpoint)


# --- the output folder ------------------------------------------------------------------------------


def test_a_run_is_replaced_only_when_asked(adalora: Run, tiny_run: list[object], finished: Path) -> None:
    shutil.copytree(finished, "run")
    Path("run/notes.md").write_text("mine")
    before = listing(Path("run"))
    refused = adalora("train", *tiny_run)
    assert refused.code == 2 and "--overwrite" in refused.err
    assert listing(Path("run")) == before
    assert adalora("train", *tiny_run, "--overwrite", "--seed", 1).code == 0
    assert yaml.safe_load(Path("run/recipe.yaml").read_text())["seed"] == 1
    assert Path("run/notes.md").read_text() == "mine"


@pytest.mark.parametrize("setting", ["lr_scheduler_type=cosine_with_min_lr", "optim=galore_adamw"])
def test_a_run_is_not_replaced_by_one_that_cannot_start(
    adalora: Run, tiny_run: list[object], finished: Path, setting: str
) -> None:
    shutil.copytree(finished, "run")
    before = listing(Path("run"))
    assert adalora("train", *tiny_run, "--overwrite", "--set", f"training.{setting}").code == 2
    assert listing(Path("run")) == before


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_a_folder_that_holds_no_run_is_left_alone(adalora: Run, tiny_run: list[object], flags: list[str]) -> None:
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("cake: flour\n")
    refused = adalora("train", *tiny_run, *flags)
    assert refused.code == 2 and refused.err.startswith("Error: ") and refused.err.count("\n") == 1
    assert Path("run/recipe.yaml").read_text() == "cake: flour\n"
    assert listing(Path("run")) == ["recipe.yaml"]


def test_there_is_nothing_to_resume_in_a_folder_that_is_not_there(adalora: Run) -> None:
    refused = adalora("train", "--resume", "--output", "nowhere")
    assert refused.code == 2 and "there is no folder nowhere" in refused.err


@pytest.mark.parametrize("command", [["evaluate"], ["predict", "--text", "x"]])
def test_only_a_run_can_be_evaluated_or_asked(adalora: Run, tiny_model: Path, command: list[str]) -> None:
    refused = adalora(command[0], tiny_model, *command[1:])
    assert refused.code == 2 and "is not the folder of a run" in refused.err


# --- other tasks and data ---------------------------------------------------------------------------


def test_regression_on_pairs_of_real_sentences(adalora: Run, tiny_model: Path) -> None:
    folder = Path(os.environ.get("ADALORA_DATA", Path(__file__).parents[2] / "../shared/data")) / "glue/stsb"
    if not folder.is_dir():
        pytest.skip(f"no benchmark data at {folder}: set ADALORA_DATA")
    done = adalora(
        *("train", "--task", "regression", "--model", tiny_model, "--output", "run"),
        *("--train", folder / "train-00000-of-00001.parquet", "--eval", folder / "validation-00000-of-00001.parquet"),
        *("--text", "sentence1", "--text-pair", "sentence2", "--max-length", 32, "--epochs", 1),
        *("--set", "data.max_train_rows=64", "--set", "data.max_eval_rows=32", "--batch-size", 8),
        *("--set", "adalora.tinit=1", "--set", "adalora.deltaT=1"),
    )
    assert done.code == 0, done.err
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert set(metrics["metrics"]) == {"pearson", "spearman", "mse"}
    assert metrics["baseline"]["metrics"]["pearson"] is None and "undefined" in done.out
    assert "label_names" not in Path("run/recipe.yaml").read_text()
    answer = adalora("predict", "run", "--text", "a man", "--text-pair", "a dog", "--json")
    assert np.isfinite(json.loads(answer.out)["value"])
    alone = adalora("predict", "run", "--text", "a man")
    assert alone.code == 2 and "second text" in alone.err


def test_a_checkpoint_on_the_way_is_a_plain_adapter(finished: Path) -> None:
    for checkpoint in (finished / "checkpoints").iterdir():
        assert json.loads((checkpoint / "adapter_config.json").read_text())["peft_type"] == "LORA"
        assert load_file(checkpoint / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["adalora", "peft_adalora"])
def test_accumulated_batches_train_as_one_large_batch(
    adalora: Run, tiny_run: list[object], tiny_model: Path, method: str
) -> None:
    """2 x 4 rows a step give the weights of 8: neither the loss nor the regulariser counts twice. Plain SGD, which
    unlike Adam does not forgive a gradient of the wrong size."""
    shutil.copytree(tiny_model, "still")
    config = json.loads(Path("still/config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    Path("still/config.json").write_text(json.dumps(config))
    settings = ["training.optim=sgd", "training.max_grad_norm=0", "training.learning_rate=0.5", "training.max_steps=6"]
    for rows, batches in ((8, 1), (4, 2)):
        shape = [f"training.per_device_train_batch_size={rows}", f"training.gradient_accumulation_steps={batches}"]
        sets = [part for setting in [*settings, *shape] for part in ("--set", setting)]
        done = adalora("train", *tiny_run, "--model", "still", "--method", method, *sets, "--output", f"by{rows}")
        assert done.code == 0, done.err
    whole, parts = (load_file(f"by{rows}/adapter_model.safetensors") for rows in (8, 4))
    assert whole.keys() == parts.keys()
    for key, weight in whole.items():
        np.testing.assert_allclose(parts[key], weight, rtol=1e-4, atol=1e-5)
