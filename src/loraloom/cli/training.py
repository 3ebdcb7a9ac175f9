"""Commands that train, score and show: train, evaluate, inspect, report, list, demo."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from loraloom.cli.shell import AsJson, Many, Overwrite, command, entries, result, table
from loraloom.registry import edge

What = StrEnum("What", ["methods", "schedules", "tasks", "models", "probes"])


@command("train")
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", show_default=False)],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: section.key=value.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train one adapter from a recipe."""
    import loraloom as ll

    trained = ll.train(ll.read_recipe(recipe, set_ or []), resume=resume, overwrite=overwrite, progress=not as_json)
    losses = [entry[key] for key in ("train_loss", "loss") for entry in trained.log if key in entry]
    made = "model" if trained.adapter is None else "adapter"
    if edge("processes").is_first():
        loss = {"loss": round(losses[-1], 4)} if losses else {}  # a run that ended before its first log has none
        result({made: str(trained.path), "seconds": round(trained.seconds, 2), **loss}, as_json)


@command("evaluate")
def evaluate(
    adapter: Annotated[Path, typer.Argument(metavar="A", help="An adapter folder, or 'base'.", show_default=False)],
    task: Annotated[list[str], typer.Option("--task", help="A task; may be repeated.", show_default=False)],
    model: Annotated[str, typer.Option(help="Base model; by default what the adapter names.")] = "",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many examples.")] = None,
    image_size: Annotated[int | None, typer.Option(min=14, help="Pixels a side; default: as trained, else 98.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score an adapter on tasks, with 95 % confidence intervals."""
    import loraloom as ll
    from loraloom.recipe import read_task

    loaded = None if str(adapter) == "base" else ll.load(adapter)
    options: dict[str, Any] = {"model": model, "split": split, "limit": limit, "image_size": image_size}
    rows = [{"adapter": str(adapter), **ll.evaluate(loaded, read_task(one), **options).to_json()} for one in task]
    table("accuracy", rows, as_json)


@command("inspect")
def inspect(adapters: Many, as_json: AsJson = False) -> None:
    """Kind, rank, size and norms by layer; with several adapters, their cosines."""
    import loraloom as ll

    summaries = [ll.summary(ll.load(path)) for path in adapters]
    if as_json:
        print(
            json.dumps([{"adapter": str(path), **one} for path, one in zip(adapters, summaries, strict=True)], indent=1)
        )
        return
    for path, one in zip(adapters, summaries, strict=True):
        head = {key: value for key, value in one.items() if key not in ("layers", "zero")}
        table(str(path), [head], as_json=False)
        table("norm of the update by layer", one["layers"], as_json=False)
        if one["zero"]:
            result({"note": f"{len(one['zero'])} updates are zero, first that of {one['zero'][0]}"}, as_json=False)
    if len(adapters) > 1:
        cosines = ll.cosines([ll.load(path) for path in adapters])
        names = [path.name for path in adapters]
        rows = [
            {"cosine": name, **dict(zip(names, row, strict=True))} for name, row in zip(names, cosines, strict=True)
        ]
        table("cosine of the updates", rows, as_json=False)


@command("report")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="results.json, a probe's JSON, adapters, scores.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="A page: .html or .md.")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(help="Also every figure as SVG and PNG, in this folder.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make one self-contained page from results, and its figures."""
    from loraloom.report import page

    print(page(runs, out, figures=figures, overwrite=overwrite))


@command("list")
def list_(what: What, as_json: AsJson = False) -> None:
    """What there is, with its paper."""
    import loraloom as ll

    entries(ll.catalogue(what.value), as_json)


@command("demo")
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for adapters, results and the page.")] = Path(
        "runs/demo"
    ),
    overwrite: Overwrite = False,
) -> None:
    """Train LoRA and CoTo adapters on bundled weights and data, merge, interpolate, prune, report."""
    from loraloom.demo import run

    run(out, overwrite=overwrite)
