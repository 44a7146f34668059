"""Magnitude and direction after DoRA's paper: against numpy, against what must hold, and of real runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from adalora.directions import Outcome, _Adapter, _matrix, change, write_directions
from adalora.report.run import read_run
from adalora.runs import RunFolder

from .cli.conftest import files, finished, own_cache, run_command, tiny_model, tiny_run
from .hf.models import gpt2

__all__ = ["files", "finished", "own_cache", "tiny_model", "tiny_run"]
TOLERANCE = 1e-6


def literal(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Equations 3 and 4 of the paper, vector by vector; W as the paper has it, a column for each output."""
    w_0, w_t = before.double().numpy().T, after.double().numpy().T
    columns = range(w_0.shape[1])
    m_0, m_t = [[float(np.linalg.norm(w[:, n])) for n in columns] for w in (w_0, w_t)]
    cosines = [float(w_t[:, n] @ w_0[:, n]) / (m_t[n] * m_0[n]) for n in columns]
    return sum(abs(m_t[n] - m_0[n]) for n in columns) / len(columns), sum(1 - c for c in cosines) / len(columns)


def test_the_papers_equations() -> None:
    before = torch.randn(7, 5)
    after = before + 0.3 * torch.randn(7, 5)
    assert change(before, after) == pytest.approx(literal(before, after), abs=1e-12)


def test_what_must_hold() -> None:
    before = torch.randn(6, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    magnitude, direction = change(before, before @ rotation)
    assert magnitude == pytest.approx(0, abs=TOLERANCE) and direction > 0.1
    magnitude, direction = change(before, before * torch.rand(6, 1).add(0.5))
    assert direction == pytest.approx(0, abs=TOLERANCE) and magnitude > 0.1
    assert change(before, before) == (0, 0)
    assert change(before, -before)[1] == pytest.approx(2)
    small = change(before, before * (1 + 1e-6) + 1e-6 * torch.randn(6, 6))[1]
    assert 0 < small < 1e-10, "a small turn is not lost in rounding"
    empty = before.clone()
    empty[0] = 0
    assert np.isfinite(change(empty, before)).all() and np.isfinite(change(before, empty)).all()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
def test_doras_own_magnitude_is_the_one_that_is_found(tmp_path: Path) -> None:
    """Of W_t = m V/‖V‖ the lengths are m, whatever V is; also in GPT-2, whose weights lie the other way."""
    base = gpt2()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["c_attn", "c_proj"], r=2, use_dora=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.rand_like(parameter))
    model.save_pretrained(tmp_path)
    plain, saved = gpt2(), _Adapter(tmp_path)
    plain.load_state_dict(
        {k.replace("base_model.model.", "").replace(".base_layer", ""): v
         for k, v in model.state_dict().items() if "lora_" not in k}
    )  # fmt: skip
    merged = model.merge_and_unload()
    names = saved.names(plain)
    assert len(names) == 6 and "transformer.h.0.mlp.c_proj" in names
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name in names:
        before = _matrix(plain, name, None)
        after = saved.weight(plain, name, before)
        torch.testing.assert_close(after.float(), merged.get_submodule(name).weight.T, rtol=0, atol=1e-5)
        m = stored[f"base_model.model.{name}.lora_magnitude_vector"]
        torch.testing.assert_close(after.norm(dim=1).float(), m, rtol=1e-5, atol=0)
        magnitude, _ = change(before, after)
        assert magnitude == pytest.approx(float((m - before.norm(dim=1)).abs().mean()), abs=1e-5)


# --------------------------------------------------------------------------------------------------------- real runs


def trained(method: str, tiny_model: Path, files: Path, output: Path) -> Path:
    """A run of eight steps with a checkpoint after every four."""
    done = run_command(
        *("train", "--model", tiny_model, "--train", files / "train.csv", "--eval", files / "test.csv"),
        *("--method", method, "--batch-size", 8, "--max-length", 16, "--lr", 1e-2, "--output", output),
        *("--set", "training.max_steps=8", "--set", "training.save_steps=4", "--set", "training.eval_strategy=no"),
    )
    assert done.code == 0, done.err
    return output


def read(folder: Path) -> tuple[dict[str, list[object]], Tensor, Tensor]:
    """(the file, ΔM, ΔD), both [layers, steps]."""
    found = json.loads((folder / "directions.json").read_text())
    assert set(found) == {"method", "steps", "layers", "magnitude", "direction"}
    magnitude, direction = torch.tensor(found["magnitude"]), torch.tensor(found["direction"])
    assert magnitude.shape == direction.shape == (len(found["layers"]), len(found["steps"]))
    return found, magnitude, direction


@pytest.mark.parametrize("method", ["full", "lora", "dora", "peft_adalora"])
def test_runs_of_methods(method: str, tiny_model: Path, files: Path, tmp_path: Path) -> None:
    run = trained(method, tiny_model, files, tmp_path / "run")
    assert write_directions(read_run(run)) == Outcome(run / "directions.json", "")
    found, magnitude, direction = read(run)
    assert found["method"] == method and found["steps"] == [4, 8]
    names = found["layers"]
    assert len(names) == 13, "12 matrices of the encoder, and its pooler"
    assert all((table >= 0).all() and (table[:, -1] > 0).sum() >= 12 for table in (magnitude, direction))

    before = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    if method == "full":
        after: nn.Module = AutoModelForSequenceClassification.from_pretrained(run)
    else:
        after = peft.PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2), run
        ).merge_and_unload()
    for index, name in enumerate(names):
        weights = [model.get_submodule(name).weight.detach() for model in (before, after)]
        expected = literal(*weights)
        assert float(magnitude[index, -1]) == pytest.approx(expected[0], abs=TOLERANCE)
        assert float(direction[index, -1]) == pytest.approx(expected[1], abs=TOLERANCE)


def test_a_run_of_adalora(finished: Path, tmp_path: Path) -> None:
    """Every checkpoint, those in the middle of pruning too; matrices at rank 0 did not move."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    assert write_directions(read_run(run)).path == RunFolder(run).directions
    found, magnitude, direction = read(run)
    assert found["steps"] == list(range(4, 37, 4))
    ranks = json.loads((run / "metrics.json").read_text())["ranks"]
    assert set(found["layers"]) == set(ranks)
    for index, name in enumerate(found["layers"]):
        assert (float(direction[index, -1]) > 0) == (ranks[str(name)] > 0)
        assert (float(magnitude[index, -1]) > 0) == (ranks[str(name)] > 0)

    written = (run / "directions.json").stat().st_mtime_ns
    write_directions(read_run(run))
    assert (run / "directions.json").stat().st_mtime_ns == written, "the same steps: nothing is computed again"
    shutil.rmtree(run / "checkpoints" / "checkpoint-8")
    write_directions(read_run(run))
    assert json.loads((run / "directions.json").read_text())["steps"] == [4, *range(12, 37, 4)]


def test_what_cannot_be_analysed_says_why(tiny_model: Path, files: Path, finished: Path, tmp_path: Path) -> None:
    run = trained("bitfit", tiny_model, files, tmp_path / "bitfit")
    assert write_directions(read_run(run)) == Outcome(None, "method bitfit saves neither LoRA nor whole weights")
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    recipe = run / "recipe.yaml"
    said = recipe.read_text()
    recipe.write_text(said.replace(str(tiny_model), str(tmp_path / "gone")))
    outcome = write_directions(read_run(run))
    assert outcome.path is None and "no model at" in outcome.reason and not (run / "directions.json").exists()
    recipe.write_text(said)
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.json").unlink()
    assert write_directions(read_run(run)) == Outcome(None, "the run has saved nothing yet")
