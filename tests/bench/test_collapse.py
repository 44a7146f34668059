"""When a run counts as collapsed: one rule, from each task's own baseline."""

from __future__ import annotations

import math

import pytest

from adalora import tasks
from adalora.bench.collapse import is_collapsed


@pytest.mark.parametrize(
    ("task", "metrics", "baseline", "collapsed"),
    [
        ("classification", {"accuracy": 0.509}, {"accuracy": 0.509}, True),
        ("classification", {"accuracy": 0.532}, {"accuracy": 0.509}, True),  # a twentieth of 0.491 is 0.025
        ("classification", {"accuracy": 0.535}, {"accuracy": 0.509}, False),
        ("glue/cola", {"mcc": 0.0}, {"mcc": 0.0}, True),
        ("glue/cola", {"mcc": 0.06}, {"mcc": 0.0}, False),
        ("glue/stsb", {"correlation": None}, {"correlation": None}, True),
        ("glue/stsb", {"correlation": 0.04}, {"correlation": math.nan}, True),
        ("glue/stsb", {"correlation": 0.8}, {"correlation": None}, False),
        ("regression", {"pearson": 0.3, "mse": 1.0}, {"pearson": None, "mse": 1.02}, True),  # nearly constant
        ("regression", {"pearson": 0.3, "mse": 0.9}, {"pearson": None, "mse": 1.02}, False),
        ("question_answering", {"f1": 3.0}, None, True),
        ("question_answering", {"f1": 6.0}, None, False),
        ("instruction", {"perplexity": 9.0}, None, False),
        ("instruction", {"perplexity": math.nan}, None, True),
    ],
)
def test_a_collapse_is_what_learned_nothing(
    task: str, metrics: dict[str, float | None], baseline: dict[str, float | None] | None, collapsed: bool
) -> None:
    assert is_collapsed(tasks.get(task), metrics, baseline) is collapsed
