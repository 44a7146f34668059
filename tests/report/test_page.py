"""What the page says, read from its HTML and its data."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plotly.graph_objects import Figure

from adalora.files import write_json
from adalora.report.magnitudes import correlation, direction_figure
from adalora.report.maps import rank_figure, returns_figure
from adalora.report.markup import isolated, plot_text, script_json, table
from adalora.report.over_matrices import score_figure, share_figures
from adalora.report.over_steps import budget_figure
from adalora.report.page import ReportError, report_html, write_report
from adalora.report.run import Run, read_run
from adalora.runs import RunError

from .runs import BERT, LLAMA, stack, write_run, write_trace

OURS = ("modules", "labels", "numbered")  # keys of a trace that the page's script reads, not plotly


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(write_run(tmp_path_factory.mktemp("runs") / "bert", stack(6)))


class Reader(HTMLParser):
    """Tags, what stands in them, and the text of those that are not scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.get_starttag_text() and self.cdata_elem == "script":
            self.scripts.append(data)
        elif self.cdata_elem is None:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def figures_of(page: str) -> dict[str, Any]:
    figures: dict[str, Any] = Reader(page).data["runs"][0]["figures"]
    return figures


# --- whole pages ------------------------------------------------------------------------------------


def test_the_page_is_complete_and_every_figure_is_one_that_plotly_knows(run: Run, tmp_path: Path) -> None:
    page = write_report(tmp_path / "report.html", [run]).read_text(encoding="utf-8")
    figures = figures_of(page)
    assert set(figures) == {
        *("ranks", "budget", "loss", "metrics", "scores", "kinds", "depth", "returned", "returns", "orthogonality")
    }
    for name, figure in figures.items():
        traces = [{key: value for key, value in trace.items() if key not in OURS} for trace in figure["data"]]
        Figure(data=traces, layout=figure["layout"])  # raises for a property or value that does not exist
        lengths = {len(column["values"]) for column in figure["columns"]}
        assert len(lengths) == 1 and lengths != {0}, name
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_headings_are_in_order_and_pictures_have_words(run: Run) -> None:
    reader = Reader(report_html([run]))
    levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    pictures = [attrs for _, attrs in reader.tags if attrs.get("role") == "img"]
    assert len(pictures) == 10 and all(len(attrs["aria-label"] or "") > 30 for attrs in pictures)
    assert {"main", "nav", "header", "section"} <= {tag for tag, _ in reader.tags}
    assert all("scope" in attrs for tag, attrs in reader.tags if tag == "th")
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_only_our_two_scripts_may_run_and_nothing_may_be_fetched(run: Run) -> None:
    reader = Reader(report_html([run]))
    policy = next(attrs["content"] or "" for tag, attrs in reader.tags if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none';")
    scripts = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in reader.scripts[1:]}
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == scripts and len(scripts) == 2
    assert not [attrs for _, attrs in reader.tags if "src" in attrs or "http" in (attrs.get("href") or "")]


def test_five_hundred_matrices_and_three_hundred_rankings_fit_six_megabytes(tmp_path: Path) -> None:
    names = stack(72, LLAMA, "model.layers")[:500]
    folder = write_run(tmp_path / "large", names, rank=12, target=8, steps=500, trace=False)
    write_trace(folder / "trace.jsonl", names, 12, 8, 500, every=1)
    run = read_run(folder)
    assert run.trace is not None and len(run.trace.allocations) == 300
    assert len(run.trace.allocations[-1].scores or []) == 500
    assert len(report_html([run]).encode()) < 6e6


def test_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    text = Reader(report_html([read_run(write_run(tmp_path / "run", stack(2), finished=False))])).text
    assert "This run is not finished." in text and "No loss was logged yet." in text
    early = write_run(tmp_path / "early", stack(2), finished=False)
    trace = early / "trace.jsonl"
    trace.write_text(trace.read_text().splitlines()[0] + "\n")  # before the first ranking
    assert set(figures_of(report_html([read_run(early)]))) == {"ranks", "budget", "kinds", "depth"}
    trace.unlink()
    assert "Ranks are known when the run is finished." in Reader(report_html([read_run(early)])).text


@pytest.mark.parametrize(("method", "names"), [("lora", stack(2)), ("full", [])])
def test_a_method_without_a_budget_shows_what_it_has(method: str, names: list[str], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", names, method="lora", trace=False)
    for file in ("recipe.yaml", "metrics.json"):
        path = folder / file
        path.write_text(path.read_text().replace("method: lora", f"method: {method}"))
    if method == "full":
        (folder / "recipe.yaml").write_text(re.sub(r"lora:\n(  .*\n)+", "", (folder / "recipe.yaml").read_text()))
    page = report_html([read_run(folder)])
    assert set(figures_of(page)) == {"loss", "metrics"} | ({"ranks"} if names else set())
    assert ("moves no budget" if names else "has no ranks") in Reader(page).text


def test_several_runs_are_tabs(run: Run, tmp_path: Path) -> None:
    other = read_run(write_run(tmp_path / "other", stack(2), finished=False))
    reader = Reader(report_html([run, other]))
    tabs = [attrs for _, attrs in reader.tags if attrs.get("role") == "tab"]
    panels = [attrs for _, attrs in reader.tags if attrs.get("role") == "tabpanel"]
    assert [tab["aria-controls"] for tab in tabs] == [panel["id"] for panel in panels] == ["panel-0", "panel-1"]
    assert ["hidden" in panel for panel in panels] == [False, True]
    assert [found["slug"] for found in reader.data["runs"]] == ["bert", "other"]


def test_tabs_of_folders_of_one_name_tell_them_apart(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / method / "seed-0", stack(1))) for method in ("lora", "adalora")]
    reader = Reader(report_html(runs))
    assert [found["slug"] for found in reader.data["runs"]] == ["lora-seed-0", "adalora-seed-0"]
    assert "folder lora/seed-0" in reader.text and "folder adalora/seed-0" in reader.text


def test_figures_of_another_version_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", stack(1))
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({key: metrics[key] for key in metrics if key != "log"}))
    with pytest.raises(RunError, match=r"metrics\.json is not of this version of adalora: train the run again"):
        read_run(folder)


def test_what_is_missing_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReportError, match="at least one run"):
        report_html([])
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ReportError, match=r"pip install adalora\[train\]"):
        report_html([run])


# --- what the figures say ---------------------------------------------------------------------------


def test_the_budget_is_followed_to_the_end(run: Run) -> None:
    assert run.trace is not None
    steps, budgets, live = (column.values for column in budget_figure(run.trace).columns)
    assert (steps[0], budgets[0], live[0]) == (0, 216, 216) and (steps[-1], budgets[-1], live[-1]) == (84, 144, 144)
    assert list(budgets) == list(live)
    shaded = budget_figure(run.trace).layout["shapes"]
    assert [(shape["x0"], shape["x1"]) for shape in shaded] == [(0, 12), (12, 84), (84, 120)]


def test_the_rank_map_holds_every_ranking(run: Run) -> None:
    assert run.trace is not None
    found = rank_figure(run).extra["map"]
    assert found["ranks"][0] == [6] * 36 and len(found["ranks"]) == len(run.trace.allocations) + 1
    assert found["kinds"] == BERT and found["layers"] == list("012345")
    names = [[run.trace.names[place] for place in cell] for cell in found["cells"][2]]
    assert names == [[f"encoder.layer.{layer}.attention.self.value"] for layer in range(6)]


def test_scores_are_cut_where_the_budget_is(run: Run) -> None:
    assert run.trace is not None
    figure = score_figure(run.trace)
    assert figure is not None
    _, scores, kept, matrices = (list(column.values) for column in figure.columns)
    assert scores == sorted(scores, reverse=True) and kept == ["yes"] * 144 + ["no"] * 72
    assert figure.layout["shapes"][0]["x0"] == 144.5
    live = [matrix for matrix, yes in zip(matrices, kept, strict=True) if yes == "yes"]
    assert [live.count(matrix) for matrix in range(36)] == run.trace.allocations[-1].ranks


def test_the_best_of_each_matrix_are_kept_whatever_the_policy(run: Run, tmp_path: Path) -> None:
    lines = [
        {"type": "start", "names": ["a", "b"], "initial_ranks": [2, 2], "triplet_parameters": [8, 8],
         "budget": {"initial": 4, "target": 2}, "schedule": None, "importance": "magnitude", "policy": "uniform"},
        {"type": "allocation", "step": 2, "budget": 2, "ranks": [1, 1], "returned": [0, 0], "orthogonality": 0.1,
         "scores": [[3.0, 4.0], [0.0, 1.0]]},
    ]  # fmt: skip
    folder = write_run(tmp_path / "run", ["a", "b"], trace=False)
    (folder / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace = read_run(folder).trace
    assert trace is not None
    figure = score_figure(trace)
    assert figure is not None and "Each matrix kept its own best" in figure.summary
    assert list(figure.columns[1].values) == [4, 3, 1, 0] and list(figure.columns[2].values) == [
        "yes",
        "no",
        "yes",
        "no",
    ]
    assert "(1 here)" in figure.note and returns_figure(trace) is None


def test_shares_add_up_and_uniform_lora_has_as_many_parameters(run: Run) -> None:
    assert run.trace is not None
    spent = sum(r * size for r, size in zip(run.trace.final.values(), run.trace.triplet_parameters, strict=True))
    for figure in share_figures(run.trace):
        _, ours, uniform = figure.columns
        assert sum(ours.values) == spent and sum(uniform.values) == pytest.approx(spent, abs=len(uniform.values))


def test_directions_are_drawn_with_their_correlation(run: Run, tmp_path: Path) -> None:
    assert direction_figure(tmp_path) is None
    draw = np.random.default_rng(0)
    magnitude, direction = draw.random((5, 3)), draw.random((5, 3))
    found = {"method": "adalora", "steps": [1, 2, 3], "layers": [f"h.{i}.q" for i in range(5)]}
    write_json(tmp_path / "directions.json", found | {"magnitude": magnitude.tolist(), "direction": direction.tolist()})
    figure = direction_figure(tmp_path)
    assert figure is not None and [trace["x"] for trace in figure.data] == direction.T.tolist()
    expected = np.corrcoef(direction.ravel(), magnitude.ravel())[0, 1]
    assert correlation(direction.ravel(), magnitude.ravel()) == pytest.approx(expected, rel=1e-12)
    assert f"{expected:.2f}" in figure.summary
    assert correlation([1, 1], [1, 2]) is None
    write_json(tmp_path / "directions.json", found | {"magnitude": [[1.0]], "direction": direction.tolist()})
    with pytest.raises(RunError, match="cannot be read"):
        direction_figure(tmp_path)


# --- strings from outside ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hostile", ["</script><script>alert(1)</script>", "<!--", "a\u2028b", "&amp;", "\"'", "\ud83e"]
)
def test_data_cannot_leave_its_script(hostile: str) -> None:
    if hostile == "\ud83e":
        hostile = "\U0001f98a"
    text = script_json({"x": hostile, "nan": math.nan})
    assert json.loads(text) == {"x": hostile, "nan": None}
    assert not set("<>&\u2028\u2029") & set(text)


def test_labels_are_text_for_plotly_and_for_html() -> None:
    assert plot_text("<b>&</b>") == "&lt;b&gt;&amp;&lt;/b&gt;"
    assert plot_text("שלום") == "\u2068שלום\u2069" and plot_text("a\u202eb") == "a\ufffdb"
    assert isolated("<i>") == "<bdi>&lt;i&gt;</bdi>"
    made = table("<c>", ["", "<v>"], [("<r>", 0.123456), ("r", None), ("s", "<x>")], key='"')
    tags = [tag for tag, _ in Reader(made).tags]
    assert not {"c", "v", "r", "x"} & set(tags)
    assert 'data-value="0.123456">0.1235<' in made and 'scope="row"' in made
