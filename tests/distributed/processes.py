"""Two processes that talk through gloo."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from adalora import AdaLoraConfig

STEPS = 14
PATIENCE = 240  # seconds; they take 20
needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo")


def config(**changes: Any) -> AdaLoraConfig:
    return AdaLoraConfig(
        task_type="SEQ_CLS",
        target_modules=["query", "value", "dense"],
        target_r=2,
        init_r=4,
        total_step=STEPS,
        tinit=2,
        tfinal=4,
        deltaT=1,
        **changes,
    )


def run_twice(work: Callable[[int, int, str], None], directory: Path) -> None:
    """Run ``work(rank, port, directory)`` in two processes; their errors are the test's."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = int(s.getsockname()[1])
    processes = mp.spawn(work, args=(port, str(directory)), nprocs=2, join=False)
    deadline = time.monotonic() + PATIENCE
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"two processes did not come to an end within {PATIENCE} seconds")


def leave() -> None:
    """The end of ``work``: gloo's threads, torn down one process after the other, now and then wait for a gone peer."""
    dist.barrier()
    os._exit(0)
