"""The picture of the terminal needs nothing from elsewhere, and is not too large for a README."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from .terminal_picture import LEFT_OUT, PICTURE, draw

SAID = f"""\
\x1b[1mTask  \x1b[0mreviews into <b>, fresh
{"long " * 30}
Next:
  adalora evaluate run
{LEFT_OUT}
  /home/me
"""


def words(svg: str) -> str:
    """The text of a picture, in order."""
    texts = [text for text in ElementTree.fromstring(svg).iter() if text.tag.endswith("}text")]
    return " ".join(" ".join("".join(text.itertext()) for text in texts).replace("\xa0", " ").split())


def test_what_was_said_is_drawn_to_the_last_word_but_paths() -> None:
    found = words(draw(SAID))
    assert "$ adalora train Task reviews into <b>, fresh long long" in found
    assert found.count("long") == 30 and found.endswith("adalora evaluate run")
    assert "PEFT" not in found and "/home/me" not in found


@pytest.mark.parametrize("svg", [draw(SAID), *([PICTURE.read_text("utf-8")] if PICTURE.is_file() else [])])
def test_a_picture_needs_nothing_from_elsewhere(svg: str) -> None:
    assert len(svg.encode()) < 100_000
    assert set(re.findall(r"https?://[^\"' )]+", svg)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\((?!#)|<script|/(?:home|root|tmp|usr)/", svg)
