"""``adalora export | convert``: adapters in the form that others read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..quiet import quieten
from .options import AsJson

if TYPE_CHECKING:
    from ..serving import Exported


def export(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A finished run, a checkpoint, or any LoRA adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to.")],
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="lora, merged, gguf-ready or diffusers.")
    ] = "lora",
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="float32, float16 or bfloat16.", show_default=False)
    ] = None,
    rank: Annotated[
        float | None,
        typer.Option(metavar="K", help="Keep the best triplets, K (or 0.25) a matrix on average.", show_default=False),
    ] = None,
    pad: Annotated[bool, typer.Option("--max-rank-pad", help="Bring every module to the largest rank.")] = False,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Where the base model is.", show_default=False)
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Part of a Diffusers pipeline: unet, transformer, ...", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in the form that an engine reads.

    lora: PEFT, vLLM and others. merged: one model for from_pretrained. gguf-ready: for llama.cpp's
    convert_lora_to_gguf.py. diffusers: for load_lora_weights of a pipeline.
    """
    quieten()
    from .. import serving

    found = serving.export(
        source, out, form, rank=rank, pad=pad, dtype=dtype, base=base, component=component, overwrite=overwrite
    )
    _show_exported(found, as_json)


def convert(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of PEFT's AdaLoRA.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make plain LoRA of a checkpoint of PEFT's AdaLoRA.

    Of any version: peft_type ADALORA, before or after a mask.
    """
    quieten()
    from .. import serving

    _show_exported(serving.convert(source, out, overwrite=overwrite), as_json)


def _show_exported(found: Exported, as_json: bool) -> None:
    if as_json:
        from ..files import to_json

        typer.echo(to_json(found._asdict() | {"folder": str(found.folder)}))
        return
    ranks = found.ranks.values()
    spread = f"rank {min(ranks)}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
    padding = "" if sum(ranks) == found.triplets else ", padded with zeros"
    typer.echo(f"{len(ranks)} modules, {spread}, {found.triplets} triplets{padding}")
    for name, size in found.files.items():
        typer.echo(f"{found.folder / name}  {size:,} bytes")
