"""Averages of weights by PyTorch's ``AveragedModel`` go on when ranks are compacted: the average is sliced, too."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..core.allocator import live_allocators
from ..core.copies import follow


def install_averages() -> None:
    """Teach ``AveragedModel.update_parameters``; safe to call again."""
    update: Any = AveragedModel.update_parameters
    if getattr(update, "_knows_adalora", False):
        return

    @functools.wraps(update)
    def update_parameters(self: AveragedModel, model: nn.Module) -> None:
        changed = [
            ours
            for ours in live_allocators()
            if (source := ours.origin.followed(ours)) is not None and source.sizes != ours.sizes
        ]
        if changed:
            averaged = {id(parameter) for parameter in self.module.parameters()}
            for ours in changed:
                if any(id(t.lam) in averaged for t in ours.triplets):
                    follow(ours)
        update(self, model)

    update_parameters._knows_adalora = True  # type: ignore[attr-defined]
    AveragedModel.update_parameters = update_parameters  # type: ignore[method-assign]
