"""Packing: several rows in one sequence, none of which sees another.

The positions begin at 0 with every row. From that, without an attention mask and without a cache, Transformers makes
the attention of each row its own: by a block-diagonal mask, or by sequence lengths where FlashAttention is used.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..recipe import RecipeError
from .base import device_of
from .generation import IGNORED, Pad


def pack(rows: Sequence[Mapping[str, list[int]]], max_length: int) -> Dataset:
    """Rows of ``input_ids`` and ``labels`` joined into sequences of at most ``max_length`` tokens, with the
    ``position_ids`` that tell them apart. The longest rows come first, each where the least space stays free."""
    packs: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # free tokens and number of each pack, in order
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"])):
        length = len(rows[index]["input_ids"])
        place = bisect.bisect_left(spaces, (length, 0))
        if place == len(spaces):
            space, number = max_length, len(packs)
            packs.append([])
        else:
            space, number = spaces.pop(place)
        packs[number].append(index)
        bisect.insort(spaces, (space - length, number))
    return Dataset.from_dict(
        {
            "input_ids": [[token for index in chosen for token in rows[index]["input_ids"]] for chosen in packs],
            "labels": [[label for index in chosen for label in _labels(rows[index])] for chosen in packs],
            "position_ids": [[at for index in chosen for at in range(len(rows[index]["labels"]))] for chosen in packs],
        }
    )


def _labels(row: Mapping[str, list[int]]) -> list[int]:
    """The first token of a row has nothing before it that could predict it, least of all the row before."""
    return [IGNORED, *row["labels"][1:]]


@dataclass(frozen=True)
class PadPacks:
    """Makes a batch of packs: tensors [packs, longest], padded on the right, without an attention mask."""

    token: int

    def __call__(self, packs: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = Pad(self.token, "right")(packs)
        del batch["attention_mask"]
        positions = [torch.tensor(pack["position_ids"]) for pack in packs]
        return batch | {"position_ids": pad_sequence(positions, batch_first=True)}


@torch.no_grad()
def prepare_packing(model: nn.Module) -> None:
    """Turn the cache off, and try whether the model keeps packed rows apart.

    Raises:
        RecipeError: what is said in one row reaches another, or its place in the sequence does.
    """
    config: Any = model.config
    config.use_cache = False  # as Transformers' Trainer has it
    device = device_of(model)
    positions = torch.arange(4, device=device)[None]
    first, second, row = torch.arange(12, device=device).remainder(config.vocab_size).view(3, 1, 4)
    training = model.training
    model.eval()
    try:
        alone = model(input_ids=row, position_ids=positions).logits.float()
        after_first, after_second = (
            model(input_ids=torch.cat([other, row], 1), position_ids=positions.repeat(1, 2)).logits[:, 4:].float()
            for other in (first, second)
        )
    except TypeError as error:  # no argument of that name
        raise _refusal(model) from error
    finally:
        model.train(training)
    leaked = (after_first - after_second).abs().max()  # the same arithmetic twice: nothing but noise of the last bit
    moved = (after_first - alone).abs().max()  # other shapes, so other rounding, which bfloat16 makes coarse
    scale = alone.std()
    if leaked > 1e-5 * scale or moved > 0.05 * scale:
        raise _refusal(model)


def _refusal(model: nn.Module) -> RecipeError:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return RecipeError(
        f"options.packing: rows that share a sequence would see each other in a model of type {kind}: set it to false"
    )
