"""Commands that look into adapters: calibrate, probe."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from loraloom.cli.shell import AsJson, Many, One, OtherBases, Overwrite, Seed, command, floats, probe, result, table

Json = Annotated[Path, typer.Option("-o", "--out", help="JSON to write.", show_default=False)]
Model = Annotated[str, typer.Option(help="Base model; by default what the (first) adapter names.")]
Split = Annotated[str, typer.Option(help="train, validation or test.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many examples.")]
Unit = Annotated[str, typer.Option(help="layer, projection, module, tower, or a regular expression.")]
Scope = StrEnum("Scope", ["model", "layer", "projection", "module"])
By = StrEnum("By", ["auto", "multilinear", "permutations", "exact", "banzhaf", "leave-one-out"])


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
    out: Json,
    model: Model = "",
    split: Split = "test",
    limit: Limit = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Scores of every task after every phase of continual learning: ACC, BWT, FWT."""
    import loraloom as ll
    from loraloom.probing import forgetting_report
    from loraloom.recipe import read_task

    _refuse_taken(out, overwrite)
    names = [path.name for path in adapters]
    phases, tasks = [ll.load(path) for path in adapters], [read_task(one) for one in task]
    report = forgetting_report(phases, tasks, names=names, model=model, split=split, limit=limit)
    _show(report, out, as_json)


@command("probe partial-modality", on=probe)
def partial_modality(
    adapter: One,
    task: Annotated[str, typer.Option("--task", help="What to score.", show_default=False)],
    out: Json,
    modality: Annotated[
        list[str] | None, typer.Option(help="Of a LoRA: a name and a number from 1 on, image=1. May be repeated.")
    ] = None,
    model: Model = "",
    split: Split = "test",
    limit: Limit = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Scores of an adapter that is on for the tokens of one modality alone: text, image, audio."""
    import loraloom as ll
    from loraloom.probing import partial_modality_report
    from loraloom.recipe import read_task

    _refuse_taken(out, overwrite)
    told = _numbers(modality) if modality else None
    options: dict[str, Any] = {"model": model, "split": split, "limit": limit}
    report = partial_modality_report(ll.load(adapter), read_task(task), modalities=told, name=adapter.name, **options)
    _show(report, out, as_json)


@command("probe stability", on=probe)
def stability(
    adapter: One,
    task: Annotated[str, typer.Option("--task", help="What to score.", show_default=False)],
    out: Json,
    at: Annotated[str, typer.Option("--at", help="Chances of a unit to be off, with commas.")] = "0.125,0.25,0.5,0.75",
    draws: Annotated[int, typer.Option(min=2, help="For each chance.")] = 8,
    unit: Unit = "layer",
    pruning: Annotated[
        bool, typer.Option("--pruning", help="Also prune those shares of units and of entries.")
    ] = False,
    seed: Seed = 0,
    model: Model = "",
    split: Split = "test",
    limit: Limit = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Scores of an adapter with units of it switched off at random, and pruned."""
    import loraloom as ll
    from loraloom.probing import stability_report
    from loraloom.recipe import read_task

    _refuse_taken(out, overwrite)
    options: dict[str, Any] = {"at": floats("--at", at), "draws": draws, "unit": unit, "pruning": pruning, "seed": seed}
    options |= {"name": adapter.name, "model": model, "split": split, "limit": limit}
    _show(stability_report(ll.load(adapter), read_task(task), **options), out, as_json)


@command("probe shapley", on=probe)
def shapley(
    adapters: Many,
    task: Annotated[str, typer.Option("--task", help="What to score.", show_default=False)],
    out: Json,
    unit: Annotated[
        str, typer.Option(help="layer, projection, module, tower, an expression; of several adapters: adapter.")
    ] = "",
    samples: Annotated[int, typer.Option(min=1, help="Coalitions or orders to draw, at most.")] = 200,
    by: Annotated[By, typer.Option(help="How to compute, or another value of the game.")] = By.auto,
    error: Annotated[float | None, typer.Option(help="Stop once every standard error is at most this.")] = None,
    truncate: Annotated[float, typer.Option(help="Of permutations: so near to the whole the rest adds nothing.")] = 0.0,
    method: Annotated[str, typer.Option(help="How several adapters are merged.")] = "linear",
    seed: Seed = 0,
    model: Model = "",
    split: Split = "test",
    limit: Limit = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """What each layer, projection, module or tower of an adapter is worth, or each of several adapters when merged."""
    import loraloom as ll
    from loraloom.probing import shapley_report
    from loraloom.recipe import read_task

    _refuse_taken(out, overwrite)
    short = len({path.name for path in adapters}) == len(adapters)
    opened = {path.name if short else str(path): ll.load(path) for path in adapters}
    if len(opened) < len(adapters):
        raise ValueError("the same adapter is given twice")
    options: dict[str, Any] = {"samples": samples, "by": by.value, "error": error, "truncate": truncate, "seed": seed}
    options |= {"merge": method, "model": model, "split": split, "limit": limit} | ({"unit": unit} if unit else {})
    _show(shapley_report(opened, read_task(task), **options), out, as_json)


@command("probe interference", on=probe)
def interference(
    adapters: Many,
    out: Json,
    entries: Annotated[
        bool, typer.Option("--entries/--no-entries", help="Compare signs, entry by entry: nearly all of the time.")
    ] = True,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Changes nothing, as nothing is scored; all probes may have one.")
    ] = None,
    allow_different_bases: OtherBases = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """How adapters lie to each other: cosines, angles, signs, singular vectors, masks. No model or task is needed.

    The masks of LoRI adapters are those in their folders, else the entries of B that are not 0.
    """
    import loraloom as ll
    from loraloom.comparison import interference_report
    from loraloom.masks import MASK

    _refuse_taken(out, overwrite)
    masks = [ll.load_mask(path) if (path / MASK).is_file() else None for path in adapters]
    opened, names = [ll.load(path) for path in adapters], [path.name for path in adapters]
    options: dict[str, Any] = {"entries": entries, "masks": masks, "same_base": not allow_different_bases}
    _show(interference_report(opened, names, **options), out, as_json)


@command("probe geometry", on=probe)
def geometry(
    adapters: Many,
    out: Json,
    allow_different_bases: OtherBases = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Where many adapters lie: cosines, distances, principal axes. No model or task is needed."""
    import loraloom as ll
    from loraloom.comparison import geometry_report

    _refuse_taken(out, overwrite)
    opened, names = [ll.load(path) for path in adapters], [path.name for path in adapters]
    _show(geometry_report(opened, names, same_base=not allow_different_bases), out, as_json)


def _numbers(given: list[str]) -> dict[str, int]:
    """Numbers by name, of ``image=1``."""
    found = {}
    for one in given:
        name, _, number = one.partition("=")
        if not number.isdigit() or not name or name in found:
            raise ValueError(f"--modality {one!r}: expected a name and a number, such as image=1, once each")
        found[name] = int(number)
    return found


def _refuse_taken(out: Path, overwrite: bool) -> None:
    if out.is_dir() or (out.exists() and not overwrite):
        raise FileExistsError(f"{out} exists; give another path or --overwrite")


def _show(report: Any, out: Path, as_json: bool) -> None:
    """Write a report, and print its first panel as a table and its second as one line."""
    from loraloom.report import replace_file
    from loraloom.report.grid import grid

    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, json.dumps(report.to_json(), indent=1) + "\n")
    if as_json:
        print(json.dumps(report.records[0]))
        return
    first, second, *_ = report.panels
    head, rows = grid(first)
    table(first.title, [dict(zip(head, row, strict=True)) for row in rows], as_json=False)
    result({str(row[0]): row[1] for row in grid(second)[1]} | {"report": str(out)}, as_json=False)
