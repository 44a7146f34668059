"""Bytes of tensors that are alive while a piece of code runs: exact, on any device, and no allocator's habits in it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages made inside ``with``: ``live`` now, ``peak`` the most so far, in bytes.

    Each operation's results are looked at as they are dispatched, and each new storage until it is freed, also while
    only autograd holds it. A storage that is met first as an operation's input was there before and does not count.
    What an operation allocates and frees within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}  # by address, which is given again once a storage is freed

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._known.clear()  # the references die, and with them their callbacks

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._meet(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._meet(storage, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _meet(self, storage: Any, size: int) -> None:
        address = storage._cdata
        if address in self._known:
            return

        def forget(_: Any) -> None:
            if self._known.pop(address, None) is not None:
                self.live -= size

        self.live += size
        self._known[address] = weakref.ref(storage, forget)


def _storages(values: Any) -> list[Any]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
