"""The commands of the pages run as they are printed, on the files printed beside them.

A page names a file in a line of its own before the block that holds it. Blocks of ``bash`` are commands that succeed.
Blocks of ``console`` are commands after ``$``, and below each what it says, word for word. What cannot run here is
read.
"""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
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
from .commands_page import parse
from .pages import BLOCKS, DOCS, PAGES, README, ROOT, Block, blocks

__all__ = ["own_cache"]

ALONE = {DOCS / name for name in ("tasks.md", "methods.md", "bench.md")}
"""Pages each of whose sections stands alone. On the others, what a command leaves is there for the next."""

SHORTER = ["training.max_steps=4", "data.max_train_rows=48", "data.max_eval_rows=8", "training.eval_strategy=no"]
"""Settings of every training here, besides its own."""

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Command(NamedTuple):
    """One command, and what its page says that it prints: nothing where it just succeeds."""

    place: str
    words: list[str]
    said: list[str]


def has_commands(block: Block) -> bool:
    return block.kind in ("bash", "console") and not block.not_run


def parts() -> Iterator[object]:
    """What is run in one folder: pages, or sections of them, each as its blocks."""
    for page in PAGES:
        if page == README:
            continue  # its commands are those of the pages
        titles = [
            number for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1) if line[:3] == "## "
        ]
        found: dict[int, list[Block]] = {}
        for block in blocks(page):
            section = max((line for line in titles if line < block.line), default=1) if page in ALONE else 1
            found.setdefault(section, []).append(block)
        for line, of_part in found.items():
            if any(map(has_commands, of_part)):
                yield pytest.param(of_part, id=f"{page.relative_to(ROOT)}:{line}")


def commands(block: Block) -> Iterator[Command]:
    """The commands of one block; a line that ends in a backslash goes on in the next."""
    lines = iter(enumerate(block.text.splitlines(), block.line + 1))
    for number, line in lines:
        while line.endswith("\\"):
            line = line[:-1] + next(lines)[1].lstrip()
        place = f"{block.page.relative_to(ROOT)}:{number}"
        if block.kind == "bash" and line.strip():
            yield Command(place, shlex.split(line, comments=True), [])
        elif line.startswith("$ "):
            said = []
            for answer in block.text.splitlines()[number - block.line :]:
                if answer.startswith("$ "):
                    break
                said.append(answer)
            yield Command(place, shlex.split(line[2:]), said)


def test_there_are_commands() -> None:
    assert len(list(parts())) >= 16


UNRUN = [block for block in BLOCKS if block.kind == "bash" and block.not_run]


@pytest.mark.parametrize("block", UNRUN, ids=lambda block: block.place)
def test_commands_that_cannot_run_here_can_be_read(block: Block) -> None:
    """By bash, by ``adalora``'s own reader of arguments, and by make."""
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in commands(block):
        program, *given = itertools.takewhile(lambda word: word != ">", command.words)
        if program == "adalora" and given:
            name, *arguments = given
            try:
                parse(name, arguments)
            except Exception as error:
                raise AssertionError(f"{command.place}: {error}") from error
        if program == "make":
            assert f"\n{given[0]}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), command.place


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models and rows in the place of those that pages name."""
    folder = tmp_path_factory.mktemp("stand-ins")
    words = [page.read_text(encoding="utf-8") for page in sorted(ALONE)]
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
        "choose: [11, 12]": "choose: 11",
        "extend: 2 ": "extend: 0 ",
    }


@pytest.mark.parametrize("part", parts())
def test_commands_run(
    part: list[Block], stand_ins: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiny models in the place of the named ones, and a few steps of each training."""
    monkeypatch.chdir(tmp_path)
    for block in part:
        for name in re.findall(r"\$\{ADALORA_DATA\}/([\w/]+)", block.text):
            benchmark_data(name)
    monkeypatch.setenv("ADALORA_DATA", str(DATA))
    for block in part:
        for name, stand_in in stand_ins.items():
            block = block._replace(text=block.text.replace(name, stand_in))
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        if has_commands(block):
            for command in commands(block):
                run(command, stand_ins)


def run(command: Command, stand_ins: dict[str, str]) -> None:
    """It succeeds, or says what its page says."""
    program, name, *given = command.words
    assert program == "adalora", command.place
    shorter = SHORTER if name == "train" else []
    if name == "train" and "--train" not in given and not any(word.endswith(".yaml") for word in given):  # the demo
        given += ["--model", stand_ins["demo:minilm"], "--train", stand_ins["demo:rotten_tomatoes"]]
    done = run_command(name, *given, *(part for setting in shorter for part in ("--set", setting)))
    printed = " ".join((done.out + done.err).split())
    fails = any(line.startswith("Error: ") for line in command.said)
    assert fails == (done.code != 0), f"{command.place}: {' '.join(command.words)}: {printed}"
    for line in command.said:
        assert " ".join(line.split()) in printed, f"{command.place}: {' '.join(command.words)}"
