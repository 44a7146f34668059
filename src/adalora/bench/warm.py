"""What cells need, imported once by the server that they are forked from."""

from __future__ import annotations

from ..quiet import quieten

quieten()

from .. import methods, progress, tasks, training  # noqa: E402, F401
