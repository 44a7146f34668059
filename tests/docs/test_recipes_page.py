"""docs/recipes.md lists every key of a recipe, as it is."""

from __future__ import annotations

from pathlib import Path

from .recipes_page import page


def test_the_page_is_up_to_date() -> None:
    written = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m tests.docs.recipes_page > docs/recipes.md"
