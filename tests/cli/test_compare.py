"""``adalora compare``: tables, JSON and the picture, of runs that can be compared and of runs that cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from .conftest import Finished, run_command

Run = Callable[..., Finished]


@pytest.fixture(scope="module")
def runs(finished: Path, tiny_model: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """AdaLoRA, LoRA and the output layer alone, of one model and task, by the names of their folders."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(finished, folder / "adalora")
    rows = ["--train", files / "train.csv", "--eval", files / "test.csv", "--batch-size", 8, "--max-length", 16]
    short = ["--set", "training.max_steps=6", "--set", "training.logging_steps=2", "--seed", 1]
    for method in ("lora", "head"):
        done = run_command("train", "--model", tiny_model, *rows, *short, "--method", method, "-o", folder / method)
        assert done.code == 0, done.err
    return {path.name: path for path in sorted(folder.iterdir())}


def test_what_is_said(adalora: Run, runs: dict[str, Path]) -> None:
    done = adalora("compare", runs["adalora"], runs["lora"], runs["head"], "--json")
    assert done.code == 0 and not done.err, done.err
    said = json.loads(done.out)
    metrics = {name: json.loads((runs[name] / "metrics.json").read_text()) for name in runs}
    assert said["runs"] == {name: str(runs[name]) for name in ("adalora", "lora", "head")}
    facts = said["facts"]
    assert facts["triplets"] == {"adalora": 24, "lora": 52, "head": None}
    for name, values in metrics.items():
        assert facts["accuracy"][name] == values["metrics"]["accuracy"]
        assert facts["saved parameters"][name] == values["parameters"]["adapter_saved"]
        assert facts["minutes"][name] == pytest.approx(values["seconds"] / 60)
    assert list(facts)[-1].startswith("memory") and 0.1 < facts["memory, GB"]["lora"] < 50

    differ = said["recipe_differences"]
    assert differ["method"] == {"adalora": "adalora", "lora": "lora", "head": "head"}
    assert differ["lora.r"] == {"adalora": None, "lora": 4, "head": None}, "sections that are not read are left out"
    assert differ["seed"] == {"adalora": 0, "lora": 1, "head": 1}
    assert not {"output", "model", "task", "training.optim"} & set(differ)

    pairs = {(pair["one"], pair["other"]): pair for pair in said["rank_similarity"]}
    uniform = pairs["adalora", "lora"]
    assert uniform["matrices"] == 12 and uniform["spearman"] is None and "one rank everywhere" in uniform["reason"]
    ranks = metrics["adalora"]["ranks"]
    assert uniform["moved"] == pytest.approx(sum(abs(rank / 24 - 1 / 12) for rank in ranks.values()) / 2)
    assert pairs["adalora", "head"]["reason"] == "head has no ranks"
    query = [rank for name, rank in ranks.items() if name.endswith("self.query")]
    assert said["mean_rank_by_module"]["attention.self.query"]["adalora"] == pytest.approx(sum(query) / 2)
    assert any("head has no ranks" in note for note in said["notes"])


@pytest.mark.parametrize("columns", [80, 110])
def test_the_tables_fit(adalora: Run, runs: dict[str, Path], columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adalora.report.terminal.console", lambda: Console(highlight=False, width=columns))
    done = adalora("compare", *runs.values())
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= columns
    for words in (
        "average rank",
        "accuracy",
        "training.max_steps",
        "Spearman",
        "attention.self.query",
        "head has no ranks",
    ):
        assert words in done.out


def test_many_runs_take_several_tables(adalora: Run, runs: dict[str, Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(runs["adalora"], tmp_path / f"copy-{index}")) for index in range(10)]
    done = adalora("compare", *copies)
    assert done.code == 0, done.err
    assert "The recipes are the same." in done.out
    assert done.out.count("attention.self.query") >= 2 and all(f"copy-{index}" in done.out for index in range(10))
    said = json.loads(adalora("compare", *copies, "--json").out)
    assert all(pair["spearman"] == pytest.approx(1) and pair["moved"] == 0 for pair in said["rank_similarity"])


def test_the_picture(adalora: Run, runs: dict[str, Path]) -> None:
    done = adalora("compare", *runs.values(), "--png", "runs.png", "--json")
    assert done.code == 0 and "runs.png" in done.err and json.loads(done.out)
    pixels = imread("runs.png")
    assert pixels.shape[0] > 1000 and pixels.shape[1] > 1200
    assert len({tuple(pixel) for pixel in pixels[::5, ::5, :3].reshape(-1, 3).round(2)}) > 5, "not blank"
    assert adalora("compare", runs["head"], runs["lora"], "--png", "runs.png").code == 0


def test_the_page(adalora: Run, runs: dict[str, Path]) -> None:
    done = adalora("compare", *runs.values(), "--html", "runs.html", "--json")
    assert done.code == 0 and "runs.html" in done.err and json.loads(done.out), done.err
    page = Path("runs.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and len(page) < 6_000_000
    assert "3 runs compared" in page and "attention.self.query" in page and "http-equiv" in page


def refused(done: Finished, *words: str) -> None:
    """One line on stderr, code 2, nothing on stdout."""
    assert done.code == 2 and not done.out and len(done.err.splitlines()) == 1, done
    for word in words:
        assert word in done.err


def test_mistakes(adalora: Run, runs: dict[str, Path], tmp_path: Path) -> None:
    refused(adalora("compare", runs["lora"]), "two runs or more", "adalora inspect")
    refused(adalora("compare", runs["lora"], runs["lora"].parent / "." / "lora"), "given twice")
    refused(adalora("compare", runs["lora"], tmp_path / "nowhere"), "no folder", "nowhere")
    refused(adalora("compare", runs["lora"], tmp_path), "not the folder of a run")


def test_a_run_that_is_not_finished(adalora: Run, runs: dict[str, Path], tmp_path: Path) -> None:
    begun = Path(shutil.copytree(runs["adalora"], tmp_path / "begun"))
    (begun / "metrics.json").unlink()
    done = adalora("compare", begun, runs["adalora"], "--json", "--png", "runs.png")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["facts"]["accuracy"]["begun"] is None and "begun is not finished." in said["notes"]
    assert said["rank_similarity"][0]["spearman"] == pytest.approx(1), "by its trace"
