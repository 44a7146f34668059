"""Kill a training at any moment, resume it, compare: as many times as wanted, alone and of two processes.

    python -m tests.cli.kills KILLS adalora-train-arguments ...

Everything is imported once; each training is a fork of this process, which must not have used its threads. A child is
killed after a random time, by SIGKILL, SIGTERM and SIGINT in turn, and resumed, by a chance of one half through another
kill. At the end the folder must hold, byte for byte, what an undisturbed training wrote.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from adalora import announcement, preparation, progress, training  # noqa: F401 (once, before the forks)
from adalora.cli import main
from adalora.quiet import quieten

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATIENCE = 300.0  # seconds that one training may take
Child = int


def start(arguments: list[str], processes: int, log: Path) -> list[Child]:
    """The command line in so many forked processes that train together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ["ACCELERATE_USE_CPU"] = "1"
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.argv = ["adalora", *arguments]
            code: Any = 1
            try:
                main()
            except SystemExit as finish:
                code = finish.code or 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(int(code))
        children.append(child)
    return children


def ended(children: list[Child], seconds: float) -> list[int] | None:
    """Exit codes, negative of a signal, when all have ended within so many seconds."""
    codes: dict[Child, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)
    return [codes[child] for child in children]


def kill(children: list[Child], number: signal.Signals) -> None:
    """Of two that train together, the other one may wait for ever where it does not hear of it."""
    for child in filter(runs, children):
        os.kill(child, number)
    time.sleep(0.5 if number != signal.SIGKILL else 0)
    for child in filter(runs, children):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def runs(child: Child) -> bool:
    """Whether it has not ended; one that was waited for is no child, and its number may be another process's."""
    try:
        return os.waitpid(child, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False


def content(run: Path) -> dict[str, Any]:
    """All that must be equal: weights and trace to the byte, and what the metrics say but times and memory."""
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["log"].pop()  # times
    kept = {key: metrics[key] for key in metrics if key not in {"seconds", "memory", "resumed_from_step"}}
    files = {name: (run / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")}
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name.startswith("."))
    pages = (run / "report.html").is_file()
    return {**files, "report": pages, "trace": (run / "trace.jsonl").read_text(), "metrics": kept, "hidden files": left}


def kill_and_resume(arguments: list[str], folder: Path, kills: int) -> list[str]:
    """Kill so many trainings, half of them of two processes; what went wrong with any."""
    quieten()
    torch.set_num_threads(1)
    draw, faults = random.Random(0), []
    for processes in (1, 2):
        whole = folder / f"whole-{processes}"
        log = folder / f"whole-{processes}.log"
        began = time.monotonic()
        codes = ended(start([*arguments, "--output", str(whole)], processes, log), PATIENCE)
        length = time.monotonic() - began
        assert codes == [0] * processes, log.read_text()
        expected = content(whole)
        for index in range(kills // 2):
            name, log = f"{processes}-{index}", folder / f"{processes}-{index}.log"
            run, number = folder / name, SIGNALS[index % 3]
            again, moments = ["train", "--resume", "--output", str(run)], []
            command = [*arguments, "--output", str(run)]
            while True:
                children = start(command, processes, log)
                if len(moments) < 1 + (index % 2):
                    moments.append(draw.uniform(0.05, 1.05) * length)
                    if ended_early := ended(children, moments[-1]):
                        codes = ended_early
                        break
                    kill(children, number)
                    command = again if (run / "recipe.yaml").is_file() else command
                    continue
                codes = ended(children, PATIENCE)
                break
            said = f"{name}: {number.name} after {', '.join(f'{moment:.1f}' for moment in moments)} s: {codes}"
            if codes != [0] * processes:
                faults.append(f"{said}: {log.read_text()[-2000:]}")
            elif content(run) != expected:
                differ = [key for key, value in content(run).items() if value != expected[key]]
                metrics = [
                    key for key, value in content(run)["metrics"].items() if value != expected["metrics"].get(key)
                ]
                faults.append(f"{said}: other {', '.join(differ)}; of the metrics {', '.join(metrics)}")
            else:
                print(f"{said}, equal", flush=True)
    return faults


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        found = kill_and_resume(["train", *sys.argv[2:]], Path(place), int(sys.argv[1]))
    sys.exit("\n".join(found) or 0)
