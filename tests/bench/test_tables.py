"""From records to tables and pages: every number against one computed by hand, and every kind of gap."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from adalora.bench.pages import as_json, as_latex, as_markdown, latex, write_results
from adalora.bench.published import ALL, figures
from adalora.bench.records import Record
from adalora.bench.tables import Results, Row, Table, results
from adalora.files import to_json

from .grids import DEBERTA, failed, grid, record

LORA, ADALORA = [0.80, 0.82, 0.84], [0.81, 0.84, 0.87]


def scored(task: str, method: str, budget: Any, scores: list[float], **more: Any) -> list[Record]:
    return [record(task, method, budget, seed, score, **more) for seed, score in enumerate(scores, start=1)]


def full_records() -> list[Record]:
    """Every cell of the grid but those that choose."""
    found = []
    for budget in ("rank 2", "rank 8"):
        found += scored("mrpc", "lora", budget, LORA) + scored("mrpc", "adalora", budget, ADALORA)
        found += scored("cola", "lora", budget, [0.5, 0.6, 0.7]) + scored("cola", "adalora", budget, [0.5, 0.5, 0.5])
    return found + scored("mrpc", "full", None, [0.9, 0.9, 0.9]) + scored("cola", "full", None, [0.6, 0.6, 0.6])


def page_of(*arguments: Any) -> str:
    """The page of a grid and its records, without pictures."""
    return as_markdown(results(*arguments), {})


def table(found: Results, task: str) -> Table:
    return next(table for table in found.tables if table.task == task)


def row(of: Table, method: str, budget: Any = "rank 2") -> Row:
    return next(row for row in of.rows if row.group[1:] == (method, budget))


def line(page: str, *starts: str) -> str:
    """The first line of a Markdown table that begins with these cells."""
    wanted = "| " + " | ".join(starts) + " |"
    return next(line for line in page.splitlines() if line.startswith(wanted))


# ------------------------------------------------------------------------------------------------ rows


def test_a_row_is_compared_with_the_reference_at_its_budget() -> None:
    """By hand: differences of 1, 2 and 3 points, mean 2, deviation 1, t = 2 / (1 / sqrt 3)."""
    found = table(results(grid(), full_records()), "mrpc")
    ours = row(found, "adalora")
    assert ours.scores == {1: 0.81, 2: 0.84, 3: 0.87}
    assert math.isclose(ours.summary.mean, 0.84) and math.isclose(ours.summary.deviation, 0.03)
    assert ours.difference is not None and math.isclose(ours.difference.mean, 0.02)
    assert math.isclose(ours.difference.p_value, 0.0741799, rel_tol=1e-5)  # Student's t of 2 degrees at 3.4641
    assert row(found, "lora").difference is None
    assert row(found, "full", None).difference is None, "no lora at that budget"
    assert (found.headline, found.points, found.model) == ("accuracy", {"accuracy": 100.0}, "demo:minilm")


def test_the_seed_that_chooses_is_not_reported() -> None:
    tried = [record("mrpc", "lora", "rank 2", 0, score, rate) for rate, score in [(1e-3, 0.99), (5e-3, 0.1)]]
    found = row(table(results(grid(), [*tried, *full_records()]), "mrpc"), "lora")
    assert (found.scores, found.learning_rates, found.tried) == ({1: 0.80, 2: 0.82, 3: 0.84}, [1e-3], [1e-3, 5e-3])


def test_costs_are_of_reported_runs_that_were_not_interrupted() -> None:
    runs = [
        record("mrpc", "lora", "rank 2", 0, 0.5, seconds=9e9, peak_bytes=2**50),
        record("mrpc", "lora", "rank 2", 1, 0.5, seconds=60.0, peak_bytes=2**20),
        record("mrpc", "lora", "rank 2", 2, 0.5, seconds=180.0, gpu_peak_bytes=2**30),
        record("mrpc", "lora", "rank 2", 3, 0.5, seconds=1.0, resumed=True, peak_bytes=2**20),
    ]
    cost = row(table(results(grid(), runs), "mrpc"), "lora").cost
    assert cost == (3000, 2000, 2.0, 2**30)


@pytest.mark.parametrize(
    ("task", "name", "value", "points"),
    [
        ("glue/mrpc", "accuracy", 0.9, 100),
        ("glue/cola", "mcc", -0.2, 100),
        ("question_answering", "f1", 0.9, 1),  # per cent already, however low
        ("summarization", "rougeLsum", 0.9, 1),
        ("data_to_text/webnlg", "ter_unseen", 0.9, 1),
        ("regression", "mse", 0.02, 1),
        ("regression", "mse, another split", 0.02, 1),
        ("regression", "pearson, another split", 0.02, 100),
        ("instruction", "perplexity", 1.5, 1),
        ("instruction", "exact_match", 0.5, 100),
    ],
)
def test_shares_and_correlations_are_shown_in_points(task: str, name: str, value: float, points: float) -> None:
    one = grid(tasks={"it": {"task": task, "data": {"train": "rows"}}})
    found = results(one, [record("it", "lora", "rank 2", 1, value, headline=name)])
    assert found.tables[0].points == {name: points}


# ------------------------------------------------------------------------------------------------ averages


def test_the_average_is_over_tasks_seed_by_seed() -> None:
    """By hand, at rank 2: lora has (80 + 50) / 2, (82 + 60) / 2, (84 + 70) / 2; adalora 65.5, 67 and 68.5."""
    found = results(grid(), full_records()).averages
    assert [average.title for average in found] == ["Average at rank 2", "Average at rank 8", "Average"]
    lora, adalora = row(found[0], "lora"), row(found[0], "adalora")
    assert lora.scores == pytest.approx({1: 65.0, 2: 71.0, 3: 77.0})
    assert adalora.scores == pytest.approx({1: 65.5, 2: 67.0, 3: 68.5})
    assert adalora.difference is not None and math.isclose(adalora.difference.mean, -4.0)


def test_the_average_is_of_the_same_tasks_and_seeds_for_every_method() -> None:
    without_a_seed = [r for r in full_records() if (r.task, r.method, r.seed) != ("cola", "adalora", 2)]
    found = results(grid(), without_a_seed).averages[0]
    assert [list(r.scores) for r in found.rows] == [[1, 3], [1, 3]]
    without_a_task = [r for r in full_records() if (r.task, r.method) != ("cola", "adalora")]
    assert [t.title for t in results(grid(), without_a_task).averages] == ["Average"], "full alone has both tasks"


def test_the_average_names_the_tasks_it_leaves_out() -> None:
    tasks = {name: {"task": "glue/rte", "data": {"train": "rows"}} for name in ("a", "b", "c")}
    tasks["d"] = {"task": "instruction", "data": {"train": "rows"}}
    records = [r for task in "ab" for m in ("lora", "adalora") for r in scored(task, m, "rank 2", LORA)]
    records += scored("c", "lora", "rank 2", LORA)
    records += [r for m in ("lora", "adalora") for r in scored("d", m, "rank 2", [9.0], headline="perplexity")]
    found = results(grid(tasks=tasks, budgets=["rank 2"], methods={"lora": None, "adalora": None}), records).averages
    assert [average.words for average in found] == [
        "mean of a (accuracy), b (accuracy); left out: c (no result of adalora), d (less perplexity is better)"
    ]


# ------------------------------------------------------------------------------------------------ gaps


def test_an_unfinished_grid_says_what_is_missing() -> None:
    records = [
        *scored("mrpc", "lora", "rank 2", [0.8, 0.9]),
        record("mrpc", "adalora", "rank 2", 1, 0.9),
        record("mrpc", "adalora", "rank 2", 2, None),
        failed("mrpc", "adalora", "rank 2", 3, "OutOfMemoryError: a | b"),
        failed("mrpc", "adalora", "rank 2", 0, "TrainingError: the loss became nan", rate=5e-3),
    ]
    page = page_of(grid(), records)
    assert line(page, "lora", "rank 2", "2 of 3", "85.00 ± 7.07", "–", "–", "–")
    assert line(page, "adalora", "rank 2", "2 of 3 (1 failed)", "45.00 ± 63.64", "−40.00", "−90.00 to +10.00")
    assert line(page, "lora", "rank 8", "0 of 3", "–", "–", "–", "–", "–", "–", "–", "–")
    for said in (
        "- lora at rank 2: 1 of 3 seeds are still to be run",
        "- adalora at rank 2: accuracy is not defined at seed 2: a constant answer, which counts as 0",
        "- adalora at rank 2: failed at seed 3, learning rate 0.001 (to report): OutOfMemoryError: a | b",
        "- adalora at rank 2: failed at seed 0, learning rate 0.005 (to choose): TrainingError: the loss became nan",
        "- full: 3 of 3 seeds are still to be run",
    ):
        assert said in page.splitlines()
    assert "- adalora at rank 2: 1 of 3 seeds" not in page, "failed and undefined ones have been run"


def test_what_is_not_defined_and_better_low_is_left_out() -> None:
    """There is no worst perplexity to count it as."""
    records = [
        record("mrpc", "lora", "rank 2", seed, score, headline="perplexity", lower_is_better=True)
        for seed, score in ((1, 3.0), (2, None))
    ]
    found = row(table(results(grid(), records), "mrpc"), "lora")
    assert found.scores == {1: 3.0} and found.undefined == [2] and found.missing == 1


def test_a_group_without_any_result_is_not_still_to_be_run() -> None:
    lost = [failed("mrpc", "lora", "rank 2", 0, "it broke", rate) for rate in (1e-3, 5e-3)]
    page = page_of(grid(), lost).partition("## cola")[0].splitlines()
    assert "- lora at rank 2: no learning rate gave a result, so there is none to report" in page
    assert "- lora at rank 2: 3 of 3 seeds are still to be run" not in page


@pytest.mark.parametrize(("rate", "word"), [(1e-3, "lowest"), (5e-3, ""), (2e-2, "highest")])
def test_a_rate_at_the_edge_of_those_tried_is_pointed_out(rate: float, word: str) -> None:
    tried = [record("mrpc", "lora", "rank 2", 0, 0.5, tried) for tried in (1e-3, 5e-3, 2e-2)]
    one = grid(learning_rates=[1e-3, 5e-3, 2e-2])
    page = page_of(one, [*tried, record("mrpc", "lora", "rank 2", 1, 0.5, rate)])
    said = f"- lora at rank 2: the learning rate chosen, {rate:g}, is the {word} of those tried"
    assert (said in page.splitlines()) == bool(word) == ("of those tried" in page)


def test_a_constant_difference_has_an_interval_and_no_p_value() -> None:
    records = scored("mrpc", "lora", "rank 2", LORA) + scored("mrpc", "adalora", "rank 2", LORA)
    page = page_of(grid(), records)
    assert line(page, "adalora", "rank 2", "3", "82.00 ± 2.00", "+0.00", "+0.00 to +0.00", "–")


def test_without_a_reference_there_are_no_differences() -> None:
    alone = grid(methods={"adalora": None, "dora": None})
    records = scored("mrpc", "adalora", "rank 2", ADALORA) + scored("mrpc", "dora", "rank 2", LORA)
    found = results(alone, records)
    assert all(row.difference is None for table in found.tables for row in table.rows)
    page = as_markdown(found, {})
    assert "names no reference" in page and "minus lora" not in page and "interval" not in page


def test_a_reference_that_failed_leaves_scores_without_differences() -> None:
    records = [failed("mrpc", "lora", "rank 2", 1, "it broke"), *scored("mrpc", "adalora", "rank 2", ADALORA)]
    page = page_of(grid(), records)
    assert line(page, "adalora", "rank 2", "3", "84.00 ± 3.00", "–", "–", "–")


def test_another_reference_can_be_named() -> None:
    page = page_of(grid(reference="adalora"), full_records())
    assert "minus adalora" in page
    assert line(page, "lora", "rank 2", "3", "82.00 ± 2.00", "−2.00")
    assert line(page, "adalora", "rank 2", "3", "84.00 ± 3.00", "–")


# ------------------------------------------------------------------------------------------------ pages


def test_the_page_has_rates_costs_and_every_metric() -> None:
    metrics = {"accuracy": 0.8, "f1": 0.875}
    records = [record("mrpc", "lora", "rank 2", 0, score, rate) for rate, score in [(1e-3, 0.7), (5e-3, 0.8)]]
    records += [record("mrpc", "lora", "rank 2", seed, 0.8, 5e-3, metrics=metrics) for seed in (1, 2, 3)]
    page = page_of(grid(), records)
    first = line(page, "lora", "rank 2", "3")
    assert first == (
        "| lora | rank 2 | 3 | 80.00 ± 0.00 | – | – | – | 80.00 | 0 | 0.005 (0.001, 0.005) | 3,000 → 2,000 | 2.0 |"
        " 1,024 MiB |"
    )
    assert "| method | budget | accuracy | f1 |" in page.splitlines()
    assert "| lora | rank 2 | 80.00 ± 0.00 | 87.50 ± 0.00 |" in page.splitlines()


def test_the_page_has_every_score_seed_by_seed() -> None:
    """So that a collapse can be told from noise, which a mean does not say."""
    collapsed = [r for r in full_records() if (r.task, r.method, r.seed) != ("mrpc", "adalora", 2)]
    page = page_of(grid(), [*collapsed, record("mrpc", "adalora", "rank 2", 2, 0.0)])
    of_mrpc = page[page.index("### accuracy of mrpc, seed by seed") :]
    assert of_mrpc.splitlines()[2] == "| method | budget | seed 1 | seed 2 | seed 3 |"
    assert line(of_mrpc, "lora", "rank 2") == "| lora | rank 2 | 80.00 | 82.00 | 84.00 |"
    assert line(of_mrpc, "adalora", "rank 2") == "| adalora | rank 2 | 81.00 | 0.00 | 87.00 |"
    assert line(of_mrpc, "adalora", "rank 8") == "| adalora | rank 8 | 81.00 | – | 87.00 |"
    one = [r for r in full_records() if r.seed == 1]
    assert "mrpc, seed by seed" not in page_of(grid(), one)


def test_metrics_of_which_less_is_more_are_marked() -> None:
    """And have more digits while they are below 1, since they are not in points."""
    tasks = {"stsb": {"task": "regression", "data": {"train": "rows"}}}
    metrics = {"pearson": 0.85, "mse": 0.0213, "pearson, other": 0.8, "mse, other": 0.0314}
    records = [record("stsb", "lora", "rank 2", seed, 0.85, headline="pearson", metrics=metrics) for seed in (1, 2)]
    lines = page_of(grid(tasks=tasks), records).splitlines()
    assert "| method | budget | pearson | mse ↓ | pearson, other | mse, other ↓ |" in lines
    assert "| lora | rank 2 | 85.00 ± 0.00 | 0.0213 ± 0.0000 | 80.00 ± 0.00 | 0.0314 ± 0.0000 |" in lines


def test_the_page_says_how_wide_the_claim_is() -> None:
    assert "it would hold the true mean 75% of the time with 3 seeds" in page_of(grid(), full_records())


def test_the_page_says_with_which_versions_its_runs_were_made() -> None:
    def lora(seed: int, **versions: str) -> Record:
        return record("mrpc", "lora", "rank 2", seed, 0.8, versions=versions)

    same = page_of(grid(), [lora(1, adalora="0.1.0", torch="2.13.0"), lora(2, adalora="0.1.0", torch="2.13.0")])
    assert "Run with adalora 0.1.0, torch 2.13.0." in same.splitlines()
    mixed = results(grid(), [lora(1, torch="2.13.0"), lora(2, torch="2.6.0")])
    assert "Run with torch 2.13.0 and 2.6.0. Runs of several versions stand side by side here." in as_markdown(
        mixed, {}
    )
    assert as_json(mixed)["versions"] == {"torch": ["2.13.0", "2.6.0"]}


def test_the_page_says_what_one_method_is_worth_over_all_tasks() -> None:
    """By hand: 2 points on one task, 10 behind on the other at one budget as at the other; the mean is -4."""
    records = full_records()
    page = page_of(grid(), records)
    assert line(page, "lora", "−4.00").endswith(" | 2 | 2 | 0 | 0, 0 |")  # the interval on the other reaches 0
    told = as_json(results(grid(), records))["overall"][0]
    assert (told["method"], told["rival"], told["tasks"]) == (
        "adalora", "lora", {"mrpc": pytest.approx(2), "cola": pytest.approx(-10)}
    )  # fmt: skip
    assert as_json(results(grid(ours="lora"), records))["overall"][0]["rival"] == "adalora"


def test_figures_of_another_model_are_said_to_be_of_another() -> None:
    page = page_of(grid(), full_records())
    assert line(page, "adalora", "1.27M", "accuracy", "90.69")
    assert f"{DEBERTA}, another model than demo:minilm above, all of the data" in page
    same = page_of(grid(base={"model": DEBERTA}), full_records())
    assert DEBERTA in same and "another model" not in same


def test_the_json_is_complete_and_plain() -> None:
    records = [*full_records(), failed("mrpc", "lora", "rank 2", 0, "it broke")]
    found = json.loads(to_json(as_json(results(grid(), records))))
    ours = next(r for r in found["tasks"]["mrpc"]["rows"] if (r["method"], r["budget"]) == ("adalora", "rank 2"))
    assert ours["scores"] == {"1": 0.81, "2": 0.84, "3": 0.87} and ours["n"] == ours["seeds_wanted"] == 3
    assert ours["difference"]["mean"] == pytest.approx(0.02) and ours["cost"]["adapter_saved"] == 2000
    lora = found["tasks"]["mrpc"]["rows"][0]
    assert lora["difference"] is None
    assert lora["failures"] == [{"role": "choose", "learning_rate": 1e-3, "seed": 0, "why": "it broke"}]


def test_results_can_be_written_at_any_time(tmp_path: Path) -> None:
    """From no record at all to all of them, and again to the same bytes."""
    one, records = grid(output=str(tmp_path)), full_records()
    for count in (0, 7, len(records)):
        page = write_results(one, records[:count])
        assert page == tmp_path / "results.md" and page.is_file()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in before} >= {"results.md", "results.json", "results.tex", "budget.png", "average.png"}
    write_results(one, records)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for target in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text(encoding="utf-8")):
        assert (tmp_path / target).is_file()


# ------------------------------------------------------------------------------------------------ LaTeX


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a_b & 5 % of $x #1 {y}", r"a\_b \& 5 \% of \$x \#1 \{y\}"),
        ("~/x^2\\n", r"\textasciitilde{}/x\textasciicircum{}2\textbackslash{}n"),
        ("1.00 ± 0.10", r"1.00 $\pm$ 0.10"),
        ("−2 → – < 0.001", r"$-$2 $\to$ -- $<$ 0.001"),
        ("`lora`", "lora"),
    ],
)
def test_latex_is_escaped(text: str, wanted: str) -> None:
    assert latex(text) == wanted


def test_latex_is_well_formed() -> None:
    """Environments nest, braces match, every row has its columns' number of cells, and no character is left that
    pdflatex does not know."""
    records = [*full_records(), failed("mrpc", "adalora", "rank 2", 0, "50 % of {braces} & _")]
    source = as_latex(results(grid(), records))
    assert source.startswith(r"\documentclass{article}") and r"\usepackage{booktabs}" in source
    assert source.isascii()
    stack: list[str] = []
    for what, name in re.findall(r"\\(begin|end)\{(\w+)\}", source):
        if what == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert stack == []
    bare = re.sub(r"\\[\\&%$#_{}]", "", source)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0 and "%" not in bare and "#" not in bare
    tables = re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", source, re.DOTALL)
    assert len(tables) == 3 * 2 + 2  # mrpc and cola, each by seed and with the paper's figures; two over both
    for columns, body in tables:
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) > 1
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(columns)}
        assert [body.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]


# ------------------------------------------------------------------------------------------------ the paper


@pytest.mark.parametrize(
    ("task", "source", "config", "found"),
    [
        ("glue/mrpc", "rows.csv", None, "glue/mrpc"),
        ("classification", "nyu-mll/glue", "sst2", "glue/sst2"),
        ("classification", "/data/glue/rte", None, "glue/rte"),
        ("question_answering", "rajpurkar/squad", None, "squad"),
        ("question_answering", "data/squad_v2/squad_v2", None, "squad_v2"),
        ("summarization", "EdinburghNLP/xsum", None, "xsum"),
        ("summarization", "abisee/cnn_dailymail", "3.0.0", "cnn_dailymail"),
        ("glue/wnli", "nyu-mll/glue", "wnli", None),
        ("classification", "demo:rotten_tomatoes", None, None),
    ],
)
def test_the_papers_figures_are_known_by_the_data(task: str, source: str, config: str | None, found: str) -> None:
    assert {figure.task for figure in figures(task, source, config)} == ({found} if found else set())


def test_the_papers_figures_give_the_papers_averages() -> None:
    """Over the eight tasks of GLUE, of which MNLI and QQP count with the mean of their two figures."""
    printed = {"184M": 88.09, "1.22M": 88.12, "1.18M": 88.24, "1.33M": 88.34, "1.27M": 89.31}
    for budget, wanted in printed.items():
        rows = [figure for figure in ALL if figure.budget == budget and figure.task.startswith("glue/")]
        tasks = {task: [f.value for f in rows if f.task == task] for task in {f.task for f in rows}}
        assert len(tasks) == 8 and len(rows) == 10
        assert sum(sum(values) / len(values) for values in tasks.values()) / 8 == pytest.approx(wanted, abs=0.01)
    assert len({(f.task, f.budget, f.method, f.metric) for f in ALL}) == len(ALL)
