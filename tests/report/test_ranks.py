"""The grid of layers and modules, the trace, the picture and the tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from adalora.report.grid import arrange, place
from adalora.report.ranks import draw_ranks
from adalora.report.run import read_trace
from adalora.report.terminal import metric_table, rank_table


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("encoder.layer.3.attention.self.query", ("encoder.layer", 3, "attention.self.query")),
        ("model.layers.11.mlp.experts.2.gate_proj", ("model.layers", 11, "mlp.experts.2.gate_proj")),
        ("transformer.h.0.attn.c_attn", ("transformer.h", 0, "attn.c_attn")),
        ("lm_head", ("", None, "lm_head")),
        ("blocks.7", ("", None, "blocks.7")),
    ],
)
def test_where_a_module_sits(name: str, where: tuple[str, int | None, str]) -> None:
    assert place(name) == where


def test_layers_are_in_the_order_of_their_numbers() -> None:
    grid = arrange({f"h.{layer}.q": layer for layer in (10, 2, 0)})
    assert grid.layers == ["0", "2", "10"] and grid.values == [[0, 2, 10]]


def test_stacks_are_kept_apart() -> None:
    ranks = {"model.decoder.layers.0.q": 1, "model.encoder.layers.0.q": 2, "model.decoder.layers.0.cross": 3, "head": 4}
    grid = arrange(ranks)
    assert grid.layers == ["decoder 0", "encoder 0", "-"]
    assert dict(zip(grid.modules, grid.values, strict=True)) == {
        "q": [1, 2, None],
        "cross": [3, None, None],
        "head": [None, None, 4],
    }


def test_modules_without_layers_are_one_column() -> None:
    assert arrange({"up": 1, "down": 2}) == (["-"], ["up", "down"], [[1], [2]])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    lines = [
        {"type": "start", "names": ["h.0.q", "h.1.q"], "initial_ranks": [3, 3], "triplet_parameters": [8, 8],
         "budget": {"initial": 6, "target": 4}, "schedule": None, "importance": "singular", "policy": "global_topk"},
        {"type": "allocation", "step": 2, "budget": 5, "ranks": [3, 2], "returned": [0, 0], "orthogonality": 0.1},
        {"type": "allocation", "step": 4, "budget": 4, "ranks": [1, 3], "returned": [0, 1], "orthogonality": 0.1},
    ]  # fmt: skip
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_last_allocation_counts(trace: Path) -> None:
    assert read_trace(trace).final == {"h.0.q": 1, "h.1.q": 3}
    whole = trace.read_text()
    trace.write_text(whole[:-20])  # cut short by a kill
    assert read_trace(trace).final == {"h.0.q": 3, "h.1.q": 2}
    trace.write_text(whole.splitlines()[0] + "\n")  # nothing to prune
    assert read_trace(trace).final == {"h.0.q": 3, "h.1.q": 3}


def test_the_picture(trace: Path, tmp_path: Path) -> None:
    picture = tmp_path / "ranks.png"
    draw_ranks(read_trace(trace), picture, "Learned ranks")
    pixels = imread(picture)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600
    assert len({tuple(pixel) for pixel in pixels[::7, ::7, :3].reshape(-1, 3).round(2)}) > 3, "not blank"
    assert {path.name for path in tmp_path.iterdir()} == {"trace.jsonl", "ranks.png"}


@pytest.mark.parametrize(("layers", "corner"), [(6, "module"), (40, "layer")])
def test_the_table_turns_where_the_terminal_is_narrow(layers: int, corner: str) -> None:
    console = Console(width=80, record=True, file=None, quiet=True)
    ranks = {f"h.{layer}.{module}": layer for layer in range(layers) for module in ("q_proj", "v_proj")}
    table = rank_table(ranks, console.width)
    assert table.columns[0].header == corner
    assert f"{(layers - 1) / 2:.1f}" in list(table.columns[-1].cells)


def test_a_metric_that_is_not_defined_says_so() -> None:
    table = metric_table({"pearson": 0.5}, {"pearson": None}, "always 2", "adalora")
    assert [list(column.cells) for column in table.columns] == [["pearson"], ["0.500"], ["undefined"]]
