"""The tables of docs/results.md from docs/results/*.json, which are the ``results.json`` of the bench's runs.

``python -m tests.docs.results_page`` writes each anew, between two comments that readers do not see:
``<!-- table of glue, sst2: method budget score -->`` and ``<!-- end of table -->``; ``agreement`` stands for a task.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from .pages import DOCS

PAGE = DOCS / "results.md"

_TABLE = re.compile(
    r"(?P<start><!-- table of (?P<grid>[\w-]+), (?P<task>\w+)(?:: (?P<columns>[\w ]+))? -->\n)"
    r".*?(?P<end>^<!-- end of table -->$)",
    re.MULTILINE | re.DOTALL,
)

# What the rows of a grid are called on the page, where its names are too short to be read alone.
LABELS: Mapping[str, Mapping[str, str]] = {
    "places": {
        "everywhere": "all six kinds, all layers",
        "query": "queries",
        "key": "keys",
        "value": "values",
        "attention-output": "attention's output",
        "feed-forward-in": "feed-forward, in",
        "feed-forward-out": "feed-forward, out",
        "layers-1-2": "layers 1 and 2",
        "layers-3-4": "layers 3 and 4",
        "layers-5-6": "layers 5 and 6",
    },
    "directions": {
        "automatic-1e-3": "gain √(d/3): 11 and 23",
        "automatic-3e-3": "gain √(d/3)",
        "automatic-frobenius-1e-3": "gain √(d/3), `frobenius`",
        "automatic-frobenius-3e-3": "gain √(d/3), `frobenius`",
        "automatic-hundredth-1e-3": "gain √(d/3), γ = 0.01",
        "root-3e-3": "gain 3.4",
        "root-1e-2": "gain 3.4",
        "root-frobenius-3e-3": "gain 3.4, `frobenius`",
        "root-frobenius-1e-2": "gain 3.4, `frobenius`",
        "root-hundredth-3e-3": "gain 3.4, γ = 0.01",
        "one-1e-2": "gain 1",
        "one-3e-2": "gain 1",
        "one-frobenius-1e-2": "gain 1, `frobenius`",
        "gaussian-1e-2": "gain 1, Gaussian start: the paper's formulas",
        "gaussian-frobenius-1e-2": "gain 1, Gaussian start, `frobenius`: the authors' code",
    },
    "ablations": {
        "adalora": "nothing: sensitivity × uncertainty, γ = 0.1, ΔT = 2 steps, phases 0.1 and 0.3",
        **{
            metric: f"importance `{metric}`"
            for metric in ("sensitivity", "uncertainty", "ratio", "singular", "magnitude", "norm_product")
        },
        "uniform": "policy `uniform`",
        "no-orthogonality": "γ = 0",
        "strong-orthogonality": "γ = 0.5",
        "no-gain": "no gain of Λ, as in the paper",
        "every-10-steps": "ΔT = 10 steps",
        "every-40-steps": "ΔT = 40 steps",
        "early": "pruning from step 0 to 60 (`tinit` 0, `tfinal` 0.7)",
        "late": "pruning from step 100 to 180 (`tinit` 0.5, `tfinal` 0.1)",
        "from-rank-2": "rank 2 → 2, nothing to prune",
        "from-rank-4": "rank 4 → 2",
        "from-rank-8": "rank 8 → 2",
    },
}


def fill(page: str, results: Callable[[str], dict[str, Any]]) -> str:
    """The page with each table as ``results`` (a grid's name -> its results.json) has it."""

    def written(found: re.Match[str]) -> str:
        grid = results(found["grid"])
        if found["task"] == "agreement":
            table = _agreement(grid)
        else:
            columns = (found["columns"] or "").split()
            table = _comparison(grid, found["task"], columns, LABELS.get(found["grid"], {}))
        return f"{found['start']}{table}\n{found['end']}"

    return _TABLE.sub(written, page)


def committed(name: str) -> dict[str, Any]:
    """docs/results/NAME.json."""
    found: dict[str, Any] = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _comparison(grid: dict[str, Any], task: str, columns: list[str], labels: Mapping[str, str]) -> str:
    table = grid["tasks"][task]
    heads = {"score": table["headline"], "difference": f"minus {grid['reference']}", "rate": "learning rate"}
    # A mean below one is a share or a correlation, which the page shows in points.
    points = 100 if max(abs(row["mean"]) for row in table["rows"]) <= 1 else 1
    cells: dict[str, Callable[[dict[str, Any]], str]] = {
        "method": lambda row: labels.get(row["method"], row["method"]),
        "budget": lambda row: "all weights" if row["budget"] is None else _count(row["budget"]),
        "score": lambda row: f"{row['mean'] * points:.2f} ± {row['deviation'] * points:.2f}",
        "seeds": lambda row: ", ".join(
            f"{score * points:.1f}" + ("\\*" if int(seed) in row["seeds_undefined"] else "")
            for seed, score in row["scores"].items()
        ),
        "difference": lambda row: _difference(row["difference"], points),
        "rate": lambda row: ", ".join(f"{rate:g}" for rate in row["learning_rates"]),
        "parameters": lambda row: _parameters(row["cost"]),
        "minutes": lambda row: f"{row['cost']['minutes']:.1f}",
        "memory": lambda row: f"{row['cost']['peak_bytes'] / 2**20:,.0f} MiB",
    }
    words = {"method", "budget", "seeds"}
    return _markdown(
        [heads.get(name, name) for name in columns],
        ["---" if name in words else "---:" for name in columns],
        [[cells[name](row) for name in columns] for row in table["rows"]],
    )


def _agreement(grid: dict[str, Any]) -> str:
    return _markdown(
        ["between", "of", "mean", "lowest to highest", "pairs"],
        ["---", "---", "---:", "---:", "---:"],
        [
            [pair["between"], pair["what"], f"{pair['mean']:.2f}", f"{pair['low']:.2f} to {pair['high']:.2f}",
             str(pair["pairs"])]
            for pair in grid["rank_agreement"]
        ],
    )  # fmt: skip


def _markdown(heads: list[str], rules: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        [f"| {' | '.join(heads)} |", f"|{'|'.join(rules)}|", *(f"| {' | '.join(row)} |" for row in rows)]
    ).replace("-0.", "−0.")


def _count(number: float | str) -> str:
    return number if isinstance(number, str) else f"{number:,.0f}"


def _parameters(cost: dict[str, Any]) -> str:
    start, saved = _count(cost["adapter_start"]), _count(cost["adapter_saved"])
    return saved if start == saved else f"{start} → {saved}"


def _difference(found: dict[str, Any] | None, points: int) -> str:
    if found is None:
        return "–"
    mean, low, high = (f"{found[name] * points:+.2f}" for name in ("mean", "low", "high"))
    p = "–" if found["p_value"] is None else f"{found['p_value']:.3f}"
    return f"{mean} ({low} to {high}, p {p})".replace("-", "−")


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), committed), encoding="utf-8")
