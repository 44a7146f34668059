"""Two processes under FSDP2 (fully_shard): what one process computes from both batches, masks, adapter and state."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import adalora

from ..hf.models import batch, bert, logits
from .processes import STEPS, config, leave, needs_gloo, run_twice


def adapted() -> nn.Module:
    torch.manual_seed(0)
    return adalora.get_peft_model(bert(), config(compact=False)).double()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)


def work(rank: int, port: int, directory: str) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    model = adapted()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.bert.encoder.layer:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, allocator = optimizer_of(model), adalora.allocator(model)
    assert all(isinstance(w, DTensor) for t in allocator.triplets for w in t.parameters)
    for step in range(STEPS):
        model(**batch("SEQ_CLS", seed=2 * step + rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {t.rank for t in allocator.triplets} == {4}, "shards pin the shapes: no compaction in memory"
    state = allocator.state_dict()["tensors"]
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        save_file(state, f"{directory}/state.safetensors")
        model.save_pretrained(f"{directory}/adapter", state_dict=full)  # type: ignore[operator]
    leave()


@needs_gloo
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has no FSDP2 on CPUs")
@pytest.mark.compatibility("Trainers and loops", "FSDP2 (`fully_shard`): one schedule, compact when saved")
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    run_twice(work, tmp_path)
    model = adapted()
    optimizer, allocator = optimizer_of(model), adalora.allocator(model)
    for step in range(STEPS):
        for rank in range(2):
            (model(**batch("SEQ_CLS", seed=2 * step + rank)).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs = load_file(tmp_path / "state.safetensors")
    ours = allocator.state_dict()["tensors"]
    assert theirs.keys() == ours.keys()
    for name, expected in ours.items():
        torch.testing.assert_close(theirs[name], expected, rtol=1e-6, atol=1e-9, msg=name)
    torch.manual_seed(0)
    stock = peft.PeftModel.from_pretrained(bert().double(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(stock, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=1e-5, atol=1e-5)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = [w.shape[0] for name, w in written.items() if name.endswith("lora_A.weight")]
    assert sum(ranks) == allocator.target_budget
