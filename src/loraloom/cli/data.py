"""Commands for merges that look at data: measure, search, soup."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from loraloom.cli.shell import (
    AsJson,
    Density,
    Extras,
    Knobs,
    Many,
    One,
    Out,
    Overwrite,
    Seed,
    Space,
    Whole,
    command,
    knobs_of,
    saved,
)
from loraloom.registry import edge

Kind = StrEnum("Kind", ["gram", "fisher"])
Labels = StrEnum("Labels", ["model", "given"])
FisherSpace = StrEnum("FisherSpace", ["factors", "delta"])
Shared = StrEnum("Shared", ["adapter", "layer"])
Per = StrEnum("Per", ["module", "layer", "projection"])
Task = Annotated[str, typer.Option("--task", help="Whose examples to look at.", show_default=False)]
Model = Annotated[str, typer.Option(help="Base model; by default what the (first) adapter names.")]
Limit = Annotated[int, typer.Option(min=1, help="So many examples, the first ones.")]


@command("measure")
def measure(
    adapter: One,
    task: Task,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.", show_default=False)],
    kind: Annotated[Kind, typer.Option(help="gram for regmean, fisher for fisher.")] = Kind.gram,
    model: Model = "",
    limit: Limit = 256,
    labels: Annotated[Labels, typer.Option(help="Of fisher: the model's own, or the examples'.")] = Labels.model,
    space: Annotated[FisherSpace, typer.Option(help="Of fisher.")] = FisherSpace.factors,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Statistics of an adapter on its task, for merge methods that need them."""
    import loraloom as ll
    from loraloom.cli.shell import result
    from loraloom.recipe import read_task

    options: dict[str, Any] = {"model": model, "limit": limit, "labels": labels.value, "space": space.value}
    found = ll.measure(ll.load(adapter), read_task(task), kind=kind.value, **options)
    path = ll.save_statistics(found, out, overwrite=overwrite)
    result({"statistics": str(path), "kind": kind.value, "modules": len(found)}, as_json)


@command("search")
def search(
    adapters: Many,
    task: Task,
    out: Out,
    method: Annotated[str, typer.Option(help="See `loraloom list methods`.")] = "linear",
    space: Annotated[Space | None, typer.Option(help="Where the method works; default: the method's own.")] = None,
    density: Density = None,
    knobs: Knobs = None,
    budget: Annotated[int, typer.Option(min=1, help="How many merges to score.")] = 40,
    unit: Annotated[Shared, typer.Option(help="One weight per adapter, or per adapter and layer.")] = Shared.adapter,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    limit: Limit = 200,
    model: Model = "",
    seed: Seed = 0,
    extras: Whole = Extras.refuse,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Find merge weights by score, without gradients, and write the best merge."""
    import loraloom as ll
    from loraloom.recipe import read_task

    given = knobs_of(method, density, knobs)
    opened = [ll.load(path) for path in adapters]
    bench = edge("statistics").bench_for(opened[0], read_task(task), model)  # with the image size of training
    found = ll.search(
        opened,
        lambda adapter: bench.evaluate(adapter, split, limit).value,
        method=method,
        space=space.value if space else None,
        budget=budget,
        unit=unit.value,
        seed=seed,
        extras=extras.value,
        **given,
    )
    weights = json.dumps(found.to_json()["weights"])
    saved(found.adapter, out, overwrite, as_json, score=found.score, evaluations=found.evaluations, weights=weights)


@command("soup")
def soup(
    adapters: Many,
    task: Task,
    out: Out,
    per: Annotated[Per, typer.Option(help="What shares a weight.")] = Per.module,
    steps: Annotated[int, typer.Option(min=1, help="Of Adam, 8 examples each.")] = 100,
    lr: Annotated[float, typer.Option(help="Its learning rate.")] = 0.02,
    convex: Annotated[bool, typer.Option("--convex", help="Weights from 0 on that add up to 1.")] = False,
    limit: Limit = 64,
    model: Model = "",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Learn the weights of every module on a few examples, and write the merge (LoRA Soups)."""
    import loraloom as ll
    from loraloom.recipe import read_task

    opened = [ll.load(path) for path in adapters]
    options: dict[str, Any] = {"model": model, "limit": limit, "seed": seed}
    weights = ll.learn_weights(opened, read_task(task), per=per.value, steps=steps, lr=lr, convex=convex, **options)
    saved(ll.merge(opened, weights=weights), out, overwrite, as_json)
