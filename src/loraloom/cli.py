"""The command line: parse, call one public function, print. Nothing is decided here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="loraloom",
    help="Train LoRA-family adapters that come apart and go together well; merge, interpolate and prune them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to write; it appears whole or not at all.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable results.")]
One = Annotated[Path, typer.Argument(metavar="A", help="An adapter folder.", show_default=False)]
Many = Annotated[list[Path], typer.Argument(metavar="A B...", help="Adapter folders.", show_default=False)]
OtherBases = Annotated[bool, typer.Option("--allow-different-bases", help="Base models of different names.")]
Space = StrEnum("Space", ["factors", "delta"])
Extras = StrEnum("Extras", ["refuse", "average"])
What = StrEnum("What", ["methods", "schedules", "tasks", "models", "probes"])


def _command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose wrong requests end in one line and exit status 2."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(**arguments: Any) -> None:
            try:
                function(**arguments)
            except (ValueError, OSError) as error:
                print(f"loraloom {name}: {_line(error)}", file=sys.stderr)
                raise typer.Exit(2) from None
            except KeyboardInterrupt:
                hint = "; the same command with --resume goes on" if name == "train" else ""
                print(f"loraloom {name}: stopped{hint}", file=sys.stderr)
                raise typer.Exit(130) from None

        return app.command(name)(run)

    return decorate


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


@_command("train")
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
    _result(
        {"adapter": str(trained.path), "seconds": round(trained.seconds, 2), "loss": round(losses[-1], 4)},
        as_json,
    )


@_command("evaluate")
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
    _table("accuracy", rows, as_json)


@_command("merge")
def merge(
    adapters: Many,
    out: Out,
    method: Annotated[str, typer.Option(help="See `loraloom list methods`.")] = "linear",
    weights: Annotated[str, typer.Option(help="One number per adapter, with commas; default 1/k each.")] = "",
    density: Annotated[float | None, typer.Option(help="Share kept, in (0, 1].")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the result.")] = None,
    space: Annotated[Space | None, typer.Option(help="Where the method works.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of methods that draw.")] = 0,
    extras: Annotated[
        Extras, typer.Option(help="Trained biases and whole saved modules of several adapters.")
    ] = Extras.refuse,
    allow_different_bases: OtherBases = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Merge adapters into one; no base model is needed."""
    import loraloom as ll

    merged = ll.merge(
        [ll.load(path) for path in adapters],
        method=method,
        weights=_floats("--weights", weights) if weights else None,
        density=density,
        rank=rank,
        space=space.value if space else None,
        seed=seed,
        extras=extras.value,
        same_base=not allow_different_bases,
    )
    _save(merged, out, overwrite, as_json)


@_command("interpolate")
def interpolate(
    a: Annotated[Path, typer.Argument(metavar="A", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", show_default=False)],
    out: Out,
    at: Annotated[float, typer.Option("--at", help="0 is A, 1 is B.")] = 0.5,
    allow_different_bases: OtherBases = False,
    space: Annotated[Space, typer.Option(help="factors: (1-t)B_a + t B_b and so A; delta: the updates.")] = Space.delta,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """One point of the path between two adapters."""
    import loraloom as ll

    point = ll.interpolate(ll.load(a), ll.load(b), at=at, space=space.value, same_base=not allow_different_bases)
    _save(point, out, overwrite, as_json)


@_command("prune")
def prune(
    adapter: One,
    out: Out,
    keep: Annotated[str, typer.Option(help="every-other, low, middle, high, or layers such as 0,2,5-7.")] = "",
    modules: Annotated[str, typer.Option(help="Projections to keep, with commas: q_proj,v_proj.")] = "",
    density: Annotated[float | None, typer.Option(help="Share of entries kept by magnitude, in (0, 1].")] = None,
    space: Annotated[Space, typer.Option(help="Whose entries: the factors' or the dense update's.")] = Space.factors,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the result, with --space delta.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Drop layers, projections or small entries of an adapter."""
    import loraloom as ll

    pruned = ll.prune(
        ll.load(adapter), keep=keep or None, modules=modules or None, density=density, space=space.value, rank=rank
    )
    _save(pruned, out, overwrite, as_json)


@_command("inspect")
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
        head = {key: value for key, value in one.items() if key != "layers"}
        _table(str(path), [head], as_json=False)
        _table("norm of the update by layer", one["layers"], as_json=False)
    if len(adapters) > 1:
        cosines = ll.cosines([ll.load(path) for path in adapters])
        names = [path.name for path in adapters]
        rows = [
            {"cosine": name, **dict(zip(names, row, strict=True))} for name, row in zip(names, cosines, strict=True)
        ]
        _table("cosine of the updates", rows, as_json=False)


@_command("report")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out")] = Path("report.html"),
    overwrite: Overwrite = False,
) -> None:
    """Make one self-contained page from results."""
    from loraloom.report import page

    print(page(runs, out, overwrite=overwrite))


@_command("list")
def list_(what: What, as_json: AsJson = False) -> None:
    """What there is, with its paper."""
    import loraloom as ll

    _table(what.value, ll.catalogue(what.value), as_json)


@_command("demo")
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for adapters, results and the page.")] = Path(
        "runs/demo"
    ),
    overwrite: Overwrite = False,
) -> None:
    """Train LoRA and CoTo adapters on bundled weights and data, merge, interpolate, prune, report."""
    from loraloom.demo import run

    run(out, overwrite=overwrite)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train, merge, interpolate and prune LoRA-family adapters."""
    if show:
        from loraloom import __version__

        print(__version__)
        raise typer.Exit


# --- printing ----------------------------------------------------------------------------------------------------


def _floats(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}: numbers with commas between them, such as 0.5,0.5") from None


def _save(adapter: Any, out: Path, overwrite: bool, as_json: bool) -> None:
    import loraloom as ll

    path = ll.save(adapter, out, overwrite=overwrite, command="loraloom " + " ".join(sys.argv[1:]))
    saved = ll.load(path)
    _result({"adapter": str(path), "kind": saved.kind, "modules": len(saved.modules)}, as_json)


def _result(values: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values))
    else:
        Console().print("  ".join(f"{key} {value}" for key, value in values.items()), soft_wrap=True, highlight=False)


def _table(title: str, rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in rows[0] if rows else ["nothing"]:
        table.add_column(
            column, overflow="fold", justify="right" if isinstance(rows[0][column], float | int) else "left"
        )
    for row in rows:
        table.add_row(*[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()])
    Console().print(table)


def main() -> None:
    """Entry point of the command ``loraloom``."""
    app()
