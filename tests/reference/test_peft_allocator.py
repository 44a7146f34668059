"""Same masks and scores as PEFT's own RankAllocator, when it is fed the same weights and gradients."""

from __future__ import annotations

import pytest
import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from adalora.core.allocator import Allocator
from adalora.core.settings import Settings
from adalora.core.triplets import Triplets

SHAPES = [(24, 16, 6), (16, 40, 6), (8, 12, 5), (10, 6, 1)]
STEPS, TINIT, TFINAL, TARGET = 80, 5, 25, 3


class Shell(nn.Module):
    """Parameters under the names by which PEFT's allocator finds them."""

    def __init__(self, triplets: list[Triplets]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for t in triplets:
            layer = nn.Module()
            layer.lora_A = nn.ParameterDict({"default": nn.Parameter(t.q.detach().clone())})
            layer.lora_E = nn.ParameterDict({"default": nn.Parameter(t.lam.detach().clone().unsqueeze(1))})
            layer.lora_B = nn.ParameterDict({"default": nn.Parameter(t.p.detach().clone())})
            self.layers.append(layer)

    def copy_from(self, triplets: list[Triplets]) -> None:
        with torch.no_grad():
            for layer, t in zip(self.layers, triplets, strict=True):
                for ours, theirs in ((t.q, layer.lora_A), (t.p, layer.lora_B)):
                    theirs["default"].copy_(ours)
                    theirs["default"].grad = ours.grad.clone()
                layer.lora_E["default"].copy_(t.lam.unsqueeze(1))
                layer.lora_E["default"].grad = t.lam.grad.clone().unsqueeze(1)


def peft_scores(allocator: RankAllocator, shell: Shell) -> torch.Tensor:
    scores = []
    for k in range(len(shell.layers)):
        name = f"layers.{k}.%s.default"
        entry_a = allocator._element_score(name % "lora_A").mean(dim=1, keepdim=True)
        entry_b = allocator._element_score(name % "lora_B").mean(dim=0).view(-1, 1)
        entry_e = allocator._element_score(name % "lora_E")
        scores.append(allocator._combine_ipt(entry_e, torch.cat([entry_a, entry_b], dim=1)))
    return torch.cat(scores)


@pytest.mark.parametrize("delta_t", [1, 5])
@pytest.mark.parametrize("lr", [5e-3, 3e-2])
def test_same_masks_and_scores_at_every_step(delta_t: int, lr: float) -> None:
    """PEFT takes sensitivity after the update; from there on only the order of summation differs."""
    ours = [Triplets.create(f"m{k}", *shape) for k, shape in enumerate(SHAPES)]
    settings = Settings(
        target_rank=TARGET, t_init=TINIT, t_final=TFINAL, delta_t=delta_t, total_step=STEPS,
        orthogonality_weight=0.0, sensitivity_at="after_step", compact=False,
    )  # fmt: skip
    allocator = Allocator(ours, settings)
    shell = Shell(ours)
    config = PeftAdaLoraConfig(
        target_r=TARGET, init_r=6, tinit=TINIT, tfinal=TFINAL, deltaT=delta_t, beta1=0.85, beta2=0.85, total_step=STEPS
    )
    theirs = RankAllocator(shell, config, "default")
    assert theirs.init_bgt == allocator.initial_budget
    optimizer = torch.optim.AdamW([w for t in ours for w in t.parameters], lr=lr)
    targets = [torch.randn(t.p.shape[0], t.q.shape[1]) for t in ours]
    compared = 0
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        x = [torch.randn(8, t.q.shape[1]) for t in ours]
        losses = [(t.forward(xk) - xk @ w.T).square().mean() for t, xk, w in zip(ours, x, targets, strict=True)]
        sum(losses).backward()
        allocator.before_step()
        optimizer.step()
        shell.copy_from(ours)
        before = len(allocator.trace)
        allocator.after_step(optimizer)
        _, pattern = theirs.update_and_allocate(shell, step, force_mask=step == STEPS - TFINAL)
        if step > STEPS - TFINAL:
            continue  # both hold the last mask from here on
        assert (len(allocator.trace) > before) == (pattern is not None), f"only one side masked at step {step}"
        if pattern is None:
            continue
        compared += 1
        expected = [flag for k in range(len(ours)) for flag in pattern[f"layers.{k}.lora_E.default"]]
        assert allocator.mask.tolist() == expected, f"masks differ at step {step}"
        if step < STEPS - TFINAL:
            torch.testing.assert_close(allocator.scores(), peft_scores(theirs, shell), rtol=1e-6, atol=1e-30)
    assert compared == len([t for t in range(TINIT + 1, STEPS - TFINAL) if t % delta_t == 0]) + 1
    assert allocator.live == TARGET * len(SHAPES)
