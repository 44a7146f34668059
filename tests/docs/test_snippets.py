"""Every Python snippet of README and docs/ runs as it is printed; one that cannot run here is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from torch import nn
from torch.utils.data import Dataset

from adalora.core.importance import METRICS
from adalora.recipe import validate
from adalora.recipe_text import parse_yaml

from ..hf.models import batch, bert, llama
from ..hf.test_trainers import conversations, language_model, tokenizer
from .pages import BLOCKS, PAGES, Block

PYTHON = [block for block in BLOCKS if block.kind == "python"]


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.rows = batch("SEQ_CLS", size=80)

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.rows.items()}


def base_model() -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return bert()


OF_THE_READER: dict[str, Callable[[], Any]] = {
    "base_model": base_model,
    "fresh_base_model": base_model,
    "batches": lambda: [batch("SEQ_CLS", seed) for seed in range(20)],
    "train_dataset": Rows,
    "language_model": language_model,
    "tokenizer": tokenizer,
    "conversations": lambda: conversations(("prompt", "completion")),
}
"""Names that snippets use and readers have -> what stands for them here."""

SETTINGS = {
    'TrainingArguments("out"': 'TrainingArguments("out", disable_tqdm=True, dataloader_pin_memory=False',
    'SFTConfig("out"': 'SFTConfig("out", disable_tqdm=True, bf16=False, use_cpu=True',
}
"""What keeps a Trainer quiet here."""


@pytest.fixture(autouse=True)
def metrics() -> Iterator[None]:
    """A metric that a page registers is gone afterwards."""
    known = dict(METRICS)
    yield
    METRICS.clear()
    METRICS.update(known)


def test_there_are_snippets_on_many_pages() -> None:
    assert len({block.page for block in PYTHON}) >= 12 and {block.page for block in BLOCKS} <= set(PAGES)


@pytest.fixture(autouse=True)
def fresh_accumulation() -> None:
    """Accelerate keeps what it knows of data loaders for the whole process, also of a training that an error ended."""
    GradientState._reset_state()


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
@pytest.mark.filterwarnings("ignore:total_step is not given, so tfinal")  # what the guide says it does
def test_snippet_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small local models for the hub's. A failure's last line is the page's."""
    code = "\n" * block.line + block.text  # so that lines are those of the page
    if block.not_run:
        compile(code, str(block.page), "exec")
        return
    monkeypatch.chdir(tmp_path)
    for name, make in {"microsoft/deberta-v3-base": bert, "meta-llama/Llama-3.2-1B": llama}.items():
        if name in code:
            make().save_pretrained(tmp_path / "hub")
            code = code.replace(name, str(tmp_path / "hub"))
    for call, quiet in SETTINGS.items():
        report = "" if "report_to" in code else ', report_to="none"'
        code = code.replace(call, quiet + report)
    names = {name: make() for name, make in OF_THE_READER.items() if name in code}
    exec(compile(code, str(block.page), "exec"), names)


RECIPES = [block for block in BLOCKS if block.kind == "yaml" and block.text.startswith("model:")]


@pytest.mark.parametrize("block", RECIPES, ids=lambda block: block.place)
def test_recipe_is_valid(block: Block) -> None:
    validate(parse_yaml(block.text, block.place), block.place)
