"""LoRA adapters as files: every operation keeps what it promises to keep, for every kind of layer and of LoRA."""

from __future__ import annotations

import copy
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adalora
from adalora import AdaLoraConfig, ConfigError
from adalora.hf.files import replacing
from adalora.hf.plain import Pair, PlainAdapter
from adalora.hf.plain_config import plain_config

from .models import batch, bert, logits

# PEFT takes the bias of a lora_B for a part of a sharded model.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'.*tensor.*have invalid shape.*lora_B.bias")

TOLERANCE = 1e-5  # float32 outputs of order 1 after another order of the same products


def serving(what: str, **kwargs: Any) -> Any:
    return pytest.mark.compatibility("Serving", what, **kwargs)


class Mixed(nn.Module):
    """An embedding, a convolution of a line and linear layers of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.line = nn.Conv1d(12, 8, 3, padding=1)
        self.wide = nn.Linear(8, 24)
        self.narrow = nn.Linear(24, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.line(self.words(x).mT).mT.tanh()
        result: torch.Tensor = self.head(self.narrow(self.wide(hidden).tanh()).tanh())
        return result


INPUTS = torch.arange(20).view(2, 10)
ALL = ["words", "line", "wide", "narrow"]
VARIANTS: dict[str, dict[str, Any]] = {
    "one rank": {"r": 4, "lora_alpha": 8},
    "patterns": {
        "r": 4, "lora_alpha": 6, "rank_pattern": {"wide": 5, "line": 2}, "alpha_pattern": {"narrow": 3, "wide": 10}
    },
    "rsLoRA": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "DoRA": {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": ["wide", "narrow"]},
    "a bias of B": {"r": 3, "lora_alpha": 6, "lora_bias": True, "target_modules": ["wide", "narrow"]},
    "biases and a head": {"r": 3, "lora_alpha": 6, "bias": "all", "modules_to_save": ["head"]},
    "scale 1": {"r": 4, "lora_alpha": 4},
}  # fmt: skip


def lora(base: nn.Module, **settings: Any) -> peft.PeftModel:
    """Stock LoRA, with weights as if trained."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{"target_modules": ALL, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def answers(base: nn.Module, directory: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory).eval()
    result: torch.Tensor = model(INPUTS)
    return result


def deltas(adapter: PlainAdapter) -> dict[str, torch.Tensor]:
    """scale · B A of each module."""
    return {name: adapter.scale(name) * pair.b.flatten(1) @ pair.a.flatten(1) for name, pair in adapter.pairs.items()}


@pytest.fixture
def base() -> nn.Module:
    return Mixed().eval()


# --------------------------------------------------------------------------------------------------------- the same


@pytest.mark.filterwarnings("ignore:.*use_rslora=True")
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_computes_what_was_read(variant: str, base: nn.Module, tmp_path: Path) -> None:
    model = lora(base, **VARIANTS[variant])
    model.save_pretrained(tmp_path / "lora")
    adapter = PlainAdapter.read(tmp_path / "lora")
    expected = model(INPUTS)
    assert (expected - base(INPUTS)).abs().max() > 0.1
    same = {
        "as it is": adapter,
        "at scale 1": adapter.unscaled(),
        "padded": adapter.padded(),
        "padded further": adapter.padded(max(adapter.ranks.values()) + 3),
        "in float64": adapter.to(torch.float64),
    }
    for name, other in same.items():
        found = answers(base, other.write(tmp_path / name))
        torch.testing.assert_close(
            found, expected, rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert all(other.scale(name) == 1 for other in (same["at scale 1"], same["padded"]) for name in other.pairs)


@pytest.mark.filterwarnings("ignore:.*use_rslora=True")
@pytest.mark.parametrize("variant", VARIANTS)
@serving("`--max-rank-pad`: one rank everywhere, the same outputs")
def test_padding_gives_uniform_tensors(variant: str, base: nn.Module, tmp_path: Path) -> None:
    lora(base, **VARIANTS[variant]).save_pretrained(tmp_path / "lora")
    PlainAdapter.read(tmp_path / "lora").padded().write(tmp_path / "padded")
    config = json.loads((tmp_path / "padded" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["use_rslora"] is False
    for key, value in load_file(tmp_path / "padded" / "adapter_model.safetensors").items():
        if ".lora_A" in key or ".lora_embedding_A" in key:
            assert value.shape[0] == config["r"]
        elif key.endswith((".lora_B.weight", ".lora_embedding_B")):
            assert value.shape[1] == config["r"]


def test_padding_cannot_cut(base: nn.Module, tmp_path: Path) -> None:
    lora(base, r=4).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="padding to rank 3 would cut modules of rank 4"):
        PlainAdapter.read(tmp_path).padded(3)


@serving("`--dtype`: float32, float16, bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_gets_the_type(dtype: torch.dtype, base: nn.Module, tmp_path: Path) -> None:
    model = lora(base, **VARIANTS["biases and a head"])
    model.save_pretrained(tmp_path / "lora")
    out = PlainAdapter.read(tmp_path / "lora").to(dtype).write(tmp_path / "cast")
    assert {value.dtype for value in load_file(out / "adapter_model.safetensors").values()} == {dtype}
    precision = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(answers(base, out), model(INPUTS), rtol=precision, atol=precision)


def test_what_float16_cannot_hold_is_an_error(base: nn.Module, tmp_path: Path) -> None:
    lora(base).save_pretrained(tmp_path)
    adapter = PlainAdapter.read(tmp_path)
    adapter.pairs["wide"].a[0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"wide\.lora_A holds 1e\+05, more than float16.*use bfloat16"):
        adapter.to(torch.float16)
    assert adapter.to(torch.bfloat16).pairs["wide"].a.isfinite().all()


# --------------------------------------------------------------------------------------------------------- truncation


@pytest.mark.filterwarnings("ignore:.*use_rslora=True")
@pytest.mark.parametrize("variant", ["one rank", "patterns", "rsLoRA", "biases and a head"])
@serving("`--rank K`: the globally best triplets, a family from one adapter")
def test_truncation_is_the_nearest_of_all_with_so_many_triplets(variant: str, base: nn.Module, tmp_path: Path) -> None:
    """Eckart and Young, over all matrices together: what is lost is the tail of all singular values."""
    lora(base, **VARIANTS[variant]).save_pretrained(tmp_path / "lora")
    adapter = PlainAdapter.read(tmp_path / "lora")
    whole = deltas(adapter)
    values = torch.cat([torch.linalg.svdvals(delta) for delta in whole.values()]).sort(descending=True).values
    for rank in (1, 2, 3):
        less = adapter.truncate(rank)
        # a zero triplet may hold the place of a module whose bias was trained
        assert less.live == rank * len(adapter.pairs) == rank * less.matrices
        kept = deltas(less)
        lost = sum((delta - kept.get(name, torch.zeros_like(delta))).square().sum() for name, delta in whole.items())
        torch.testing.assert_close(lost, values[rank * len(adapter.pairs) :].square().sum(), rtol=1e-3, atol=1e-5)
        assert answers(base, less.write(tmp_path / str(rank))).isfinite().all()  # stock PEFT loads it
        if rank > 1:  # the smaller is part of the larger
            inner = deltas(less.truncate(rank - 1))
            for name, delta in deltas(adapter.truncate(rank - 1)).items():
                torch.testing.assert_close(inner[name], delta, rtol=1e-4, atol=1e-4)


def test_truncating_to_what_is_there_changes_nothing(base: nn.Module, tmp_path: Path) -> None:
    lora(base, r=3).save_pretrained(tmp_path)
    adapter = PlainAdapter.read(tmp_path)
    assert adapter.truncate(3) is adapter


def test_modules_without_triplets_are_left_out_and_excluded(base: nn.Module, tmp_path: Path) -> None:
    lora(base, r=2).save_pretrained(tmp_path / "lora")
    adapter = PlainAdapter.read(tmp_path / "lora")
    adapter.pairs["narrow"].b.mul_(1e-4)
    less = adapter.truncate(1)
    assert "narrow" not in less.pairs and less.config.exclude_modules == {"narrow"} and less.matrices == 4
    expected = answers(base, less.write(tmp_path / "less"))
    read = PlainAdapter.read(tmp_path / "less")
    assert read.matrices == 4, "a later truncation counts them, too"
    torch.testing.assert_close(
        answers(base, read.padded().write(tmp_path / "padded")), expected, rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("variant", ["DoRA", "a bias of B"])
def test_a_module_with_something_else_trained_stays(variant: str, base: nn.Module, tmp_path: Path) -> None:
    lora(base, **VARIANTS[variant]).save_pretrained(tmp_path / "lora")
    adapter = PlainAdapter.read(tmp_path / "lora")
    adapter.pairs["narrow"].b.mul_(1e-6)
    less = adapter.truncate(1)
    assert less.ranks["narrow"] == 1 and not less.pairs["narrow"].b.any()
    assert less.rest.keys() == adapter.rest.keys()
    found = answers(base, less.write(tmp_path / "less"))
    for key in less.rest:
        less.rest[key].add_(1.0)
    assert (answers(base, less.write(tmp_path / "other")) - found).abs().max() > 0.05, "what was trained has no effect"


def test_importance_decides_where_it_is_known(base: nn.Module, tmp_path: Path) -> None:
    """The triplets themselves are kept, not mixtures of them; the importance goes along, through files too."""
    lora(base, r=3, lora_alpha=6).save_pretrained(tmp_path)
    adapter = PlainAdapter.read(tmp_path)
    scores = {name: torch.tensor([0.0, 2.0, 1.0]) for name in adapter.pairs}
    known = replace(adapter, scores=scores)
    less = known.truncate(1)
    for name, pair in less.pairs.items():
        assert torch.equal(pair.b, adapter.pairs[name].b[:, [1]])
        torch.testing.assert_close(pair.a, 2.0 * adapter.pairs[name].a[[1]])
        assert less.scores[name].tolist() == [2.0]
    read = PlainAdapter.read(known.padded(5).write(tmp_path / "padded"))
    assert all(score.tolist() == [0.0, 2.0, 1.0, 0.0, 0.0] for score in read.scores.values())
    again = read.truncate(2)
    assert all(torch.equal(again.pairs[name].b, adapter.pairs[name].b[:, [1, 2]]) for name in adapter.pairs)


@serving("`--rank K` by importance, kept in the file: each adapter lies within the next")
def test_an_export_knows_the_importance_of_its_triplets(tmp_path: Path) -> None:
    """From the last allocation, through compaction: a family of adapters, each within the next."""
    torch.manual_seed(0)
    model = adalora.get_peft_model(
        bert(),
        AdaLoraConfig(
            task_type="SEQ_CLS", target_modules=["query", "value"], target_r=3, init_r=5, total_step=12, tinit=1,
            tfinal=4, deltaT=1,
        ),
    )  # fmt: skip
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], 1e-2)
    for step in range(12):
        model(**batch("SEQ_CLS", step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = adalora.allocator(model)
    whole = PlainAdapter.read(adalora.export_lora(model, tmp_path / "whole"))
    by_name = dict(zip((t.name for t in ours.triplets), ours.scores().split(ours.sizes), strict=True))
    assert ours.live == 12 and all(torch.equal(score, by_name[name]) for name, score in whole.scores.items())
    before: PlainAdapter | None = None
    for rank in (3, 2, 1):
        kept = PlainAdapter.read(adalora.export_lora(model, tmp_path / str(rank), rank=rank))
        every = torch.cat([*by_name.values()]).sort(descending=True).values
        assert torch.equal(torch.cat([*kept.scores.values()]).sort(descending=True).values, every[: rank * 4])
        for name, pair in kept.pairs.items():
            larger = (before or whole).pairs[name]
            assert all(any(torch.equal(column, other) for other in larger.b.T) for column in pair.b.T)
        before = kept


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, "rank=0 must be an average rank above 0"),
        (-1, "above 0"),
        (True, "above 0"),
        (0.1, "rank 0.1 for each of 4 matrices leaves no triplet at all"),
        (4, "makes 16 triplets, but the adapter has 12.*choose 3 or less"),
    ],
)
def test_ranks_that_cannot_be_meant(rank: Any, words: str, base: nn.Module, tmp_path: Path) -> None:
    lora(base, r=3).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=words):
        PlainAdapter.read(tmp_path).truncate(rank)


# ----------------------------------------------------------------------------------------------- out of AdaLoRA's hands


def test_a_fraction_is_a_triplet_for_some_of_the_matrices(base: nn.Module, tmp_path: Path) -> None:
    lora(base, r=3).save_pretrained(tmp_path)
    whole = PlainAdapter.read(tmp_path)
    assert [sum(whole.truncate(rank).ranks.values()) for rank in (0.25, 0.5, 0.99, 1.5)] == [1, 2, 3, 6]
    assert whole.truncate(1.5).truncate(0.5).ranks == whole.truncate(0.5).ranks


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, nn.Module]:
    """(base, model) of a BERT trained with target_r=2."""
    torch.manual_seed(0)
    base = bert()
    config = AdaLoraConfig(
        task_type="SEQ_CLS", target_modules="all-linear", target_r=2, init_r=4, lora_alpha=16, total_step=24, tinit=2,
        tfinal=8, deltaT=3,
    )  # fmt: skip
    model = adalora.get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=2e-2)
    for step in range(24):
        model(**batch("SEQ_CLS", step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return base, model


@serving("`export_lora(rank=, pad=, dtype=)`")
def test_export_lora_takes_rank_padding_and_type(trained: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    base, model = trained
    matrices = len(adalora.ranks(model))
    assert 0 in adalora.ranks(model).values(), "no module without triplets: this shows less"

    def loaded(directory: Path) -> nn.Module:
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), directory)

    padded = loaded(adalora.export_lora(model, tmp_path / "padded", pad=True))
    torch.testing.assert_close(logits(padded, "SEQ_CLS"), logits(model, "SEQ_CLS"), rtol=0, atol=TOLERANCE)
    same = PlainAdapter.read(adalora.export_lora(model, tmp_path / "same", rank=2))
    assert same.matrices == matrices and same.ranks == {k: r for k, r in adalora.ranks(model).items() if r}
    half = PlainAdapter.read(adalora.export_lora(model, tmp_path / "half", rank=1, pad=True, dtype=torch.bfloat16))
    assert set(half.ranks.values()) == {half.config.r} and half.pairs.popitem()[1].a.dtype == torch.bfloat16
    assert PlainAdapter.read(tmp_path / "half").live == matrices
    assert (logits(loaded(tmp_path / "half"), "SEQ_CLS") - logits(base, "SEQ_CLS")).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=f"has {2 * matrices}"):
        adalora.export_lora(model, tmp_path / "more", rank=3)
    assert not (tmp_path / "more").exists()
    before = (tmp_path / "same" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError):
        adalora.export_lora(model, tmp_path / "same", rank=3)
    assert (tmp_path / "same" / "adapter_model.safetensors").read_bytes() == before
    assert sorted(file.name for file in (tmp_path / "same").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_our_triplets_are_nearly_in_order_already(trained: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    """P and Q are orthonormal but for the regulariser's slack: ‖ΔW_i‖_F of the triplets are about singular values."""
    _, model = trained
    adapter = PlainAdapter.read(adalora.export_lora(model, tmp_path))
    for name, delta in deltas(adapter).items():
        pair = adapter.pairs[name]
        norms = (pair.b.norm(dim=0) * pair.a.norm(dim=1)).sort(descending=True).values
        torch.testing.assert_close(norms, torch.linalg.svdvals(delta)[: pair.rank], rtol=0.25, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- files


def test_files_have_ordinary_permissions_and_nothing_else_is_left(base: nn.Module, tmp_path: Path) -> None:
    lora(base).save_pretrained(tmp_path / "lora")
    before = os.umask(0o022)
    try:
        out = PlainAdapter.read(tmp_path / "lora").write(tmp_path / "deep" / "out")
    finally:
        os.umask(before)
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {
        "adapter_model.safetensors": 0o644,
        "adapter_config.json": 0o644,
    }


def test_after_an_error_nothing_has_changed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    for name in ("there", "new"):
        with pytest.raises(ZeroDivisionError), replacing(tmp_path / name) as beside:
            (beside / "file").write_text("new")
            1 / 0  # noqa: B018
    assert (tmp_path / "there" / "file").read_text() == "old" and not (tmp_path / "new").exists()
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["file"]


def test_a_name_that_ends_another_excludes_itself_alone() -> None:
    """PEFT excludes whatever ends with a name: ``vision.layer.q`` must not go with ``layer.q``."""
    kept, gone = {"vision.layer.q": 2, "layer.v": 1}, {"layer.q": 0, "layer.k": 0}
    for excluded in (None, ["pooler"], r".*pooler.*"):
        config = peft.LoraConfig(target_modules=["q", "k", "v", "pooler"], exclude_modules=excluded)
        plain = plain_config(config, {**kept, **gone})
        chosen = {
            name: bool(peft.tuners.tuners_utils.check_target_module_exists(plain, name))
            for name in [*kept, *gone, *(["a.pooler"] if excluded else [])]
        }
        assert chosen == {
            **dict.fromkeys(kept, True),
            **dict.fromkeys([*gone, *(["a.pooler"] if excluded else [])], False),
        }


def no_pairs(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("lora_", "lokr_"): value for key, value in tensors.items()}


def no_b(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if not key.endswith("wide.lora_B.weight")}


def other_ranks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value[1:] if key.endswith("wide.lora_A.weight") else value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        ({"peft_type": "ADALORA"}, None, "adalora convert"),
        ({"peft_type": "LOHA"}, None, "'LOHA', not LORA"),
        ({"peft_type": None}, None, "not LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, None, "path_initial_model_for_weight_conversion"),
        ({"target_parameters": ["experts"]}, None, "target_parameters"),
        ({"layers_pattern": ["h"], "target_modules": ".*"}, None, "not a configuration of LoRA"),
        ({"r": 5}, None, "not a pair of rank 5"),
        ({}, no_pairs, "holds no pair"),
        ({}, no_b, "wide has no lora_B"),
        ({}, other_ranks, "not a pair of rank 8"),
    ],
)
def test_files_that_are_no_lora(settings: Any, change: Any, words: str, base: nn.Module, tmp_path: Path) -> None:
    lora(base).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    if change is not None:
        weights = tmp_path / "adapter_model.safetensors"
        save_file({key: value.contiguous() for key, value in change(load_file(weights)).items()}, weights)
    with pytest.raises(ConfigError, match=words):
        PlainAdapter.read(tmp_path)


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    """Byte for byte, with pruned modules in the metadata too; and the file says what is in it."""
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["a", "b"])
    adapter = PlainAdapter(
        config, {"a": Pair(torch.ones(3, 2), torch.ones(2, 5))}, {}, {"b": Pair.empty([4, 0], [0, 3], False)}
    )
    written = {(adapter.write(tmp_path / str(n)) / "adapter_model.safetensors").read_bytes() for n in range(12)}
    assert len(written) == 1
    read = PlainAdapter.read(tmp_path / "0")
    assert torch.equal(read.pairs["a"].a, torch.ones(2, 5)) and read.matrices == 2
    assert read.pruned["b"].b.shape == (4, 0) and read.pruned["b"].a.shape == (0, 3)
