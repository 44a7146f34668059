"""What can go wrong with a bench as a whole."""

from __future__ import annotations

from ..core.errors import AdaLoraError


class BenchError(AdaLoraError, RuntimeError):
    """A bench that cannot run: what is in its way, and what to do."""
