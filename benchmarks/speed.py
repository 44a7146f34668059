"""What does a step cost: AdaLoRA, plain LoRA on the same kernels, PEFT's LoRA, DoRA and AdaLoRA, full, nothing at all?

All methods of a shape live in one process around the same frozen weights (random: what they are does not change the
cost) and take turns, in an order that is drawn anew each round; full fine-tuning has a copy. A step is `zero_grad`,
forward, backward and AdamW(fused=True). Our allocator works in the optimizer's hooks; PEFT's in `update_and_allocate`
after `optimizer.step()`, and its regulariser in the tuner's forward. The rank is 12 for all; AdaLoRA is on its way to
8, in its pruning phase throughout, and allocates at every step (ΔT = 1) unless named otherwise. All linear layers but
pooler and head are adapted, and nothing else is trained. `frozen` trains nothing and takes the gradient down to the
embeddings' output.

    python benchmarks/speed.py                    # `make bench-speed`: a few rounds, less than 10 minutes on two cores
    python benchmarks/speed.py --preset full      # more rounds
    python benchmarks/speed.py --preset gpu       # Llama-shaped models of 1B and 7B, bfloat16; needs a GPU
    python benchmarks/speed.py --shapes bert-base-4x128 --dtype bfloat16 --rounds 15

- Times: a method's time in a round is the median of its steps in that turn (CUDA events on a GPU); ratios are taken
  within a round, and the median over rounds is given with its quartiles. Python's garbage collector is off meanwhile.
- Operations: tensor operations that one step dispatches after two steps of warm-up, views not counted; of them, those
  in our allocator's two hooks (importance, regulariser, allocation). With ΔT > 1 it is a step that does not allocate.
- Memory: the peak of the same step over the frozen base, every tensor counted from its making to its end (see
  live_bytes.py): adapter, gradients, optimizer, allocator, activations. On a GPU, what PyTorch's allocator says.
- State: bytes of the allocator's moving averages for each parameter of the adapter.

speed.json holds every number (milliseconds of each round; of ratios the median and the quartiles), speed.md the tables.
What fails is recorded, and the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import math
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from live_bytes import LiveBytes
from operations import OperationCounter
from speed_methods import INITIAL_RANK, METHODS, SHAPES, Situation, Subject, allocator_of, copy_of, state_bytes
from speed_report import ADALORA, FLOOR, KERNELS, LORA, bounds, markdown, put_into_page, ratio

import adalora
from adalora.files import write_json, write_text

WARM_UP = 2
FEWEST_ROUNDS = 3  # also when time is up; for inference they are enough
ROUNDS_SHARE = 0.75  # of a shape's time; then come inference and files
BY_COST = sorted(SHAPES, key=lambda name: SHAPES[name].share)  # where time runs out, it is for the largest
CPU_SHAPES = [name for name in BY_COST if not SHAPES[name].gpu]
GPU_SHAPES = [name for name in BY_COST if SHAPES[name].gpu]
COMPILED = ["adalora", "lora, our kernels", "peft lora", "frozen"]  # compiling takes most of a minute for each
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Preset:
    shapes: list[str]
    rounds: int
    minutes: float  # after these nothing new is begun
    dtype: str = "float32"
    device: str = "cpu"
    compile: bool = False
    brief: bool = False  # on the large shapes, without the methods that are not essential


PRESETS = {
    "short": Preset(CPU_SHAPES, rounds=9, minutes=8, brief=True),
    "full": Preset(CPU_SHAPES, rounds=25, minutes=60),
    "gpu": Preset(GPU_SHAPES, rounds=5, minutes=7.5, dtype="bfloat16", device="cuda", compile=True),
}


class Cell:
    """One shape, eager or compiled: all methods side by side.

    Args:
        until: in seconds of ``time.monotonic``; after it rounds end.
        deadline: after it no method is prepared.
    """

    def __init__(
        self, name: str, options: argparse.Namespace, compiled: bool, until: float, deadline: float = math.inf
    ) -> None:
        self.name, self.options, self.compiled = name, options, compiled
        self.until, self.deadline = until, deadline
        self.shape, self.device = SHAPES[name], torch.device(options.device)
        self.rng = random.Random(options.seed)
        self.subjects: dict[str, Subject] = {}
        self.found: dict[str, dict[str, Any]] = {}
        calls = options.rounds * self.shape.turn + WARM_UP + 1
        self.situation = Situation(4 * calls, self.shape.kind, options.dropout)

    @property
    def methods(self) -> list[str]:
        if self.options.methods is not None:
            return list(self.options.methods)
        if self.compiled:
            return COMPILED
        brief = self.options.brief and not self.shape.is_small
        return [name for name, method in METHODS.items() if method.essential or not brief]

    def measure(self) -> dict[str, Any]:
        """Everything about this shape, as it is written to speed.json."""
        load = os.getloadavg()
        torch.manual_seed(self.options.seed)
        self.base = self.shape.model(DTYPES[self.options.dtype], self.device)
        self.batch = self.shape.batch(self.options.seed, self.device)
        for name in self.methods:
            self.found[name] = {}
            with self.recording(name):
                self.prepare(name)
        steps = self.interleave(list(self.subjects), self.step, self.options.rounds)
        for name, milliseconds in steps.items():
            found = self.found[name]
            found["step_ms"] = milliseconds
            found["tokens_per_second"] = 1000 * self.shape.tokens / statistics.median(milliseconds)
        if not self.compiled:
            for what, work in {"forward_ms": self.forward, "merged_ms": self.merged}.items():
                inferring = [name for name in self.subjects if METHODS[name].inference]
                few = min(self.options.rounds, FEWEST_ROUNDS)
                for name, milliseconds in self.interleave(inferring, work, few).items():
                    self.found[name][what] = milliseconds
            for name in list(self.subjects):
                with self.recording(name):
                    self.files(name)
        cell: dict[str, Any] = {
            "shape": self.name,
            "sizes": vars(self.shape),
            "compiled": self.compiled,
            "load": [load, os.getloadavg()],
            "rounds": max((len(found.get("step_ms", [])) for found in self.found.values()), default=0),
            "methods": self.found,
        }
        for name, found in self.found.items():
            every = {other: ratio(cell, name, other) for other in (LORA, ADALORA, KERNELS, FLOOR)}
            found["ratios"] = {other: value for other, value in every.items() if value is not None}
        return cell

    @contextlib.contextmanager
    def recording(self, name: str) -> Iterator[None]:
        """What fails is noted, and this method is left out from there on."""
        try:
            yield
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            self.found[name]["error"] = f"{type(error).__name__}: {first}"
            self.subjects.pop(name, None)
            print(f"  {name}: {self.found[name]['error']}", flush=True)  # noqa: T201 (a program)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    # ---------------------------------------------------------------- what takes one step

    def prepare(self, name: str) -> None:
        """Make the model, warm it up, and look closely at one step: operations, peak memory, state."""
        if time.monotonic() > self.deadline:
            raise TimeoutError("not begun: time was up")
        found, model = self.found[name], copy_of(self.base, name)
        on_gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        alive = None if on_gpu or self.compiled else LiveBytes()
        with alive or contextlib.nullcontext():
            subject = METHODS[name].prepare(model, self.situation)
            if self.compiled:
                subject.called.compile()
            for _ in range(WARM_UP):
                subject.step(self.batch)
            if alive is not None:
                alive.restart()
                found.update(self.operations(subject))
                found["peak_bytes"] = alive.peak
                at_rest = alive.live
            elif on_gpu:
                torch.cuda.reset_peak_memory_stats()
                subject.step(self.batch)
                found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
                found["launches"] = self.launches(subject)
                if not self.compiled:  # an operation counter would switch the compiled code off
                    found.update(self.operations(subject))
        trained = subject.trained
        found["trained_parameters"] = sum(w.numel() for w in trained.values())
        kept = state_bytes(subject.model)
        if kept is not None:
            found["state_bytes"] = kept
            found["state_bytes_per_parameter"] = kept / found["trained_parameters"]
            found["matrices"] = sum("lora_B" in name for name in trained)
        if alive is not None and subject.optimizer is not None:
            made = [] if name == "full" else [*trained.values()]  # there, what is trained was made before
            made += [w.grad for w in trained.values() if w.grad is not None]
            made += [t for state in subject.optimizer.state.values() for t in state.values()]
            found["other_bytes_at_rest"] = at_rest - sum(t.nbytes for t in made) - (kept or 0)
        if METHODS[name].timed:
            self.subjects[name] = subject

    def operations(self, subject: Subject) -> dict[str, int]:
        """Operations of one step, and of the allocator's part in it."""
        ours = [found for found in (allocator_of(subject.model),) if found is not None]
        within = OperationCounter()
        for allocator in ours:
            for hook in ("before_step", "after_step"):
                setattr(allocator, hook, counted(getattr(allocator, hook), within))
        try:
            with OperationCounter() as counter:
                subject.step(self.batch)
        finally:
            for allocator in ours:
                del allocator.before_step, allocator.after_step
        return {"operations": counter.total, **({"allocator_operations": within.total} if ours else {})}

    def launches(self, subject: Subject) -> int:
        """Kernels that one step launches."""
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            subject.step(self.batch)
            torch.cuda.synchronize()
        return sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)

    # ---------------------------------------------------------------- what takes turns

    def times(self, call: Callable[[], Any], repeats: int) -> float:
        """Median milliseconds of ``call``."""
        if self.device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
            torch.cuda.synchronize()
            events[0].record()
            for event in events[1:]:
                call()
                event.record()
            torch.cuda.synchronize()
            return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            taken.append(1000 * (time.perf_counter() - start))
        return statistics.median(taken)

    def interleave(
        self, names: list[str], work: Callable[[Subject], float | None], rounds: int
    ) -> dict[str, list[float]]:
        """Every method's result of every round; all have the same rounds."""
        results: dict[str, list[float]] = {name: [] for name in names}
        gc.collect()
        gc.disable()
        try:
            for count in range(rounds):
                if count >= FEWEST_ROUNDS and time.monotonic() > self.until:
                    break
                present = [name for name in names if name in self.subjects]
                for name in self.rng.sample(present, len(present)):
                    with self.recording(name):
                        result = work(self.subjects[name])
                        if result is not None:
                            results[name].append(result)
        finally:
            gc.enable()
        return {name: numbers for name, numbers in results.items() if numbers and name in self.subjects}

    def step(self, subject: Subject) -> float:
        return self.times(lambda: subject.step(self.batch), self.shape.turn)

    def forward(self, subject: Subject) -> float:
        """Inference with the adapter beside the base weights."""
        inputs = {key: value for key, value in self.batch.items() if key != "labels"}
        subject.model.eval()
        with torch.inference_mode():
            taken = self.times(lambda: subject.called(**inputs), self.shape.turn)
        subject.model.train()
        return taken

    def merged(self, subject: Subject) -> float | None:
        """Inference with the adapter merged into the base weights, which all methods share: it is taken out again."""
        if not isinstance(subject.model, peft.PeftModel):
            return None
        subject.model.merge_adapter()
        try:
            return self.forward(subject)
        finally:
            subject.model.unmerge_adapter()

    def files(self, name: str) -> None:
        """Seconds to save an adapter, to load it into a base model, and to export it as plain LoRA."""
        model = self.subjects[name].model
        if not isinstance(model, peft.PeftModel):
            return
        taken: dict[str, list[float]] = {"save_s": [], "load_s": [], "export_s": []}
        for _ in range(1 if self.device.type == "cuda" else 3):  # to build a large model is slow, and no noise matters
            with tempfile.TemporaryDirectory() as folder:
                base = copy_of(self.base, name)
                taken["save_s"].append(seconds(model.save_pretrained, folder, save_embedding_layers=False))
                taken["load_s"].append(seconds(peft.PeftModel.from_pretrained, base, folder))
                if allocator_of(model) is not None:
                    taken["export_s"].append(seconds(adalora.export_lora, model, Path(folder) / "exported"))
        self.found[name].update((what, statistics.median(values)) for what, values in taken.items() if values)


def counted(call: Callable[..., Any], counter: OperationCounter) -> Callable[..., Any]:
    def within(*args: Any, **kwargs: Any) -> Any:
        with counter:
            return call(*args, **kwargs)

    return within


def seconds(call: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    start = time.perf_counter()
    call(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------------------ the program


def machine() -> dict[str, Any]:
    """The class of the machine, as far as it decides what is fast."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.is_file() else set()
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "avx512_bf16": "avx512_bf16" in flags,
        "amx_bf16": "amx_bf16" in flags,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="short", help="what the other options start from")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--minutes", type=float, help="begin nothing new after these")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the base; PEFT keeps adapters in float32 then, for all alike"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="also with torch.compile")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/speed"), help="a folder")
    parser.add_argument("--page", type=Path, help="put the tables into this page, between its marks, too")
    options = parser.parse_args(arguments)
    for name, value in vars(PRESETS[options.preset]).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "there is no GPU that PyTorch can use, so the GPU figures cannot be measured here; the operation counts of"
            " the other presets stand in. (--device cpu runs any shape on the CPU, large ones slowly.)"
        )
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded, and nothing is asked
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")  # PEFT, of its own file
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT, to Transformers
    began = time.monotonic()
    found: dict[str, Any] = {
        "command": shlex.join(["benchmarks/speed.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "options": {name: value for name, value in vars(options).items() if name not in ("output", "page")},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("adalora", "torch", "peft", "transformers")},
        },
        "machine": machine(),
        "initial_rank": INITIAL_RANK,
        "load": {"before": os.getloadavg()},
        "cells": [],
    }
    deadline = began + 60 * options.minutes
    cells = [
        (name, compiled) for compiled in ((False, True) if options.compile else (False,)) for name in options.shapes
    ]
    for k, (name, compiled) in enumerate(cells):
        now, left = time.monotonic(), sum(SHAPES[other].share for other, _ in cells[k:])
        until = now + ROUNDS_SHARE * (deadline - now) * SHAPES[name].share / left
        print(f"{name}{', compiled' * compiled} ({now - began:.0f} s)", flush=True)  # noqa: T201
        found["cells"].append(Cell(name, options, compiled, until, deadline).measure())
        found["load"]["after"], found["seconds"] = os.getloadavg(), time.monotonic() - began
        found["bounds"] = bounds(found)
        write_json(options.output / "speed.json", found)
        write_text(options.output / "speed.md", markdown(found))
        torch._dynamo.reset()
        gc.collect()  # models with hooks are cycles
    if options.page is not None:
        put_into_page(options.page, markdown(found))
    print(f"\n{markdown(found)}")  # noqa: T201


if __name__ == "__main__":
    main()
