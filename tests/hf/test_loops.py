"""Any training loop allocates by itself, once per optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import adalora
from adalora import AdaLoraCallback, AdaLoraConfig, ScheduleError, StateError

from .models import batch, bert

STEPS = 12


class Rows(Dataset[dict[str, torch.Tensor]]):
    """96 rows: 12 batches of 8, or 12 steps of 4 accumulated batches of 2."""

    def __init__(self, size: int = 96) -> None:
        self.rows = batch("SEQ_CLS", seed=5, size=size)

    def __len__(self) -> int:
        return len(self.rows["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.rows.items()}


def make(**settings: Any) -> nn.Module:
    defaults: dict[str, Any] = {
        "task_type": "SEQ_CLS", "target_modules": ["query", "value", "dense"], "target_r": 2, "init_r": 4,
        "lora_alpha": 16, "tinit": 2, "tfinal": 4, "deltaT": 1, "total_step": STEPS,
    }  # fmt: skip
    torch.manual_seed(11)
    return adalora.get_peft_model(bert(), AdaLoraConfig(**{**defaults, **settings}))


def adamw(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], **{"lr": 1e-2, **settings})


def plain_loop(model: nn.Module) -> None:
    optimizer, rows = adamw(model), Rows()
    for indices in torch.arange(96).split(8):
        loss = model(**{key: value[indices] for key, value in rows.rows.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trainer(
    model: nn.Module,
    output: Path,
    accumulation: int = 1,
    callbacks: list[TrainerCallback] | None = None,
    **arguments: Any,
) -> Trainer:
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **{"num_train_epochs": 1, "save_strategy": "no", "logging_strategy": "no", **arguments},
        ),
        train_dataset=Rows(),
        eval_dataset=Rows(8),
        callbacks=callbacks,
    )


def accelerate_loop(model: nn.Module) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, adamw(model), loader)
    for rows in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**rows).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("loop", ["plain", "trainer", "trainer, accumulation 4", "accelerate, accumulation 4"])
@pytest.mark.compatibility("Trainers and loops", "a plain loop, `Trainer`, Accelerate, with accumulation")
def test_every_loop_allocates_once_per_optimizer_step(loop: str, tmp_path: Path) -> None:
    model = make()
    if loop == "plain":
        plain_loop(model)
    elif loop.startswith("trainer"):
        trainer(model, tmp_path, accumulation=4 if "4" in loop else 1).train()
    else:
        accelerate_loop(model)
    allocator = adalora.allocator(model)
    assert allocator.step == STEPS
    assert [allocation.step for allocation in allocator.trace] == [3, 4, 5, 6, 7, 8]
    assert sum(adalora.ranks(model).values()) == 2 * len(adalora.ranks(model))


@pytest.mark.compatibility("Trainers and loops", "No `total_step` and no callback", refused=True)
def test_forgetting_total_step_is_an_error_at_the_first_step_that_says_both_ways(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"total_step=.*AdaLoraCallback\(\)"):
        plain_loop(make(total_step=None))
    with pytest.raises(ScheduleError, match=r"total_step=.*AdaLoraCallback\(\)"):
        trainer(make(total_step=None), tmp_path).train()
    model = make(total_step=None)
    trainer(model, tmp_path, callbacks=[AdaLoraCallback()]).train()
    assert adalora.allocator(model).schedule.total_step == STEPS
    assert adalora.allocator(model).live == 2 * len(adalora.ranks(model))


def test_units_of_length_under_a_trainer(tmp_path: Path) -> None:
    model = make(total_step=None, tinit="1 epoch", tfinal=0.25, deltaT=0.05)
    trainer(model, tmp_path, callbacks=[AdaLoraCallback()], num_train_epochs=4).train()
    schedule = adalora.allocator(model).schedule
    assert (schedule.total_step, schedule.t_init, schedule.t_final, schedule.delta_t) == (48, 12, 12, 2)
    by_hand = make(total_step=None, tinit="1 epoch")
    with pytest.raises(ScheduleError, match="counts epochs"):
        adalora.allocator(by_hand).plan(STEPS)
    adalora.allocator(by_hand).plan(STEPS, steps_per_epoch=3)
    plain_loop(by_hand)
    assert adalora.allocator(by_hand).trace[0].step == 4


def test_a_wrong_total_step_under_a_trainer_is_corrected_with_a_warning(tmp_path: Path) -> None:
    model = make(total_step=500)
    with pytest.warns(UserWarning, match="total_step=500"):
        trainer(model, tmp_path, callbacks=[AdaLoraCallback()]).train()
    assert adalora.allocator(model).live == 2 * len(adalora.ranks(model))


def test_log_lines_and_the_trace_file(tmp_path: Path) -> None:
    model = make(total_step=None)
    run = trainer(
        model, tmp_path, callbacks=[AdaLoraCallback(trace_path=tmp_path / "trace.jsonl")], logging_strategy="steps",
        logging_steps=1, logging_nan_inf_filter=False,
    )  # fmt: skip
    run.train()
    lines = [line for line in run.state.log_history if "loss" in line]
    assert [line["adalora/live"] for line in lines][-1] == 2 * len(adalora.ranks(model))
    assert lines[0]["adalora/budget"] == 4 * len(adalora.ranks(model))
    assert all(0 <= line["adalora/orthogonality"] < 1 for line in lines)
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 1 + len(adalora.allocator(model).trace)


def test_ending_before_pruning_does_warns(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    with pytest.warns(UserWarning, match="ended at step 5, before pruning did"):
        trainer(make(total_step=None), tmp_path, callbacks=[AdaLoraCallback(), Stop()]).train()


@pytest.mark.compatibility("Trainers and loops", "An optimizer of another copy of the model", refused=True)
def test_an_optimizer_of_another_model_is_noticed(tmp_path: Path) -> None:
    """Otherwise the adapter would train, or not, and never allocate."""
    model, other = make(total_step=None), make(total_step=None)
    run = trainer(model, tmp_path, callbacks=[AdaLoraCallback()], num_train_epochs=3)
    run.optimizer = adamw(other)
    with pytest.raises(StateError, match="none of them was the adapter's"):
        run.train()


# ------------------------------------------------------------------------------------------------ the numbers of a step


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, parts: int = 1) -> None:
    rows = Rows(8).rows
    for indices in torch.arange(8).split(8 // parts):
        (model(**{key: value[indices] for key, value in rows.items()}).loss / parts).backward()
    optimizer.step()
    optimizer.zero_grad()


def adapter_weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([w.detach().flatten() for t in adalora.allocator(model).triplets for w in t.parameters])


def test_the_regulariser_is_added_once_however_many_batches_are_accumulated() -> None:
    """PEFT adds it to every accumulated loss: n times too much."""
    models = [make(initialization="gaussian", orth_reg_weight=5.0) for _ in range(2)]
    for model, parts in zip(models, (1, 4), strict=True):
        optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=1e-2)
        for _ in range(3):
            one_step(model, optimizer, parts)
    assert adalora.allocator(models[0]).step == adalora.allocator(models[1]).step == 3
    # the mean of four quarter batches is the batch up to rounding
    torch.testing.assert_close(adapter_weights(models[0]), adapter_weights(models[1]), rtol=1e-4, atol=1e-6)


def test_the_regulariser_is_never_part_of_a_loss() -> None:
    """Not of the training loss, not of the evaluation loss; and it acts also when the loss is computed from logits."""
    heavy, none = (
        make(orth_reg_weight=50.0, initialization="gaussian"),
        make(orth_reg_weight=0.0, initialization="gaussian"),
    )
    rows = Rows(8).rows
    assert heavy(**rows).loss == none(**rows).loss
    assert heavy.eval()(**rows).loss == none.eval()(**rows).loss
    assert adalora.allocator(heavy).penalty() > 0
    before = adalora.allocator(heavy).orthogonality_error()
    optimizer = torch.optim.SGD([w for w in heavy.parameters() if w.requires_grad], lr=1e-4)
    for _ in range(5):
        labels = rows["labels"]
        logits = heavy(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert adalora.allocator(heavy).orthogonality_error() < before


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.compatibility("Optimizers and precision", "float16: autocast with `GradScaler`, skipped steps not counted")
def test_steps_skipped_by_a_loss_scaler_are_not_counted(fused: bool) -> None:
    model = make()
    optimizer, allocator = adamw(model, fused=fused), adalora.allocator(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        scaler.scale(model(**Rows(8).rows).loss).backward()
        if step in (0, 3):
            allocator.triplets[2].p.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert allocator.step == 4
    assert all(torch.isfinite(w).all() for w in model.parameters())
    assert all(torch.isfinite(value).all() for value in allocator.state_dict()["tensors"].values())


@pytest.mark.compatibility("Optimizers and precision", "float16: autocast with `GradScaler`, skipped steps not counted")
@pytest.mark.parametrize("sensitivity_at", ["before_step", "after_step"])
def test_a_loss_scaler_changes_nothing_but_rounding(sensitivity_at: str) -> None:
    """Also for fused optimizers, which see gradients that are still scaled, and leave them unscaled."""
    results = []
    for scaled, fused in ((False, False), (True, False), (True, True)):
        model = make(orth_reg_weight=1.0, initialization="gaussian", sensitivity_at=sensitivity_at)
        optimizer, scaler = adamw(model, fused=fused), torch.amp.GradScaler("cpu", init_scale=512.0, enabled=scaled)
        for _ in range(5):
            scaler.scale(model(**Rows(8).rows).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append((adapter_weights(model), adalora.allocator(model).scores()))
    for weights, scores in results[1:]:
        torch.testing.assert_close(weights, results[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores, results[0][1], rtol=1e-2, atol=1e-12)


def test_an_infinite_gradient_leaves_the_moving_averages_untouched() -> None:
    model = make()
    optimizer, allocator = adamw(model), adalora.allocator(model)
    for _ in range(2):
        one_step(model, optimizer)
    before = allocator.state_dict()["tensors"]
    model(**Rows(8).rows).loss.backward()
    for triplets in allocator.triplets:
        triplets.q.grad[0, 0] = float("nan")
    allocator.before_step()
    after = allocator.state_dict()["tensors"]
    assert all(torch.equal(before[key], after[key]) for key in before if key.endswith(("sensitivity", "uncertainty")))


@pytest.mark.compatibility("Optimizers and precision", "A closure evaluated once is the same as backward and step")
def test_closures_are_followed_by_the_regulariser_and_the_importance() -> None:
    direct, closed = make(orth_reg_weight=1.0), make(orth_reg_weight=1.0)
    optimizers = [adamw(direct), adamw(closed)]

    def closure() -> torch.Tensor:
        optimizers[1].zero_grad()
        loss: torch.Tensor = closed(**Rows(8).rows).loss
        loss.backward()
        return loss

    for _ in range(STEPS):
        one_step(direct, optimizers[0])
        optimizers[1].step(closure)
    assert adalora.ranks(direct) == adalora.ranks(closed)
    torch.testing.assert_close(adapter_weights(direct), adapter_weights(closed), rtol=0, atol=0)


@pytest.mark.compatibility("Optimizers and precision", "A part of the adapter that no optimizer holds", refused=True)
def test_a_part_of_the_adapter_that_no_optimizer_holds_is_an_error() -> None:
    """As soon as it can be known that no other optimizer steps in between."""
    model = make()
    names = [w for n, w in model.named_parameters() if w.requires_grad and "layer.0" in n]
    optimizer = torch.optim.AdamW(names, lr=1e-2)
    one_step(model, optimizer)
    assert adalora.allocator(model).step == 0
    with pytest.raises(StateError, match=r"only a part of the adapter, and no other optimizer .*requires_grad_"):
        one_step(model, optimizer)


def test_two_adapters_with_budgets_of_their_own_train_one_after_the_other() -> None:
    model = make()
    model.add_adapter("second", AdaLoraConfig(
        task_type="SEQ_CLS", target_modules=["query"], target_r=1, init_r=2, total_step=6, tinit=1, tfinal=2, deltaT=1,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for name, steps in (("default", STEPS), ("second", 6)):
        model.set_adapter(name)
        for _ in range(steps):
            one_step(model, optimizer)
    assert adalora.allocator(model, "default").step == STEPS
    assert adalora.allocator(model, "second").step == 6
    assert sum(adalora.ranks(model, "second").values()) == 2
    with pytest.raises(StateError, match="several AdaLoRA adapters"):
        adalora.ranks(model)


def test_nothing_to_prune_is_lora_in_svd_form() -> None:
    model = make(init_r=2, target_r=2, total_step=None)
    optimizer = adamw(model)
    for _ in range(3):
        one_step(model, optimizer)
    assert set(adalora.ranks(model).values()) == {2}
    assert not adalora.allocator(model).trace


@pytest.mark.filterwarnings("ignore:at the last allocation")  # in float16 every gradient underflows here
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.compatibility("Optimizers and precision", "bfloat16 and float16 adapter weights")
def test_half_precision_adapters_keep_the_whole_budget(dtype: torch.dtype) -> None:
    """Scores are products of squares of gradients: in float16 they underflow, tie, and prune everything."""
    torch.manual_seed(0)
    config = AdaLoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "value"], target_r=2, init_r=4, total_step=10, tinit=1, tfinal=3,
        deltaT=1,
    )  # fmt: skip
    model = adalora.get_peft_model(bert().to(dtype), config, autocast_adapter_dtype=False)
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=1e-3)
    allocator = adalora.allocator(model)
    for _ in range(10):
        (model(**Rows(8).rows).loss * 1e-3).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not allocator.frozen:
            assert allocator.scores().dtype == torch.float32
    assert {w.dtype for t in allocator.triplets for w in t.parameters} == {dtype}
    assert allocator.live == 2 * len(allocator.triplets)


@pytest.mark.compatibility("Trainers and loops", "`zero_grad` of either kind")
def test_zeroing_gradients_either_way_changes_nothing() -> None:
    models = [make(), make()]
    for model, to_none in zip(models, (True, False), strict=True):
        optimizer = adamw(model)
        for _ in range(STEPS):
            model(**Rows(8).rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
    torch.testing.assert_close(adapter_weights(models[0]), adapter_weights(models[1]), rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="Transformers 5 compiles from torch 2.7 on")
@pytest.mark.compatibility("Trainers and loops", "`torch.compile`: masks do not recompile")
def test_a_compiled_model_does_not_notice_masks() -> None:
    """Compiled once, and once more when the ranks shrink."""
    torch._dynamo.reset()
    model = make()
    compiled, optimizer, graphs = torch.compile(model, backend="aot_eager"), adamw(model), []
    for _ in range(STEPS):
        compiled(**Rows(8).rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert [a.step for a in adalora.allocator(model).trace] == [3, 4, 5, 6, 7, 8]
    assert graphs[1] == graphs[7], "a mask led to another compilation"
    assert graphs[8] == graphs[-1] <= graphs[7] + 1
    assert sum(t.rank for t in adalora.allocator(model).triplets) == 2 * len(adalora.ranks(model))
