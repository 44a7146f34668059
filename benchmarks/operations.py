"""Tensor operations that a piece of code dispatches: on a GPU about the kernels it launches, and no machine's noise."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_FREE = re.compile(r"aten::(detach|_unsafe_view|unsafe_split|promote_types|empty|new_empty)|profiler::")  # move no data


class OperationCounter(TorchDispatchMode):
    """Counts what is dispatched inside ``with``, backward passes included. Views and allocations are not counted.

    Operations on a list of tensors (``_foreach_add_``) count once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.by_name.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not func.is_view and not _FREE.match(func.name()):
            self.by_name[func.name()] += 1
        return func(*args, **(kwargs or {}))
