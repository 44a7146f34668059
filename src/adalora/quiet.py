"""A terminal that is ours: the libraries' own bars, reports and warnings are for their developers."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from typing import TextIO

_TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")  # speak up when PEFT imports them


# C0 and C1 controls, what turns the direction of writing, what looks like nothing, and halves of characters.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


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


def visible(text: str) -> str:
    """``text`` as a terminal may have it: control and formatting characters, but for line ends, as escapes."""
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


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
        sys.stderr.write(f"Warning: {visible(str(message))}\n")
