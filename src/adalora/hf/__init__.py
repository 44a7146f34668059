"""The edge: PEFT and Transformers. Importing it teaches PEFT's LoRA model about AdaLoraConfig."""

from __future__ import annotations

from .installation import install

install()
