"""The command that runs a table: sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraloom.cli.shell import command, written


@command("sweep")
def sweep(
    table: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder that all processes see.", show_default=False)],
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes on this machine.")] = 1,
    arms: Annotated[
        str, typer.Option(help="Only these arms: LoRA,CoTo. Others may follow in the same folder.", show_default=False)
    ] = "",
    known: Annotated[
        str,
        typer.Option(help="Results of finished sweeps, FILE,FILE: arms in them are read, not run.", show_default=False),
    ] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is there; finished jobs are read.")] = False,
) -> None:
    """Run a table: train a grid of adapters, combine and prune them, score all, write one report."""
    from loraloom import sweep

    asked = sweep.read(table, arms.split(",") if arms else ())
    there = sweep.known(asked, known.split(",") if known else ())
    sweep.run(asked, out, resume=resume, jobs=jobs, known=there, command=written())
