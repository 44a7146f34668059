"""sentence-transformers and SetFit, run for real: nothing but the configuration and a callback is ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, TrainerCallback

import adalora
from adalora import AdaLoraCallback, AdaLoraConfig

from .models import VOCABULARY
from .test_trainers import AREA, tokenizer

st: Any = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
STEPS = 12
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*",
    "ignore:training ended at step",  # where a test stops it
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def config(kind: str, **settings: Any) -> AdaLoraConfig:
    shape: dict[str, Any] = {"target_r": 2, "init_r": 4, "tinit": 2, "tfinal": 4, "deltaT": 1}
    return AdaLoraConfig(task_type=kind, target_modules=["query", "value", "dense"], **shape, **settings)


def pairs(label: str) -> Any:
    """A text and the same backwards, or another one."""
    draw = torch.Generator().manual_seed(1)
    first = torch.randint(0, 40, (8 * STEPS, 5), generator=draw)
    second = torch.where((torch.arange(len(first)) % 2 == 0)[:, None], first.flip(1), first.roll(1, 0))
    texts = [[" ".join(f"w{word}" for word in row) for row in part.tolist()] for part in (first, second)]
    scores = [float(index % 2 == 0) for index in range(len(first))]
    return importlib.import_module("datasets").Dataset.from_dict(
        {"sentence1": texts[0], "sentence2": texts[1], label: scores}
    )


def bi_encoder(encoder: Path) -> Any:
    torch.manual_seed(1)
    parts = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    model = st.SentenceTransformer(modules=[parts.Transformer(str(encoder)), parts.Pooling(32)], device="cpu")
    model.add_adapter(config("FEATURE_EXTRACTION"))
    return model


def cross_encoder(encoder: Path) -> Any:
    torch.manual_seed(1)
    model = st.CrossEncoder(str(encoder), num_labels=1, device="cpu")
    model.add_adapter(config("SEQ_CLS", modules_to_save=["classifier"]))
    return model


def answers(model: Any) -> torch.Tensor:
    rows = pairs("score")[:8]
    if isinstance(model, st.CrossEncoder):
        return torch.tensor(model.predict(list(zip(rows["sentence1"], rows["sentence2"], strict=True))))
    return torch.tensor(model.encode(rows["sentence1"]))


def trainer(model: Any, output: Path, **settings: Any) -> Any:
    cross = isinstance(model, st.CrossEncoder)
    kind = st.CrossEncoderTrainer if cross else st.SentenceTransformerTrainer
    arguments = st.CrossEncoderTrainingArguments if cross else st.SentenceTransformerTrainingArguments
    losses = importlib.import_module(
        "sentence_transformers.cross_encoder.losses" if cross else "sentence_transformers.sentence_transformer.losses"
    )
    rows = pairs("label" if cross else "score")
    defaults: dict[str, Any] = {
        "output_dir": str(output), "per_device_train_batch_size": 8, "num_train_epochs": 1, "learning_rate": 1e-2,
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 3, "dataloader_pin_memory": False,
        "logging_strategy": "no", "save_strategy": "no",
    }  # fmt: skip
    return kind(
        model=model,
        args=arguments(**{**defaults, **settings}),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)) if "eval_strategy" in settings else None,
        loss=losses.BinaryCrossEntropyLoss(model) if cross else losses.CosineSimilarityLoss(model),
        callbacks=[AdaLoraCallback()],
    )


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


class BestAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        metrics["eval_distance"] = abs(state.global_step - self.step)


WHAT = "train, save, load; resume; load the best after compaction"
KINDS = [
    pytest.param(make, marks=pytest.mark.compatibility(AREA, f"sentence-transformers' `{name}`: {WHAT}"), id=name)
    for name, make in (("SentenceTransformer", bi_encoder), ("CrossEncoder", cross_encoder))
]


@pytest.mark.parametrize("make", KINDS)
def test_training_saving_resuming_and_the_best(make: Callable[[Path], Any], encoder: Path, tmp_path: Path) -> None:
    whole = make(encoder)
    trainer(whole, tmp_path / "whole").train()
    ranks = adalora.ranks(whole)
    assert sum(ranks.values()) == 2 * len(ranks) and adalora.allocator(whole).frozen
    whole.save(str(tmp_path / "saved"))
    assert_close(answers(type(whole)(str(tmp_path / "saved"), device="cpu")), answers(whole))

    for step in (4, 10):  # while pruning; after compaction
        output = tmp_path / f"killed-{step}"
        killed = trainer(make(encoder), output, save_strategy="steps", save_steps=step)
        killed.add_callback(StopAt(step))
        killed.train()
        again = make(encoder)
        trainer(again, output).train(resume_from_checkpoint=str(output / f"checkpoint-{step}"))
        assert adalora.ranks(again) == ranks and torch.equal(answers(again), answers(whole))

    best = make(encoder)
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    run = trainer(
        best, tmp_path / "best", **every, load_best_model_at_end=True, metric_for_best_model="distance",
        greater_is_better=False,
    )  # fmt: skip
    run.add_callback(BestAt(10))
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-10")
    assert sum(adalora.ranks(best).values()) == 2 * len(ranks)
    assert_close(answers(best), answers(type(best)(run.state.best_model_checkpoint, device="cpu")))
    assert not torch.equal(answers(best), answers(whole))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.compatibility(AREA, "SetFit's `Trainer(callbacks=[AdaLoraCallback()])`")
def test_setfit(encoder: Path, tmp_path: Path) -> None:
    setfit: Any = pytest.importorskip("setfit", reason="setfit is not installed")
    linear: Any = importlib.import_module("sklearn.linear_model")
    body = bi_encoder(encoder)
    model = setfit.SetFitModel(model_body=body, model_head=linear.LogisticRegression())
    rows = pairs("score")[:32]
    texts = importlib.import_module("datasets").Dataset.from_dict(
        {"text": rows["sentence1"], "label": [int(score) for score in rows["score"]]}
    )
    arguments = setfit.TrainingArguments(
        output_dir=str(tmp_path), batch_size=8, max_steps=STEPS, report_to="none", body_learning_rate=1e-2,
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    setfit.Trainer(model=model, args=arguments, train_dataset=texts, callbacks=[AdaLoraCallback()]).train()
    ranks = adalora.ranks(body)
    assert adalora.allocator(body).step == STEPS and sum(ranks.values()) == 2 * len(ranks)
    assert len(model.predict(rows["sentence1"][:4])) == 4


def test_a_model_without_an_adapter_in_it_says_what_to_give() -> None:
    class Wrapper:
        inner = None

    arguments: Any = None
    with pytest.raises(adalora.StateError, match="a Wrapper, none of whose parts has an AdaLoRA adapter: add one"):
        AdaLoraCallback().on_train_begin(arguments, arguments, arguments, model=Wrapper())
