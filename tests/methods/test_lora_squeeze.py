"""LoRA squeezed by singular values: against a dense SVD, and what happens beside it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from adalora.core.errors import AdaLoraError
from adalora.methods.lora_pruned import weights_of
from adalora.methods.lora_squeeze import Squeezer, squeezed
from adalora.report.run import read_trace

from .jobs import adapt, outputs, recipe_for, trainer_for


@pytest.mark.parametrize(("d_out", "r", "d_in"), [(20, 6, 13), (4, 6, 30), (30, 6, 3)])
def test_it_is_the_best_approximation_of_its_rank(d_out: int, r: int, d_in: int) -> None:
    """Eckart and Young; float64 would be exact, and these are float32: 1e-5 of entries near 3."""
    torch.manual_seed(0)
    b, a = torch.randn(d_out, r), torch.randn(r, d_in)
    left, right = squeezed(b, a, 2)
    u, s, vh = torch.linalg.svd((b @ a).double(), full_matrices=False)
    torch.testing.assert_close((left @ right).double(), u[:, :2] * s[:2] @ vh[:2], atol=1e-5, rtol=0)
    assert left.shape == b.shape and right.shape == a.shape and not left[:, 2:].any() and not right[2:].any()
    torch.testing.assert_close(left.norm(dim=0)[:2], right.norm(dim=1)[:2])  # half of each singular value


def test_the_update_keeps_its_scale_and_the_optimizer_starts_afresh(tmp_path: Path) -> None:
    """From rank 6 to 4 with nothing to cut off: the outputs are the same before and after."""
    recipe = recipe_for("lora_squeeze", adalora={"target_r": 4, "init_r": 6, "deltaT": 1})
    _, adapted = adapt("lora_squeeze", tmp_path, recipe)
    trainer = trainer_for(adapted, tmp_path)
    (callback,) = adapted.callbacks
    squeezer = callback.budgeted  # type: ignore[attr-defined]
    assert isinstance(squeezer, Squeezer)
    with torch.no_grad():
        for layer in squeezer.layers.values():
            for weight in weights_of(layer):
                weight.normal_()
            weights_of(layer)[1][:, 4:] = 0
    before, scaling = outputs(adapted.model).logits, [dict(layer.scaling) for layer in squeezer.layers.values()]
    trainer.create_optimizer()
    squeezer.optimizer = trainer.optimizer
    for weight in adapted.model.parameters():
        if weight.requires_grad:
            trainer.optimizer.state[weight] = {"step": torch.tensor(5.0)}  # type: ignore[union-attr]
    squeezer.step = squeezer.schedule.final_step - 1
    allocation = squeezer.after_step()
    assert allocation is not None and allocation.ranks == [4] * 12
    torch.testing.assert_close(outputs(adapted.model).logits, before, atol=1e-4, rtol=1e-4)
    assert [dict(layer.scaling) for layer in squeezer.layers.values()] == scaling
    left = trainer.optimizer.state  # type: ignore[union-attr]
    assert all(weight not in left for layer in squeezer.layers.values() for weight in weights_of(layer))
    assert len(left) == 2, "the output layer's averages stay"


def test_what_is_cut_off_stays_zero_and_the_rank_falls_everywhere(tmp_path: Path) -> None:
    recipe = recipe_for("lora_squeeze", adalora={"target_r": 2, "init_r": 6, "deltaT": 2})
    _, adapted = adapt("lora_squeeze", tmp_path, recipe)
    start = copy.deepcopy(adapted.ranks())
    trainer_for(adapted, tmp_path).train()
    assert set(start.values()) == {6} and set(adapted.ranks().values()) == {2}
    trace = [allocation.ranks for allocation in read_trace(tmp_path / "trace.jsonl").allocations]
    assert all(len(set(ranks)) == 1 for ranks in trace)
    falls = [ranks[0] for ranks in trace]
    assert falls == sorted(falls, reverse=True) and falls[-1] == 2 and len(set(falls)) > 2
    squeezer = adapted.callbacks[0].budgeted  # type: ignore[attr-defined]
    for layer in squeezer.layers.values():
        a, b = weights_of(layer)
        assert a[:2].any() and b[:, :2].any() and not a[2:].any() and not b[:, 2:].any()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"importance": "ratio"}, "adalora.importance: the method lora_squeeze has no such choice"),
        ({"policy": "global_topk", "rank_by": "score_per_parameter"}, "adalora.rank_by: the method lora_squeeze"),
        ({"target_r": 0.5}, "adalora.target_r: lora_squeeze gives every matrix ranks of its own accord"),
    ],
)
def test_what_it_does_not_do_is_refused(section: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdaLoraError, match=message):
        adapt("lora_squeeze", tmp_path, recipe_for("lora_squeeze", adalora=section))
