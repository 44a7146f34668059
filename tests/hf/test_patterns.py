"""Names of modules are regular expressions to PEFT: ours mean one module each, and a stranger's take bounded time."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

import adalora
from adalora import AdaLoraConfig, ConfigError
from adalora.hf.patterns import Chosen, Patterns, as_keys, is_exactly
from adalora.hf.plain import PlainAdapter

PART = st.text("ab1_+*([|^$-", min_size=1, max_size=3)
NAME = st.lists(PART, min_size=1, max_size=4).map(".".join)


@given(st.sets(NAME, min_size=1, max_size=12))
def test_a_key_is_its_own_module_to_peft(names: set[str]) -> None:
    keys = as_keys(names)
    assert {get_pattern_key(list(keys.values()), name) for name in names} == set(keys.values())
    assert all(get_pattern_key(list(keys.values()), name) == key for name, key in keys.items())
    ours = Patterns({key: name for name, key in keys.items()})
    assert all(ours.get(name, None) == name for name in names)


def test_names_stay_readable_where_they_mean_one_module() -> None:
    names = ["layers.1.q", "layers.11.q", "q", "text.projection", "text_projection", "a+b"]
    assert as_keys(names) == {
        "text.projection": r"^text\.projection", "text_projection": "text_projection", "layers.11.q": "layers.11.q",
        "layers.1.q": "layers.1.q", "a+b": r"^a\+b", "q": "q",
    }  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(["q", "a.q", ".*q", "^q", "a|q", "a.b", "a_b", r"a\.b"]), st.integers(1, 9)), NAME
)
def test_patterns_answer_as_peft_does(pattern: dict[str, int], name: str) -> None:
    for asked in (name, "q", "a.q", "b.a.q", "a.b", "a_b", "x.a_b"):
        assert Patterns(pattern).get(asked, 0) == pattern.get(get_pattern_key(list(pattern), asked), 0), asked


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q", "layers.1.v"]},
        {"target_modules": r".*\.(q|v)"},
        {"target_modules": ["q", "v"], "exclude_modules": ["layers.0.q"]},
        {"target_modules": ["q", "v"], "exclude_modules": r"model\.layers\.0\..*"},
        {"target_modules": ["q", "v", "head"], "modules_to_save": ["head", "layers.1"]},
        {"target_modules": ["q", "v"], "layers_to_transform": 1},
        {"target_modules": ["q", "v"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": ["q", "model.layers.1.v"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "blocks"},
    ],
)
def test_modules_are_chosen_as_peft_does(settings: dict[str, Any]) -> None:
    config = peft.LoraConfig(**settings)
    names = [f"model.layers.{i}.{part}" for i in range(12) for part in ("q", "v", "qv", "q.base")]
    names += ["head", "x.head", "q", "overhead", "model.blocks.0.q", "h.0.q"]
    chosen = Chosen(config)
    expected = {name for name in names if check_target_module_exists(config, name)}
    assert {name for name in names if name in chosen} == expected and (expected or settings["target_modules"] == ["q"])


def test_an_exact_pattern() -> None:
    pattern = is_exactly(["a.b", "c+d"])
    assert [n for n in ("a.b", "aXb", "x.a.b", "c+d", "c") if re.fullmatch(pattern, n)] == ["a.b", "c+d"]


@pytest.mark.parametrize(
    "key",
    ["(a|a)*b", "(.*.*.*.*)*x", "(a{1000}){1000}", "((a{99}){99}){99}", "(" * 400 + ")" * 400, "a" * 2000, "[", "(?P<"],
)
def test_a_stranger_s_pattern_cannot_take_for_ever(key: str) -> None:
    start = time.monotonic()
    name = f"model.{'a' * 400}!"
    try:
        assert Patterns({f"{key}+": 1}).get(name, 0) == 0
        assert name not in Chosen(peft.LoraConfig(target_modules=f"{key}+"))
    except ConfigError as error:
        assert "_pattern has " in str(error) and "\n" not in str(error) and len(str(error)) < 400
    assert time.monotonic() - start < 8


class Projections(nn.Module):
    """``text.projection`` beside ``text_projection``, which is what a dot may stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(8, 16)
        self.text = nn.ModuleDict({"projection": nn.Linear(16, 16)})
        self.text_projection = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inp(x).tanh()
        result: torch.Tensor = self.text_projection(hidden + self.text["projection"](hidden).tanh()).sum(-1)
        return result


@pytest.mark.parametrize("dotted", [1, 3])
def test_a_name_that_would_catch_another_is_written_so_that_it_does_not(dotted: int, tmp_path: Path) -> None:
    live = {"text.projection": dotted, "text_projection": 4 - dotted}
    base = Projections()
    kept = {key: value.clone() for key, value in base.state_dict().items()}
    config = AdaLoraConfig(target_r=2, init_r=4, target_modules="all-linear", total_step=30)
    model = adalora.get_peft_model(base, config)
    for triplets in adalora.allocator(model).triplets:
        with torch.no_grad():
            triplets.lam[: live.get(triplets.name, 2)] = 0.5
    model.save_pretrained(tmp_path)
    fresh = Projections()
    fresh.load_state_dict(kept)
    x = torch.randn(4, 8)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(loaded(x), model(x))  # ranks that differ do not even load
    adalora.export_lora(model, tmp_path / "again")
    assert PlainAdapter.read(tmp_path / "again").ranks == {"inp": 2, **live}
