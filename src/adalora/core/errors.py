"""The one error tree.

AdaLoraError
├── ConfigError      a setting that cannot be meant (also a ValueError)
│   ├── UnknownFieldError    no such field (also a TypeError)
│   └── ScheduleError    step counts that leave no room to prune, or no step count at all
└── StateError       a saved state that does not fit the model, or a call at the wrong time (also a RuntimeError)
"""

from __future__ import annotations


class AdaLoraError(Exception):
    """Base of every error raised on purpose by this library."""


class ConfigError(AdaLoraError, ValueError):
    """A setting has a value that cannot be meant; the message says which, what was expected and what to do."""


class UnknownFieldError(ConfigError, TypeError):
    """A configuration has no field of this name; the message says the nearest."""


class ScheduleError(ConfigError):
    """The schedule cannot be laid out: no total number of steps, or no step left for pruning."""


class StateError(AdaLoraError, RuntimeError):
    """A saved state does not fit this model, or a call came at a time when it cannot be right."""
