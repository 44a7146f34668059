"""One run in several processes, as torchrun starts them: all of them train, and the first one announces and writes."""

from __future__ import annotations

import os


def rank() -> int:
    """Which of the run's processes this is, from 0 on. Known before any library is imported."""
    return int(os.environ.get("RANK") or 0)


def is_first() -> bool:
    """Whether this process is the one that announces and writes."""
    return rank() == 0


def wait() -> None:
    """Until all processes are here; at once where there is one alone."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
