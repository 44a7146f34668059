"""Parameters that FSDP2 keeps in shards (DTensors): whole for the allocator to read, and back into the shards.

Every process makes the same decisions from the same whole tensors. Each parameter and gradient is gathered by itself:
right, and no faster than that; adapters are small.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor

from .errors import StateError

PATIENCE = 300.0
"""Seconds to wait for the other processes before a gathering that all of them must take part in."""
_met: dict[str, int] = {}  # what for -> how often


def is_sharded(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and there are no shards before it is
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """A plain copy, with its gradient, of a parameter in shards (they are its ``shards``); any other as it is."""
    if not is_sharded(parameter):
        return parameter
    sharded: Any = parameter
    copy: Any = sharded.full_tensor().detach().requires_grad_(sharded.requires_grad)
    if sharded.grad is not None:
        copy.grad = sharded.grad.full_tensor()
    copy.shards = sharded
    return copy  # type: ignore[no-any-return]


def shards_of(tensor: Tensor) -> Any:
    """The parameter that ``tensor`` is a whole copy of, if it is one."""
    return getattr(tensor, "shards", None)


def like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor of the parameter's shape, equal in every process, in shards if the parameter lies in shards."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    if isinstance(tensor, DTensor):
        return tensor.redistribute(mesh, placements)
    replicated = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=placements)


def meet(call: str) -> None:
    """Wait until every process has come here, before shards are gathered: one alone would wait for ever.

    Args:
        call: what the user has called.

    Raises:
        StateError: others have not within :data:`PATIENCE` seconds.
    """
    distributed: Any = torch.distributed
    store, everyone = distributed.distributed_c10d._get_default_store(), distributed.get_world_size()
    key = f"adalora/{call}/{_met.get(call, 0)}"
    store.add(key, 1)
    deadline = time.monotonic() + PATIENCE
    while (there := store.add(key, 0)) < everyone:
        if time.monotonic() > deadline:
            store.add(key, -1)
            raise StateError(
                f"{call} was called by {there} of {everyone} processes. This model's parameters lie in shards (FSDP2),"
                f" which all processes gather together: call {call} on every process; the first of them writes."
            )
        time.sleep(0.01)
    _met[call] = _met.get(call, 0) + 1
