"""Exact match and F1 of answers, as the official scripts of SQuAD 1.1 and 2.0 compute them.

Written from the published ``evaluate-v1.1.py`` (Rajpurkar et al., 2016, arXiv 1606.05250, section 6.1) and
``evaluate-v2.0.py`` (Rajpurkar, Jia and Liang, 2018, arXiv 1806.03822). The libraries' ports do not give their numbers:
torchmetrics adds up in single precision, has the F1 of 2.0 for two answers without words (1, where 1.1 says 0), and
stops at a question without references.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)  # of ASCII: a dash of typographers stays


def words(text: str) -> list[str]:
    """The words that count: lower case, without punctuation, then without English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def overlap(predicted: list[str], reference: list[str]) -> float:
    """Harmonic mean of precision and recall of the words, as bags; 0 when they share none."""
    shared = sum((Counter(predicted) & Counter(reference)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(reference)
    return 2 * precision * recall / (precision + recall)


def squad_v1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1 and exact match in percent, of the best-matching reference of each question; each has one or more."""
    scores = [
        _best((overlap(answer, wanted), answer == wanted) for wanted in map(words, known))
        for answer, known in zip(map(words, predictions), references, strict=True)
    ]
    return _means(scores)


def squad_v2(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """As ``squad_v1``, where a question without references wants the empty answer; then the same of the questions
    that have an answer, and of those that have none (nan where there are none of a kind)."""
    scores = []
    for answer, known in zip(map(words, predictions), references, strict=True):
        references_with_words = [wanted for wanted in map(words, known) if wanted]
        scores.append(
            _best((overlap(answer, wanted), answer == wanted) for wanted in references_with_words)
            if references_with_words
            else (answer == [], answer == [])
        )
    with_answer = [score for score, known in zip(scores, references, strict=True) if known]
    without = [score for score, known in zip(scores, references, strict=True) if not known]
    return {
        **_means(scores),
        **{f"has_answer_{name}": value for name, value in _means(with_answer).items()},
        **{f"no_answer_{name}": value for name, value in _means(without).items()},
    }


def _best(scores: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The highest F1 and the highest exact match, which may be of different references."""
    f1, exact = zip(*scores, strict=True)
    return max(f1), max(exact)


def _means(scores: Sequence[tuple[float, float]]) -> dict[str, float]:
    count = len(scores)
    return {
        "f1": 100.0 * sum(f1 for f1, _ in scores) / count if count else math.nan,
        "exact_match": 100.0 * sum(exact for _, exact in scores) / count if count else math.nan,
    }
