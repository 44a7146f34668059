"""speed.json as tables in Markdown, and its figures against what was promised."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

OURS, KERNELS, LORA, ADALORA, FLOOR = "adalora", "lora, our kernels", "peft lora", "peft adalora", "frozen"
FOUR = ("bert-small-16x64", "bert-small-4x128", "bert-base-4x128", "llama-small-4x128")
MARKS = "<!-- speed.md begins -->", "<!-- speed.md ends -->"
Found = dict[str, Any]


def ratio(cell: Found | None, method: str, other: str, what: str = "step_ms") -> tuple[float, float, float] | None:
    """(median, lower and upper quartile) over rounds of one method's time over another's in the same round."""
    pair = [] if cell is None else [cell["methods"].get(name, {}).get(what) for name in (method, other)]
    if len(pair) < 2 or None in pair:
        return None
    ratios = [ours / theirs for ours, theirs in zip(*pair, strict=True)]
    return statistics.median(ratios), *quartiles(ratios)


def quartiles(numbers: list[float]) -> tuple[float, float]:
    if len(numbers) < 2:
        return numbers[0], numbers[0]
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, high


# ------------------------------------------------------------------------------------------------ what was promised


def bounds(found: Found) -> list[Found]:
    """Every promised figure: what it is, at most, what was measured (None: not here), and whether it is met."""
    cells = {cell["shape"]: cell for cell in found["cells"] if not cell["compiled"]}
    options, rows = found["options"], []

    def add(what: str, where: str, most: float, value: Any, why_not: str = "not part of this run") -> None:
        low_high = list(value[1:]) if isinstance(value, tuple) else None
        number = value[0] if isinstance(value, tuple) else value
        met = None if number is None else number <= most
        row = {"figure": what, "where": where, "at_most": most, "measured": number, "quartiles": low_high, "met": met}
        rows.append({**row, "note": why_not if number is None else None})

    def of(shape: str, key: str, method: str = OURS) -> Any:
        return cells.get(shape, {"methods": {}})["methods"].get(method, {}).get(key)

    in_float32 = options["dtype"] == "float32"
    timed = cells if in_float32 else {}
    for other, limits in ((LORA, (0.80, 0.80, 0.93, 0.93)), (ADALORA, (0.68, 0.68, 0.83, 0.85))):
        for shape, most in zip(FOUR, limits, strict=True):
            add(f"step, ours / {other}", shape, most, ratio(timed.get(shape), OURS, other))
    for shape, most in ((FOUR[0], 1.02), (FOUR[1], 1.02), ("matrices-216", 1.08)):
        add(f"step, ours / {KERNELS}", shape, most, ratio(timed.get(shape), OURS, KERNELS))
    add("step, ours / frozen floor", FOUR[2], 1.12, ratio(timed.get(FOUR[2]), OURS, FLOOR))
    add("operations a step", "matrices-216", 2500, of("matrices-216", "operations"))
    for shape in ("matrices-216", "matrices-12"):
        add("importance, regulariser and allocation, operations", shape, 60, of(shape, "allocator_operations"))
    few, many = of("matrices-12", "allocator_operations"), of("matrices-216", "allocator_operations")
    add("the same, 216 matrices less 12", "", 0, None if few is None or many is None else many - few)
    for shape in cells:
        add("state, bytes per adapter parameter", shape, 8, of(shape, "state_bytes_per_parameter"))
    for shape in cells:
        kept, matrices = (of(shape, key, "adalora singular") for key in ("state_bytes", "matrices"))
        triplets = None if kept is None else matrices * found["initial_rank"]
        add("state with `singular`, bytes per triplet", shape, 8, None if triplets is None else kept / triplets)
    for shape in FOUR:
        ours, theirs = of(shape, "peak_bytes"), of(shape, "peak_bytes", LORA)
        add(f"peak memory growth, ours / {LORA}", shape, 1.0, None if None in (ours, theirs) else ours / theirs)
    if found["machine"]["amx_bf16"] and not in_float32 and options["device"] == "cpu":
        for shape in FOUR:
            add(f"step in bfloat16, AMX, ours / {LORA}", shape, 0.85, ratio(cells.get(shape), OURS, LORA))
    else:
        why = "needs --dtype bfloat16" if found["machine"]["amx_bf16"] else "this machine has no AMX"
        add(f"step in bfloat16, AMX, ours / {LORA}", "", 0.85, None, why)
    return rows


# ------------------------------------------------------------------------------------------------ tables


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def spread(value: tuple[float, float, float] | None) -> str:
    return "–" if value is None else f"{value[0]:.2f} ({value[1]:.2f}–{value[2]:.2f})"


def markdown(found: Found) -> str:
    """Machine, the comparison, the promised figures, and one table a shape."""
    parts = [heading(found), comparison(found), promised(found["bounds"])]
    parts += [shape_table(cell) for cell in found["cells"]]
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(found: Found) -> str:
    machine, versions, options = found["machine"], found["versions"], found["options"]
    extras = [name for name in ("avx512_bf16", "amx_bf16") if machine[name]]
    where = machine["gpu"] if options["device"] == "cuda" else f"{machine['processor']}, {machine['cores']} cores"
    loads = " to ".join(f"{found['load'][when][0]:.1f}" for when in ("before", "after"))
    return (
        f"`python {found['command']}`: {where} ({', '.join([machine['vectors'], *extras])}),"
        f" {options['threads']} thread{'s' * (options['threads'] > 1)}, base in {options['dtype']},"
        f" load of the machine {loads}, seed {options['seed']};"
        f" {', '.join(f'{name} {number}' for name, number in versions.items())}."
    )


def comparison(found: Found) -> str:
    others = {ADALORA: "PEFT's AdaLoRA", LORA: "PEFT's LoRA", KERNELS: "LoRA on our kernels", FLOOR: "the frozen base"}
    rows = [
        [f"our AdaLoRA / {words}", *(spread(ratio(cell, OURS, name)) for cell in found["cells"])]
        for name, words in others.items()
    ]
    floor = [spread(ratio(cell, FLOOR, LORA)) for cell in found["cells"]]
    rows.append(["the frozen base / PEFT's LoRA: nothing can be below", *floor])
    return table(["a step (quartiles)", *(title(cell) for cell in found["cells"])], rows)


def title(cell: Found) -> str:
    return cell["shape"] + ", compiled" * cell["compiled"]


def promised(rows: list[Found]) -> str:
    verdicts = {True: "met", False: "**missed**"}
    lines = []
    for row in rows:
        number, quarts = row["measured"], row["quartiles"]
        form = ".2f" if isinstance(row["at_most"], float) else ".4g"
        measured = "–" if number is None else f"{number:{form}}"
        if quarts is not None:
            measured += f" ({quarts[0]:.2f}–{quarts[1]:.2f})"
        verdict = row["note"] if number is None else verdicts[row["met"]]
        lines.append([row["figure"], row["where"], f"{row['at_most']:{form}}", measured, verdict])
    return table(["figure", "shape", "at most", "measured", ""], lines)


def shape_table(cell: Found) -> str:
    """Everything about one shape."""
    head = ["method", "step, ms", f"/ {LORA}", "tokens/s", "operations", "of the allocator", "peak, MiB"]
    head += ["state, B/parameter", "forward, ms", "merged, ms", "save, ms", "load, ms", "export, ms"]
    launches = any("launches" in method for method in cell["methods"].values())
    rows = []
    for name, method in cell["methods"].items():
        if "error" in method and "operations" not in method:
            rows.append([name, method["error"].replace("|", "/"), *[""] * (len(head) + launches - 2)])
            continue
        cells = [
            name + (f" (then {method['error']})".replace("|", "/") if "error" in method else ""),
            median(method.get("step_ms")),
            spread(ratio(cell, name, LORA)),
            number(method.get("tokens_per_second"), ",.0f"),
            number(method.get("operations"), ",d"),
            number(method.get("allocator_operations"), ",d"),
            number(method.get("peak_bytes"), ",.1f", 2**-20),
            number(method.get("state_bytes_per_parameter"), ".3g"),
            median(method.get("forward_ms")),
            median(method.get("merged_ms")),
            *(number(method.get(what), ",.0f", 1000) for what in ("save_s", "load_s", "export_s")),
        ]
        rows.append(cells + [number(method.get("launches"), ",d")] * launches)
    shown = table(head + ["launches"] * launches, rows)
    loads = " to ".join(f"{load[0]:.1f}" for load in cell["load"])
    return f"**{title(cell)}**, {cell['rounds']} rounds, load {loads}\n\n{shown}"


def median(numbers: list[float] | None) -> str:
    return "–" if numbers is None else f"{statistics.median(numbers):.1f}"


def number(value: float | None, form: str, factor: float = 1) -> str:
    return "–" if value is None else f"{value * factor if factor != 1 else value:{form}}"


def put_into_page(page: Path, text: str) -> None:
    """Replace what lies between the page's marks."""
    old = page.read_text(encoding="utf-8")
    head, _, rest = old.partition(MARKS[0])
    _, found, tail = rest.partition(MARKS[1])
    if not found:
        raise SystemExit(f"{page} lacks the lines {MARKS[0]} and {MARKS[1]}, between which the tables go.")
    page.write_text(f"{head}{MARKS[0]}\n{text}{MARKS[1]}{tail}", encoding="utf-8")
