"""docs/reference/commands.md is what the commands' own help says."""

from __future__ import annotations

from .commands_page import page
from .pages import DOCS


def test_the_page_is_up_to_date() -> None:
    written = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m tests.docs.commands_page > docs/reference/commands.md"
