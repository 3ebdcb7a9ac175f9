"""Commands that look into adapters: calibrate."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from loraloom.cli.shell import AsJson, One, Overwrite, command, result

Scope = StrEnum("Scope", ["model", "layer", "projection", "module"])


@command("calibrate")
def calibrate(
    adapter: One,
    out: Annotated[Path, typer.Option("-o", "--out", help="Mask file to write.", show_default=False)],
    density: Annotated[float, typer.Option(help="Share of B's entries to keep, in (0, 1].")] = 0.1,
    scope: Annotated[Scope, typer.Option(help="Where the density holds.")] = Scope.model,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(help="Entries not to take: a mask, or all that an adapter's B holds. May be repeated."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """A LoRI mask: the largest entries of a trained adapter's B."""
    import loraloom as ll
    from loraloom.calibration import protected

    held = [protected(path) for path in exclude or ()]
    mask = ll.calibrate(ll.load(adapter), density=density, scope=scope.value, exclude=held)
    path = ll.save_mask(mask, out, overwrite=overwrite)
    result({"mask": str(path), "kept": mask.kept, "entries": mask.entries, "modules": len(mask)}, as_json)
