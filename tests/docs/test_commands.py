"""The commands of the pages on tasks, methods and the bench run as they are printed, on the files printed beside them.

A page names a file in a line of its own before the block that holds it. Blocks of ``bash`` are commands that succeed.
Blocks of ``console`` are commands after ``$``, and below each what it says, word for word.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from ..cli.conftest import own_cache, reviews, run_command
from ..data import ROOT as DATA
from ..data import benchmark_data
from ..tasks.generators import END, PAD, START, tokenizer_of

__all__ = ["own_cache"]

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ["tasks.md", "methods.md", "bench.md"]
FILE = re.compile(r"^`(?P<name>[\w.-]+)`:\n\n```\w+\n(?P<content>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```(?P<kind>bash|console)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
SHORTER = ["training.max_steps=4", "data.max_train_rows=48", "data.max_eval_rows=8", "training.eval_strategy=no"]
"""Settings of every training here, besides its own."""

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Command(NamedTuple):
    """One command, and what its page says that it prints: nothing where it just succeeds."""

    words: list[str]
    said: list[str]


def sections() -> Iterator[object]:
    """The sections of the pages that have commands, each with its title."""
    for page in PAGES:
        for section in re.split(r"^(?=## )", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE):
            if COMMANDS.search(section):
                title = section.splitlines()[0].removeprefix("## ")
                yield pytest.param(section, id=f"{page}: {title}")


def commands(section: str) -> Iterator[Command]:
    for block in COMMANDS.finditer(section):
        text = re.sub(r"\\\n\s*", "", block["text"])
        if block["kind"] == "bash":
            yield from (Command(shlex.split(line, comments=True), []) for line in text.splitlines())
            continue
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            line, *said = part.strip().splitlines()
            yield Command(shlex.split(line), said)


def test_there_are_commands() -> None:
    assert len(list(sections())) >= 12


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models and rows in the place of those that pages name."""
    folder = tmp_path_factory.mktemp("stand-ins")
    words = [(DOCS / page).read_text(encoding="utf-8") for page in PAGES]
    ids = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}

    def saved(name: str, kind: str, model: PreTrainedModel) -> str:
        tokenizer = tokenizer_of(kind, words)
        tokenizer.model_max_length = 1024
        tokenizer.chat_template = CHATML if kind == "llama" else None
        if kind == "bart":
            special = [("<s>", START), ("</s>", END)]
            single, pair = "<s> $A </s>", "<s> $A </s> $B:1 </s>:1"
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=single, pair=pair, special_tokens=special
            )
        tokenizer.save_pretrained(folder / name)
        model.save_pretrained(folder / name)
        return str(folder / name)

    bert = BertModel(BertConfig(vocab_size=400, max_position_embeddings=1024, **ids, **sizes))
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=400, max_position_embeddings=1024, **ids, **sizes))
    layers = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": END}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=400, **ids, **layers, **widths))
    rows = {"train": reviews(64, seed=1), "validation": reviews(40, seed=2)}
    DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()}).save_to_disk(folder / "reviews")
    return {
        "demo:minilm": saved("encoder", "bart", bert),
        "demo:smollm2": saved("causal", "llama", llama),
        "facebook/bart-large": saved("bart", "bart", bart),
        "demo:rotten_tomatoes": str(folder / "reviews"),
        "report: [1, 2, 3, 4, 5]": "report: [1]",
    }


@pytest.mark.parametrize("section", sections())
def test_commands_run(section: str, stand_ins: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny models in the place of the named ones, and a few steps of each training."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"\$\{ADALORA_DATA\}/([\w/]+)", section):
        benchmark_data(name)
    monkeypatch.setenv("ADALORA_DATA", str(DATA))
    for name, stand_in in stand_ins.items():
        section = section.replace(name, stand_in)
    for file in FILE.finditer(section):
        Path(file["name"]).write_text(file["content"], encoding="utf-8")
    for command in commands(section):
        program, name, *given = command.words
        assert program == "adalora"
        shorter = SHORTER if name == "train" else []
        done = run_command(name, *given, *(part for setting in shorter for part in ("--set", setting)))
        printed = " ".join((done.out + done.err).split())
        fails = any(line.startswith("Error: ") for line in command.said)
        assert fails == (done.code != 0), f"{command.words}: {printed}"
        for line in command.said:
            assert " ".join(line.split()) in printed, command.words
