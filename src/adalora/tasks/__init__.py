"""The tasks: one file per family, found here by being in this folder."""

from __future__ import annotations

import importlib
import pkgutil

from .base import Columns, Task, check_columns, check_text, get, names, tokenize

__all__ = ["Columns", "Task", "check_columns", "check_text", "get", "names", "tokenize"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
