"""What tests of tasks share with those of the command line, and an encoder that splits words into pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ..cli.conftest import SPECIAL, adalora, bert_tokenizer, own_cache, save_tiny_bert

__all__ = ["adalora", "own_cache", "pieces"]


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT of two layers that reads 32 tokens, each a word's first or further letter."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
    tokens = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return save_tiny_bert(tmp_path_factory.mktemp("pieces"), bert_tokenizer(tokenizer))
