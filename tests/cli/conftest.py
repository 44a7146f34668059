"""A tiny BERT with its tokenizer, small files of made-up reviews, and the command line in this process."""

from __future__ import annotations

import csv
import io
import random
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from adalora.cli import main

GOOD = ["great", "funny", "moving", "superb"]
BAD = ["dull", "boring", "awful", "flat"]
OTHER = ["the", "film", "is", "a", "plot", "and", "cast", "very"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


class Finished(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


def bert_tokenizer(tokenizer: Tokenizer, max_length: int = 32) -> Any:
    """A tokenizer that knows ``SPECIAL``, made to read texts and pairs of them as BERT does."""
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names)


def save_tiny_bert(folder: Path, tokenizer: Any) -> Path:
    """A random BERT of two layers in ``folder``, as long as the tokenizer reads, and the tokenizer."""
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.1,  # a random encoder that tells its tokens apart
        max_position_embeddings=tokenizer.model_max_length,
    )
    torch.manual_seed(0)  # a fixture of the whole session comes before the seed of a test
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT of two layers and a tokenizer that knows the words above."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *GOOD, *BAD, *OTHER])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return save_tiny_bert(tmp_path_factory.mktemp("tiny-bert"), bert_tokenizer(tokenizer))


def reviews(count: int, seed: int) -> list[dict[str, str]]:
    """Made-up reviews of different lengths whose words decide the class."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        words = GOOD if index % 2 else BAD
        text = draw.choices(OTHER, k=draw.randint(1, 6)) + draw.choices(words, k=3)
        draw.shuffle(text)
        rows.append({"text": " ".join(text), "label": "fresh" if index % 2 else "rotten"})
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    """``rows`` as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv (96 rows) and test.csv (40 rows)."""
    folder = tmp_path_factory.mktemp("reviews")
    write_csv(folder / "train.csv", reviews(96, seed=1))
    write_csv(folder / "test.csv", reviews(40, seed=2))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that ``datasets`` caches outlives a test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def run_command(*arguments: object) -> Finished:
    """The command line, in this process and the present folder."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["adalora", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as finish,
    ):
        main()
    return Finished(int(finish.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture
def adalora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """The command line, run from an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("ADALORA_DEBUG", raising=False)
    return run_command


@pytest.fixture(scope="session")
def tiny_run(tiny_model: Path, files: Path) -> list[object]:
    """Arguments of ``train`` for a run of a few seconds that learns: 36 steps, 12 matrices."""
    return [
        *("--model", tiny_model, "--train", files / "train.csv", "--eval", files / "test.csv"),
        *("--target-r", 2, "--init-r", 3, "--epochs", 3, "--lr", 2e-2, "--batch-size", 8, "--max-length", 16),
        *("--set", "adalora.exclude_modules=.*pooler.*", "--output", "run"),
    ]


@pytest.fixture(scope="session")
def finished(tiny_run: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run with a checkpoint every 4 steps; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    keep = ["--set", "training.save_total_limit=20", "--set", "training.save_steps=4"]
    done = run_command("train", *tiny_run, *keep, "--output", folder)
    assert done.code == 0, done.err
    return folder
