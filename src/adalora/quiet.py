"""A terminal that is ours: the libraries' own bars, reports and warnings are for their developers."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO

_TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")  # speak up when PEFT imports them


def quieten() -> None:
    """To be called before anything imports the libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars that ask nobody; it is read when they are imported
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    # PEFT asks whether the vocabulary has grown, and cannot tell of a GGUF file; ours never does.
    warnings.filterwarnings("ignore", "Could not find a config file in")
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning in a line; what is deprecated where is for developers."""
    if not issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
        sys.stderr.write(f"Warning: {message}\n")
