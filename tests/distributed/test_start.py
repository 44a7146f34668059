"""The gradient start in two processes: the same P and Q in both, those of one process that has all batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import adalora
from adalora.core.errors import StateError

from ..hf.models import batch, bert
from .processes import config, leave, needs_gloo, run_twice

BATCHES = 3


def adapted() -> nn.Module:
    torch.manual_seed(0)
    return adalora.get_peft_model(bert(), config(compact=False, initialization="gradient", start_batches=BATCHES))


def batches(rank: int) -> list[dict[str, torch.Tensor]]:
    return [batch("SEQ_CLS", seed=2 * i + rank, size=4) for i in range(BATCHES)]


def vectors(model: nn.Module) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = adalora.allocator(model).state_dict()["tensors"]
    return {key: value.contiguous() for key, value in state.items() if value.ndim == 2}


def work(rank: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    wrapped = torch.nn.parallel.DistributedDataParallel(adapted())
    told = adalora.start(wrapped, batches(rank))
    assert (told["rows"], told["batches"]) == (2 * 4 * BATCHES, BATCHES)
    save_file(vectors(wrapped.module), f"{directory}/ddp-{rank}.safetensors")
    loss = wrapped(**batches(rank)[0]).loss  # DDP expects every gradient of a pass of its own, and gets them
    loss.backward()
    sharded(rank, directory)
    failing = torch.nn.parallel.DistributedDataParallel(adapted())

    def fails(model: Any, rows: Any) -> torch.Tensor:
        if rank == 1:
            raise ZeroDivisionError
        found: torch.Tensor = model(**rows).loss
        return found

    with pytest.raises(ZeroDivisionError if rank == 1 else StateError):
        adalora.start(failing, batches(rank), fails)
    leave()


def sharded(rank: int, directory: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not hasattr(torch.cpu.Stream, "record_event"):  # this torch has no FSDP2 on CPUs
        return
    model = adapted()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.bert.encoder.layer:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    adalora.start(model, batches(rank))
    save_file(vectors(model), f"{directory}/fsdp-{rank}.safetensors")


@needs_gloo
@pytest.mark.compatibility("Trainers and loops", "the gradient start under DDP and FSDP2: the same P and Q everywhere")
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    """A process that cannot look, and its peer, both say so instead of waiting for each other."""
    run_twice(work, tmp_path)
    model = adapted()
    adalora.start(model, [*batches(0), *batches(1)], number=2 * BATCHES)
    expected = vectors(model)
    kinds = ["ddp", "fsdp"] if hasattr(torch.cpu.Stream, "record_event") else ["ddp"]
    for kind in kinds:
        first, second = (load_file(tmp_path / f"{kind}-{rank}.safetensors") for rank in range(2))
        for name, value in expected.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=0, atol=1e-3, msg=f"{kind} {name}")
