"""Where cells run: processes of this machine (``LocalPool``), or the workers of a Ray cluster (``cluster.RayPool``)."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Protocol

import torch

from .cells import Job, run_cell
from .errors import BenchError
from .grid import Resources

PRELOADED = ["adalora.bench.warm", "adalora.methods", "adalora.progress", "adalora.tasks", "adalora.training"]
"""What cells need, imported once by the server that they are forked from."""

_GRACE = 5.0  # seconds that a process has to end when it is told to


class Pool(Protocol):
    """Runs jobs, each in a process that ends with it. A job is known by a key of the caller's."""

    threads: int
    """How many threads a job may have."""

    def capacity(self) -> int:
        """How many jobs may run at a time, as things are now."""
        ...

    def start(self, key: str, job: Job) -> None:
        """Start a job; returns at once."""
        ...

    def ended(self, seconds: float) -> dict[str, str | None]:
        """Jobs that have ended, waiting for the first at most so long. With each, how its process came to an end if
        that was not by itself."""
        ...

    def stop(self) -> None:
        """Stop what runs, and give back what the pool holds."""
        ...


class LocalPool:
    """Processes on this machine. They are forked from a server that has imported the libraries, so each starts at once
    and is alone: one that crashes or is killed takes nothing with it. They end when this process does, however."""

    def __init__(self, workers: int, resources: Resources) -> None:
        self._places = places(workers, resources.gpus)
        self.threads = max(1, _cores() // len(self._places))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._running: dict[str, tuple[BaseProcess, str]] = {}

    def capacity(self) -> int:
        """One for each place."""
        return len(self._places)

    def start(self, key: str, job: Job) -> None:
        """On the first place that is free."""
        free = list(self._places)
        for _, taken in self._running.values():
            free.remove(taken)
        process = self._context.Process(target=_run, args=(job, free[0]), name=key)
        process.start()
        self._running[key] = (process, free[0])

    def ended(self, seconds: float) -> dict[str, str | None]:
        """By exit code or signal."""
        wait([process.sentinel for process, _ in self._running.values()], seconds)
        found = {key: process.exitcode for key, (process, _) in self._running.items()}
        gone = {key: _ending(code) for key, code in found.items() if code is not None}
        for key in gone:
            del self._running[key]
        return gone

    def stop(self) -> None:
        """Politely first."""
        processes = [process for process, _ in self._running.values()]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(_GRACE)
            if process.exitcode is None:
                process.kill()
                process.join()
        self._running.clear()


def places(workers: int, gpus: float) -> list[str]:
    """For each worker the GPUs that its cells see, as CUDA_VISIBLE_DEVICES says it. BenchError where there are not
    enough for one."""
    if not gpus:
        return [""] * workers
    here = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    devices = named[:here] if named else list(map(str, range(here)))  # those that this process was given, no others
    if gpus < 1:
        places = devices * int(1 / gpus)  # a second cell on a GPU only when each has one
    else:
        each = int(gpus)
        places = [",".join(devices[first : first + each]) for first in range(0, here - each + 1, each)]
    if not places:
        raise BenchError(f"resources.gpus: a cell wants {gpus:g} GPUs, and this machine has {here}")
    return places[:workers]


def _run(job: Job, devices: str) -> None:
    """A job in a process of its own. An interrupt from the keyboard is for the bench to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_bench, daemon=True).start()
    os.environ["CUDA_VISIBLE_DEVICES"] = devices
    run_cell(job)


def _end_with_bench() -> None:
    """A bench that is killed cannot stop its cells, and the next one would run them again beside these."""
    bench = multiprocessing.parent_process()
    assert bench is not None
    wait([bench.sentinel])
    os._exit(1)


def _ending(code: int) -> str | None:
    if code >= 0:
        return f"its process ended with exit code {code}" if code else None
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    why = ", as a system does that is out of memory" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{why}"


def _cores() -> int:
    with contextlib.suppress(AttributeError):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
