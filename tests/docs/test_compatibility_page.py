"""The compatibility page is made from outcomes, and is up to date with the tests that speak for its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from .compatibility_page import Row, page

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def test_outcomes_become_words() -> None:
    rows = [
        Row("Layers", "Linear", "works", "", "tests/a.py::one"),
        Row("Layers", "Linear", "skipped", "no GPU", "tests/a.py::two"),
        Row("Layers", "Conv9d", "refused", "", "tests/a.py::three"),
        Row("Serving", "an engine", "skipped", "it is not installed", "tests/a.py::four"),
        Row("Serving", "another", "failed", "", "tests/a.py::five"),
        Row("Serving", "another", "works", "", "tests/a.py::five"),
    ]
    text = page(rows)
    assert "| Linear | works | `tests/a.py::one` |" in text
    assert "| Conv9d | refused with a clear error | `tests/a.py::three` |" in text
    assert "| an engine | not testable here: it is not installed | `tests/a.py::four` |" in text
    assert "| another | **fails** | `tests/a.py::five` |" in text
    assert text.index("## Layers") < text.index("## Serving")
    with pytest.raises(ValueError, match="Nowhere"):
        page([Row("Nowhere", "x", "works", "", "t")])


def test_the_page_has_every_row_and_no_failure(request: pytest.FixtureRequest) -> None:
    """Run ``make compatibility`` when a test has begun to speak for a new row."""
    text = PAGE.read_text(encoding="utf-8")
    missing = {
        f"{mark.args[0]}: {mark.args[1]}"
        for item in request.session.items
        for mark in item.iter_markers("compatibility")
        if f"| {mark.args[1]} |" not in text
    }
    assert missing == set() and "**fails**" not in text
