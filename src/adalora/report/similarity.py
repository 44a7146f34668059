"""How alike two maps of ranks are."""

from __future__ import annotations

import math
from collections.abc import Mapping

from scipy import stats


def spearman(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Spearman's correlation over the matrices that both have, average ranks for ties; nan where one of the two has the
    same rank everywhere."""
    common = [name for name in one if name in other]
    pairs = [[ranks[name] for name in common] for ranks in (one, other)]
    if any(len(set(ranks)) < 2 for ranks in pairs):
        return math.nan
    return float(stats.spearmanr(*pairs).statistic)


def moved(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    """The share of the budget that lies elsewhere, over the matrices that both have: ½ Σ|r/Σr - r'/Σr'|, which is
    ½ Σ|r - r'| / Σr at equal budgets. 0: divided alike; 1: no matrix has triplets in both; nan without a budget."""
    common = [name for name in one if name in other]
    totals = [sum(ranks[name] for name in common) for ranks in (one, other)]
    if not all(totals):
        return math.nan
    return math.fsum(abs(one[name] / totals[0] - other[name] / totals[1]) for name in common) / 2
