"""The pages that people read, and the blocks of code on them.

A block that cannot run here has a comment before it, which readers do not see: ``<!-- not run: needs vLLM -->``.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]

_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<kind>\w+)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_NOT_RUN = re.compile(r"<!-- not run: (?P<why>[^>]+) -->\n\Z")
_FILE = re.compile(r"^`(?P<name>[\w.-]+)`:\n\n\Z", re.MULTILINE)


class Block(NamedTuple):
    """One block of code."""

    page: Path
    line: int  # of its fence
    kind: str  # python, bash, console, yaml, ...
    text: str
    file: str  # the name of the file that it is, if its page says so
    not_run: str  # why it cannot run here, or nothing

    @property
    def place(self) -> str:
        """``docs/guides/trl.md:5``, as editors open it."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Every block with a language, in order."""
    content = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(content):
        before = content[: found.start()]
        not_run, file = _NOT_RUN.search(before), _FILE.search(before)
        yield Block(
            page,
            before.count("\n") + 1,
            found["kind"],
            textwrap.dedent(found["text"]),
            file["name"] if file else "",
            not_run["why"] if not_run else "",
        )


BLOCKS = [block for page in PAGES for block in blocks(page)]
