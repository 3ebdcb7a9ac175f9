"""The command line: parse, call one public function, print. Nothing is decided here."""

from __future__ import annotations

from typing import Annotated

import typer

from loraloom.cli import analyses, data, folders, operators, planning, probes, sweeping, training  # noqa: F401 - importing them registers their commands
from loraloom.cli.shell import app


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train, merge, interpolate and prune LoRA-family adapters."""
    if show:
        from loraloom import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the command ``loraloom``."""
    app()
