"""Figures that the paper prints, to stand beside ours: AdaLoRA (Zhang et al., ICLR 2023), means of five seeds.

They are of other models than most of ours (``Figure.model``), so tables show them apart and name the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

SOURCE = "AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512)"
DEBERTA = "microsoft/deberta-v3-base"
BART = "facebook/bart-large"


class Figure(NamedTuple):
    """One printed number."""

    task: str  # the name of the data: glue/mrpc, squad, squad_v2, xsum or cnn_dailymail
    model: str
    budget: str  # as the paper has it: trained parameters, or their share of the model's
    method: str
    metric: str  # as our tasks call it; what the paper calls R-L is rougeLsum
    value: float  # in points, 0 to 100


def figures(task: str, data: str = "", config: str | None = None) -> list[Figure]:
    """What the paper prints on a task, known by the task's name (``glue/mrpc``) or by that of its data, a name on
    the hub or a folder in the hub's layout (``rajpurkar/squad``, ``data/squad/plain_text``)."""
    parts = {part.lower() for part in (*task.split("/"), *data.split("/"))}
    known = {name: set(name.split("/")) for name in dict.fromkeys(figure.task for figure in ALL)}
    if config is not None and "glue" in parts:
        parts.add(config)
    found = [name for name, words in known.items() if words <= parts]
    return [figure for figure in ALL if figure.task in found[:1]]


# --- GLUE, development sets --------------------------------------------------------------------------

_GLUE_COLUMNS = (
    ("glue/mnli", "accuracy"),
    ("glue/mnli", "accuracy, mismatched"),
    ("glue/sst2", "accuracy"),
    ("glue/cola", "mcc"),
    ("glue/qqp", "accuracy"),
    ("glue/qqp", "f1"),
    ("glue/qnli", "accuracy"),
    ("glue/rte", "accuracy"),
    ("glue/mrpc", "accuracy"),
    ("glue/stsb", "correlation"),
)
_GLUE = (
    ("184M", "full", 89.90, 90.12, 95.63, 69.19, 92.40, 89.80, 94.03, 83.75, 89.46, 91.60),
    ("1.22M", "houlsby", 90.13, 90.17, 95.53, 68.64, 91.91, 89.27, 94.11, 84.48, 89.95, 91.48),
    ("1.18M", "pfeiffer", 90.33, 90.39, 95.61, 68.77, 92.04, 89.40, 94.29, 85.20, 89.46, 91.54),
    ("1.33M", "lora", 90.65, 90.69, 94.95, 69.82, 91.99, 89.38, 93.87, 85.20, 89.95, 91.60),
    ("1.27M", "adalora", 90.76, 90.79, 96.10, 71.45, 92.23, 89.74, 94.55, 88.09, 90.69, 91.84),
    ("0.33M", "lora", 90.30, 90.38, 94.95, 68.71, None, None, 94.03, 85.56, 89.71, None),
    ("0.32M", "adalora", 90.66, 90.70, 95.80, 70.04, None, None, 94.49, 87.36, 90.44, None),
)

# --- question answering: exact match and F1 ---------------------------------------------------------

_SQUAD = (
    ("0.08 %", "houlsby", 84.4, 91.5, 83.4, 86.6),
    ("0.08 %", "lora", 86.4, 92.8, 84.7, 87.5),
    ("0.08 %", "adalora", 87.2, 93.4, 85.6, 88.7),
    ("0.65 %", "houlsby", 86.7, 92.9, 85.4, 88.3),
    ("0.65 %", "lora", 86.7, 93.1, 85.0, 88.0),
    ("0.65 %", "adalora", 87.6, 93.7, 86.0, 88.9),
    ("100 %", "full", 86.0, 92.7, 85.4, 88.4),
)
_SQUAD_COLUMNS = (("squad", "exact_match"), ("squad", "f1"), ("squad_v2", "exact_match"), ("squad_v2", "f1"))

# --- summarisation: ROUGE-1, -2 and -L ---------------------------------------------------------------

_SUMMARIES = (
    ("100 %", "full", 45.49, 22.33, 37.26, 44.16, 21.28, 40.90),
    ("2.20 %", "lora", 43.95, 20.72, 35.68, 45.03, 21.84, 42.15),
    ("2.20 %", "adalora", 44.72, 21.46, 36.46, 45.00, 21.89, 42.16),
    ("1.10 %", "lora", 43.40, 20.20, 35.20, 44.72, 21.58, 41.84),
    ("1.10 %", "adalora", 44.35, 21.13, 36.13, 44.96, 21.77, 42.09),
    ("0.26 %", "lora", 43.18, 19.89, 34.92, 43.95, 20.91, 40.98),
    ("0.26 %", "adalora", 43.55, 20.17, 35.20, 44.39, 21.28, 41.50),
)
_ROUGE = ("rouge1", "rouge2", "rougeLsum")
_SUMMARY_COLUMNS = (*(("xsum", name) for name in _ROUGE), *(("cnn_dailymail", name) for name in _ROUGE))

# --- ablations, and LoRA on one type of matrix or three layers alone ----------------------------------

_ABLATIONS = (
    ("glue/sst2", "0.16 %", "lora_pruned", "accuracy", 94.50),
    ("glue/rte", "0.16 %", "lora_pruned", "accuracy", 86.15),
    ("glue/cola", "0.16 %", "lora_pruned", "mcc", 69.29),
    ("glue/sst2", "0.16 %", "adalora", "accuracy", 95.80),
    ("glue/rte", "0.16 %", "adalora", "accuracy", 87.73),
    ("glue/cola", "0.16 %", "adalora", "mcc", 70.04),
    ("glue/sst2", "0.16 %", "adalora, sensitivity alone", "accuracy", 95.30),
    ("glue/rte", "0.16 %", "adalora, sensitivity alone", "accuracy", 87.71),
    ("glue/cola", "0.16 %", "adalora, sensitivity alone", "mcc", 68.83),
    ("glue/sst2", "0.32 %", "lora", "accuracy", 94.72),
    ("glue/mnli", "0.32 %", "lora", "accuracy", 90.40),
    ("glue/sst2", "0.32 %", "svd_lora", "accuracy", 95.07),
    ("glue/mnli", "0.32 %", "svd_lora", "accuracy", 90.52),
    ("glue/sst2", "0.32 %", "adalora, no orthogonality", "accuracy", 95.30),
    ("glue/mnli", "0.32 %", "adalora, no orthogonality", "accuracy", 90.56),
    ("glue/sst2", "0.32 %", "adalora", "accuracy", 96.10),
    ("glue/mnli", "0.32 %", "adalora", "accuracy", 90.66),
    ("glue/mnli", "0.28M", "lora, query alone", "accuracy", 88.58),
    ("glue/mnli", "0.28M", "lora, key alone", "accuracy", 89.28),
    ("glue/mnli", "0.28M", "lora, value alone", "accuracy", 89.36),
    ("glue/mnli", "0.28M", "lora, attention output alone", "accuracy", 88.98),
    ("glue/mnli", "0.28M", "lora, first feed-forward matrix alone", "accuracy", 89.91),
    ("glue/mnli", "0.28M", "lora, second feed-forward matrix alone", "accuracy", 89.99),
    ("glue/mnli", "0.28M", "lora, layers 1-3 alone", "accuracy", 77.87),
    ("glue/mnli", "0.28M", "lora, layers 10-12 alone", "accuracy", 88.15),
)


def _spread(
    model: str, columns: tuple[tuple[str, str], ...], table: tuple[tuple[str | float | None, ...], ...]
) -> Iterator[Figure]:
    """One figure for each filled cell of a table whose rows begin with budget and method."""
    for budget, method, *values in table:
        for (task, metric), value in zip(columns, values, strict=True):
            if isinstance(value, float):
                yield Figure(task, model, str(budget), str(method), metric, value)


ALL: tuple[Figure, ...] = (
    *_spread(DEBERTA, _GLUE_COLUMNS, _GLUE),
    *_spread(DEBERTA, _SQUAD_COLUMNS, _SQUAD),
    *_spread(BART, _SUMMARY_COLUMNS, _SUMMARIES),
    *(Figure(task, DEBERTA, budget, method, metric, value) for task, budget, method, metric, value in _ABLATIONS),
)
"""Every figure, in the paper's order."""
