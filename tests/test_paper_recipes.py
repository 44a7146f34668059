"""recipes/paper: the files are what the tables say, and each of them trains a tiny model of the right architecture on
real rows."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import ClassLabel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BartConfig, DebertaV2Config, PreTrainedConfig, PreTrainedTokenizerFast

from adalora.data import read_rows, sample
from adalora.preparation import prepare
from adalora.reading import completed, task_of
from adalora.recipe import Recipe, validate
from adalora.recipe_text import read_raw
from adalora.training import train

from .data import benchmark_data

FOLDER = Path(__file__).parents[1] / "recipes" / "paper"
FILES = sorted(FOLDER.glob("*.yaml"))
TASKS = sorted({path.stem.rpartition("-")[0] for path in FILES})


def load_make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_recipes", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make = load_make()


def of(path: Path) -> Recipe:
    return validate(read_raw(path), str(path))


# ------------------------------------------------------------------------------------------------ the files


def test_the_files_are_what_the_tables_say() -> None:
    """Else: python recipes/paper/make.py."""
    wanted = make.recipes()
    assert {path: path.read_text(encoding="utf-8") for path in FILES} == wanted
    assert len(wanted) == 8 * 3 + 2 * 4 + 2 * 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_parses(path: Path) -> None:
    """It is complete, its task takes its options, and nothing in it is beside the method."""
    recipe = completed(of(path))
    task_of(recipe)
    assert recipe.method == "adalora" and recipe.output == f"runs/paper/{path.stem}"
    method = recipe.adalora
    assert (method.initialization, method.singular_gain, method.orthogonality) == ("gaussian", 1.0, "squared")
    assert (method.importance, method.beta1, method.beta2) == ("sensitivity_uncertainty", 0.85, 0.85)
    assert method.init_r is not None and 1.5 <= method.init_r / method.target_r <= 2


@pytest.mark.parametrize("row", [*make.GLUE, *make.SQUAD, *make.SUMMARIES], ids=lambda row: row.data)
def test_the_schedule_leaves_time_to_allocate(row: Any) -> None:
    """With all the rows there are, the budget falls for a tenth of the training at least."""
    batches = math.ceil(row.rows / (row.batch // row.devices))
    steps = row.epochs * math.ceil(batches / row.devices)
    assert row.warmup < row.tinit + row.tfinal < 0.9 * steps


def test_the_budgets_are_those_of_the_models() -> None:
    """Matrices and parameters at rank 1, counted in models of the real size (without their weights)."""
    base = DebertaV2Config(
        vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    )
    for model, config, whole in [(make.DEBERTA, base, 184e6), (make.BART, BartConfig(), 406e6)]:
        with torch.device("meta"):
            empty = AutoModel.from_config(config)
        shapes = [
            module.weight.shape
            for name, module in empty.named_modules()
            if isinstance(module, torch.nn.Linear) and name.endswith(tuple(f".{end}" for end in model.modules))
        ]
        assert (len(shapes), sum(map(sum, shapes))) == (model.matrices, model.rank_one)
        assert sum(p.numel() for p in empty.parameters()) == pytest.approx(whole, rel=0.01)
    for budgets, model, whole in [
        (make.SQUAD_BUDGETS, make.DEBERTA, 184e6), (make.SUMMARY_BUDGETS, make.BART, 406e6)
    ]:  # fmt: skip
        for budget, rank in budgets.items():  # the paper rounds down to multiples of its lowest budget
            assert float(budget.removesuffix(" %")) == pytest.approx(100 * rank * model.rank_one / whole, rel=0.15)
    for budget, rank in make.GLUE_BUDGETS.items():
        assert 1e6 * float(budget.removesuffix("M")) == pytest.approx(rank * make.DEBERTA.rank_one, rel=0.05)


# ------------------------------------------------------------------------------------------------ three steps

HERE = {
    "nyu-mll/glue": "glue",
    "rajpurkar/squad": "squad/plain_text",
    "rajpurkar/squad_v2": "squad_v2/squad_v2",
    "EdinburghNLP/xsum": "xsum/default",
    "abisee/cnn_dailymail": "cnn_dailymail",
}
"""Where a data set of the hub is in the folder of benchmarks."""


def on_local_rows(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What to change in a recipe so that it reads local rows: splits that are not here give way to one that is."""
    data = recipe.data
    if data.config == "qqp":
        source = like_qqp(folder)
    else:
        source = benchmark_data(HERE[data.train])
    inside = source / (data.config or "")
    splits = sorted(path.name.partition("-0")[0] for path in inside.glob("*.parquet"))
    labelled = [split for split in splits if split != "test" or data.train == "EdinburghNLP/xsum"]

    def here(split: str) -> str:
        return split if split in splits else labelled[0]

    more = [split for split in data.more_eval_splits if split in splits]
    changed = {"train": str(source), "train_split": here(data.train_split), "eval_split": here(data.eval_split)}
    return changed | {"more_eval_splits": more}


def like_qqp(folder: Path) -> Path:
    """QQP is not among the benchmarks: rows of MRPC under its columns."""
    rows = sample(read_rows(str(benchmark_data("glue")), "train", "mrpc"), 16)
    rows = rows.cast_column("label", ClassLabel(names=["not_duplicate", "duplicate"]))
    columns = {"sentence1": "question1", "sentence2": "question2"}
    (folder / "qqp").mkdir()
    for split in ("train", "validation"):
        rows.rename_columns(columns).to_parquet(str(folder / "qqp" / f"{split}-00000-of-00001.parquet"))
    return folder


WORDS = ["the", "of", "and", "to", "in", "a", "is", "was", "for", "on", "that", "with", ",", ".", "'", "?"]


def tiny(architecture: str) -> PreTrainedConfig:
    """Two layers of width 32."""
    if architecture == "deberta":
        return DebertaV2Config(
            vocab_size=200,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=512,
            relative_attention=True,  # from here on as DeBERTaV3 is
            position_buckets=32,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            type_vocab_size=0,
        )
    return BartConfig(
        vocab_size=200,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=1024,
    )


def tokenizer_of(architecture: str) -> PreTrainedTokenizerFast:
    """Words and punctuation, 200 of them known; special tokens where the real tokenizer has them."""
    bart = architecture == "bart"
    begin, end, pad, unknown = ("<s>", "</s>", "<pad>", "<unk>") if bart else ("[CLS]", "[SEP]", "[PAD]", "[UNK]")
    words = [begin, pad, end, unknown, *WORDS]  # the special tokens in BART's order
    vocabulary = {word: index for index, word in enumerate([*words, *map(str, range(200 - len(words)))])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B {end}",
        special_tokens=[(token, vocabulary[token]) for token in (begin, end)],
    )
    names = {"cls_token": begin, "sep_token": end, "pad_token": pad, "unk_token": unknown}
    if bart:
        names |= {"bos_token": begin, "eos_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=built, model_max_length=1024 if bart else 512, **names)


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a random model and its tokenizer, for each of the paper's models."""
    found = {}
    for name, architecture in [(make.DEBERTA.name, "deberta"), (make.BART.name, "bart")]:
        folder = tmp_path_factory.mktemp(architecture)
        torch.manual_seed(0)
        AutoModel.from_config(tiny(architecture)).save_pretrained(folder)
        tokenizer_of(architecture).save_pretrained(folder)
        found[name] = folder
    return found


def budgets(lowest: bool) -> Iterator[Any]:
    """The recipe of each task at its lowest budget, or the others."""
    for task in TASKS:
        paths = [path for path in FILES if path.stem.rpartition("-")[0] == task]
        for path in paths[:1] if lowest else paths[1:]:
            yield pytest.param(path, id=path.stem, marks=() if lowest else pytest.mark.slow)


@pytest.mark.parametrize("path", [*budgets(lowest=True), *budgets(lowest=False)])
def test_every_recipe_makes_three_steps(
    path: Path, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On real rows, with its own columns, lengths, options, ranks and matrices; the lengths of the schedule are cut to
    what three steps allow. The triplets that the budget leaves are what is saved."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    recipe = of(path)
    sections = {
        "model": str(tiny_models[recipe.model]),
        "output": str(tmp_path / "run"),
        "data": recipe.data.model_dump() | on_local_rows(recipe, tmp_path) | {"max_train_rows": 8, "max_eval_rows": 2},
        "adalora": recipe.adalora.model_dump() | {"tinit": 1, "tfinal": 1, "deltaT": 1},
        "training": recipe.training.model_dump()
        | {"max_steps": 3, "warmup_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
        | {"eval_strategy": "no", "save_steps": 3},
    }
    short = validate(recipe.model_dump(include={"task", "method", "options", "seed"}) | sections, path.name)
    prepared = prepare(short)
    stacked = 2 * 6 if "deberta" in recipe.model else 6 + 10
    assert len(prepared.initial_ranks) == stacked
    assert set(prepared.initial_ranks.values()) == {recipe.adalora.init_r}
    metrics = train(prepared)
    assert metrics["steps"] == 3 and math.isfinite(metrics["training_loss"])
    assert sum(metrics["ranks"].values()) == recipe.adalora.target_r * stacked
    assert set(metrics["metrics"]) == set(prepared.task.metric_names)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
