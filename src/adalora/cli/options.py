"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines; words go to stderr.")]
Picture = Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Save a picture.", show_default=False)]
Page = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Save a page, for any browser.", show_default=False)
]
