"""The tasks: one file per family, found here by being in this folder."""

from __future__ import annotations

import importlib
import pkgutil

from .base import (
    Answer,
    Columns,
    ModelKind,
    Options,
    Setup,
    Signed,
    StartsOutput,
    Stratified,
    Task,
    TellsLoss,
    get,
    names,
)

__all__ = [
    "Answer",
    "Columns",
    "ModelKind",
    "Options",
    "Setup",
    "Signed",
    "StartsOutput",
    "Stratified",
    "Task",
    "TellsLoss",
    "get",
    "names",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
