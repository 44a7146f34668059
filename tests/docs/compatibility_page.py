"""docs/compatibility.md from what the tests saw; ``make compatibility`` runs them and writes it.

A test speaks for a row with ``@pytest.mark.compatibility(area, what)``, or with ``refused=True`` where what it shows is
a clear error. Rows of one name are one row: it works if every test that speaks for it passed.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

AREAS = (
    "Layers",
    "LoRA variants",
    "Initializations",
    "Choosing what to adapt",
    "Quantized bases",
    "Several adapters",
    "Trainers and loops",
    "Optimizers and precision",
    "Saving, loading, resuming",
    "PEFT's own methods",
    "PEFT's AdaLoRA",
    "Serving",
)

HEADER = """# Compatibility

Made by `make compatibility` from what the tests saw: each row is one or several tests that run the real thing.
*Works* means that they passed, *refused* that a clear error says what to do instead, *not testable here* that the
machine lacked what is named; the test runs wherever that is there.
"""


class Row(NamedTuple):
    """What one test saw."""

    area: str
    what: str
    outcome: str  # works, refused, skipped or failed
    reason: str
    test: str


PACKAGES = (
    "torch", "peft", "transformers", "accelerate", "trl", "sentence-transformers", "setfit", "lightning",
    "schedulefree", "bitsandbytes", "torchao", "hqq", "diffusers",
)  # fmt: skip


def versions() -> str:
    """What the tests ran on."""
    found = []
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def page(rows: list[Row]) -> str:
    """The whole page; areas in their order, rows in the order of their names."""
    unknown = {row.area for row in rows} - set(AREAS)
    if unknown:
        raise ValueError(f"areas {sorted(unknown)} are not in the page's list: {', '.join(AREAS)}")
    parts = [f"{HEADER}\nSeen with {versions()}.\n"]
    for area in AREAS:
        named: dict[str, list[Row]] = {}
        for row in rows:
            if row.area == area:
                named.setdefault(row.what, []).append(row)
        if named:
            lines = [
                f"| {what} | {_verdict(same)} | `{sorted({row.test for row in same})[0]}` |"
                for what, same in sorted(named.items(), key=lambda item: item[0].lower())
            ]
            parts.append("\n".join([f"## {area}\n", "| what | result | shown by |", "|---|---|---|", *lines]) + "\n")
    return "\n".join(parts)


def _verdict(rows: list[Row]) -> str:
    outcomes = {row.outcome for row in rows}
    if "failed" in outcomes:
        return "**fails**"
    skipped = next((row for row in rows if row.outcome == "skipped"), None)
    if outcomes == {"skipped"} and skipped is not None:
        return f"not testable here: {skipped.reason}"
    if "refused" in outcomes:
        return "refused with a clear error"
    return "keeps its loader's rules; not run" if rows[0].what.endswith("(not run)") else "works"
