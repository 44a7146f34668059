"""Windows on long contexts: cutting them, finding answers in them, and putting what was found back together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from ..data import DataError
from ..recipe import RecipeError


class Window(NamedTuple):
    """The part of a context that is read at once, after all of the question."""

    row: int  # whose context it is
    first: int  # the first token of the context
    characters: np.ndarray  # where the context's tokens begin and end in its text, [tokens, 2]

    def positions(self, answer: tuple[int, int] | None) -> tuple[int, int]:
        """The first and the last token of an answer, of which the characters are given; the first token of all, twice,
        unless the window holds all of the answer."""
        begins, ends = self.characters.T
        if answer is None or not len(begins) or answer[0] < begins[0] or answer[1] > ends[-1]:
            return 0, 0
        first = int(np.searchsorted(ends, answer[0], side="right"))
        last = int(np.searchsorted(begins, answer[1], side="left")) - 1
        return (self.first + first, self.first + last) if first <= last else (0, 0)

    def spans(self, first: np.ndarray, last: np.ndarray) -> list[tuple[int, int]]:
        """The characters from each ``first`` to the ``last`` token, [spans]."""
        begins, ends = self.characters.T
        return list(zip(begins[first - self.first].tolist(), ends[last - self.first].tolist(), strict=True))


class Windows(NamedTuple):
    """What is read of some questions and their contexts."""

    inputs: dict[str, list[list[int]]]  # the model's, for each window
    read: list[Window]


def cut(
    questions: list[str], contexts: list[str], tokenizer: Any, max_length: int, shared: int, first_row: int
) -> Windows:
    """Windows of ``max_length`` tokens, neighbours of which have ``shared`` tokens of the context in common.

    Raises DataError on a question that leaves too little room for the context, with its number counted from
    ``first_row``, the number of the first; RecipeError when the tokenizer does not say where tokens are.
    """
    if not tokenizer.is_fast:
        raise RecipeError(
            f"question answering needs to know where each token is in the text, which {type(tokenizer).__name__} does "
            "not tell: choose a model with a fast tokenizer (tokenizer.json)"
        )
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    lengths = map(len, tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"])
    for number, (question, length) in enumerate(zip(questions, lengths, strict=True), first_row):
        if room - length <= shared:
            raise DataError(
                f"the question of row {number} is too long: its {length} tokens leave {max(room - length, 0)} of "
                f"data.max_length {max_length} for the context, and windows share {shared} (options.doc_stride). Raise "
                f"the one, lower the other, or shorten {short(question)}"
            )
    encoded = tokenizer(
        questions,
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=shared,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    row_of, characters = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    read = []
    for index, row in enumerate(row_of):
        texts = encoded.sequence_ids(index)  # 0 for a token of the question, 1 for one of the context, else None
        count = texts.count(1)
        first = texts.index(1) if count else 0
        places = np.array(characters[index][first : first + count], dtype=np.int64).reshape(-1, 2)
        read.append(Window(row, first, places))
    return Windows(dict(encoded), read)


def best_spans(
    begin: torch.Tensor, end: torch.Tensor, windows: Sequence[Window], longest: int, best: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ``best`` spans of at most ``longest`` tokens of the context in each window.

    ``begin`` and ``end`` are logits, [windows, tokens]. Every span is looked at, not only those between the best begins
    and the best ends. Returns the sums of their two logits, best first (-inf where there are fewer spans than that),
    and their first and last tokens, each [windows, best].
    """
    inside = torch.zeros(begin.shape, dtype=torch.bool)
    for index, window in enumerate(windows):
        inside[index, window.first : window.first + len(window.characters)] = True
    outside = ~inside.to(begin.device)
    begin, end = begin.masked_fill(outside, -torch.inf), end.masked_fill(outside, -torch.inf)
    longest = min(longest, begin.shape[1])
    ends = functional.pad(end, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)  # [w, t, k] = end[w, t + k]
    scores, place = (begin[:, :, None] + ends).flatten(1).topk(min(best, begin.shape[1] * longest))
    sums, places = scores.cpu().numpy(), place.cpu().numpy()
    return sums, places // longest, places // longest + places % longest


def short(value: object) -> str:
    """How a message shows a value."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
