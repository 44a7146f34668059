"""Writes the recipes of this folder from the tables below: ``python recipes/paper/make.py``.

The numbers are the paper's (AdaLoRA, Zhang et al., ICLR 2023, arXiv 2303.10512, section 4 and appendix); where it
gives none, they are those of the scripts that its authors published. README.md says what else was decided.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from adalora.bench.published import figures

FOLDER = Path(__file__).parent


class Model(NamedTuple):
    """A model, and the matrices of its layers that are adapted: W_q, W_k, W_v, W_o, W_f1 and W_f2."""

    name: str
    note: str
    modules: tuple[str, ...]
    matrices: int  # in all layers
    rank_one: int  # entries of P and Q of all of them at rank 1


DEBERTA = Model(
    "microsoft/deberta-v3-base",
    "184M parameters; reads text with: pip install sentencepiece protobuf",
    ("query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense"),
    matrices=12 * 6,
    rank_one=12 * (4 * (768 + 768) + 2 * (768 + 3072)),
)
BART = Model(
    "facebook/bart-large",
    "406M parameters",
    ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    matrices=12 * 6 + 12 * 10,  # a layer of the decoder attends twice
    rank_one=12 * (4 * (1024 + 1024) + 2 * (1024 + 4096)) + 12 * (8 * (1024 + 1024) + 2 * (1024 + 4096)),
)

GLUE_BUDGETS = {"0.32M": 2, "0.64M": 4, "1.27M": 8}
SQUAD_BUDGETS = {"0.08 %": 1, "0.16 %": 2, "0.32 %": 4, "0.65 %": 8}
SUMMARY_BUDGETS = {"0.13 %": 1, "0.26 %": 2, "1.10 %": 8, "2.20 %": 16}
"""Average rank at the end, for each budget as the paper names it."""


class Row(NamedTuple):
    """One task of the paper's tables of hyperparameters."""

    title: str
    task: str
    data: str  # its name among the paper's figures, and in those of recipes
    hub: str
    config: str | None
    rows: int  # to train on
    lr: str
    epochs: int
    tinit: int
    tfinal: int
    delta: int
    gamma: float
    alpha: int
    max_length: int
    warmup: float  # steps, or a fraction of all
    decay: float  # of weights
    batch: int = 32
    devices: int = 1  # that shared a batch in the scripts; here one takes its share so many times
    windows: bool = False  # a long row is several rows for the model
    eval_split: str = "validation"
    more_eval_splits: tuple[str, ...] = ()
    columns: tuple[str, str] | None = None  # text and label, where not the task's own
    options: tuple[tuple[str, str, str], ...] = ()  # key, value, comment
    scripts: tuple[tuple[str, str], ...] = ()  # what the scripts have instead, by key
    scripts_init_r: tuple[int, int] | None = None  # target and initial rank of the script, where not 1.5 to 1


GLUE = [
    Row("MNLI of GLUE", "glue/mnli", "glue/mnli", "nyu-mll/glue", "mnli", 392_702, "5e-4", 7,
        8000, 50_000, 100, 0.1, 16, 256, warmup=1000, decay=0.0,
        eval_split="validation_matched", more_eval_splits=("validation_mismatched",)),
    Row("SST-2 of GLUE", "glue/sst2", "glue/sst2", "nyu-mll/glue", "sst2", 67_349, "8e-4", 24,
        6000, 22_000, 100, 0.1, 16, 128, warmup=1000, decay=0.01),
    Row("CoLA of GLUE", "glue/cola", "glue/cola", "nyu-mll/glue", "cola", 8_551, "5e-4", 25,
        800, 3500, 10, 0.5, 32, 64, warmup=100, decay=0.0,
        scripts=(("learning_rate", "8e-4"), ("orth_reg_weight", "0.1"))),
    Row("QQP of GLUE", "glue/qqp", "glue/qqp", "nyu-mll/glue", "qqp", 363_846, "5e-4", 5,
        8000, 25_000, 100, 0.1, 16, 320, warmup=2000, decay=0.01, scripts=(("learning_rate", "8e-4"),)),
    Row("QNLI of GLUE", "glue/qnli", "glue/qnli", "nyu-mll/glue", "qnli", 104_743, "1.2e-3", 5,
        2000, 8000, 100, 0.1, 32, 512, warmup=500, decay=0.01, scripts=(("learning_rate", "5e-4"),)),
    Row("RTE of GLUE", "glue/rte", "glue/rte", "nyu-mll/glue", "rte", 2_490, "1.2e-3", 50,
        600, 1800, 1, 0.3, 32, 320, warmup=200, decay=0.01),
    Row("MRPC of GLUE", "glue/mrpc", "glue/mrpc", "nyu-mll/glue", "mrpc", 3_668, "1e-3", 30,
        600, 1800, 1, 0.1, 32, 320, warmup=0.1, decay=0.01),
    Row("STS-B of GLUE", "glue/stsb", "glue/stsb", "nyu-mll/glue", "stsb", 5_749, "2.2e-3", 25,
        800, 2000, 10, 0.1, 32, 128, warmup=100, decay=0.1, scripts=(("orth_reg_weight", "0.3"),)),
]  # fmt: skip

_STRIDE = ("doc_stride", "128", "tokens that two windows of a long context share")
_UNANSWERABLE = ("unanswerable", "true", "some questions have no answer")
SQUAD = [
    Row("SQuAD 1.1", "question_answering", "squad", "rajpurkar/squad", None, 87_599, "1e-3", 10,
        5000, 25_000, 100, 0.1, 16, 384, warmup=1000, decay=0.0, batch=16, windows=True, options=(_STRIDE,)),
    Row("SQuAD 2.0", "question_answering", "squad_v2", "rajpurkar/squad_v2", None, 130_319, "1e-3", 12,
        5000, 50_000, 100, 0.1, 16, 384, warmup=1000, decay=0.0, batch=16, windows=True,
        options=(_UNANSWERABLE, _STRIDE)),
]  # fmt: skip

SUMMARIES = [
    Row("XSum", "summarization", "xsum", "EdinburghNLP/xsum", None, 204_045, "5e-4", 25,
        6000, 50_000, 100, 0.1, 32, 768, warmup=3000, decay=0.0, batch=64, devices=8,
        options=(("max_target_length", "64", ""), ("num_beams", "8", "")), scripts=(("tfinal", "25000"),)),
    Row("CNN/DailyMail", "summarization", "cnn_dailymail", "abisee/cnn_dailymail", "3.0.0", 287_113, "5e-4", 15,
        5000, 85_000, 100, 0.1, 32, 1024, warmup=3000, decay=0.0, batch=32, devices=8,
        columns=("article", "highlights"), scripts_init_r=(2, 4),
        options=(("max_target_length", "160", ""), ("num_beams", "4", ""))),
]  # fmt: skip


def recipes() -> dict[Path, str]:
    """Every recipe: where it belongs, and its text."""
    groups = [(DEBERTA, GLUE, GLUE_BUDGETS), (DEBERTA, SQUAD, SQUAD_BUDGETS), (BART, SUMMARIES, SUMMARY_BUDGETS)]
    return {
        FOLDER / f"{name_of(row, budget)}.yaml": "\n".join(lines(model, row, budget, rank)) + "\n"
        for model, rows, budgets in groups
        for row in rows
        for budget, rank in budgets.items()
    }


def name_of(row: Row, budget: str) -> str:
    """Of file and run: ``mrpc-0.32M``, ``squad-0.08pc``."""
    return f"{row.data.removeprefix('glue/')}-{budget.replace(' %', 'pc')}"


def lines(model: Model, row: Row, budget: str, rank: int) -> Iterator[str]:
    """One recipe, line by line."""
    steps = row.epochs * math.ceil(row.rows / row.batch)
    steps_note = f"steps, of {steps:,}" + (" and more: a long context is several rows" if row.windows else "")
    init_r = math.ceil(1.5 * rank)
    init_note = "half as much again at the start, as in the paper" if init_r == 1.5 * rank else "1.5, rounded up"
    if row.scripts_init_r and row.scripts_init_r[0] == rank:
        init_r, init_note = row.scripts_init_r[1], "as in the authors' script, which runs this budget"
    instead = {key: f"the authors' script has {value}" for key, value in row.scripts}

    def entry(key: str, value: object, comment: str = "", section: bool = True) -> str:
        given = f"{'  ' if section else ''}{key}: {value}".rstrip()
        said = "; ".join(text for text in (comment, instead.get(key, "")) if text)
        return f"{given:<34}# {said}" if said else given

    printed = _printed(row, budget)
    yield f"# {row.title} with AdaLoRA at {budget}: {rank * model.matrices:,} triplets, on average {rank} in a matrix,"
    yield f"# which are {rank * model.rank_one:,} parameters where they are spread evenly."
    if printed:
        yield f"# The paper reports {printed}, a mean of five seeds."
    yield "# Written by make.py from the tables in it; README.md says what was decided."
    yield ""
    yield entry("model", model.name, model.note, section=False)
    yield entry("task", row.task, section=False)
    yield entry("method", "adalora", section=False)
    yield entry("output", f"runs/paper/{name_of(row, budget)}", section=False)
    yield entry("seed", 0, "the paper's figures are means of five seeds", section=False)
    yield ""
    yield "data:"
    yield entry("train", row.hub)
    if row.config is not None:
        yield entry("config", row.config)
    yield entry("train_split", "train", f"{row.rows:,} rows")
    yield entry("eval_split", row.eval_split)
    if row.more_eval_splits:
        yield entry("more_eval_splits", f"[{', '.join(row.more_eval_splits)}]")
    if row.columns is not None:
        yield entry("text", row.columns[0])
        yield entry("label", row.columns[1])
    yield entry("max_length", row.max_length)
    if row.options:
        yield ""
        yield "options:"
        yield from (entry(*option) for option in row.options)
    yield ""
    yield "adalora:"
    yield entry("target_r", rank)
    yield entry("init_r", init_r, init_note)
    yield entry("lora_alpha", row.alpha)
    yield entry("target_modules", "", "W_q, W_k, W_v, W_o, W_f1 and W_f2 of every layer")
    yield from (f"    - {module}" for module in model.modules)
    yield entry("initialization", "gaussian", "the paper's start; the default here is orthonormal")
    yield entry("singular_gain", 1.0, "the paper's Λ; the default here is auto")
    yield entry("importance", "sensitivity_uncertainty")
    yield entry("beta1", 0.85)
    yield entry("beta2", 0.85)
    yield entry("orthogonality", "squared")
    yield entry("orth_reg_weight", row.gamma, "γ")
    yield entry("schedule", "cubic")
    yield entry("tinit", row.tinit, steps_note)
    yield entry("tfinal", row.tfinal)
    yield entry("deltaT", row.delta)
    yield ""
    yield "training:"
    yield entry("num_train_epochs", row.epochs)
    yield entry("learning_rate", row.lr)
    yield entry("lr_scheduler_type", "linear")
    yield entry("warmup_steps", row.warmup, "of all steps" if row.warmup < 1 else "")
    yield entry("weight_decay", row.decay)
    yield entry("per_device_train_batch_size", row.batch // row.devices)
    if row.devices > 1:
        yield entry("gradient_accumulation_steps", row.devices, f"{row.batch} rows in a step")
    yield entry("eval_strategy", "epoch")


def _printed(row: Row, budget: str) -> str:
    """What the paper reports of this very row."""
    digits = 1 if row.windows else 2
    own = (figure for figure in figures(row.data) if (figure.method, figure.budget) == ("adalora", budget))
    return ", ".join(f"{figure.metric} {figure.value:.{digits}f}" for figure in own)


def main() -> None:
    """Write them all."""
    for path, text in recipes().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
