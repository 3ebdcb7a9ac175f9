"""Commands that look into adapters: calibrate, probe."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from loraloom.cli.shell import AsJson, Many, One, Overwrite, command, probe, result, table

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


@command("probe forgetting", on=probe)
def forgetting(
    adapters: Many,
    task: Annotated[list[str], typer.Option("--task", help="The task of each phase, in order.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="JSON to write.", show_default=False)],
    model: Annotated[str, typer.Option(help="Base model; by default what the first adapter names.")] = "",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many examples.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Scores of every task after every phase of continual learning: ACC, BWT, FWT."""
    import loraloom as ll
    from loraloom.probing import forgetting_report
    from loraloom.recipe import read_task
    from loraloom.report import replace_file
    from loraloom.report.grid import grid

    if out.is_dir() or (out.exists() and not overwrite):
        raise FileExistsError(f"{out} exists; give another path or --overwrite")
    names = [path.name for path in adapters]
    phases, tasks = [ll.load(path) for path in adapters], [read_task(one) for one in task]
    report = forgetting_report(phases, tasks, names=names, model=model, split=split, limit=limit)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, json.dumps(report.to_json(), indent=1) + "\n")
    if as_json:
        print(json.dumps(report.records[0]))
        return
    matrix, summaries = report.panels
    head, rows = grid(matrix)
    table(matrix.title, [dict(zip(head, row, strict=True)) for row in rows], as_json=False)
    result({str(row[0]): row[1] for row in grid(summaries)[1]} | {"report": str(out)}, as_json=False)
