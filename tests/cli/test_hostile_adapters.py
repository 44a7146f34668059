"""Strangers' adapters: whatever is in a folder, every command that reads adapters does its work or says in one line
what is wrong, in seconds, within memory, and writes nothing but what it was asked for."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from .conftest import Finished, run_command

SECONDS, MEMORY = 5.0, 2 * 2**30
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUGE, DEEP = 10**400, "[" * 100_000

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    HUGE,
    1e308,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "q_proj",
    "(a+)+$",
    "(.*)*x",
    "[",
    "\\",
    "(" * 500,
    "a" * 100_000,
    "\x1b[31mred\x1b[0m\x07",
    "\u202egnp",
    "../../../../etc/passwd",
    "/",
    "-",
    "demo:minilm",
    [],
    [None],
    [[]],
    ["(a|a)*$"],
    [HUGE],
    ["q_proj", 3],
    [0, 1, 2],
    {},
    {"x": 1},
    {"(a+)+$": 4},
    {"(x*)*y": 2, "q_proj": "4"},
    {"q_proj": HUGE},
    {"q_proj": 0},
    {"q_proj": -3},
    {"q_proj": [1]},
    {"": 1},
    {".*": float("nan")},
    {"a" * 2000: 1},
]
FIELDS = [
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "bias",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "revision",
    "layers_to_transform",
    "layers_pattern",
    "trainable_token_indices",
    "init_lora_weights",
    "auto_mapping",
    "megatron_core",
    "megatron_config",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "eva_config",
    "loftq_config",
    "use_bdlora",
    "velora_config",
    "kasa_config",
    "arrow_config",
    "init_r",
    "target_r",
    "lora_dropout",
    "unheard_of",
]
NAMES = [
    "x\x1b]0;title\x07",
    "a" * 5000,
    "$\\frac{",
    "layers." + "9" * 5000 + ".q",
    "é\u202e",
    "a.b.c",
    "[red]x[/red]",
    " ",
    "0.1.2",
]


def draw_config(draw: random.Random, folder: Path) -> None:
    file = folder / CONFIG
    settings = json.loads(file.read_text())
    for _ in range(draw.randint(1, 3)):
        settings[draw.choice(FIELDS)] = draw.choice(VALUES)
    file.write_text(json.dumps(settings))


def draw_config_text(draw: random.Random, folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    cut = draw.randrange(len(text))
    new = draw.choice(
        [text[:cut], text[:cut] + DEEP, DEEP, "", "[]", "null", "{}", '{"r": ' + "9" * 5000 + "}", text + text, "\x00"]
    )
    (folder / CONFIG).write_bytes(draw.choice([new.encode(), new.encode("utf-16"), b"\xff\xfe" + new.encode()]))


def draw_metadata(draw: random.Random, folder: Path) -> None:
    name = "model.layers.9.self_attn.q_proj"
    shapes: list[Any] = [
        [[2**31, 0], [0, 2**31], False],
        [[10**9, 0], [0, 10**9], False],
        [[4, 0], [0, 4], True],
        [[4], [4], False],
        [[], [], False],
        [[4, 1], [1, 4], False],
        [[HUGE, 0], [0, 4], False],
        [[-4, 0], [0, 4], False],
        [4, 4, False],
        "x",
        None,
        [[4, 0, 1], [0, 4], 1],
        [[True, 0], [0, 4], False],
        [["4", 0], [0, 4], False],
        [[50_000_000, 0], [0, 8], False],
    ]
    pruned = draw.choice([{name: draw.choice(shapes)}, {draw.choice(NAMES): draw.choice(shapes)}, [], 3, None, "x"])
    scores = draw.choice(
        [{}, {name: [1.0]}, {name: "x"}, {name: [[1], 2]}, {name: [HUGE]}, {name: [float("nan")]}, [], 7]
    )
    about = {"adalora_pruned": json.dumps(pruned), "adalora_scores": json.dumps(scores)}
    if draw.random() < 0.3:
        about[draw.choice(list(about))] = draw.choice([DEEP, "", "{", "9" * 5000, "\x00"])
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt", **about})


def draw_header(draw: random.Random, folder: Path) -> None:
    raw = bytearray((folder / WEIGHTS).read_bytes())
    size = int.from_bytes(raw[:8], "little")
    way = draw.randrange(5)
    if way == 0:
        raw = raw[: draw.randrange(len(raw))]
    elif way == 1:
        raw[:8] = struct.pack("<Q", draw.choice([0, 1, 2**63, size + 8, size - 8, 10**9]))
    elif way == 2:
        for _ in range(draw.randint(1, 40)):
            raw[draw.randrange(8, 8 + size)] = draw.randrange(256)
    else:
        header = json.loads(raw[8 : 8 + size])
        key = draw.choice([key for key in header if key != "__metadata__"])
        field = draw.choice(["dtype", "shape", "data_offsets"])
        values: list[Any] = [
            "F64",
            "I32",
            "BOOL",
            "F8_E4M3",
            "X",
            3,
            [],
            [0],
            [2**40, 2**40],
            [0, 0],
            [-1, 4],
            [0, 2**60],
            None,
            HUGE,
        ]
        header[key][field] = draw.choice(values)
        if way == 4:
            header[key.replace("q_proj", draw.choice(NAMES))] = header.pop(key)
        text = json.dumps(header).encode()
        raw = bytearray(struct.pack("<Q", len(text))) + text + raw[8 + size :]
    (folder / WEIGHTS).write_bytes(raw)


CHANGES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda value: value * float("nan"),
    lambda value: value + float("inf"),
    lambda value: value * 1e38,
    lambda value: value.double() * 1e300,
    lambda value: value[:0],
    lambda value: value[:, :0],
    lambda value: value.flatten(),
    lambda value: value[None],
    lambda value: value.long(),
    lambda value: value.bool(),
    lambda value: value.to(torch.complex64),
    lambda value: value.to(torch.float8_e4m3fn),
    lambda value: torch.ones(()),
    lambda value: torch.ones(3, 300_000),
    lambda value: value.T.contiguous(),
    lambda value: torch.zeros_like(value),
    lambda value: value.half() * 1e-8,
]


def draw_tensors(draw: random.Random, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    for _ in range(draw.randint(1, 3)):
        key = draw.choice(list(tensors))
        value = tensors[key]
        way = draw.random()
        if way < 0.6:
            tensors[key] = draw.choice(CHANGES)(value).contiguous()
        elif way < 0.8:
            del tensors[key]
            if not tensors:
                break
        else:
            name = draw.choice(NAMES)
            other = draw.choice(
                [key.replace("q_proj", name), name, f"{name}.lora_A.weight", key.removeprefix("base_model.model.")]
            )
            tensors[other] = tensors.pop(key)
    save_file({key: value.clone() for key, value in tensors.items()}, folder / WEIGHTS)


def draw_files(draw: random.Random, folder: Path) -> None:
    file = folder / draw.choice([CONFIG, WEIGHTS])
    kept = file.read_bytes()
    file.unlink()
    way = draw.randrange(6)
    if way == 0:
        file.mkdir()
    elif way == 1:
        file.symlink_to("/dev/zero")
    elif way == 2:
        file.symlink_to(file)
    elif way == 3:
        (folder / "adapter_model.bin").write_bytes(
            draw.choice([b"", kept, b"\x80\x02cos\nsystem\n.", b"PK\x03\x04" + kept[:99]])
        )
    elif way == 4:
        huge = torch.zeros(1).expand(10**6, 10**6)
        key = "base_model.model.model.layers.0.self_attn.q_proj"
        torch.save({f"{key}.lora_A.weight": huge, f"{key}.lora_B.weight": huge}, folder / "adapter_model.bin")
    else:
        torch.save(
            draw.choice([[1], {"x": 1}, {3: torch.ones(2)}, torch.ones(2), {"x": torch.ones(2).to_sparse()}]),
            folder / "adapter_model.bin",
        )


MUTATIONS = [
    draw_config,
    draw_config,
    draw_config_text,
    draw_metadata,
    draw_header,
    draw_tensors,
    draw_tensors,
    draw_files,
]


def templates(folder: Path) -> list[Path]:
    """A LoRA adapter and one of PEFT's AdaLoRA, on one small base model."""
    torch.manual_seed(0)
    sizes: Any = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "base")
    made = []
    kinds: dict[str, Any] = {
        "lora": peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        ),
        "peft_adalora": peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM"
        ),
    }
    for name, config in kinds.items():
        model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), config)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(str(folder / name))
        made.append(folder / name)
    return made


def commands(folder: Path, work: Path) -> list[list[object]]:
    out = [work / f"out{i}" for i in range(6)]
    return [
        ["inspect", folder, "--rank", 2, "--png", work / "picture.png"],
        ["inspect", folder, "--json"],
        ["export", folder, out[0]],
        ["export", folder, out[1], "--rank", 2, "--max-rank-pad"],
        ["export", folder, out[2], "--format", "merged"],
        ["export", folder, out[3], "--format", "diffusers", "--component", "unet"],
        ["export", folder, out[4], "--format", "gguf-ready", "--dtype", "float16"],
        ["convert", folder, out[5]],
        ["report", folder],
        ["compare", folder, folder],
        ["evaluate", folder],
        ["predict", folder, "--text", "x"],
    ]


def judge(done: Finished, arguments: list[object], seconds: float) -> list[str]:
    said = done.err.strip().splitlines()
    errors = [line for line in said if not line.startswith("Warning: ")]
    faults = []
    if done.code not in (0, 2):
        faults.append(f"exit code {done.code}")
    if done.code and (len(errors) != 1 or not errors[0].startswith("Error: ") or len(errors[0]) > 2200):
        faults.append(f"{len(errors)} lines")
    if any((ord(letter) < 32 and letter not in "\n\t") or letter in "\x7f\u202e" for letter in done.out + done.err):
        faults.append("control characters")
    if seconds > SECONDS:
        faults.append(f"{seconds:.1f} s")
    return [f"{' '.join(map(str, arguments))[:160]}: {', '.join(faults)}: {done.err[-300:]!r}"] if faults else []


def attack(seeds: range, made: list[Path], work: Path, answer: Any) -> None:
    """In a process of its own, whose memory is bounded beyond what it takes to import everything."""
    torch.set_num_threads(1)
    sys.stdin = io.StringIO()
    run_command("inspect", made[0])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    faults = []
    for seed in seeds:
        draw = random.Random(seed)
        here = work / str(seed)
        shutil.copytree(draw.choice(made), here / "adapter")
        first = draw.choice(MUTATIONS)
        first(draw, here / "adapter")
        if first is not draw_files and draw.random() < 0.5:
            with suppress(Exception):  # of what the first mutation has broken
                draw.choice(MUTATIONS)(draw, here / "adapter")
        os.chdir(here)
        before = {path for path in work.parent.rglob("*") if here not in path.parents}
        for arguments in commands(here / "adapter", here):
            start = time.monotonic()
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                done = run_command(*arguments)
            faults += [f"seed {seed}: {fault}" for fault in judge(done, arguments, time.monotonic() - start)]
        if outside := {path for path in work.parent.rglob("*") if here not in path.parents} - before:
            faults.append(f"seed {seed}: wrote {outside}")
        if left := list(here.rglob(".export-*")):
            faults.append(f"seed {seed}: left {left}")
        os.chdir("/")
        shutil.rmtree(here)
    answer.put(faults)


def attacked(seeds: range, folder: Path) -> list[str]:
    made, work = templates(folder / "made"), folder / "work"
    work.mkdir()
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=attack, args=(seeds, made, work, answer))
    process.start()
    process.join(len(seeds) * 20)
    if process.is_alive():
        process.kill()
        return [f"seeds {seeds}: not done"]
    return (
        answer.get(timeout=5)
        if process.exitcode == 0
        else [f"seeds {seeds}: the process ended with {process.exitcode}"]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded by Linux's limits")
@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 1000, 50))
def test_a_thousand_hostile_folders(first: int, tmp_path: Path) -> None:
    assert attacked(range(first, first + 50), tmp_path) == []
