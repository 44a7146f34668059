"""Two processes under DistributedDataParallel: one schedule, the same masks, an adapter that is compact when saved."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import adalora

from ..hf.models import batch, bert, logits
from .processes import STEPS, config, leave, needs_gloo, run_twice


def work(rank: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    base = bert()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = adalora.get_peft_model(copy.deepcopy(base), config())
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    for step in range(STEPS):
        wrapped(**batch("SEQ_CLS", seed=2 * step + rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    allocator = adalora.allocator(model)
    assert allocator.frozen
    assert {t.rank for t in allocator.triplets} == {4}, "DDP's buffers pin the shapes: no compaction in memory"
    assert sum(int(t.lam.count_nonzero()) for t in allocator.triplets) == allocator.live == 2 * len(allocator.triplets)
    masks = [torch.empty_like(allocator.mask) for _ in range(2)]
    dist.all_gather(masks, allocator.mask)
    assert torch.equal(*masks)
    if rank == 0:
        torch.save(base.state_dict(), f"{directory}/base.pt")
        model.save_pretrained(directory)
        save_file({"logits": logits(model, "SEQ_CLS")}, f"{directory}/expected.safetensors")
    leave()


@needs_gloo
def test_two_processes_with_gradient_checkpointing(tmp_path: Path) -> None:
    """Elsewhere the regulariser is a second use of the parameters in the graph: "marked ready twice"."""
    run_twice(work, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(w.shape[0] for key, w in weights.items() if "lora_A" in key) == 2 * 11
    base = bert()
    base.load_state_dict(torch.load(tmp_path / "base.pt", weights_only=True))
    served = peft.PeftModel.from_pretrained(base, tmp_path)
    expected = load_file(tmp_path / "expected.safetensors")["logits"]
    torch.testing.assert_close(logits(served, "SEQ_CLS"), expected, rtol=0, atol=1e-5)
