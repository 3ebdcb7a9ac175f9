"""What a sweep does to finished adapters, as operators with their arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from loraloom.adapter import Adapter, Factors
from loraloom.ops.interpolate import interpolate
from loraloom.ops.merge import merge
from loraloom.ops.prune import prune
from loraloom.probes.game import uniforms, units_of
from loraloom.sweep.table import Sweep, Tasks

Base = Callable[..., Mapping[str, Tensor]]
_STREAM = 0x5377_6565  # the upper half of the generator's key: draws for other ends are another stream


@dataclass(frozen=True)
class Operation:
    """What is done to adapters before they are scored: nothing (``alone``), or an operator with its arguments."""

    name: str
    how: Literal["base", "alone", "interpolate", "merge", "tasks", "prune", "coalition"] = "alone"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def applied(self, adapters: Sequence[Adapter], base: Base | None = None) -> Adapter:
        """The adapter that is scored.

        Args:
            adapters: what is operated on.
            base: gives the weights of the base model under adapters; asked for where updates of DoRA are put
                together, whose magnitudes do not add.
        """
        joins = self.how in ("interpolate", "merge", "tasks") and self.arguments.get("space") != "factors"
        dora = joins and adapters[0].kind == "dora"
        on: dict[str, Any] = {"base": base(*adapters)} if dora and base is not None else {}
        if self.how == "interpolate":
            return interpolate(adapters[0], adapters[1], **self.arguments, **on)
        if self.how in ("merge", "tasks"):
            return merge(adapters, **self.arguments, **on)
        if self.how == "coalition":
            return _coalition(adapters[0], **self.arguments)
        return prune(adapters[0], **self.arguments) if self.how == "prune" else adapters[0]


def _coalition(adapter: Adapter, off: float, draw: int) -> Adapter:
    """The layers that are on in a draw; at least one is."""
    layers = list(units_of(adapter, "layer").values())
    drawn = uniforms(0, draw, len(layers), _STREAM)
    on = [names for names, u in zip(layers, drawn, strict=True) if u >= off or u == max(drawn)]
    return replace(adapter, modules={name: adapter.modules[name] for names in on for name in names})


BASE, ALONE = Operation("frozen model", "base"), Operation("alone")


def operations(sweep: Sweep) -> Iterator[Operation]:
    """What is done to finished adapters, in order."""
    asked = sweep.measure
    for space, at in product(asked.interpolate.spaces, asked.interpolate.at) if asked.interpolate else ():
        yield Operation(
            f"half way, {space}" if at == 0.5 else f"at {at:g}, {space}", "interpolate", {"at": at, "space": space}
        )
    for one in asked.merge:
        weights = [weight / sum(one.weights) for weight in one.weights]
        shares = ":".join(f"{weight:g}" for weight in one.weights)
        yield Operation(f"merge {shares}, {_told(one)}", "merge", {**_arguments(one), "weights": weights})
    for several in asked.tasks:
        yield Operation(f"tasks merged, {_told(several)}", "tasks", _arguments(several))
    for kept in asked.prune:
        arguments = kept.model_dump(exclude_defaults=True)
        told = ", ".join(str(value) if key == "keep" else f"{key} {value}" for key, value in arguments.items())
        yield Operation(f"kept: {told}", "prune", arguments)
    draws = asked.coalitions
    for off, draw in product(draws.off, range(draws.draws)) if draws else ():
        yield Operation(f"layers off with chance {off:g}", "coalition", {"off": off, "draw": draw})


def _arguments(one: Tasks) -> dict[str, Any]:
    return {"method": one.method, "space": one.space, **one.options}


def _told(one: Tasks) -> str:
    options = [f"{key} {value}" for key, value in one.options.items()]
    return " ".join([one.method, *([one.space] if one.space else []), *options])


def groups(sweep: Sweep, operation: Operation) -> list[tuple[int, ...]]:
    """The seeds that an operation takes together: consecutive ones, around; each set once where order says nothing."""
    weights = operation.arguments.get("weights", ())
    size = 2 if operation.how == "interpolate" else len(weights) or 1
    seeds, count = sweep.seeds, len(sweep.seeds)
    around = [tuple(seeds[(at + k) % count] for k in range(size)) for at in range(count)]
    alike = operation.how == "interpolate" or len(set(weights)) <= 1  # of two seeds there is one path
    return around[:1] if size == count and size > 1 and alike else around


def tried(operation: Operation, kind: str, tasks: int) -> None:
    """Do an operation once on tiny adapters, so that what it refuses is known before anything is trained.

    Raises:
        ValueError, TypeError: the operation's own.
    """
    told = str(operation.arguments.get("keep") or "") + str(operation.arguments.get("modules") or "")
    if kind in ("moka", "none") or "modules" in operation.arguments or any(one.isdigit() for one in told):
        return  # what it names is the model's
    magnitude = torch.ones(4) if kind == "dora" else None
    factors = Factors(B=torch.eye(4)[:, :2], A=torch.eye(4)[:2], magnitude=magnitude)
    config = {"r": 2, "peft_type": "HIRA" if kind == "hira" else "LORA", "use_dora": kind == "dora"}
    tiny = Adapter(config, {f"layers.{layer}.q": factors for layer in range(6)})
    count = {"interpolate": 2, "merge": len(operation.arguments.get("weights", ())), "tasks": tasks}
    weights = dict.fromkeys(tiny.modules, torch.eye(4))
    if operation.how == "prune" and "density" in operation.arguments:  # of so few entries a small share is none
        operation = replace(operation, arguments={**operation.arguments, "density": 0.5})
    operation.applied([tiny] * count.get(operation.how, 1), lambda *adapters: weights).loaded()
