"""The gradient start on quantized bases: the directions of the dense gradient of what the base computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import adalora
from adalora.hf.layers import adapted_layers

from .models import batch
from .test_quantized import CAUSAL, KINDS, adapt, over, stored

# through activations that are rounded themselves, no gradient comes back: there most matrices have none
STARTED = {k: build for k, build in KINDS.items() if k.startswith(("bits", "torchao")) and "activations" not in k}

pytestmark = [pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast from")]


@over(STARTED, "the gradient start")
def test_the_gradient_is_that_of_the_quantized_base(kind: str, tmp_path: Path) -> None:
    """Seen by other means: G = Σ g xᵀ of inputs and gradients that ordinary hooks keep. The base stays as it is, of a
    model in evaluation mode, too, in which bitsandbytes would pack weights anew and read them wrong backwards."""
    model = adapt(STARTED[kind](tmp_path), initialization="gradient", start_batches=2).train()
    base = {name: value for name, _, value in stored(model)}
    layers = dict(adapted_layers(model, "default"))
    dense: dict[str, torch.Tensor] = {name: torch.zeros(()) for name in layers}

    def keep(name: str) -> object:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            x = args[0].detach().float().flatten(0, -2)

            def add(g: torch.Tensor) -> None:
                dense[name] = dense[name] + g.float().flatten(0, -2).T @ x / 2

            y.register_hook(add)

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]  # type: ignore[attr-defined]
    rows = [batch(CAUSAL, seed, 4) for seed in range(2)]
    for b in rows:
        model(**b).loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    model.eval()
    told = adalora.start(model, rows)
    assert len(told["values"]) == len(layers) == 14
    changed = [name for name, _, value in stored(model) if value != base[name]]
    assert not changed
    for t, g in zip(adalora.allocator(model).triplets, dense.values(), strict=True):
        p, lam, q = (part.detach().float() for part in t.factors)
        share = -torch.diagonal(p.T @ g @ q.T).sum() / torch.linalg.svdvals(g)[: len(lam)].sum()
        assert not lam.any() and share > 0.9, (t.name, share)
