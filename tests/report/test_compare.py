"""How alike rank maps are, by hand; runs that share nothing; names of runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from adalora.recipe import dump, validate
from adalora.report.compare import compare
from adalora.report.compared import draw_comparison, setting, shown
from adalora.report.compared_page import comparison_html
from adalora.report.similarity import moved, spearman


def test_the_share_of_the_budget_that_moved() -> None:
    even = {"a": 2, "b": 2, "c": 2}
    assert moved(even, even) == 0
    assert moved(even, {"a": 3, "b": 2, "c": 1}) == pytest.approx(1 / 6), "one triplet of six"
    assert moved({"a": 4, "b": 0}, {"a": 0, "b": 4}) == 1
    assert moved(even, {"a": 4, "b": 4, "c": 4}) == 0, "by shares: another budget is no other division"
    assert moved({"a": 1, "b": 3, "x": 9}, {"a": 3, "b": 1, "y": 7}) == pytest.approx(0.5), "over what both have"
    assert math.isnan(moved({"a": 0}, {"a": 3})) and math.isnan(moved({"a": 1}, {"b": 1}))


def test_spearmans_correlation() -> None:
    one = {"a": 1, "b": 2, "c": 3, "d": 4}
    assert spearman(one, {"a": 10, "b": 20, "c": 30, "d": 40}) == pytest.approx(1)
    assert spearman(one, {"a": 4, "b": 3, "c": 2, "d": 1, "more": 9}) == pytest.approx(-1)
    # ties get average ranks: (1, 2.5, 2.5, 4) against (1, 2, 3, 4), by Pearson's formula
    assert spearman({"a": 1, "b": 2, "c": 2, "d": 3}, one) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman(one, dict.fromkeys(one, 2)))


def written(folder: Path, ranks: dict[str, int], headline: str = "accuracy", **recipe: Any) -> Path:
    """A finished run's folder, as ``train`` writes it, with these ranks."""
    facts = {"train_rows": 8, "eval_rows": 4, "train_digest": "0", "versions": {"torch": "2"}}
    raw = {"model": "bert", "data": {"train": "rows.csv"}, "facts": facts} | recipe
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump(validate(raw, "test")))
    metrics = {
        "method": "adalora", "headline": headline, "metrics": {headline: 0.5, "loss": 1.0}, "ranks": ranks, "steps": 8,
        "seconds": 60, "memory": {"peak_bytes": 10**9, "gpu_peak_bytes": None},
        "parameters": {"adapter_saved": 10, "trainable": 20}, "versions": facts["versions"],
        "log": [{"step": 4, "loss": 2.0}, {"step": 8, "loss": 1.0}, {"step": 8, f"eval_{headline}": 0.5}],
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_runs_of_different_models_and_tasks(tmp_path: Path) -> None:
    """The tables are there, and what cannot be compared says why."""
    one = written(tmp_path / "one", {"layer.0.q": 1, "layer.1.q": 3})
    other = written(tmp_path / "other", {"h.0.attn": 2, "h.1.attn": 5}, "f1", model="gpt2", task="token_classification")
    found = compare([one, other])
    facts = {row.name: row.values for row in found.facts}
    assert facts["model"] == ["bert", "gpt2"] and facts["accuracy"] == [0.5, None] and facts["f1"] == [None, 0.5]
    assert list(facts)[11:13] == ["accuracy", "f1"], "headlines come first"
    assert "GPU memory, GB" not in facts
    (pair,) = found.likenesses
    assert (pair.matrices, pair.reason) == (0, "no matrix in common") and math.isnan(pair.moved)
    assert any("differ in task" in note for note in found.notes)
    assert {row.name: row.values for row in found.kinds} == {"q": [2, None], "attn": [None, 3.5]}
    assert {row.name for row in found.settings} == {"model", "task"}
    draw_comparison(found, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 10_000


def test_ranks_of_two_seeds(tmp_path: Path) -> None:
    ranks = [{"layer.0.q": 1, "layer.0.v": 2, "layer.1.q": 3, "layer.1.v": 4}]
    ranks.append({"layer.0.q": 2, "layer.0.v": 1, "layer.1.q": 3, "layer.1.v": 4})
    found = compare([written(tmp_path / str(seed), ranks[seed], seed=seed) for seed in (0, 1)])
    (pair,) = found.likenesses
    assert (pair.matrices, pair.reason) == (4, "") and pair.spearman == pytest.approx(0.8)
    assert pair.moved == pytest.approx(0.1), "one triplet of ten"
    assert [(row.name, row.values) for row in found.settings] == [("seed", [0, 1])]
    assert {row.name: row.values for row in found.layers} == {"0": [1.5, 1.5], "1": [3.5, 3.5]}
    assert found.notes == []
    assert json.loads(json.dumps(found.as_json()))["ranks"]["1"] == ranks[1]


def test_the_page_shows_names_as_text(tmp_path: Path) -> None:
    """Folders, models and modules may be called anything."""
    evil = "<script>alert(1)<!--"
    one = written(tmp_path / evil, {f"layer.0.{evil}": 1, "layer.1.q": 3}, model=evil)
    other = written(tmp_path / "other", {f"layer.0.{evil}": 2, "layer.1.q": 2})
    page = comparison_html(compare([one, other]))
    assert evil not in page and "&lt;script&gt;alert(1)&lt;!--" in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    figures = data["runs"][0]["figures"]
    assert set(figures) == {"loss", "scores", "budget", "kinds", "layers"}
    assert figures["layers"]["data"][0]["y"] == [1, 3] and figures["layers"]["data"][1]["y"] == [2, 2]
    assert figures["loss"]["data"][0]["name"].startswith("&lt;script")
    assert all(f'data-figure="{key}"' in page for key in figures)
    assert "one rank everywhere" in page and "Nothing: they are the same." not in page


def test_the_shortest_names_that_differ(tmp_path: Path) -> None:
    ranks = {"layer.0.q": 1}
    paths = [written(tmp_path / name, ranks) for name in ("sst2/seed-1/run", "sst2/seed-2/run", "mrpc/seed-1/run")]
    assert compare(paths).names == ["sst2/seed-1/run", "sst2/seed-2/run", "mrpc/seed-1/run"]
    assert compare(paths[:2]).names == ["seed-1/run", "seed-2/run"]


def test_values_for_people() -> None:
    given: list[object] = [None, 0.5, 12345, 2026, math.nan, "x"]
    assert [shown(value) for value in given] == ["–", "0.500", "12,345", "2026", "undefined", "x"]
    given = [None, True, 0.5, 12.0, 1e-5, 12345, ["q", "v"], [], "x"]
    assert [setting(value) for value in given] == ["–", "true", "0.5", "12", "1e-05", "12345", "q, v", "[]", "x"]


def test_defaults_of_a_section_that_one_method_reads_are_no_news(tmp_path: Path) -> None:
    ranks = {"layer.0.q": 2}
    one = written(tmp_path / "one", ranks, adalora={"target_r": 8})
    other = written(tmp_path / "other", ranks, method="lora", lora={"r": 8})
    found = compare([one, other])
    assert {"adalora.beta1", "lora.lora_dropout"} <= {row.name for row in found.settings}
    notable = {row.name: row.values for row in found.notable_settings}
    assert notable == {
        "method": ["adalora", "lora"],
        "adalora.target_r": [8, None],
        "adalora.init_r": [12, None],
        "adalora.lora_alpha": [24.0, None],
        "lora.r": [None, 8],
        "lora.lora_alpha": [None, 16.0],
    }
