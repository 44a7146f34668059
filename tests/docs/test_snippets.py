"""Every Python snippet of README and docs/ runs as it is printed."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from adalora.core.importance import METRICS

from ..hf.models import batch, bert

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPETS = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}:{page.read_text()[: match.start()].count(chr(10)) + 2}")
    for page in PAGES
    for match in re.finditer(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    for code in [match.group(1)]
]


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.rows = batch("SEQ_CLS", size=80)

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.rows.items()}


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 8


@pytest.mark.parametrize("code", SNIPPETS)
@pytest.mark.filterwarnings("ignore:total_step is not given, so tfinal")  # what the guide says it does
def test_snippet_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small local model for the hub's, and a base model, batches and a data set that the reader has."""
    monkeypatch.chdir(tmp_path)
    known = dict(METRICS)
    base = bert()
    base.save_pretrained(tmp_path / "base")
    names: dict[str, Any] = {
        "base_model": copy.deepcopy(base),
        "fresh_base_model": copy.deepcopy(base),
        "batches": [batch("SEQ_CLS", seed) for seed in range(20)],
        "train_dataset": Rows(),
    }
    code = code.replace("microsoft/deberta-v3-base", str(tmp_path / "base"))
    code = code.replace(
        'TrainingArguments("out"', 'TrainingArguments("out", disable_tqdm=True, dataloader_pin_memory=False'
    )
    if "report_to" not in code:
        code = code.replace("disable_tqdm=True", 'disable_tqdm=True, report_to="none"')
    try:
        exec(compile(code, "snippet", "exec"), names)
    finally:
        METRICS.clear()
        METRICS.update(known)
