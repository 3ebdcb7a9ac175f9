"""Commands from adapters to an adapter: merge, interpolate, prune, compress, align, scale, subtract."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from loraloom.cli.shell import (
    AsJson,
    Base,
    Budget,
    Density,
    Device,
    Energy,
    Extras,
    Knobs,
    Many,
    One,
    Other,
    OtherBases,
    Out,
    Overwrite,
    Plain,
    Rank,
    Seed,
    Space,
    Whole,
    command,
    floats,
    knobs_of,
    read_json,
    saved,
)

Unit = StrEnum("Unit", ["entry", "rank", "layer", "module"])
Scope = StrEnum("Scope", ["model", "layer", "projection", "module"])
PruneSpace = StrEnum("PruneSpace", ["factors", "balanced", "delta"])
Gauge = StrEnum("Gauge", ["orthogonal", "invertible"])


@command("merge")
def merge(
    adapters: Many,
    out: Out,
    method: Annotated[str, typer.Option(help="See `loraloom list methods`.")] = "linear",
    weights: Annotated[
        str, typer.Option(help="One number per adapter, with commas, or a JSON file by module; default 1/k each.")
    ] = "",
    density: Density = None,
    knobs: Knobs = None,
    rank: Rank = None,
    energy: Energy = None,
    budget: Budget = "",
    space: Annotated[Space | None, typer.Option(help="Where the method works; default: the method's own.")] = None,
    seed: Seed = 0,
    statistics: Annotated[
        list[Path] | None, typer.Option(help="A file of `loraloom measure`; one per adapter.")
    ] = None,
    base: Base = None,
    device: Device = "",
    extras: Whole = Extras.refuse,
    allow_different_bases: OtherBases = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Merge adapters into one; no base model is needed, but for DoRA."""
    import loraloom as ll

    opened = [ll.load(path) for path in adapters]
    merged = ll.merge(
        opened,
        method=method,
        weights=_weights(weights),
        rank=rank,
        energy=energy,
        budget=budget or None,
        space=space.value if space else None,
        seed=seed,
        statistics=[ll.load_statistics(path) for path in statistics] if statistics else None,
        base=ll.base_weights(base, *opened) if base else None,
        device=device or None,
        extras=extras.value,
        same_base=not allow_different_bases,
        **knobs_of(method, density, knobs),
    )
    saved(merged, out, overwrite, as_json)


def _weights(text: str) -> Any:
    if not text:
        return None
    return read_json(Path(text), "weights by module") if text.endswith(".json") else floats("--weights", text)


@command("interpolate")
def interpolate(
    a: One,
    b: Other,
    out: Out,
    at: Annotated[float, typer.Option("--at", help="0 is A, 1 is B.")] = 0.5,
    via: Annotated[Path | None, typer.Option(help="A third adapter: the control point of a Bezier curve.")] = None,
    space: Annotated[Plain, typer.Option(help="factors: (1-t)B_a + t B_b and so A; delta: the updates.")] = Plain.delta,
    align: Annotated[Gauge | None, typer.Option(help="Bring B to A's gauge first, for --space factors.")] = None,
    base: Base = None,
    device: Device = "",
    extras: Whole = Extras.refuse,
    allow_different_bases: OtherBases = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """One point of the path between two adapters; no base model is needed, but for DoRA."""
    import loraloom as ll

    opened = [ll.load(path) for path in (a, b, via) if path]
    point = ll.interpolate(
        opened[0],
        opened[1],
        at=at,
        via=opened[2] if via else None,
        space=space.value,
        align=align.value if align else None,
        base=ll.base_weights(base, *opened) if base else None,
        device=device or None,
        extras=extras.value,
        same_base=not allow_different_bases,
    )
    saved(point, out, overwrite, as_json)


@command("prune")
def prune(
    adapter: One,
    out: Out,
    keep: Annotated[str, typer.Option(help="every-other, low, middle, high, or layers such as 0,2,5-7.")] = "",
    modules: Annotated[str, typer.Option(help="Projections to keep, with commas: q_proj,v_proj.")] = "",
    density: Annotated[float | None, typer.Option(help="Share of units kept, in (0, 1].")] = None,
    unit: Annotated[Unit, typer.Option(help="What is kept or dropped: entries, singular directions, ...")] = Unit.entry,
    by: Annotated[
        str,
        typer.Option(help="magnitude, random, or a JSON file of scores by unit, such as `loraloom probe shapley`'s."),
    ] = "magnitude",
    scope: Annotated[Scope, typer.Option(help="Over what the density holds.")] = Scope.model,
    pattern: Annotated[str, typer.Option(help="N:M, the N largest of every M entries of a row, such as 2:4.")] = "",
    space: Annotated[
        PruneSpace, typer.Option(help="Whose entries: the factors' as stored or balanced, or the dense update's.")
    ] = PruneSpace.factors,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the result, with --space delta.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Drop layers, projections, singular directions or small entries of an adapter."""
    import loraloom as ll
    from loraloom.probing import scores_in

    pruned = ll.prune(
        ll.load(adapter),
        keep=keep or None,
        modules=modules or None,
        density=density,
        unit=unit.value,
        by=scores_in(read_json(Path(by), "scores by unit"), by) if by.endswith(".json") else by,
        scope=scope.value,
        pattern=pattern or None,
        space=space.value,
        rank=rank,
        seed=seed,
    )
    saved(pruned, out, overwrite, as_json)


@command("compress")
def compress(
    adapter: One,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    budget: Budget = "",
    scores: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of scores by unit that weigh the budget, such as `loraloom probe shapley`'s (there those "
            "below 0 count as 0)."
        ),
    ] = None,
    device: Device = "",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """The best adapter of lower rank, by SVD of the factors."""
    import loraloom as ll
    from loraloom.probing import scores_in

    small = ll.compress(
        ll.load(adapter),
        rank=rank,
        energy=energy,
        budget=budget or None,
        scores=scores_in(read_json(scores, "scores by unit"), str(scores), least=0.0) if scores else None,
        device=device or None,
    )
    saved(small, out, overwrite, as_json)


@command("align")
def align(
    adapter: One,
    to: Annotated[Path, typer.Option("--to", help="The adapter whose factors to come near.", show_default=False)],
    out: Out,
    by: Annotated[Gauge, typer.Option(help="Which changes of gauge are allowed.")] = Gauge.invertible,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """The same update in factors that are near those of another adapter."""
    import loraloom as ll

    saved(ll.align(ll.load(adapter), to=ll.load(to), by=by.value), out, overwrite, as_json)


@command("scale")
def scale(
    adapter: One,
    out: Out,
    by: Annotated[float, typer.Option("--by", help="The factor; -1 turns the adapter round.", show_default=False)],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Every update times a number."""
    import loraloom as ll

    saved(ll.scale(ll.load(adapter), by), out, overwrite, as_json)


@command("subtract")
def subtract(
    a: One,
    b: Other,
    out: Out,
    weight: Annotated[float, typer.Option(help="How much of B to take away.")] = 1.0,
    allow_different_bases: OtherBases = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """A minus B, exactly."""
    import loraloom as ll

    left = ll.subtract(ll.load(a), ll.load(b), weight, same_base=not allow_different_bases)
    saved(left, out, overwrite, as_json)
