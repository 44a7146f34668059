"""AdaLoRA (arXiv 2303.10512): low-rank fine-tuning under a parameter budget that goes where it matters.

Names are imported when they are first used, so that ``adalora.core`` works with torch alone and ``adalora --help``
without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.allocator import Allocator
    from .core.errors import AdaLoraError, ConfigError, ScheduleError, StateError
    from .hf.adapters import (
        allocator,
        compact,
        export_lora,
        get_peft_model,
        last_checkpoint,
        load_state,
        ranks,
        save_state,
        upgrade,
    )
    from .hf.callback import AdaLoraCallback
    from .hf.config import AdaLoraConfig
    from .hf.convert import convert
    from .hf.start import start

__version__ = "0.1.0"

_HOMES = {
    ".hf.config": ("AdaLoraConfig",),
    ".hf.callback": ("AdaLoraCallback",),
    ".hf.convert": ("convert",),
    ".hf.start": ("start",),
    ".hf.adapters": (
        "allocator",
        "compact",
        "export_lora",
        "get_peft_model",
        "last_checkpoint",
        "load_state",
        "ranks",
        "save_state",
        "upgrade",
    ),
    ".core.allocator": ("Allocator",),
    ".core.errors": ("AdaLoraError", "ConfigError", "ScheduleError", "StateError"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdaLoraCallback",
    "AdaLoraConfig",
    "AdaLoraError",
    "Allocator",
    "ConfigError",
    "ScheduleError",
    "StateError",
    "allocator",
    "compact",
    "convert",
    "export_lora",
    "get_peft_model",
    "last_checkpoint",
    "load_state",
    "ranks",
    "save_state",
    "start",
    "upgrade",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'adalora' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
