"""``adalora scan``: a rank map before training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adalora.scanning import largest

Run = Callable[..., Any]


def test_the_budget_goes_to_the_largest_values_of_all() -> None:
    assert largest({"a": [5.0, 1.0], "b": [4.0, 3.0], "c": []}, 3) == {"a": 1, "b": 2, "c": 0}
    assert largest({"a": [2.0], "b": [2.0]}, 1) == {"a": 1, "b": 0}  # ties in the model's order
    assert largest({"a": [2.0]}, 5) == {"a": 1}


def test_a_scan_beside_learned_ranks(adalora: Run, tiny_run: list[object]) -> None:
    flags = [*tiny_run, "--set", "adalora.start_batches=4"]
    assert adalora("train", *tiny_run).code == 0
    before = sorted(path.name for path in Path("run").iterdir())
    done = adalora("scan", *flags, "--run", "run", "--png", "scan.png", "--html", "scan.html", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["rows"] == 32 and 0 < found["share"] <= 1
    assert sum(found["ranks"].values()) == 24 and len(found["ranks"]) == 12
    values = found["singular_values"]
    assert all(of == sorted(of, reverse=True) and len(of) == 3 for of in values.values())
    every = sorted((value for of in values.values() for value in of), reverse=True)
    for name, rank in found["ranks"].items():
        assert all(value >= every[23] for value in values[name][:rank])
    assert found["learned"].keys() == values.keys()
    assert -1 <= found["likeness"]["spearman_of_sums"] <= 1 and 0 <= found["likeness"]["moved"] <= 1
    assert Path("scan.png").read_bytes().startswith(b"\x89PNG")
    page = Path("scan.html").read_text()
    assert "Ranks by the gradient" in page and "Learned ranks" in page and "decision 016" in page
    words = " ".join(adalora("scan", *flags, "--run", "run").out.split())
    assert f"{found['likeness']['spearman_of_sums']:.2f} of the sums of singular values" in words
    assert sorted(path.name for path in Path("run").iterdir()) == before, "nothing is written but what was asked for"


def test_the_output_layer_may_learn_first(adalora: Run, tiny_run: list[object]) -> None:
    at_once = json.loads(adalora("scan", *tiny_run, "--json").out)
    later = json.loads(adalora("scan", *tiny_run, "--head-steps", 20, "--json").out)
    assert (at_once["head_steps"], later["head_steps"]) == (0, 20)
    assert at_once["singular_values"] != later["singular_values"]
    said = adalora("scan", *tiny_run, "--head-steps", 20).out
    assert "after 20 steps of the output layer alone" in " ".join(said.split())


@pytest.mark.parametrize(("flags", "message"), [(["--run", "nothing"], "nothing"), (["--head-steps", "-1"], "")])
def test_what_cannot_be_meant(adalora: Run, tiny_run: list[object], flags: list[str], message: str) -> None:
    refused = adalora("scan", *tiny_run, *flags)
    assert refused.code == 2 and message in refused.err
