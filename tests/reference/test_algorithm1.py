"""The allocator against a literal port of the paper's Algorithm 1, over whole trajectories."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adalora.core.allocator import Allocator
from adalora.core.settings import Settings
from adalora.core.triplets import Triplets

from .algorithm1 import Algorithm1

SHAPES = [(12, 20, 4), (16, 16, 4), (7, 24, 3), (9, 5, 1)]  # d_out, d_in, initial rank; the last has rank 1
STEPS, T_INIT, T_FINAL = 90, 8, 20
OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=2e-2),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=2e-3, momentum=0.9),
}


def batch(step: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(step)
    xs = [torch.randn(16, d_in, generator=generator, dtype=dtype) for _, d_in, _ in SHAPES]
    weights = torch.Generator().manual_seed(99)
    ys = [
        x @ torch.randn(d_in, d_out, generator=weights, dtype=dtype)
        for x, (d_out, d_in, _) in zip(xs, SHAPES, strict=True)
    ]
    return xs, [(k + 1) / 4 * y for k, y in enumerate(ys)]


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("delta_t", [1, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@pytest.mark.parametrize(("compact", "gamma"), [(False, 0.1), (True, 0.0)])
def test_whole_trajectory_equals_the_paper(
    optimizer_name: str, delta_t: int, dtype: torch.dtype, tolerance: float, compact: bool, gamma: float
) -> None:
    """Same masks at every step, same scores and weights.

    Both sides see the same numbers in another order of summation. Training amplifies that rounding, so the whole
    trajectory agrees to 1e-9 in float64 and to 2e-4 in float32; scores, in float32, to 1e-5 over the first 20 steps.
    With ``compact``, pruned vectors leave the regulariser in the final phase (decision 002), hence γ = 0 there.
    """
    ours = [Triplets.create(f"m{k}", *shape, dtype=dtype, initialization="gaussian") for k, shape in enumerate(SHAPES)]
    reference = Algorithm1(
        [(t.p.detach(), t.lam.detach(), t.q.detach()) for t in ours],
        T=STEPS, t_init=T_INIT, t_final=T_FINAL, delta_t=delta_t, target_rank=2, beta1=0.85, beta2=0.8, gamma=gamma,
    )  # fmt: skip
    settings = Settings(
        target_rank=2, t_init=T_INIT, t_final=T_FINAL, delta_t=delta_t, total_step=STEPS, beta1=0.85, beta2=0.8,
        orthogonality_weight=gamma, compact=compact,
    )  # fmt: skip
    allocator = Allocator(ours, settings)
    our_optimizer = OPTIMIZERS[optimizer_name]([w for t in ours for w in t.parameters])
    their_optimizer = OPTIMIZERS[optimizer_name](reference.parameters())
    allocations = 0
    for step in range(1, STEPS + 1):
        xs, ys = batch(step, dtype)
        our_optimizer.zero_grad()
        sum((t.forward(x, 0.5) - y).square().mean() for t, x, y in zip(ours, xs, ys, strict=True)).backward()
        allocator.before_step()
        our_optimizer.step()
        scores = allocator.scores() if step < STEPS - T_FINAL else None
        before = len(allocator.trace)
        allocator.after_step(our_optimizer)
        outputs = [x @ (m["P"] * m["E"] @ m["Q"]).T * 0.5 for x, m in zip(xs, reference.matrices, strict=True)]
        loss = sum((out - y).square().mean() for out, y in zip(outputs, ys, strict=True))
        reference.step(step, loss, their_optimizer)

        if len(allocator.trace) > before:
            allocations += 1
            assert allocator.trace[-1].step == step
            assert allocator.trace[-1].ranks == [int(mask.sum()) for mask in reference.masks]
        if not (allocator.frozen and compact):
            assert torch.equal(allocator.mask, torch.cat(reference.masks)), f"masks differ at step {step}"
        if scores is not None and len(allocator.trace) > before:
            theirs = torch.cat(reference.scores)
            torch.testing.assert_close(
                scores, theirs, rtol=1e-5 if step < 20 and dtype == torch.float32 else tolerance, atol=1e-30
            )
        for t, m, mask in zip(ours, reference.matrices, reference.masks, strict=True):
            delta = m["P"] * m["E"] @ m["Q"]
            scale = delta.abs().max().clamp_min(1e-12)
            assert (t.delta() - delta).abs().max() <= tolerance * scale, f"weights differ at step {step}"
            if allocator.frozen and compact:
                assert t.rank == int(mask.sum())
    assert allocations == len([t for t in range(T_INIT + 1, STEPS - T_FINAL) if t % delta_t == 0]) + 1
    assert allocator.live == 2 * len(SHAPES)
