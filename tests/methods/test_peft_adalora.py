"""PEFT's AdaLoRA, driven: the same as by hand, the regulariser once a step, saved and resumed exactly."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from adalora import methods
from adalora.core.errors import AdaLoraError
from adalora.report.run import read_trace

from ..hf.models import ARCHITECTURES, batch, logits
from .budgets import (
    ALLOCATIONS,
    STEPS,
    Finished,
    adapted_for,
    budgeted_of,
    check_resumed,
    finished_run,
    job_for,
    optimizer_for,
    steps_by_hand,
    train,
    trained_weights,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished_run("peft_adalora", tmp_path_factory.mktemp("finished"))


def svd_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if hasattr(layer, "ranknum")]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_it_is_the_loop_that_peft_documents(name: str, tmp_path: Path) -> None:
    """The pattern is kept elsewhere and saving goes on in between: to the bit, nothing else is different."""
    ours = adapted_for(job_for("peft_adalora", tmp_path, name), name)
    theirs: Any = copy.deepcopy(ours.model)
    optimizer = optimizer_for(theirs)
    for t in steps_by_hand(ours, name):
        theirs(**batch(ARCHITECTURES[name][2], t)).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(t)
        optimizer.zero_grad()
        if t % 5 == 0:
            ours.save(tmp_path / "saved")
        for mine, other in zip(ours.model.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other), f"step {t}"
    live = sum(int((layer.lora_E["default"] != 0).sum()) for layer in svd_layers(theirs))
    assert live == sum(ours.ranks().values()) == len(ours.ranks())


def test_budget_and_steps_are_those_of_our_own(finished: Finished, tmp_path: Path) -> None:
    """Under a Trainer: the same matrices, and the same number of triplets after the same steps."""
    ours = adapted_for(job_for("adalora", tmp_path))
    assert ours.ranks() == finished.start and set(finished.start.values()) == {2}
    train(ours, tmp_path / "checkpoints")
    assert sum(finished.ranks.values()) == len(finished.start) == sum(ours.ranks().values())
    traces = [
        [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
        for folder in (tmp_path, finished.folder)
    ]
    (head, *lines), (peft_head, *peft_lines) = traces
    assert head == peft_head
    assert [line["step"] for line in lines] == [line["step"] for line in peft_lines] == ALLOCATIONS
    assert [line["budget"] for line in lines] == [line["budget"] for line in peft_lines]
    assert [sum(line["ranks"]) for line in peft_lines] == [line["budget"] for line in peft_lines]
    trace = read_trace(finished.folder / "trace.jsonl")
    assert trace.initial == finished.start and trace.final == finished.ranks


@pytest.mark.parametrize("use_rslora", [False, True])
def test_its_scale_is_the_recipes(use_rslora: bool, tmp_path: Path) -> None:
    """Not 1e-5 / 4 beside it, as PEFT's would be; 1e-6: float32."""
    section = {"init_r": 4, "lora_alpha": 6.0, "use_rslora": use_rslora}
    adapted = adapted_for(job_for("peft_adalora", tmp_path, **section))
    for layer in svd_layers(adapted.model):
        a, b, e = (getattr(layer, part)["default"] for part in ("lora_A", "lora_B", "lora_E"))
        nn.init.normal_(e)
        expected = (6.0 / 2 if use_rslora else 6.0 / 4) * b @ torch.diag(e.flatten()) @ a
        factor = (layer.get_delta_weight("default") * expected).sum() / expected.square().sum()
        assert abs(factor.item() - 1) < 1e-6


def test_its_regulariser_is_in_the_loss(tmp_path: Path) -> None:
    """γ times the mean of ‖XXᵀ - I‖_F over every A and B; 1e-5: float32."""
    adapted: Any = adapted_for(job_for("peft_adalora", tmp_path, orth_reg_weight=0.7))
    inputs = batch("SEQ_CLS")
    with_it = adapted.model(**inputs).loss
    task = nn.functional.cross_entropy(adapted.model(**inputs).logits, inputs["labels"])
    norms = [
        torch.linalg.norm(x @ x.T - torch.eye(len(x)))
        for layer in svd_layers(adapted.model)
        for x in (layer.lora_A["default"], layer.lora_B["default"].T)
    ]
    torch.testing.assert_close(with_it - task, 0.7 * torch.stack(norms).mean(), rtol=1e-5, atol=1e-6)


def test_accumulated_batches_get_the_regulariser_once(tmp_path: Path) -> None:
    """A Trainer tells language models how many items a step holds, and divides no loss then. Twice 4 rows train as 8
    do; float64, so that only the order of summation differs."""
    results = []
    for accumulate in (1, 2):
        job = job_for("peft_adalora", tmp_path, "llama", accumulate, orth_reg_weight=0.5)
        adapted = adapted_for(job, "llama", torch.float64)
        train(adapted, tmp_path / str(accumulate), "llama", accumulate=accumulate, checkpoints=False)
        assert budgeted_of(adapted).step == STEPS
        results.append(trained_weights(adapted.model))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_what_is_saved_is_plain_lora_that_computes_the_same(name: str, tmp_path: Path) -> None:
    """Stock PEFT loads it. 1e-5: the scale and E are folded into A."""
    method = methods.get("peft_adalora")
    job = job_for("peft_adalora", tmp_path, name)
    adapted = adapted_for(job, name)
    for step in steps_by_hand(adapted, name):
        if step in (5, 7, STEPS):  # between two masks, where λ of pruned triplets have grown again, and at the end
            folder = tmp_path / str(step)
            adapted.save(folder)
            torch.manual_seed(3)
            base: Any = ARCHITECTURES[name][0]()
            loaded = method.load(base, job.recipe, folder)
            found, expected = (logits(model, ARCHITECTURES[name][2]) for model in (loaded, adapted.model))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(loaded, PeftModel)
    saved = {key: len(w) for key, w in loaded.named_parameters() if ".lora_A." in key}
    assert sum(saved.values()) == len(adapted.ranks())
    assert len(saved) == sum(rank > 0 for rank in adapted.ranks().values()) < len(adapted.ranks())


@pytest.mark.parametrize("step", [5, 10, 20])  # between two masks, on one, and after the last
def test_a_resumed_training_is_the_same_to_the_bit(step: int, finished: Finished, tmp_path: Path) -> None:
    """As PEFT saves and loads by itself, this fails on sizes or ends at another rank."""
    check_resumed("peft_adalora", finished, step, tmp_path)


def test_matrices_that_the_loss_does_not_depend_on_are_no_error(tmp_path: Path) -> None:
    """PEFT's allocator multiplies by gradients that are not there."""
    job = job_for("peft_adalora", tmp_path)
    adapted: Any = adapted_for(job)
    last = svd_layers(adapted.model)[-1]
    last.forward = last.base_layer.forward
    assert list(steps_by_hand(adapted)) and sum(adapted.ranks().values()) == len(adapted.ranks())
    assert list(adapted.ranks().values())[-1] == 0


def test_lengths_may_be_fractions_or_epochs(tmp_path: Path) -> None:
    """An epoch has 12 steps here."""
    section = {"tinit": 0.25, "tfinal": "1 epoch", "deltaT": 0.1}
    adapted: Any = adapted_for(job_for("peft_adalora", tmp_path, **section))
    config = adapted.model.peft_config["default"]
    assert (config.tinit, config.tfinal, config.deltaT, config.total_step) == (6, 12, 2, STEPS)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"importance": "singular"}, r"adalora\.importance: the method peft_adalora has no such choice.*'singular'"),
        ({"policy": "uniform"}, r"adalora\.policy: .*'global_topk'"),
        ({"schedule": "linear"}, r"adalora\.schedule: .*'cubic'"),
        ({"singular_gain": 2.0}, r"adalora\.singular_gain: "),
        ({"init_r": 1}, r"adalora\.init_r: .*should be above target_r=1 \(given: 1\)"),
        ({"beta2": 0.0}, r"adalora\.beta2: .*more than 0"),
        ({"tinit": 20}, r"no step is left for pruning"),
        ({"target_modules": ["nothing"]}, r"target_modules: .*matches nothing"),
    ],
)
def test_what_peft_cannot_do_is_refused(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdaLoraError, match=message):
        adapted_for(job_for("peft_adalora", tmp_path, **section))
    assert not list(tmp_path.iterdir())


def test_keys_may_say_what_peft_does_anyway(tmp_path: Path) -> None:
    said = {"initialization": "gaussian", "orthogonality": "frobenius", "sensitivity_at": "after_step"}
    assert adapted_for(job_for("peft_adalora", tmp_path, **said)).ranks()
