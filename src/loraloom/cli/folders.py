"""Commands between adapters and whole models: fold, extract, export."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from loraloom.cli.shell import (
    AsJson,
    Device,
    Energy,
    Extras,
    Many,
    One,
    Out,
    Overwrite,
    Whole,
    command,
    floats,
    result,
    saved,
    written,
)

Dtype = StrEnum("Dtype", ["fp32", "bf16", "fp16", "fp64"])
Rest = StrEnum("Rest", ["refuse", "ignore", "keep"])
Target = StrEnum("Target", ["vllm"])
Model = Annotated[Path, typer.Option("--base", help="Folder of the base model.", show_default=False)]


@command("fold")
def fold(
    adapters: Many,
    base: Model,
    out: Out,
    weights: Annotated[str, typer.Option(help="One number per adapter, with commas; default 1 each.")] = "",
    dtype: Annotated[Dtype | None, typer.Option(help="Convert the whole model; default: as it is.")] = None,
    extras: Whole = Extras.refuse,
    text_only: Annotated[bool, typer.Option("--text-only", help="Of MokA adapters, what they do to text.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the base model with the adapters added to its weights, shard by shard."""
    import loraloom as ll

    path = ll.fold(
        [ll.load(path) for path in adapters],
        base,
        out,
        weights=floats("--weights", weights) if weights else None,
        dtype=dtype.value if dtype else None,
        extras=extras.value,
        text_only=text_only,
        overwrite=overwrite,
        command=written(),
    )
    result({"model": str(path)}, as_json)


@command("extract")
def extract(
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="Folder of the tuned model.", show_default=False)],
    base: Model,
    out: Out,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every module; default 16.")] = None,
    energy: Energy = None,
    modules: Annotated[str, typer.Option(help="Only these, with commas: q_proj,up_proj.")] = "",
    rest: Annotated[Rest, typer.Option(help="Other parameters that differ.")] = Rest.refuse,
    device: Device = "",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make an adapter of the difference of a tuned model and its base."""
    import loraloom as ll

    how: dict[str, Any] = {"modules": modules or None, "rest": rest.value, "device": device or None}
    adapter = ll.extract(tuned, base, rank=rank, energy=energy, **how)
    saved(adapter, out, overwrite, as_json)


@command("export")
def export(
    adapter: One,
    out: Out,
    target: Annotated[Target, typer.Option("--for", help="Whose loader it is for.")] = Target.vllm,
    max_rank: Annotated[int | None, typer.Option(min=1, help="Refuse a larger rank.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the factors; default: as it is.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as a server's loader wants it, and verify it."""
    import loraloom as ll

    path = ll.export(
        ll.load(adapter),
        out,
        target=target.value,
        max_rank=max_rank,
        dtype=dtype.value if dtype else None,
        overwrite=overwrite,
        command=written(),
    )
    held = ll.load(path)
    result({"adapter": str(path), "rank": held.config["r"], "modules": len(held.modules)}, as_json)
