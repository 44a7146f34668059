"""What can be wrong with data."""

from ..core.errors import AdaLoraError


class DataError(AdaLoraError):
    """Data that cannot be used: what was given, what was expected, what to do."""
