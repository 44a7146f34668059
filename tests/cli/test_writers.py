"""One process writes to a run's folder: beside another training it is refused, and of several processes that train
together the first one announces and writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adalora.files import holding

from ..distributed.processes import needs_gloo
from .conftest import Finished

Run = Callable[..., Finished]


@pytest.mark.parametrize("flags", [["--overwrite"], ["--resume"], []])
def test_a_folder_that_another_training_writes_to(
    adalora: Run, tiny_run: list[object], finished: Path, flags: list[str]
) -> None:
    shutil.copytree(finished, "run")
    Path("run/metrics.json").unlink()
    if not flags:  # it has just begun
        Path("run/recipe.yaml").unlink()
        shutil.rmtree("run/checkpoints")
        for file in Path("run").iterdir():
            file.unlink()
    with holding(Path("run/.lock")):
        before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
        refused = adalora("train", *tiny_run, *flags)
        assert refused.code == 2 and refused.err.count("\n") == 1, refused
        assert f"another training writes to run (process {os.getpid()} on" in refused.err
        assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_the_death_of_a_writer_releases_its_folder(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from adalora.files import holding
with holding(Path(sys.argv[1])):
    print(flush=True)
    os.kill(os.getpid(), 9)
"""
    lock = tmp_path / ".lock"
    died = subprocess.run([sys.executable, "-c", program, str(lock)], capture_output=True)
    assert died.returncode == -9 and "process" in lock.read_text()
    with holding(lock):
        pass


def test_a_run_that_came_between_checking_and_training_is_kept(
    adalora: Run, tiny_run: list[object], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that start at the same time both find an empty folder; while one loads its model, the other finishes."""
    from adalora import training

    unchanged = training.processes.wait

    def meanwhile() -> None:
        if not Path("run").exists():
            shutil.copytree(finished, "run")
        unchanged()

    monkeypatch.setattr(training.processes, "wait", meanwhile)
    refused = adalora("train", *tiny_run)
    assert refused.code == 2 and "another training has written to run in the meantime" in refused.err
    assert (Path("run") / "metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()


@needs_gloo
@pytest.mark.compatibility("Trainers and loops", "`torchrun --nproc-per-node 2 -m adalora train`, and its resumption")
def test_two_processes_train_one_run(adalora: Run, tiny_run: list[object]) -> None:
    settings = ["training.max_steps=6", "training.save_steps=3", "training.eval_strategy=no"]
    command = ["-m", "adalora", "train", *map(str, tiny_run), *(part for s in settings for part in ("--set", s))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run([*torchrun, *command], capture_output=True, text=True, env=alone, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Task ") == done.stdout.count("Trained in") == 1
    assert "6 of 16 rows each" in done.stdout
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["steps"] == 6 and Path("run/report.html").is_file()
    manifest = json.loads(Path("run/checkpoints/checkpoint-3/manifest.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= manifest["files"].keys()

    whole = Path("run/adapter_model.safetensors").read_bytes()
    Path("run/metrics.json").unlink()
    shutil.rmtree("run/checkpoints/checkpoint-6")
    refused = adalora("train", "--resume", "--output", "run")
    assert refused.code == 2 and "torchrun --nproc-per-node 2" in refused.err
    again = [*torchrun, "-m", "adalora", "train", "--resume", "--output", "run"]
    resumed = subprocess.run(again, capture_output=True, text=True, env=alone, timeout=300)
    assert resumed.returncode == 0 and "after step 3" in resumed.stdout, resumed.stderr
    assert Path("run/adapter_model.safetensors").read_bytes() == whole
