"""``adalora inspect``: every figure is what the SVD of the whole update gives, for adapters of PEFT and ours."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adalora.inspection import inspect
from adalora.report.updates import Adapter, Update

from ..hf.models import ARCHITECTURES, batch
from .conftest import Finished

Run = Callable[..., Finished]
TOLERANCE = 1e-5  # float32 ΔW of order 1, against the same product in float64


class Net(nn.Module):
    """A convolution, an embedding, and linear layers of several shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3, padding=1), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})
            for _ in range(2)
        )


def written(folder: Path, base: nn.Module | None = None, **settings: Any) -> peft.PeftModel:
    """A LoRA that PEFT made, with random factors, and saved in ``folder``."""
    targets = {"target_modules": ["words", "conv", "up", "down"], "r": 4, "lora_alpha": 6}
    model = peft.get_peft_model(base or Net(), peft.LoraConfig(**(targets | settings)))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return model


def deltas(model: peft.PeftModel) -> dict[str, Tensor]:
    """ΔW of each matrix by PEFT itself, [d_out, d_in]."""
    return {
        name: layer.get_delta_weight("default").detach().flatten(1)
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


def agrees(update: Update, delta: Tensor) -> None:
    """Figures of one matrix against ΔW itself."""
    expected = torch.linalg.svdvals(delta.double())[: update.rank]
    size = max(1.0, float(expected[:1].sum()))
    found = torch.tensor(update.singular_values, dtype=torch.float64)
    torch.testing.assert_close(found, expected[: len(found)], rtol=0, atol=TOLERANCE * size)
    assert update.frobenius == pytest.approx(float(delta.double().norm()), abs=TOLERANCE * size)
    assert update.spectral == pytest.approx(float(torch.linalg.matrix_norm(delta.double(), 2)), abs=TOLERANCE * size)
    spread = torch.special.entr(expected / expected.sum()).sum().exp() if update.rank else torch.zeros(())
    assert update.effective_rank == pytest.approx(float(spread), rel=1e-4)
    for rank in range(1, update.rank + 1):
        share = float((expected[:rank] ** 2).sum() / (expected**2).sum())
        assert update.energy(rank) == pytest.approx(share, abs=TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True, "target_modules": ["conv", "up", "down"]},
        {"rank_pattern": {"up": 2, "blocks.1.down": 7}, "alpha_pattern": {"down": 3}},
        {"r": 16},  # above the smaller side of some matrices
    ],
    ids=["lora", "rslora", "dora", "patterns", "high"],
)
def test_what_peft_wrote(settings: dict[str, Any], tmp_path: Path) -> None:
    model = written(tmp_path, **settings)
    found, expected = inspect(tmp_path), deltas(model)
    assert set(found.ranks) == set(expected)
    for update in found.updates:
        layer = model.base_model.model.get_submodule(update.name)
        assert update.rank == layer.r["default"]
        agrees(update, expected[update.name])
    kinds = {update.name: update.kind for update in found.updates}
    assert kinds["blocks.0.conv"] == "convolution" and kinds["blocks.0.up"] == "linear"
    shapes = {update.name: update.shape for update in found.updates}
    assert shapes["blocks.1.conv"] == (5, 27) and shapes["blocks.1.up"] == (12, 8)
    of_lora = [p.numel() for n, p in model.named_parameters() if ".lora_A" in n or ".lora_B" in n or "embedding_" in n]
    assert found.parameters == sum(of_lora)
    magnitudes = [p.numel() for n, p in model.named_parameters() if "magnitude" in n]
    assert found.other_parameters == sum(magnitudes) and bool(found.notes) == bool(magnitudes)


def test_energy_of_the_whole_model(tmp_path: Path) -> None:
    """Ranked over all matrices, or cut alike, from the singular values of all ΔW by torch."""
    model = written(tmp_path, target_modules=["up", "down"])
    values = torch.stack([torch.linalg.svdvals(delta)[:4] for delta in deltas(model).values()]) ** 2
    found = inspect(tmp_path)
    for rank in (1, 2, 3):
        cut = found.cut(rank)
        best = values.flatten().sort(descending=True).values[: rank * len(values)]
        assert cut.whole == pytest.approx(float(best.sum() / values.sum()), abs=TOLERANCE)
        assert cut.each == pytest.approx(float(values[:, :rank].sum() / values.sum()), abs=TOLERANCE)
        assert cut.whole >= cut.each
        modules = found.at(rank)["modules"]
        assert sum(module["rank"] for module in modules.values()) == rank * len(values)
    assert [cut.rank for cut in found.cuts()] == [1, 2, 4] and found.cuts()[-1].whole == 1


def test_no_update_is_no_division_by_zero() -> None:
    nothing = Update("h.0.q", "linear", (4, 4), 0, 0, [])
    assert (nothing.frobenius, nothing.spectral, nothing.effective_rank, nothing.energy(1)) == (0, 0, 0, 1)
    assert Adapter("x", None, "LoRA", {}, 0, [], [nothing]).cuts() == []
    zeros = Update("h.0.q", "linear", (4, 4), 2, 16, [0.0, 0.0])
    assert (zeros.frobenius, zeros.effective_rank, zeros.energy(1)) == (0, 0, 1)
    flat = Update("h.0.q", "linear", (4, 4), 3, 24, [2.0, 2.0, 2.0])
    assert flat.effective_rank == pytest.approx(3) and flat.energy(1) == pytest.approx(1 / 3)
    assert flat.frobenius == pytest.approx(math.sqrt(12))


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*tensor.*have invalid shape")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module.*lora_E")
@pytest.mark.parametrize("steps", [1, 10], ids=["before a mask", "after masks"])
def test_a_checkpoint_of_pefts_adalora(steps: int, tmp_path: Path) -> None:
    base = ARCHITECTURES["bert"][0]()
    targets = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    config = peft.AdaLoraConfig(init_r=4, target_r=2, tinit=2, total_step=10, tfinal=2, **targets)  # type: ignore[arg-type]
    model = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=5e-2)
    for step in range(steps):
        model(**batch("SEQ_CLS", step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert "AdaLoRA" in found.method and found.settings["init_r"] == 4
    assert sum(found.ranks.values()) == (16 if steps == 1 else 8)
    expected = {
        n: m.get_delta_weight("default") for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_E")
    }
    assert set(expected) == set(found.ranks)
    for update in found.updates:
        agrees(update, expected[update.name].detach())


# ------------------------------------------------------------------------------------------------------- of our runs


def test_a_run_and_a_checkpoint_in_its_middle(adalora: Run, finished: Path) -> None:
    ranks = json.loads((finished / "metrics.json").read_text())["ranks"]
    found = inspect(finished)
    assert found.ranks == ranks and sum(ranks.values()) == 24  # those of rank 0 included
    tensors = load_file(finished / "adapter_model.safetensors")
    for update in found.updates:
        if update.rank:
            key = f"base_model.model.{update.name}"
            agrees(update, tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"])  # at scale 1
    middle = inspect(finished / "checkpoints" / "checkpoint-12")
    assert set(middle.ranks) == set(ranks) and 24 < sum(middle.ranks.values()) <= 36

    done = adalora("inspect", finished, "--json")
    said = json.loads(done.out)
    assert done.code == 0 and not done.err
    assert said["triplets"] == 24 and said["matrices"] == 12 and said["parameters"]["adapter"] == found.parameters
    assert [module["singular_values"] for module in said["modules"]] == [u.singular_values for u in found.updates]
    cut = json.loads(adalora("inspect", finished, "--json", "--rank", 1).out)["at_rank"]
    assert sum(module["rank"] for module in cut["modules"].values()) == 12 and 0 < cut["each"] <= cut["whole"] < 1


@pytest.mark.parametrize("columns", [80, 110])
@pytest.mark.parametrize("rank", [None, 1])
def test_the_tables_fit(adalora: Run, finished: Path, columns: int, rank: int | None, monkeypatch: Any) -> None:
    monkeypatch.setattr("adalora.report.terminal.console", lambda: _console(columns))
    done = adalora("inspect", finished, *([] if rank is None else ["--rank", rank]))
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= columns
    assert "Base model" in done.out and "24 triplets, 2 on average" in " ".join(done.out.split())
    assert "every matrix alike" in done.out and (" left " in done.out) == (rank is not None)
    rows = [line for line in lines if "attention.self.query" in line]
    assert len(rows) == 3, "one in the table of ranks, one for each layer"
    assert ("parameters" in done.out.replace("Parameters", "")) == (rank is None or columns > 100)


def _console(columns: int) -> Any:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False, width=columns)


def test_the_picture(adalora: Run, finished: Path) -> None:
    done = adalora("inspect", finished, "--png", "updates.png", "--json")
    assert done.code == 0 and "updates.png" in done.err and json.loads(done.out)
    pixels = imread("updates.png")
    assert pixels.shape[0] > 600 and pixels.shape[1] > 900
    assert len({tuple(pixel) for pixel in pixels[::7, ::7, :3].reshape(-1, 3).round(2)}) > 5, "not blank"


# ---------------------------------------------------------------------------------------------------------- mistakes


def refused(done: Finished, *words: str) -> None:
    """One line on stderr, code 2, nothing on stdout."""
    assert done.code == 2 and not done.out and len(done.err.splitlines()) == 1, done
    for word in words:
        assert word in done.err


def test_what_cannot_be_inspected(adalora: Run, tmp_path: Path, tiny_model: Path, finished: Path) -> None:
    refused(adalora("inspect", "nowhere"), "no folder nowhere")
    refused(adalora("inspect", finished / "adapter_model.safetensors"), "is a file", str(finished))
    refused(adalora("inspect", tmp_path), "not the folder of an adapter", "adapter_config.json")
    refused(adalora("inspect", tiny_model), "whole model", "bert")
    written(tmp_path / "both" / "one")
    shutil.copytree(tmp_path / "both" / "one", tmp_path / "both" / "two")
    refused(adalora("inspect", tmp_path / "both"), "2 adapters", "one, two")

    lora = tmp_path / "lora"
    written(lora)
    weights, config = lora / "adapter_model.safetensors", lora / "adapter_config.json"
    said = config.read_text()
    config.unlink()
    refused(adalora("inspect", lora), "no adapter_config.json", "scale")
    config.write_text(said.replace('"LORA"', '"IA3"'))
    refused(adalora("inspect", lora), "'IA3'", "LORA")
    config.write_text("{")
    refused(adalora("inspect", lora), "not JSON")
    config.write_text(said)
    whole = weights.read_bytes()
    tensors = {key: value.clone() for key, value in load_file(weights).items()}  # the file itself is written over below
    weights.write_bytes(whole[: len(whole) // 2])
    refused(adalora("inspect", lora), "cannot be read", "interrupted")
    name = next(key for key in tensors if "lora_A" in key)
    save_file(tensors | {name: tensors[name] * math.nan}, weights)
    refused(adalora("inspect", lora), "not finite")
    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    refused(adalora("inspect", lora), "no lora_A")
    weights.unlink()
    refused(adalora("inspect", lora), "neither")
    torch.save(tensors, lora / "adapter_model.bin")
    refused(adalora("inspect", lora), "pickle", "adalora export", "not opened")
    assert adalora("export", lora, "out").code == 0, "the advice works"
    assert adalora("inspect", "out", "--json").code == 0


def test_runs_that_have_no_adapter(adalora: Run, finished: Path) -> None:
    run = Path(shutil.copytree(finished, "run"))
    for file in ("metrics.json", "adapter_config.json", "adapter_model.safetensors"):
        (run / file).unlink()
    refused(adalora("inspect", run), "not finished", "checkpoints/checkpoint-")
    shutil.rmtree(run / "checkpoints")
    refused(adalora("inspect", run), "not finished", "--resume")
    (run / "metrics.json").write_text("{}")
    refused(adalora("inspect", run), "method adalora, which leaves no LoRA adapter")
