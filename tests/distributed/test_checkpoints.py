"""Checkpoints of two processes: the callback under DDP (in a real Trainer) and FSDP2, distributed checkpoints, exports
of parameters in shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

import adalora
from adalora import AdaLoraCallback, StateError
from adalora.core import sharded

from ..hf.models import batch, bert, logits
from ..hf.test_loops import make, trainer
from .processes import STEPS, config, leave, needs_gloo, run_twice

STOP = 7  # between two masks

needs_fsdp2 = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has no FSDP2 on CPUs"
)


# ------------------------------------------------------------------------------------------------------------------ DDP


def ddp(rank: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    # 96 rows, 8 a process: 6 steps an epoch
    settings: dict[str, Any] = {"ddp_backend": "gloo", "num_train_epochs": 2, "seed": 3, "save_total_limit": None}
    whole = trainer(
        make(total_step=None), Path(directory) / "out", callbacks=[AdaLoraCallback()],
        **settings, save_strategy="steps", save_steps=5,
    )  # fmt: skip
    whole.train()
    checkpoint = Path(directory) / "out" / "checkpoint-5"
    assert adalora.last_checkpoint(checkpoint.parent) == Path(directory) / "out" / "checkpoint-12"
    resumed = trainer(
        make(total_step=None),
        Path(directory) / "again",
        callbacks=[AdaLoraCallback(resume_from=checkpoint)],
        **settings,
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == adalora.allocator(resumed.model).step == 12
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert adalora.allocator(whole.model).live == 2 * len(adalora.ranks(whole.model))
    leave()


@needs_gloo
@pytest.mark.compatibility("Trainers and loops", "`Trainer` under DDP: saved and resumed bit for bit")
def test_a_trainer_under_ddp_resumes_bit_for_bit(tmp_path: Path) -> None:
    run_twice(ddp, tmp_path)


# ---------------------------------------------------------------------------------------------------------------- FSDP2


def sharded_model() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = adalora.get_peft_model(bert(), config()).double()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.bert.encoder.layer:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


class Loop:
    """What a Trainer does around the steps, with its own handler of callbacks."""

    def __init__(self, model: nn.Module, output: Path, rank: int, step: int = 0) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
        self.arguments = TrainingArguments(str(output), use_cpu=True, report_to="none")
        self.state = TrainerState(
            global_step=step, max_steps=STEPS, num_train_epochs=1, is_world_process_zero=rank == 0
        )
        self.control, self.rank = TrainerControl(), rank
        self.handler = CallbackHandler([AdaLoraCallback()], model, None, self.optimizer, None)

    def begin(self) -> None:
        self.handler.on_train_begin(self.arguments, self.state, self.control)

    def run(self, until: int) -> None:
        while self.state.global_step < until:
            self.model(**batch("SEQ_CLS", seed=2 * self.state.global_step + self.rank)).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.global_step += 1
            self.handler.on_step_end(self.arguments, self.state, self.control)
            self.handler.on_log(self.arguments, self.state, self.control, {"loss": 0.0})

    def save(self) -> Path:
        directory = Path(str(self.arguments.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.rank == 0:
            directory.mkdir(parents=True)
        self.handler.on_save(self.arguments, self.state, self.control)
        dist.barrier()
        return directory


def fsdp2(rank: int, port: int, directory: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    out = Path(directory)
    whole = Loop(sharded_model(), out, rank)
    whole.begin()
    whole.run(STOP)
    checkpoint = whole.save()
    assert (checkpoint / adalora.hf.adapters.STATE_NAME).is_file()
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(whole.model, whole.optimizer), strict=True)),
             checkpoint_id=str(out / "dcp"))  # fmt: skip
    whole.run(STEPS)

    again = Loop(sharded_model(), out, rank, step=STOP)
    with torch.no_grad():
        for w in again.model.parameters():
            w.mul_(0.5)
    states = dict(zip(("model", "optimizer"), get_state_dict(again.model, again.optimizer), strict=True))
    dcp.load(states, checkpoint_id=str(out / "dcp"))
    set_state_dict(again.model, again.optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    again.begin()
    again.run(STEPS)
    for (name, a), b in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        local = [w.to_local() for w in (a, b[1])]  # type: ignore[attr-defined]
        assert torch.equal(*local), name
    assert adalora.ranks(again.model) == adalora.ranks(whole.model)

    adalora.export_lora(whole.model, out / "adapter")
    adalora.export_lora(whole.model, out / "smaller", rank=1)
    expected = logits(whole.model, "SEQ_CLS")
    if rank == 0:
        save_file({"logits": expected}, out / "expected.safetensors")
    sharded.PATIENCE = 0.2
    if rank == 1:
        for call in (adalora.save_state, adalora.export_lora):
            with pytest.raises(StateError, match=rf"{call.__name__} was called by 1 of 2 .* on every process"):
                call(whole.model, out / "alone")
    dist.barrier()
    adalora.save_state(whole.model, out / "together")  # one that was left alone is no harm to the next
    assert not (out / "alone").exists()
    leave()


@needs_gloo
@needs_fsdp2
@pytest.mark.compatibility("Trainers and loops", "FSDP2: `AdaLoraCallback`, distributed checkpoints, `export_lora`")
def test_fsdp2_checkpoints_resume_bit_for_bit_and_export(tmp_path: Path) -> None:
    run_twice(fsdp2, tmp_path)
    torch.manual_seed(0)
    stock = peft.PeftModel.from_pretrained(bert().double(), str(tmp_path / "adapter"))
    expected = load_file(tmp_path / "expected.safetensors")["logits"]
    torch.testing.assert_close(logits(stock, "SEQ_CLS"), expected, rtol=1e-5, atol=1e-5)
    for name, budget in (("adapter", 2 * 11), ("smaller", 11)):
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        assert sum(w.shape[0] for key, w in weights.items() if key.endswith("lora_A.weight")) == budget
