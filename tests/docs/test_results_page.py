"""The tables of docs/results.md are what the bench's runs say."""

from __future__ import annotations

from typing import Any

from .results_page import PAGE, committed, fill


def test_the_page_is_up_to_date() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == fill(written, committed), "run: python -m tests.docs.results_page"


def test_each_committed_result_has_a_table() -> None:
    written = PAGE.read_text(encoding="utf-8")
    for path in sorted((PAGE.parent / "results").glob("*.json")):
        for task in committed(path.stem)["tasks"]:
            assert f"<!-- table of {path.stem}, {task}: " in written, f"{path.name} has {task}, the page has not"


def test_a_table_says_what_the_results_say() -> None:
    row: dict[str, Any] = {
        "method": "lora", "budget": "rank 2", "learning_rates": [0.003], "scores": {"1": 0.5, "2": 0.0},
        "mean": 0.25, "deviation": 0.3536, "seeds_undefined": [2],
        "difference": {"mean": -0.25, "low": -0.5, "high": 0.0, "p_value": None},
        "cost": {"adapter_start": 1200.0, "adapter_saved": 800.0, "minutes": 1.26, "peak_bytes": 2**31},
    }  # fmt: skip
    grid = {
        "reference": "full",
        "tasks": {"sst2": {"headline": "accuracy", "rows": [row]}},
        "rank_agreement": [{"between": "seeds", "what": "adalora", "mean": 0.5, "low": -0.25, "high": 1.0, "pairs": 3}],
    }
    page = (
        "Before.\n\n<!-- table of it, sst2: method budget score seeds difference rate parameters minutes memory -->\n"
        "what stood here\n<!-- end of table -->\n\n<!-- table of it, agreement -->\n<!-- end of table -->\nAfter.\n"
    )
    filled = fill(page, lambda name: grid)
    assert (
        "| method | budget | accuracy | seeds | minus full | learning rate | parameters | minutes | memory |" in filled
    )
    assert (
        "| lora | rank 2 | 25.00 ± 35.36 | 50.0, 0.0\\* | −25.00 (−50.00 to +0.00, p –) | 0.003 | 1,200 → 800 | 1.3 "
        "| 2,048 MiB |" in filled
    )
    assert "| seeds | adalora | 0.50 | −0.25 to 1.00 | 3 |" in filled
    assert "what stood here" not in filled and filled.startswith("Before.") and filled.endswith("After.\n")
    assert fill(filled, lambda name: grid) == filled
