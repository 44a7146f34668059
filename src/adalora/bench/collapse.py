"""When a run counts as collapsed: it answers no better than something that has not learned at all.

The one definition for every task. A task's ``baseline`` is what takes no model: the most frequent class, the mean, the
same labels for each row, the input itself. Its headline metric on the same held-out rows is the floor (the share of the
majority; 0 of Matthews's and of other correlations, which a constant answer does not define), a perfect answer's the
top. A run is collapsed when it does not get :data:`MARGIN` of the way from the one to the other, or when its metric is
not defined, as the correlation of a constant answer is not. So is a regression whose squared error is no better than
the mean's by that margin, whatever the order of its nearly constant answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..tasks import Task

MARGIN = 0.05
"""Of the way from the floor to the top."""

_ERROR = "mse"


def is_collapsed(
    kind: type[Task], metrics: Mapping[str, float | None], baseline: Mapping[str, float | None] | None
) -> bool:
    """Whether a finished run with ``metrics`` has collapsed.

    Args:
        baseline: metrics of the task's constant answer on the same rows; None of a task that has none, whose floor is
            0 where more is better. Where less is better there is no floor then: only a metric that is not defined is a
            collapse.
    """
    score = metrics.get(kind.headline)
    if score is None or not math.isfinite(score):
        return True
    constant = (baseline or {}).get(kind.headline)
    if kind.headline in kind.lower_is_better:
        return constant is not None and score > (1 - MARGIN) * constant
    floor = constant if constant is not None and math.isfinite(constant) else 0.0
    top = 100.0 if kind.in_percent else 1.0
    error, of_mean = metrics.get(_ERROR), (baseline or {}).get(_ERROR)
    constantly_wrong = error is not None and of_mean is not None and error > (1 - MARGIN) * of_mean
    return score < floor + MARGIN * (top - floor) or constantly_wrong
