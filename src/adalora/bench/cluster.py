"""Cells on a Ray cluster: one is one task in a fresh worker. Nodes need this package, and the folders of models, data
and results under the same paths as here."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import ray
from ray.exceptions import RayError

from .cells import Job, run_cell
from .errors import BenchError
from .grid import Resources


class RayPool:
    """Workers of the cluster at ``address``; ``local``: of one that is started here and ends with the bench.

    Args:
        workers: use no more than so many at a time. None: as many as there are.
    """

    def __init__(self, address: str, workers: int | None, resources: Resources) -> None:
        self.threads = resources.cpus
        self._share = {"CPU": resources.cpus, "GPU": resources.gpus}
        self._workers = workers
        self._running: dict[str, Any] = {}
        own: dict[str, Any] = {}
        if address == "local":
            own["include_dashboard"] = False
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a bench tells nobody that it runs
        _check_address(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            raise BenchError(f"no Ray cluster at {address}: {error}") from error
        if not self.capacity():
            ray.shutdown()
            raise BenchError(f"no node of the Ray cluster at {address} has what a cell wants: {self._share}")
        task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_calls=1, max_retries=0)
        self._task = task(_run)

    def capacity(self) -> int:
        """As many as fit on the nodes that are there now."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        wanted = {name: share for name, share in self._share.items() if share}
        places = sum(min(int(node.get(name, 0) / share) for name, share in wanted.items()) for node in nodes)
        return min(places, self._workers or places)

    def start(self, key: str, job: Job) -> None:
        """Ray decides where."""
        self._running[key] = self._task.options(name=key).remote(job, bool(self._share["GPU"]))

    def ended(self, seconds: float) -> dict[str, str | None]:
        """By Ray's own words where a worker was lost."""
        keys = {task: key for key, task in self._running.items()}
        done, _ = ray.wait(list(keys), timeout=seconds)
        gone = {keys[task]: _ending(task) for task in done}
        for key in gone:
            del self._running[key]
        return gone

    def stop(self) -> None:
        """And leave the cluster."""
        for task in self._running.values():
            ray.cancel(task, force=True)
        self._running.clear()
        ray.shutdown()


def _check_address(address: str) -> None:
    """BenchError when nobody listens there: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise BenchError(f"no Ray cluster at {address}: {error}") from error


def _run(job: Job, with_gpu: bool) -> None:
    """A job in a worker of the cluster, to which Ray has said which GPUs it has."""
    if not with_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    run_cell(job)


def _ending(task: Any) -> str | None:
    try:
        ray.get(task)
    except RayError as error:
        return f"its Ray worker was lost: {' '.join(str(error).split())}"
    return None
