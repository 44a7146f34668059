"""Pictures: which are drawn, and that what they show is what the records say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from adalora.bench import plots
from adalora.bench.records import Record
from adalora.bench.tables import results

from .grids import failed, grid, record


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Every figure by its name, in place of files."""
    found: dict[str, Figure] = {}

    def keep(figure: Figure, path: Path) -> list[Path]:
        found[f"{path.parent.name}/{path.name}"] = figure
        return [path]

    monkeypatch.setattr(plots, "_saved", keep)
    return found


def draw(records: list[Record], **keys: Any) -> list[str]:
    """The names of the pictures."""
    drawn = plots.draw_plots(results(grid(**keys), records), records, Path("plots"))
    return [f"{path.parent.name}/{path.name}" for paths in drawn.values() for path in paths]


def some_records() -> list[Record]:
    found = [record("mrpc", "full", None, seed, 0.9) for seed in (1, 2)]
    for budget, rank in (("rank 2", 2), ("rank 8", 8)):
        for seed in (1, 2):
            even = {"encoder.layer.0.query": rank, "encoder.layer.1.query": rank}
            learned = {"encoder.layer.0.query": rank - seed, "encoder.layer.1.query": rank + seed}
            found.append(record("mrpc", "lora", budget, seed, 0.8 + 0.02 * seed, ranks=even))
            found.append(record("mrpc", "adalora", budget, seed, 0.8 + 0.04 * seed, ranks=learned))
    return found


def test_scores_stand_over_their_budgets_with_a_deviation_each_way(drawn: dict[str, Figure]) -> None:
    """By hand: adalora has 84 and 88, mean 86, sample deviation sqrt 8, at both budgets."""
    assert draw(some_records()) == ["mrpc/budget", "mrpc/ranks"], "nothing chose a rate, and cola has no record"
    axes = drawn["mrpc/budget"].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["rank 2", "rank 8"]
    assert axes.get_ylabel() == "accuracy" and axes.get_title() == ""
    lines = {bars.get_label(): bars for bars in axes.containers}
    line, caps, _ = lines["adalora"]
    assert line.get_ydata() == pytest.approx([86, 86])
    assert [cap.get_ydata() for cap in caps] == [pytest.approx([86 + s * math.sqrt(8)] * 2) for s in (-1, 1)]
    assert [round(place) for place in line.get_xdata()] == [0, 1]
    across = [line for line in axes.lines if line.get_label() == "full"]
    assert len(across) == 1 and list(across[0].get_ydata()) == [90, 90], "a method of one size is a line"


def test_one_seed_has_no_bar(drawn: dict[str, Figure]) -> None:
    draw([record("mrpc", "lora", budget, 1, 0.8) for budget in ("rank 2", "rank 8")])
    line, caps, _ = drawn["mrpc/budget"].axes[0].containers[0]
    assert list(line.get_ydata()) == [80, 80] and [list(cap.get_ydata()) for cap in caps] == [[80, 80]] * 2


def test_rates_show_the_runs_that_chose_and_the_choice(drawn: dict[str, Figure]) -> None:
    tried = [record("mrpc", "lora", "rank 2", 0, score, rate) for rate, score in [(5e-3, 0.7), (1e-3, 0.8)]]
    tried.append(record("mrpc", "adalora", "rank 8", 0, 0.6))
    lost = [failed("mrpc", "adalora", "rank 8", 0, "it broke", 5e-3), record("mrpc", "full", None, 0, None)]
    draw([*tried, *lost, record("mrpc", "lora", "rank 2", 1, 0.9, 1e-3)])
    first, second = drawn["mrpc/rate"].axes
    assert (first.get_title(), second.get_title()) == ("rank 2", "rank 8"), "full has no score to show"
    line, ring = first.lines
    assert list(line.get_xdata()) == [1e-3, 5e-3] and list(line.get_ydata()) == pytest.approx([80, 70])
    assert list(ring.get_xdata()) == [1e-3] and ring.get_markerfacecolor() == "none"
    assert first.get_xscale() == "log" and [tick.get_text() for tick in first.get_xticklabels()] == ["0.001", "0.005"]
    assert len(second.lines[0].get_xdata()) == 1, "the broken run is not there"


def test_rank_maps_are_means_over_seeds(drawn: dict[str, Figure]) -> None:
    """By hand, at rank 2: (1 + 0) / 2 and (3 + 4) / 2."""
    draw(some_records())
    maps = [axes for axes in drawn["mrpc/ranks"].axes if axes.images]
    assert [axes.get_title() for axes in maps] == ["adalora, rank 2, 2 seeds", "adalora, rank 8, 2 seeds"]
    assert maps[0].images[0].get_array().tolist() == [[0.5, 3.5]]
    assert [text.get_text() for text in maps[0].texts] == ["0.5", "3.5"]
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["query"]


def test_the_average_is_drawn_over_budgets(drawn: dict[str, Figure]) -> None:
    records = some_records() + [
        record("cola", method, budget, seed, 0.5)
        for method in ("lora", "adalora")
        for budget in ("rank 2", "rank 8")
        for seed in (1, 2)
    ]
    assert "plots/average" in draw(records)
    line = next(bars for bars in drawn["plots/average"].axes[0].containers if bars.get_label() == "adalora")[0]
    assert line.get_ydata() == pytest.approx([68, 68])  # (86 + 50) / 2


@pytest.mark.parametrize("records", [[], [failed("mrpc", "lora", "rank 2", 1, "it broke")]])
def test_nothing_is_drawn_of_nothing(records: list[Record], drawn: dict[str, Figure]) -> None:
    assert draw(records) == []


@pytest.mark.parametrize(
    ("budget", "title"), [("rank 2", "accuracy of mrpc at rank 2: "), (None, "accuracy of mrpc: ")]
)
def test_with_one_budget_methods_stand_below_each_other(budget: Any, title: str, drawn: dict[str, Figure]) -> None:
    records = [record("mrpc", name, budget, seed, 0.8 + 0.02 * seed) for name in ("lora", "adalora") for seed in (1, 2)]
    records.append(record("mrpc", "full", None, 1, 0.9))
    keys: dict[str, Any] = {"budgets": [budget]} if budget else {"budgets": []}
    assert draw(records, **keys) == ["mrpc/methods"]
    figure = drawn["mrpc/methods"]
    axes = figure.axes[0]
    assert figure.get_suptitle().startswith(title)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["full", "adalora", "lora"], "the first is on top"
    assert [bars[0].get_xdata().tolist() for bars in axes.containers] == [[90], [83], [83]]
    seeds = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "|" and line.get_markersize() == 5]
    assert seeds == [[90], pytest.approx([82, 84]), pytest.approx([82, 84])]


def test_many_rank_maps_stand_side_by_side(drawn: dict[str, Figure]) -> None:
    learned = {"encoder.layer.0.query": 1, "encoder.layer.1.query": 3}
    names = [f"variant-{index}" for index in range(5)]
    records = [record("mrpc", name, "rank 2", 1, 0.8, ranks=learned) for name in names]
    draw(records, methods={name: {"method": "adalora"} for name in names}, reference=None)
    maps = [axes for axes in drawn["mrpc/ranks"].axes if axes.images]
    assert len({round(axes.get_position().x0, 2) for axes in maps}) == 2 and len(maps) == 5


def test_pictures_are_png_and_svg(tmp_path: Path) -> None:
    records = some_records()
    drawn = plots.draw_plots(results(grid(), records), records, tmp_path)
    assert {task: len(paths) for task, paths in drawn.items()} == {"mrpc": 4, "cola": 0, "average": 0}
    names = ["budget.png", "budget.svg", "ranks.png", "ranks.svg"]
    assert [path.name for path in drawn["mrpc"]] == names
    assert sorted(path.name for path in (tmp_path / "mrpc").iterdir()) == names, "nothing beside"
    assert min(imread(drawn["mrpc"][0]).shape[:2]) > 300
    assert "<svg" in drawn["mrpc"][1].read_text(encoding="utf-8")
