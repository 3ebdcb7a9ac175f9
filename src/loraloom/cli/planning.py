"""The command that estimates what a recipe needs before it is run."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from loraloom.cli.shell import AsJson, command, table

Sharding = StrEnum("Sharding", ["ddp", "fsdp", "zero1", "zero2", "zero3"])


@command("plan")
def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", show_default=False)],
    world: Annotated[int, typer.Option(min=1, help="Number of processes, one a device.")] = 1,
    sharding: Annotated[Sharding, typer.Option(help="What is split over them.")] = Sharding.ddp,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: section.key=value.")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate parameters, memory, operations and communication of a recipe, without weights or data."""
    import loraloom as ll

    made = ll.plan(ll.read_recipe(recipe, set_ or []), world=world, sharding=sharding.value)
    if as_json:
        print(json.dumps(made.to_json()))
        return
    table(f"{made.model}: {made.kind}, {made.strategy}, {world} x {sharding.value}", _rows(made), as_json)


def _rows(made: Any) -> list[dict[str, str]]:
    memory, flops, sent = made.memory, made.flops, made.communication
    rows = [
        ("weights of the base", f"{made.parameters.base:,}"),
        ("trained weights", f"{made.parameters.trainable:,}"),
        ("memory a rank, as the recipe says", _gib(made.peak)),
        ("  base", _gib(memory.weights)),
        ("  adapter, gradients, optimizer", _gib(memory.static - memory.weights)),
        ("  activations, without checkpointing", _gib(memory.activations)),
        ("  activations, with checkpointing", _gib(memory.checkpoints + memory.block)),
        ("  logits at the start of backward", _gib(memory.logits)),
        ("  without checkpointing in all", _gib(memory.total(False))),
        ("  with checkpointing in all", _gib(memory.total(True))),
        ("operations a rank and step", f"{_tera(flops.forward + flops.backward)}"),
        ("  in the mean over the schedule", f"{_tera(flops.mean)}"),
        ("  checkpointing adds, in the mean", f"{_tera(flops.mean_recomputed)}"),
        ("sent a rank and step: gradients", _gib(sent.gradients)),
        ("  of active units, in the mean", _gib(sent.active_gradients)),
        ("sent a rank and step: weights", _gib(sent.weights)),
    ]
    return [{"what": what, "how much": much} for what, much in rows]


def _gib(size: float) -> str:
    return f"{size / 2**30:.4g} GiB"


def _tera(count: float) -> str:
    return f"{count / 1e12:.4g} TFLOP"
