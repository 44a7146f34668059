"""Quality of generated texts: ROUGE by rouge-score, BLEU, chrF and TER by sacrebleu. All run from 0 to 100.

Each prediction has one or more references, and each may have another number of them. A library's defaults stand, so
that figures can be compared: ROUGE (Lin 2004) is the mean F-measure over words in lower case, stemmed by Porter's
stemmer, against the reference that fits best; BLEU (Papineni et al. 2002), chrF (Popović 2015) and TER (Snover et al.
2006; an error rate, so less is better) are sacrebleu's over the whole corpus, with the case and the tokenization that
their ``signatures`` name (Post 2018).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from statistics import fmean
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

References = Sequence[Sequence[str]]
"""The references of each prediction."""

_SACREBLEU = {"bleu": BLEU, "chrf": CHRF, "ter": TER}

# A sentence ends with a full stop, a question or an exclamation mark, perhaps followed by quotes and brackets, before
# white space and what may begin a sentence; or with a line.
_END = re.compile(r"""(?<=[.!?])["'”’)\]]*\s+(?=["'“‘(\[]?[A-Z0-9£$€])|\n+""")
_TITLES = "Mr|Mrs|Ms|Dr|St|Prof|Gen|Sen|Rep|Gov|Lt|Col|Sgt|Jr|Sr|No|vs"
_ABBREVIATION = re.compile(rf"""(?:^|[\s("'“‘])(?:(?:[A-Z]\.)*[A-Z]|{_TITLES})\.$""")


def rouge(predictions: Sequence[str], references: References, kinds: Sequence[str]) -> dict[str, float]:
    """ROUGE of the kinds ``rouge1``, ``rouge2``, ``rougeL`` and ``rougeLsum``; nan without predictions.

    ``rougeLsum`` is the summary-level one, for summaries of several sentences: the union of common subsequences over
    pairs of sentences, as ``sentences`` divides them. Of single sentences it is the same as ``rougeL``.
    """
    if not predictions:
        return dict.fromkeys(kinds, math.nan)
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    scores = [
        scorer.score_multi([_by_line(reference) for reference in options], _by_line(prediction))
        for prediction, options in zip(predictions, references, strict=True)
    ]
    return {kind: 100 * fmean(score[kind].fmeasure for score in scores) for kind in kinds}


def bleu_chrf_ter(predictions: Sequence[str], references: References) -> dict[str, float]:
    """``bleu``, ``chrf`` and ``ter``; nan without predictions."""
    if not predictions:
        return dict.fromkeys(_SACREBLEU, math.nan)
    streams = _streams(references)
    return {
        "bleu": BLEU().corpus_score(predictions, streams).score,
        "chrf": CHRF().corpus_score(predictions, streams).score,
        "ter": _ter(predictions, references),
    }


def signatures(references: References) -> dict[str, str]:
    """How sacrebleu computes each of its metrics against these references, in its own notation."""
    streams = _streams(references)
    return {name: str(metric(references=streams).get_signature()) for name, metric in _SACREBLEU.items()}


def sentences(text: str) -> list[str]:
    """The sentences of an English text: its lines, divided where a sentence ends."""
    found: list[str] = []
    start = 0
    for end in _END.finditer(text):
        sentence = text[start : end.end()].strip()
        if "\n" in end.group() or not _ABBREVIATION.search(sentence):
            found.append(sentence)
            start = end.end()
    return [sentence for sentence in [*found, text[start:].strip()] if sentence]


def _ter(predictions: Sequence[str], references: References) -> float:
    """The same as sacrebleu's corpus score, in less than half the time, nearly all of which goes into its search for
    shifts: the edits to the nearest reference, and the words alone often tell which cannot be the nearest."""
    edits, length = 0, 0.0
    for prediction, options in zip(predictions, references, strict=True):
        nearest = math.inf
        for least, reference in sorted((_least_edits(prediction, option), option) for option in options):
            if least >= nearest:
                break
            nearest = min(nearest, _edits(prediction, reference))
        edits += int(nearest)
        length += fmean(len(option.split()) for option in options)
    return 100 * edits / length


@lru_cache(maxsize=100_000)  # another part of the rows, or another evaluation, asks again
def _edits(prediction: str, reference: str) -> int:
    return int(TER().sentence_score(prediction, [reference]).num_edits)


def _least_edits(prediction: str, reference: str) -> int:
    """No fewer words than these are inserted, deleted or replaced, whatever their order."""
    words, wanted = (Counter(text.lower().split()) for text in (prediction, reference))
    return max((words - wanted).total(), (wanted - words).total())


def _by_line(text: str) -> str:
    """A sentence on each line, which is where rouge-score looks for them."""
    return "\n".join(sentences(text))


def _streams(references: References) -> Any:
    """The first reference of every prediction, the second, and so on; None where a prediction has no more of them."""
    return [list(stream) for stream in zip_longest(*references)]
