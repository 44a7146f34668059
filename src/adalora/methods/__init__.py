"""The methods: AdaLoRA and what it is compared with, found here by being in this folder."""

from __future__ import annotations

import importlib
import pkgutil

from .base import Adapted, Job, Method, get, head_modules, names

__all__ = ["Adapted", "Job", "Method", "get", "head_modules", "names"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
