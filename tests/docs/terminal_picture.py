"""``docs/terminal.svg``: what ``adalora train`` says, word for word, drawn from a run of the demo. It takes minutes:

python -m tests.docs.terminal_picture

Further arguments go to ``adalora train``.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from adalora.cli import main

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "terminal.svg"
COLUMNS = 84
LEFT_OUT = "or anywhere, with PEFT alone:"  # what follows names a folder of this machine
THEME = TerminalTheme(
    (30, 33, 39), (214, 218, 224),
    [(62, 68, 81), (224, 108, 117), (152, 195, 121), (229, 192, 123), (97, 175, 239), (198, 120, 221), (86, 182, 194),
     (214, 218, 224)],
)  # fmt: skip
FRAME = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img" \
aria-label="adalora train in a terminal">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; \
font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>\
</clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""
"""Rich's own, without fonts from elsewhere."""


def said(arguments: list[str]) -> str:
    """What ``adalora train`` says, with its colours, as on a terminal that does not redraw lines."""
    recorder = Console(
        record=True,
        width=COLUMNS,
        color_system="truecolor",
        force_terminal=True,
        force_interactive=False,
        highlight=False,
    )
    with (
        mock.patch("adalora.report.terminal.console", lambda stderr=False: recorder),
        mock.patch.object(sys, "argv", ["adalora", "train", *arguments]),
    ):
        try:
            main()
        except SystemExit as finish:
            if finish.code:
                raise
    return recorder.export_text(styles=True)


def draw(text: str) -> str:
    """``text``, with its colours, as an SVG without anything from elsewhere."""
    canvas = Console(record=True, width=COLUMNS, color_system="truecolor", highlight=False, file=io.StringIO())
    canvas.print(Text("$ adalora train", "bold"))
    canvas.print(Text.from_ansi(text.partition(LEFT_OUT)[0].rstrip()))
    return canvas.export_svg(title="adalora train", theme=THEME, code_format=FRAME, unique_id="adalora")


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        heard = said(sys.argv[1:])
        os.chdir(PICTURE.parent)
    PICTURE.write_text(draw(heard), encoding="utf-8")
