"""Probes as commands. What they all take is said once: a probe's function has its own options and gives a report."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from loraloom.cli.shell import (
    Many,
    One,
    Other,
    OtherBases,
    Overwrite,
    Seed,
    command,
    floats,
    probe,
    result,
    table,
    written,
)

Task = Annotated[str, typer.Option("--task", help="What to score.", show_default=False)]
Out = Annotated[Path, typer.Option("-o", "--out", help="JSON to write.", show_default=False)]
Model = Annotated[str, typer.Option(help="Base model; by default what the (first) adapter names.")]
Split = Annotated[str, typer.Option(help="train, validation or test.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many examples.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the record, a list where there are several.")]
Unit = Annotated[str, typer.Option(help="layer, projection, module, tower, or a regular expression.")]
By = StrEnum("By", ["auto", "multilinear", "permutations", "exact", "banzhaf", "leave-one-out"])


@dataclass(frozen=True)
class Ask:
    """What every probe is asked with; those that score nothing have no task, model, split and limit."""

    out: Out
    task: Task = ""
    model: Model = ""
    split: Split = "test"
    limit: Limit = None
    overwrite: Overwrite = False
    as_json: AsJson = False

    @property
    def scored(self) -> dict[str, Any]:
        """Model, split and limit by name, as the functions of ``loraloom.probing`` take them."""
        return {"model": self.model, "split": self.split, "limit": self.limit}

    @property
    def read_task(self) -> Any:
        """The task, or the description of a data set."""
        from loraloom.recipe import read_task

        return read_task(self.task)


def asks(name: str, *, scores: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a probe's command: a function of an :class:`Ask` and of options of its own that returns a report.

    An option of its own goes before one of the same name in :class:`Ask`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _, *own = inspect.signature(function, eval_str=True).parameters.values()
        taken = {one.name for one in own} | ({"task", "model", "split", "limit"} if not scores else set())
        shared = [one for one in inspect.signature(Ask, eval_str=True).parameters.values() if one.name not in taken]
        asked = [one.replace(default=one.empty) if one.name in ("task", "out") else one for one in shared]
        options = [one.replace(kind=one.KEYWORD_ONLY) for one in (*own, *asked)]
        options.sort(key=lambda one: one.default is not one.empty)  # what must be given comes first

        def run(**given: Any) -> None:
            from loraloom.probing.asking import kept
            from loraloom.report import ran

            ask = Ask(**{one.name: given.pop(one.name) for one in shared})
            paths = [one for value in given.values() for one in (value if isinstance(value, list) else [value])]
            folders = [path for path in paths if isinstance(path, Path)]
            request = partial(_request, name, ask, given, folders)
            with kept(ask.out, request, f"probe {name}", fresh=ask.overwrite) as held:
                held.first(partial(_refuse_taken, ask))
                report = function(ask, **given)
                if held.rank == 0:
                    _show(ran(report, written(), folders), ask)

        run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in options}
        run.__doc__ = function.__doc__
        command(f"probe {name}", on=probe)(run)
        return function

    return decorate


@asks("forgetting")
def forgetting(
    ask: Ask,
    adapters: Many,
    task: Annotated[list[str], typer.Option("--task", help="The task of each phase, in order.", show_default=False)],
) -> Any:
    """Scores of every task after every phase of continual learning: ACC, BWT, FWT."""
    import loraloom as ll
    from loraloom.probing import forgetting_report
    from loraloom.recipe import read_task

    phases, tasks = [ll.load(path) for path in adapters], [read_task(one) for one in task]
    return forgetting_report(phases, tasks, names=[path.name for path in adapters], **ask.scored)


@asks("partial-modality")
def partial_modality(
    ask: Ask,
    adapter: One,
    modality: Annotated[
        list[str] | None, typer.Option(help="Of a LoRA: a name and a number from 1 on, image=1. May be repeated.")
    ] = None,
) -> Any:
    """Scores of an adapter that is on for the tokens of one modality alone: text, image, audio."""
    import loraloom as ll
    from loraloom.probing import partial_modality_report

    told = _numbers(modality) if modality else None
    return partial_modality_report(ll.load(adapter), ask.read_task, modalities=told, name=adapter.name, **ask.scored)


@asks("stability")
def stability(
    ask: Ask,
    adapter: One,
    at: Annotated[str, typer.Option("--at", help="Chances of a unit to be off, with commas.")] = "0.125,0.25,0.5,0.75",
    draws: Annotated[int, typer.Option(min=2, help="For each chance.")] = 8,
    unit: Unit = "layer",
    pruning: Annotated[
        bool, typer.Option("--pruning", help="Also prune those shares of units and of entries.")
    ] = False,
    seed: Seed = 0,
) -> Any:
    """Scores of an adapter with units of it switched off at random, and pruned."""
    import loraloom as ll
    from loraloom.probing import stability_report

    options: dict[str, Any] = {"at": floats("--at", at), "draws": draws, "unit": unit, "pruning": pruning, "seed": seed}
    return stability_report(ll.load(adapter), ask.read_task, name=adapter.name, **options, **ask.scored)


@asks("shapley")
def shapley(
    ask: Ask,
    adapters: Many,
    unit: Annotated[
        str, typer.Option(help="layer, projection, module, tower, an expression; of several adapters: adapter.")
    ] = "",
    samples: Annotated[int, typer.Option(min=1, help="Coalitions or orders to draw, at most.")] = 200,
    by: Annotated[By, typer.Option(help="How to compute, or another value of the game.")] = By.auto,
    error: Annotated[float | None, typer.Option(help="Stop once every standard error is at most this.")] = None,
    truncate: Annotated[float, typer.Option(help="Of permutations: so near to the whole the rest adds nothing.")] = 0.0,
    method: Annotated[str, typer.Option(help="How several adapters are merged.")] = "linear",
    seed: Seed = 0,
) -> Any:
    """What each layer, projection, module or tower of an adapter is worth, or each of several adapters when merged."""
    import loraloom as ll
    from loraloom.probing import shapley_report

    short = len({path.name for path in adapters}) == len(adapters)
    opened = {path.name if short else str(path): ll.load(path) for path in adapters}
    if len(opened) < len(adapters):
        raise ValueError("the same adapter is given twice")
    options: dict[str, Any] = {"samples": samples, "by": by.value, "error": error, "truncate": truncate, "seed": seed}
    options |= {"merge": method} | ({"unit": unit} if unit else {})
    return shapley_report(opened, ask.read_task, **options, **ask.scored)


@asks("connectivity")
def connectivity(
    ask: Ask,
    a: One,
    b: Other,
    via: Annotated[Path | None, typer.Option(help="A third adapter: the control point of bent paths.")] = None,
    space: Annotated[str, typer.Option(help="delta, factors, or both with a comma.")] = "delta,factors",
    align: Annotated[
        str, typer.Option(help="In factors: none, orthogonal, invertible, or several with commas.")
    ] = "none",
    points: Annotated[int, typer.Option(min=2, help="On each path, ends included.")] = 11,
) -> Any:
    """Scores of the adapters on the paths between two, and how far they sink: straight paths and, with --via, bent."""
    import loraloom as ll
    from loraloom.probing import connectivity_report

    paths = [a, b] if via is None else [a, b, via]
    first, last, *control = [ll.load(path) for path in paths]
    aligns = [None if one == "none" else one for one in align.split(",")]
    options: dict[str, Any] = {"via": control[0] if control else None, "names": [path.name for path in paths]}
    options |= {"space": space.split(","), "align": aligns, "points": points}
    return connectivity_report(first, last, ask.read_task, **options, **ask.scored)


@asks("plane")
def plane(
    ask: Ask,
    a: One,
    b: Other,
    c: Annotated[Path, typer.Argument(metavar="C", help="A third adapter folder.", show_default=False)],
    grid: Annotated[int, typer.Option(min=2, help="Positions on each axis.")] = 9,
    margin: Annotated[float, typer.Option(min=0, help="Beyond the three, as a share of the longer axis.")] = 0.25,
) -> Any:
    """A map of the scores on the plane through three adapters, and the score of their mean."""
    import loraloom as ll
    from loraloom.probing import plane_report

    names, opened = [path.name for path in (a, b, c)], [ll.load(path) for path in (a, b, c)]
    return plane_report(opened, ask.read_task, names=names, grid=grid, margin=margin, **ask.scored)


@asks("interference")
def interference(
    ask: Ask,
    adapters: Many,
    entries: Annotated[
        bool, typer.Option("--entries/--no-entries", help="Compare signs, entry by entry: nearly all of the time.")
    ] = True,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Also score the adapters and their average on it. May be repeated."),
    ] = None,
    allow_different_bases: OtherBases = False,
) -> Any:
    """How adapters lie to each other: cosines, angles, signs, singular vectors, masks. Needs no model but for --task.

    The masks of LoRI adapters are those in their folders, else the entries of B that are not 0.
    """
    import loraloom as ll
    from loraloom.masks import MASK
    from loraloom.probing import interference_report
    from loraloom.recipe import read_task

    if not task and ask.scored != Ask(ask.out).scored:
        raise ValueError("--model, --split and --limit say how --task is scored; give --task too")
    masks = [ll.load_mask(path) if (path / MASK).is_file() else None for path in adapters]
    opened, names = [ll.load(path) for path in adapters], [path.name for path in adapters]
    options: dict[str, Any] = {"entries": entries, "masks": masks, "same_base": not allow_different_bases}
    return interference_report(opened, names, tasks=[read_task(one) for one in task or ()], **options, **ask.scored)


@asks("geometry", scores=False)
def geometry(
    ask: Ask,
    adapters: Many,
    tsne: Annotated[bool, typer.Option("--tsne", help="Also a map by t-SNE, of at least four adapters.")] = False,
    perplexity: Annotated[float | None, typer.Option(help="Of the map; by default (k - 1) / 3, at most 30.")] = None,
    seed: Seed = 0,
    allow_different_bases: OtherBases = False,
) -> Any:
    """Where many adapters lie: cosines, distances, principal axes, t-SNE. No model or task is needed."""
    import loraloom as ll
    from loraloom.probing import geometry_report

    opened, names = [ll.load(path) for path in adapters], [path.name for path in adapters]
    options: dict[str, Any] = {"tsne": tsne, "perplexity": perplexity, "seed": seed}
    return geometry_report(opened, names, same_base=not allow_different_bases, **options)


@asks("balance", scores=False)
def balance(
    ask: Ask,
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Adapters, or JSON of a balance.", show_default=False)
    ],
    groups: Annotated[
        str, typer.Option("--groups", help="A name for each run, with commas; those of one name are told as one.")
    ] = "",
) -> Any:
    """How training shared its work out over layers and projections, of runs with train.balance_every. Needs no model.

    Without --groups, runs whose recipes differ in the seed alone are told as one. Bands reach from the lowest to the
    highest.
    """
    import loraloom as ll
    from loraloom.cli.shell import read_json
    from loraloom.probing import balance_report

    told = groups.split(",") if groups else []
    if told and len(told) != len(runs):
        raise ValueError(f"--groups {groups!r}: {len(told)} names for {len(runs)} runs; one each is needed")
    opened = [read_json(path, "a balance") if path.is_file() else ll.load(path) for path in runs]
    return balance_report(opened, [path.stem if path.is_file() else path.name for path in runs], told)


def _numbers(given: list[str]) -> dict[str, int]:
    """Numbers by name, of ``image=1``."""
    found = {}
    for one in given:
        name, _, number = one.partition("=")
        if not number.isdigit() or not name or name in found:
            raise ValueError(f"--modality {one!r}: expected a name and a number, such as image=1, once each")
        found[name] = int(number)
    return found


def _refuse_taken(ask: Ask) -> None:
    if ask.out.is_dir() or (ask.out.exists() and not ask.overwrite):
        raise FileExistsError(f"{ask.out} exists; give another path or --overwrite")


def _request(name: str, ask: Ask, given: dict[str, Any], folders: list[Path]) -> dict[str, Any]:
    """All that tells one request from another, for the journal: what was typed, and what the adapters hold."""
    import loraloom as ll
    from loraloom.contents import of_adapter

    typed = {**asdict(ask), **given}
    told = {key: value for key, value in typed.items() if key not in ("out", "overwrite", "as_json")}
    plain = json.loads(json.dumps(told, default=str))
    return {"probe": name, **plain, "contents": [of_adapter(ll.load(folder)) for folder in folders]}


def _show(report: Any, ask: Ask) -> None:
    """Write a report, and print its first panel as a table and its second as one line."""
    from loraloom.report import replace_file
    from loraloom.report.grid import grid

    replace_file(ask.out, json.dumps(report.to_json(), indent=1) + "\n", overwrite=ask.overwrite)
    if ask.as_json:
        print(json.dumps(report.records[0] if len(report.records) == 1 else report.records))
        return
    first, second, *_ = report.panels
    head, rows = grid(first)
    table(first.title, [dict(zip(head, row, strict=True)) for row in rows], as_json=False)
    result({str(row[0]): row[1] for row in grid(second)[1]} | {"report": str(ask.out)}, as_json=False)
