"""LoRA pruned by doublets: the paper's formulas, written out, and a Trainer's ways."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adalora import methods
from adalora.core.errors import AdaLoraError
from adalora.core.importance import METRICS
from adalora.methods import Adapted
from adalora.methods.lora_pruned import OF_SINGULAR_VALUES, Pruner
from adalora.report.run import read_trace

from ..hf.models import ARCHITECTURES, batch, bert, logits
from ..reference.algorithm1 import budget
from .budgets import (
    ALLOCATIONS,
    DELTA_T,
    STEPS,
    T_FINAL,
    T_INIT,
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

BETA1, BETA2 = 0.85, 0.85


class Doublet:
    """A_i* and B_*i of one LoRA, entry by entry; nothing here is shared with the library."""

    def __init__(self, a: nn.Parameter, b: nn.Parameter, index: int) -> None:
        self.a, self.b, self.index = a, b, index
        self.smooth = {"a": torch.zeros_like(a[index]), "b": torch.zeros_like(b[:, index])}
        self.uncertain = {"a": torch.zeros_like(a[index]), "b": torch.zeros_like(b[:, index])}
        self.pruned = False

    def look(self) -> None:
        """I = |w · g|, its average, and the average of how far it is from that."""
        assert self.a.grad is not None and self.b.grad is not None
        entries = {
            "a": (self.a[self.index] * self.a.grad[self.index]).abs().detach(),
            "b": (self.b[:, self.index] * self.b.grad[:, self.index]).abs().detach(),
        }
        for key, sensitivity in entries.items():
            self.smooth[key] = BETA1 * self.smooth[key] + (1 - BETA1) * sensitivity
            away = (sensitivity - self.smooth[key]).abs()
            self.uncertain[key] = BETA2 * self.uncertain[key] + (1 - BETA2) * away

    def score(self) -> float:
        return sum(float((self.smooth[key] * self.uncertain[key]).mean()) for key in "ab")

    def zero(self) -> None:
        with torch.no_grad():
            self.a[self.index] = 0.0
            self.b[:, self.index] = 0.0


def doublets_of(model: nn.Module) -> list[Doublet]:
    weights = dict(model.named_parameters())
    return [
        Doublet(a, weights[name.replace("lora_A", "lora_B")], index)
        for name, a in weights.items()
        if ".lora_A." in name
        for index in range(len(a))
    ]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_whole_training_is_the_papers_written_out(name: str, tmp_path: Path) -> None:
    """Float64: the two sides differ by the order of summation alone; 1e-5, relative, of each weight."""
    ours = adapted_for(job_for("lora_pruned", tmp_path, name), name, torch.float64)
    theirs = copy.deepcopy(ours.model)
    doublets, optimizer = doublets_of(theirs), optimizer_for(theirs)
    whole = len(doublets)
    for t in steps_by_hand(ours, name):
        theirs(**batch(ARCHITECTURES[name][2], t)).loss.backward()
        if t < STEPS - T_FINAL:
            for doublet in doublets:
                doublet.look()
        optimizer.step()
        optimizer.zero_grad()
        if (T_INIT < t < STEPS - T_FINAL and t % DELTA_T == 0) or t == STEPS - T_FINAL:
            b = budget(t, b0=whole, bT=whole // 2, T=STEPS, t_init=T_INIT, t_final=T_FINAL)
            left = [doublet for doublet in doublets if not doublet.pruned]
            for doublet in sorted(left, key=lambda one: -one.score())[b:]:
                doublet.pruned = True
        for doublet in doublets:
            if doublet.pruned:
                doublet.zero()
        assert budgeted_of(ours).mask.tolist() == [not doublet.pruned for doublet in doublets], f"step {t}"
        for (key, mine), other in zip(ours.model.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-12, msg=f"{key} differs at step {t}")
    assert sum(doublet.pruned for doublet in doublets) == whole // 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished_run("lora_pruned", tmp_path_factory.mktemp("finished"), watch=Watch)


class Watch(TrainerCallback):
    """After every step: what is pruned is zero and stays so."""

    def __init__(self, adapted: Adapted) -> None:
        self.pruner: Pruner = budgeted_of(adapted)
        self.masks = [self.pruner.mask.clone()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.masks.append(self.pruner.mask.clone())
        assert not bool((self.masks[-1] & ~self.masks[-2]).any())
        for layer, live in zip(self.pruner.layers.values(), self.pruner.live.values(), strict=True):
            assert not layer.lora_A["default"].weight[~live].any()
            assert not layer.lora_B["default"].weight[:, ~live].any()


def test_what_is_pruned_stays_zero_under_a_trainer(finished: Finished) -> None:
    """Momentum and clipping included, as was watched; the trace says the same."""
    masks = finished.watch.masks
    assert len(masks) == STEPS + 1 and set(finished.start.values()) == {2}
    assert int(masks[-1].sum()) == len(finished.start) == sum(finished.ranks.values())
    lines = [json.loads(line) for line in (finished.folder / "trace.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[1:]] == ALLOCATIONS
    assert [sum(line["ranks"]) for line in lines[1:]] == [line["budget"] for line in lines[1:]]
    assert [line["budget"] for line in lines[1:]] == [int(masks[step].sum()) for step in ALLOCATIONS]
    trace = read_trace(finished.folder / "trace.jsonl")
    assert trace.initial == finished.start and trace.final == finished.ranks


def test_a_pruned_doublet_is_not_chosen_again(tmp_path: Path) -> None:
    """Its averages live longer than it does: even the best score does not bring it back."""
    adapted = adapted_for(job_for("lora_pruned", tmp_path))
    pruner = budgeted_of(adapted)
    for step in steps_by_hand(adapted, last=ALLOCATIONS[3]):
        if step == ALLOCATIONS[2]:
            live = pruner.mask.clone()
            for name, flags in pruner.live.items():
                averages = pruner._scored().averages()[f"{name}/q"]
                averages.sensitivity[~flags], averages.uncertainty[~flags] = 1e3, 1e3
    assert int(pruner.mask.sum()) == pruner.schedule.budget(ALLOCATIONS[3]) < int(live.sum()) < len(live)
    assert not bool((pruner.mask & ~live).any())


def test_the_importance_is_that_of_the_step_before_the_final_phase(tmp_path: Path) -> None:
    """As the authors' code has it: gradients of the step that begins it are not looked at any more."""
    adapted = adapted_for(job_for("lora_pruned", tmp_path))
    pruner = budgeted_of(adapted)
    seen = []
    for _ in steps_by_hand(adapted, last=STEPS - T_FINAL - 1):
        seen.append({key: value.clone() for key, value in pruner.tensors().items()})
    adapted.model(**batch("SEQ_CLS")).loss.backward()
    pruner.before_step()
    assert all(torch.equal(value, seen[-1][key]) for key, value in pruner.tensors().items())
    assert any(not torch.equal(value, seen[-2][key]) for key, value in seen[-1].items())


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    """Twice 4 rows train as 8 do; float64, so that only the order of summation differs."""
    results = []
    for accumulate in (1, 2):
        adapted = adapted_for(job_for("lora_pruned", tmp_path, "llama"), "llama", torch.float64)
        train(adapted, tmp_path / str(accumulate), "llama", accumulate=accumulate, checkpoints=False)
        results.append((adapted.ranks(), budgeted_of(adapted).step, trained_weights(adapted.model)))
    assert results[0][:2] == results[1][:2]
    for key, value in results[0][2].items():
        torch.testing.assert_close(value, results[1][2][key], rtol=1e-5, atol=1e-9)


def test_a_step_that_the_loss_scaler_skips_is_none(tmp_path: Path) -> None:
    """Neither counted nor seen: gradients of inf leave importance and weights as they are."""
    adapted = adapted_for(job_for("lora_pruned", tmp_path))
    (callback,), pruner = adapted.callbacks, budgeted_of(adapted)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = AcceleratedOptimizer(optimizer_for(adapted.model), scaler=scaler)
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()

    def step(seed: int, broken: bool) -> None:
        scaler.scale(adapted.model(**batch("SEQ_CLS", seed)).loss).backward()
        if broken:
            next(iter(pruner.layers.values())).lora_A["default"].weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer.optimizer)
        callback.on_pre_optimizer_step(arguments, state, control, optimizer=optimizer)
        optimizer.step()
        assert optimizer.step_was_skipped == broken
        callback.on_optimizer_step(arguments, state, control, optimizer=optimizer)
        optimizer.zero_grad()

    callback.on_train_begin(arguments, state, control)
    for seed in (1, 2):
        step(seed, broken=False)
    weights, averages = trained_weights(adapted.model), {k: v.clone() for k, v in pruner.tensors().items()}
    step(3, broken=True)
    assert pruner.step == 2
    assert all(torch.equal(value, averages[key]) for key, value in pruner.tensors().items())
    assert all(torch.equal(value, weights[key]) for key, value in trained_weights(adapted.model).items())
    step(3, broken=False)
    assert pruner.step == 3
    assert any(not torch.equal(value, averages[key]) for key, value in pruner.tensors().items())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_is_saved_is_compact_and_computes_the_same(name: str, tmp_path: Path) -> None:
    """Stock PEFT loads it. 1e-5: the scale is folded into A."""
    method = methods.get("lora_pruned")
    job = job_for("lora_pruned", tmp_path, name)
    adapted = adapted_for(job, name)
    for step in steps_by_hand(adapted, name):
        if step in (6, STEPS):  # between two allocations, and at the end
            folder = tmp_path / str(step)
            adapted.save(folder)
            torch.manual_seed(3)
            base: Any = ARCHITECTURES[name][0]()
            loaded = method.load(base, job.recipe, folder)
            task_type = ARCHITECTURES[name][2]
            torch.testing.assert_close(
                logits(loaded, task_type), logits(adapted.model, task_type), rtol=1e-5, atol=1e-5
            )
    assert isinstance(loaded, PeftModel)
    saved = {key: len(w) for key, w in loaded.named_parameters() if ".lora_A." in key}
    ranks = {rank for rank in adapted.ranks().values() if rank}
    assert sum(saved.values()) == len(adapted.ranks()) and set(saved.values()) == ranks
    assert 0 in adapted.ranks().values() and len(saved) < len(adapted.ranks())


@pytest.mark.parametrize("step", [10, 20])  # while pruning, and after it
def test_a_resumed_training_is_the_same_to_the_bit(step: int, finished: Finished, tmp_path: Path) -> None:
    check_resumed("lora_pruned", finished, step, tmp_path)


def test_a_checkpoint_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    (callback,) = adapted_for(job_for("lora_pruned", tmp_path)).callbacks
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(AdaLoraError, match=r"checkpoint-10 cannot be resumed.*interrupted"):
        callback.on_train_begin(arguments, TrainerState(global_step=10), TrainerControl())
    assert not (tmp_path / "trace.jsonl").exists()


@pytest.mark.parametrize("policy", ["global_topk", "uniform"])
@pytest.mark.parametrize("importance", sorted(set(METRICS) - set(OF_SINGULAR_VALUES)))
def test_every_importance_that_has_a_meaning_prunes(importance: str, policy: str, tmp_path: Path) -> None:
    adapted = adapted_for(job_for("lora_pruned", tmp_path, importance=importance, policy=policy))
    masks = [budgeted_of(adapted).mask.clone() for _ in steps_by_hand(adapted)]
    assert int(masks[-1].sum()) == len(adapted.ranks())
    assert all(not bool((after & ~before).any()) for before, after in pairwise(masks))
    if policy == "uniform":
        assert set(adapted.ranks().values()) == {1}


def test_the_size_of_its_product_is_a_doublets_norm_product(tmp_path: Path) -> None:
    """‖B_i‖ ‖A_i‖, which is ‖ΔW_i‖_F: the constant λ = 1 is the right one."""
    adapted = adapted_for(job_for("lora_pruned", tmp_path, importance="norm_product"))
    assert list(steps_by_hand(adapted, last=2))
    pruner = budgeted_of(adapted)
    layer = next(iter(pruner.layers.values()))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scoring = pruner._scored()
    found: Tensor = scoring.scores(scoring.stacks.parameters())[:2]
    expected = torch.stack([torch.outer(b[:, i], a[i]).norm() for i in range(2)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"orth_reg_weight": 0.5}, r"adalora\.orth_reg_weight: the method lora_pruned has no such choice.*given: 0\.5"),
        ({"initialization": "gaussian"}, r"adalora\.initialization: .*given: 'gaussian'"),
        ({"singular_gain": 3.0}, r"adalora\.singular_gain: "),
        ({"sensitivity_at": "after_step"}, r"adalora\.sensitivity_at: "),
        ({"importance": "singular"}, r"adalora\.importance: singular looks at singular values"),
        ({"importance": "magnitude"}, r"adalora\.importance: magnitude looks at"),
        ({"importance": "guess"}, r"importance='guess' is not known"),
        ({"target_modules": ["word_embeddings", "query"]}, r"word_embeddings is an embedding"),
        ({"target_modules": ["nothing"]}, r"target_modules: .*matches nothing"),
        ({"tinit": STEPS}, r"no step is left for pruning"),
        ({"init_r": 1, "target_r": 2}, r"initial ranks sum to .* below the target"),
    ],
)
def test_what_has_no_meaning_is_refused(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdaLoraError, match=message):
        adapted_for(job_for("lora_pruned", tmp_path, **section))
    assert not list(tmp_path.iterdir())


def test_keys_may_say_what_it_does_anyway(tmp_path: Path) -> None:
    said = {"orth_reg_weight": 0.0, "singular_gain": 1.0, "compact": False}
    assert adapted_for(job_for("lora_pruned", tmp_path, **said)).ranks()


def test_a_budget_sets_the_target_and_keeps_ratio_and_scale(tmp_path: Path) -> None:
    """As many parameters as LoRA of the target rank has."""
    recipe = job_for("lora_pruned", tmp_path).recipe
    sides = sum(sum(layer.weight.shape) for layer in bert().bert.modules() if isinstance(layer, nn.Linear))
    changed = methods.get("lora_pruned").with_budget(bert(), recipe, 5 * sides).adalora
    assert (changed.target_r, changed.init_r, changed.lora_alpha) == (5, 10, 20.0)
    assert changed.budget_unit == "parameters"
    fraction = methods.get("lora_pruned").with_budget(bert(), recipe, sides // 3).adalora
    assert (fraction.init_r, fraction.lora_alpha) == (1, 2.0) and 0.32 < fraction.target_r < 0.34
