"""What all commands share: the application, options of one name and meaning, errors in one line, printing."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraloom import untrusted
from loraloom.registry import edge

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
Other = Annotated[Path, typer.Argument(metavar="B", help="Another adapter folder.", show_default=False)]
Many = Annotated[list[Path], typer.Argument(metavar="A B...", help="Adapter folders.", show_default=False)]
OtherBases = Annotated[bool, typer.Option("--allow-different-bases", help="Base models of different names.")]
Base = Annotated[Path | None, typer.Option("--base", help="Folder of the base model's weights.")]
Rank = Annotated[int | None, typer.Option(min=1, help="Rank of the result.")]
Energy = Annotated[float | None, typer.Option(help="Share of squared singular values kept, in (0, 1].")]
Budget = Annotated[str, typer.Option(help="Size of the result's factors: 10MB, 64MiB, 0.5x.")]
Device = Annotated[str, typer.Option("--device", help="Where to compute, such as cuda.")]
Density = Annotated[float | None, typer.Option(help="Share kept, in (0, 1].")]
Seed = Annotated[int, typer.Option(min=0, help="Of what is drawn.")]
Knobs = Annotated[list[str] | None, typer.Option("--set", help="A further argument of the method: name=value.")]
_SAID_FIRST = ("name", "summary")
Space = StrEnum("Space", ["factors", "delta", "core", "knots", "units"])
Plain = StrEnum("Plain", ["factors", "delta"])
Extras = StrEnum("Extras", ["refuse", "average"])
Whole = Annotated[Extras, typer.Option("--extras", help="Trained biases and whole saved modules of several adapters.")]


probe = typer.Typer(
    name="probe",
    help="Analyses of adapters; each writes a result that `loraloom report` shows.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(probe)


def command(name: str, on: typer.Typer = app) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose wrong requests end in one line and exit status 2."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(**arguments: Any) -> None:
            try:
                function(**arguments)
            except (ValueError, OSError) as error:
                if edge("processes").speaks(error):
                    print(f"loraloom {name}: {line_of(error)}", file=sys.stderr)
                raise typer.Exit(2) from None
            except RuntimeError:
                if not edge("processes").told():  # no fault of ours where another process has ended
                    raise
                raise typer.Exit(2) from None
            except KeyboardInterrupt as stop:
                resumes = name in ("train", "sweep")
                hint = "; the same command with --resume goes on" if resumes else f"; {stop}" if str(stop) else ""
                if edge("processes").speaks(stop):
                    print(f"loraloom {name}: stopped{hint}", file=sys.stderr)
                raise typer.Exit(130) from None

        return on.command(name.rsplit(maxsplit=1)[-1])(run)

    return decorate


def line_of(error: BaseException) -> str:
    """What went wrong, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def floats(option: str, text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}: numbers with commas between them, such as 0.5,0.5") from None


def knobs_of(method: str, density: float | None, given: Sequence[str] | None) -> dict[str, Any]:
    """What a merge method takes: the density, and arguments such as ``gamma=0.05``, of which the value is YAML."""
    from loraloom.ops.checks import check_knobs
    from loraloom.ops.merge_methods import merge_methods

    found: dict[str, Any] = {} if density is None else {"density": density}
    for one in given or ():
        name, equals, value = one.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set {one!r}: expected name=value")
        if name in found:
            raise ValueError(f"--set {one!r}: {name} is given twice")
        found[name] = untrusted.parse_yaml(value, f"--set {one!r}")
    check_knobs(merge_methods[method], found)
    return found


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file."""
    found = untrusted.read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object ({what}), got {type(found).__name__}")
    return found


def written() -> str:
    """The command line, for the record."""
    return shlex.join(["loraloom", *sys.argv[1:]])


def saved(adapter: Any, out: Path, overwrite: bool, as_json: bool, **more: Any) -> None:
    """Write an adapter and say what it is, with its error certificate if something was cut."""
    import loraloom as ll
    from loraloom.ops.certificate import total

    path = ll.save(adapter, out, overwrite=overwrite, command=written())
    held = ll.load(path)
    record = held.provenance.get("record") or {}
    values: dict[str, Any] = {"adapter": str(path), "kind": held.kind, "modules": len(held.modules), **more}
    told = ("entries", "entries_kept", "directions", "directions_kept", "density")
    reached = {key: record[key] for key in told if key in record}
    error = total(record)
    if error is not None:
        worst = max(record["error"], key=record["error"].__getitem__)
        reached |= {"error": error, "worst": record["error"][worst], "worst_module": worst}
    result(values | reached, as_json)


def result(values: Mapping[str, Any], as_json: bool) -> None:
    """Print one result on one line."""
    if as_json:
        print(json.dumps(values))
    else:
        Console().print(
            "  ".join(f"{key} {shown(value)}" for key, value in values.items()), soft_wrap=True, highlight=False
        )


def table(title: str, rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print rows that all have the same columns."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    grid = Table(title=title, title_justify="left", header_style="bold")
    for column in rows[0] if rows else ["nothing"]:
        grid.add_column(
            column, overflow="fold", justify="right" if isinstance(rows[0][column], float | int) else "left"
        )
    for row in rows:
        grid.add_row(*[shown(value) for value in row.values()])
    Console().print(grid)


def entries(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print named things: each name, below it its summary and what else is known of it."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    console = Console(highlight=False)
    for row in rows:
        known = {key.replace("_", " "): value for key, value in row.items() if value and key not in _SAID_FIRST}
        more = "; ".join(key if value is True else f"{key}: {shown(value)}" for key, value in known.items())
        console.print(Text(row["name"], style="bold"), soft_wrap=True)
        for text, style in ((row["summary"], ""), (more, "dim")):
            for line in textwrap.wrap(text, console.width - 2, break_long_words=False, break_on_hyphens=False):
                console.print(Text(f"  {line}", style=style), soft_wrap=True)


def shown(value: Any) -> str:
    """Four digits of a float, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
