"""The first module that the server of cells imports: it keeps the libraries quiet, which come after it."""

from __future__ import annotations

from ..quiet import quieten

quieten()
