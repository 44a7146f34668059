"""Trainers of Transformers, TRL, Accelerate and Lightning: nothing but the configuration and a callback is ours."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

import adalora
from adalora import AdaLoraCallback, AdaLoraConfig
from adalora.hf.callback import check_rate

from .models import VOCABULARY, batch, bert, llama, logits, t5
from .test_loops import STEPS, Rows, adamw, adapter_weights, make, plain_loop, trainer

AREA = "Trainers and loops"
SAVING = "Saving, loading, resuming"
OPTIMIZERS = "Optimizers and precision"
BFLOAT16 = 0.03  # logits near 1, of products with eight bits of mantissa


def assert_budget_reached(model: nn.Module, steps: int = STEPS, target: int = 2) -> None:
    allocator, ranks = adalora.allocator(model), adalora.ranks(model)
    assert allocator.frozen and allocator.step == steps
    assert len(allocator.trace) > 1 and len({allocation.step for allocation in allocator.trace}) == len(allocator.trace)
    assert allocator.live == sum(ranks.values()) == target * len(ranks)
    assert all(0 <= rank <= initial for rank, initial in zip(ranks.values(), allocator.initial_ranks, strict=True))
    assert {t.name: t.rank for t in allocator.triplets} == ranks


def saved_ranks(directory: Path) -> dict[str, int]:
    weights = load_file(directory / "adapter_model.safetensors")
    return {key: value.shape[0] for key, value in weights.items() if key.endswith("lora_A.weight")}


def same_bert() -> nn.Module:
    torch.manual_seed(11)  # as in make()
    return bert()


# --------------------------------------------------------------------------------------------------------- Transformers


@pytest.mark.compatibility(AREA, "`Trainer`: gradient clipping, accumulation, bf16, `average_tokens_across_devices`")
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_grad_norm": 0.1},
        {"accumulation": 4, "max_grad_norm": 1.0, "average_tokens_across_devices": True},
        {"bf16": True, "average_tokens_across_devices": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1},
    ],
    ids=lambda arguments: ", ".join(arguments),
)
def test_trainer(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = make(total_step=None)
    later = {name: arguments[name] for name in ("max_grad_norm", "lr_scheduler_type") if name in arguments}
    arguments = {name: value for name, value in arguments.items() if name not in later}
    run = trainer(model, tmp_path, callbacks=[AdaLoraCallback()], **arguments)
    for name, value in later.items():  # trainer() has values of its own for these
        setattr(run.args, name, value)
    run.train()
    assert_budget_reached(model)
    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(same_bert(), tmp_path / "adapter")
    assert type(loaded.peft_config["default"]) is LoraConfig
    # with bf16, Accelerate has wrapped the model's own forward in autocast for good
    atol = BFLOAT16 if arguments.get("bf16") else 1e-5
    torch.testing.assert_close(logits(loaded, "SEQ_CLS"), logits(model, "SEQ_CLS").float(), rtol=0, atol=atol)


@pytest.mark.parametrize(("rate", "optim"), [(5e-5, "adamw_torch"), (1e-4, "adamw_torch"), (5e-5, "sgd")])
def test_a_rate_at_which_an_adapter_hardly_moves(rate: float, optim: str, tmp_path: Path) -> None:
    """The Trainer's default, for one. Other optimizers have scales of their own; many steps make up for a low rate."""
    run = trainer(make(total_step=None), tmp_path, callbacks=[AdaLoraCallback()], optim=optim, warmup_steps=3)
    run.args.learning_rate = rate
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    said = [str(warning.message) for warning in caught if "learning rate" in str(warning.message)]
    if rate < 1e-4 and optim != "sgd":
        assert len(said) == 1 and "the learning rate is 5e-05: with AdamW" in said[0] and "1e-3" in said[0]
    else:
        assert said == []
    check_rate(adalora.allocator(run.model), run.optimizer, 5000)


@pytest.mark.compatibility(OPTIMIZERS, "`TrainingArguments(optim=...)`: every kind that runs on a CPU")
@pytest.mark.parametrize(
    ("optimizer", "needs"),
    [
        ("adamw_torch", None),
        ("adamw_torch_fused", None),
        ("adafactor", None),
        ("sgd", None),
        ("adagrad", None),
        ("rmsprop", None),
        ("adamw_8bit", "bitsandbytes"),
        ("schedule_free_adamw", "schedulefree"),
        ("schedule_free_sgd", "schedulefree"),
    ],
)
def test_optimizers_of_the_trainer(optimizer: str, needs: str | None, tmp_path: Path) -> None:
    if needs is not None:
        pytest.importorskip(needs, reason=f"{needs} is not installed")
    model = make(total_step=None)
    run = trainer(
        model, tmp_path, callbacks=[AdaLoraCallback()], optim=optimizer, save_strategy="steps", save_steps=STEPS
    )
    run.train()
    allocator = adalora.allocator(model)
    assert allocator.step == STEPS and allocator.frozen
    assert allocator.live == 2 * len(allocator.triplets)
    assert sum(saved_ranks(tmp_path / f"checkpoint-{STEPS}").values()) == allocator.live


class Pairs(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows whose labels are themselves: 96 for 12 steps of 8."""

    def __init__(self, size: int = 96) -> None:
        rows = batch("SEQ_2_SEQ_LM", seed=3, size=size)
        self.rows = [{"input_ids": ids, "labels": ids[:5]} for ids in rows["input_ids"]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays is extremely slow")  # the collator
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")
@pytest.mark.compatibility(AREA, "`Seq2SeqTrainer` with `predict_with_generate`")
def test_seq2seq_trainer(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = AdaLoraConfig(
        task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wi", "wo"], target_r=2, init_r=4, tinit=2, tfinal=4,
        deltaT=1,
    )  # fmt: skip
    model = adalora.get_peft_model(t5(), config)
    seen: list[tuple[int, ...]] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"length": float(prediction.predictions.shape[1])}

    run = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, per_device_eval_batch_size=8, num_train_epochs=1,
            learning_rate=1e-2, predict_with_generate=True, eval_strategy="steps",
            eval_steps=4, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Pairs(),
        eval_dataset=Pairs(8),
        data_collator=DataCollatorForSeq2Seq(tokenizer(), pad_to_multiple_of=4),
        processing_class=tokenizer(),
        compute_metrics=metrics,
        callbacks=[AdaLoraCallback()],
    )  # fmt: skip
    run.train()
    assert len(seen) == 3 and all(shape[0] == 8 and 1 < shape[1] <= 21 for shape in seen)
    assert_budget_reached(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(2)
    loaded = PeftModel.from_pretrained(t5(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, "SEQ_2_SEQ_LM"), logits(model, "SEQ_2_SEQ_LM"), rtol=0, atol=1e-5)
    prompt = {"input_ids": batch("SEQ_2_SEQ_LM")["input_ids"], "max_new_tokens": 5}
    assert torch.equal(loaded.generate(**prompt), model.generate(**prompt))


@pytest.mark.compatibility(AREA, "`EarlyStoppingCallback` before the final phase: a warning, and the true ranks saved")
def test_early_stopping_before_the_final_phase_warns_and_saves_what_there_is(tmp_path: Path) -> None:
    model = make(total_step=None)
    run = trainer(
        model, tmp_path, callbacks=[AdaLoraCallback(), EarlyStoppingCallback(early_stopping_patience=2)],
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, metric_for_best_model="steps_left",
        load_best_model_at_end=True,
    )  # fmt: skip
    run.compute_metrics = lambda _: {"steps_left": -run.state.global_step}  # it only gets worse
    with pytest.warns(UserWarning, match="before pruning did.* triplets are live and the budget was 22"):
        run.train()
    assert run.state.global_step == 6 < 8
    model.save_pretrained(tmp_path / "adapter")
    ranks = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): rank
        for key, rank in saved_ranks(tmp_path / "adapter").items()
    }
    alive = {t.name.removeprefix("base_model.model."): t.lam.count_nonzero() for t in adalora.allocator(model).triplets}
    assert ranks == {name: rank for name, rank in alive.items() if rank}
    assert sum(ranks.values()) > 22
    loaded = PeftModel.from_pretrained(same_bert(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=1e-5)


@pytest.mark.compatibility(SAVING, "`load_best_model_at_end` with `save_total_limit`, the best in the final phase")
def test_the_best_checkpoint_of_the_final_phase_is_within_the_budget(tmp_path: Path) -> None:
    """No warning then (a warning would fail this test), and old checkpoints are deleted with all they hold."""
    model = make(total_step=None)
    run = trainer(
        model, tmp_path, callbacks=[AdaLoraCallback()], eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="eval_distance",
        greater_is_better=False,
    )  # fmt: skip
    run.compute_metrics = lambda _: {"distance": abs(run.state.global_step - 10)}
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-10")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", f"checkpoint-{STEPS}"]
    assert adalora.last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{STEPS}"
    best = PeftModel.from_pretrained(same_bert(), tmp_path / "checkpoint-10")
    torch.testing.assert_close(logits(best, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=1e-5)
    assert adalora.allocator(model).live == 22
    assert sum(saved_ranks(tmp_path / "checkpoint-10").values()) == 22


# ------------------------------------------------------------------------------------------------------------------ TRL


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, w0 to w59, with a template for conversations."""
    tokenizers = importlib.import_module("tokenizers")
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: index for index, word in enumerate([*special, *(f"w{i}" for i in range(VOCABULARY - 4))])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for message in messages %}{{ '<s> ' + message['content'] + ' </s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s> ' }}{% endif %}"
    )
    return fast


def conversations(columns: tuple[str, ...], size: int = 48) -> Any:
    """Questions whose answer, of its own length, counts on; a rejected one does not."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(size):
        start, length = (int(torch.randint(2, 20, (), generator=generator)) for _ in range(2))
        texts = {
            "prompt": f"w{start} w{start + 1}",
            "completion": " ".join(f"w{start + 2 + i}" for i in range(length)),
            "chosen": " ".join(f"w{start + 2 + i}" for i in range(length)),
            "rejected": " ".join("w50" for _ in range(length)),
        }
        rows.append(
            {
                column: [{"role": "user" if column == "prompt" else "assistant", "content": texts[column]}]
                for column in columns
            }
        )
    return pytest.importorskip("datasets", reason="datasets is not installed").Dataset.from_list(rows)


def language_model() -> nn.Module:
    torch.manual_seed(13)
    model = llama()
    model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id = 0, 1, 2
    return model


def trl_config(**settings: Any) -> AdaLoraConfig:
    defaults: dict[str, Any] = {
        "task_type": "CAUSAL_LM", "target_modules": "all-linear", "target_r": 2, "init_r": 4, "lora_alpha": 16,
        "tinit": 2, "tfinal": 4, "deltaT": 1,
    }  # fmt: skip
    return AdaLoraConfig(**{**defaults, **settings})


def trl_run(kind: str, output: Path, **arguments: Any) -> Any:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    settings: dict[str, Any] = {
        "output_dir": str(output), "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-2,
        "max_length": 24, "bf16": False, "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "seed": 4,
    }  # fmt: skip
    columns = ("prompt", "completion") if kind == "SFT" else ("prompt", "chosen", "rejected")
    return getattr(trl, f"{kind}Trainer")(
        model=language_model(),
        args=getattr(trl, f"{kind}Config")(**{**settings, **arguments}),
        train_dataset=conversations(columns),
        processing_class=tokenizer(),
        peft_config=trl_config(),
        callbacks=[AdaLoraCallback()],
    )


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        pytest.param(
            kind,
            arguments,
            marks=pytest.mark.compatibility(AREA, f"TRL's `{kind}Trainer(peft_config=AdaLoraConfig(...))`"),
        )
        for kind, arguments in (
            ("SFT", {}),
            ("SFT", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.5}),
            ("SFT", {"bf16": True, "gradient_checkpointing": False}),
            ("SFT", {"packing": True, "packing_strategy": "wrapped", "num_train_epochs": 2}),
            ("DPO", {}),
            ("DPO", {"precompute_ref_log_probs": True}),
        )
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value) or "as it stands",
)
def test_trl(kind: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    run = trl_run(kind, tmp_path, **arguments)
    model = run.model
    run.train()
    assert_budget_reached(model, steps=run.state.max_steps)
    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(language_model(), tmp_path / "adapter")
    assert type(loaded.peft_config["default"]) is LoraConfig
    atol = BFLOAT16 if arguments.get("bf16") else 1e-4
    torch.testing.assert_close(logits(loaded, "CAUSAL_LM"), logits(model, "CAUSAL_LM").float(), rtol=0, atol=atol)
    with loaded.disable_adapter():  # DPO's reference
        assert torch.equal(logits(loaded, "CAUSAL_LM"), logits(language_model(), "CAUSAL_LM"))
    assert (logits(model, "CAUSAL_LM") - logits(language_model(), "CAUSAL_LM")).abs().max() > 0.1


@pytest.mark.compatibility(SAVING, "resuming from a checkpoint under TRL's `SFTTrainer`")
def test_sft_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 6

    whole = trl_run("SFT", tmp_path / "whole")
    whole.train()
    killed = trl_run("SFT", tmp_path / "killed", save_strategy="steps", save_steps=3)
    killed.add_callback(Stop())
    with pytest.warns(UserWarning, match="ended at step 6"):
        killed.train()
    again = trl_run("SFT", tmp_path / "killed")
    again.train(resume_from_checkpoint=str(adalora.last_checkpoint(tmp_path / "killed")))
    assert_budget_reached(again.model)
    assert adalora.ranks(again.model) == adalora.ranks(whole.model)
    assert torch.equal(logits(again.model, "CAUSAL_LM"), logits(whole.model, "CAUSAL_LM"))


# ----------------------------------------------------------------------------------------------------------- Accelerate


@pytest.mark.compatibility(AREA, "Accelerate: accumulation, clipping, schedulers, mixed precision")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # another test of this process may have chosen a precision
    accelerator = Accelerator(gradient_accumulation_steps=4, mixed_precision=precision, cpu=True)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2)
    model = make()
    inner = adamw(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.9**step)
    model, optimizer, loader, scheduler = accelerator.prepare(model, inner, loader, scheduler)
    for rows in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**rows).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    bare = accelerator.unwrap_model(model)
    assert_budget_reached(bare)
    bare.save_pretrained(tmp_path, save_function=accelerator.save)
    loaded = PeftModel.from_pretrained(same_bert(), tmp_path)
    atol = 1e-5 if precision == "no" else BFLOAT16
    torch.testing.assert_close(logits(loaded, "SEQ_CLS"), logits(bare, "SEQ_CLS").float(), rtol=0, atol=atol)
    AcceleratorState._reset_state(reset_partial_state=True)


# ------------------------------------------------------------------------------------------------------------ Lightning


def lightning_module(model: nn.Module, losses: list[float]) -> Any:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, rows: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**rows).loss
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.model)

    return Module()


def lightning_trainer(directory: Path, **settings: Any) -> Any:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    defaults: dict[str, Any] = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": directory,
    }  # fmt: skip
    return lightning.Trainer(**{**defaults, **settings})


pytest_lightning = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:You defined",
    "ignore:GPU available but not used",
)


@pytest_lightning
@pytest.mark.compatibility(AREA, "Lightning: automatic optimization, clipping, accumulation, precision")
def test_lightning_is_the_same_as_a_plain_loop(tmp_path: Path) -> None:
    """It hands its whole backward pass to the optimizer as a closure: bit for bit what a plain loop computes."""
    plain, model = make(), make()
    plain_loop(plain)
    losses: list[float] = []
    loader = torch.utils.data.DataLoader(Rows(), batch_size=8)
    lightning_trainer(tmp_path).fit(lightning_module(model, losses), loader)
    model.train()
    assert len(losses) == STEPS
    assert_budget_reached(model)
    assert [a.step for a in adalora.allocator(model).trace] == [3, 4, 5, 6, 7, 8]
    assert adalora.ranks(model) == adalora.ranks(plain)
    assert torch.equal(adapter_weights(model), adapter_weights(plain))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(same_bert(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=1e-5)


@pytest_lightning
@pytest.mark.compatibility(AREA, "Lightning: automatic optimization, clipping, accumulation, precision")
@pytest.mark.parametrize(
    "settings",
    [{"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 4}, {"precision": "bf16-mixed"}],
    ids=lambda settings: next(iter(settings)),
)
def test_lightning_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    model = make()
    size = 8 // settings.get("accumulate_grad_batches", 1)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=size)
    lightning_trainer(tmp_path, **settings).fit(lightning_module(model, []), loader)
    assert_budget_reached(model)
