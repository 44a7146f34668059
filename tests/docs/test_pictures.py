"""The pictures of docs/ are drawn from a run's trace; each is there, small, and on a page."""

from __future__ import annotations

from pathlib import Path

import torch

from adalora import AdaLoraConfig, allocator, get_peft_model
from adalora.core.trace import TraceFile
from adalora.report.run import read_trace

from ..hf.models import batch, bert
from .pages import DOCS, PAGES
from .pictures import DRAWN, PICTURES, draw


def trace_of_a_training(path: Path) -> None:
    """Twelve steps under a budget, as a file."""
    config = AdaLoraConfig(target_r=2, target_modules="all-linear", task_type="SEQ_CLS", total_step=12, deltaT=1)
    model = get_peft_model(bert(), config)
    ours = allocator(model)
    ours.trace_file = TraceFile(path)
    ours.trace_file.start(ours.header())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(12):
        model(**batch("SEQ_CLS", seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_picture_is_drawn_from_a_trace(tmp_path: Path) -> None:
    trace_of_a_training(tmp_path / "trace.jsonl")
    drawn = draw(read_trace(tmp_path / "trace.jsonl"), tmp_path / "pictures")
    assert [path.stem for path in drawn] == list(DRAWN)
    for path in drawn:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 3000


def test_pictures_are_small_and_on_a_page() -> None:
    assert set(DRAWN) <= {path.stem for path in PICTURES.glob("*.png")}
    words = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in DOCS.rglob("*.png"):
        assert path.stat().st_size < 150_000, path
        assert f"{path.name})" in words, f"no page shows {path}"
