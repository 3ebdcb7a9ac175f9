"""Which modules stay: by name (layers, thirds, projections), or by score."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loraloom.adapter import Adapter
from loraloom.ops.merge import module_generator
from loraloom.registry import UnknownName
from loraloom.strategies.units import base_path, group, role, tower

KEEPS = ("every-other", "low", "middle", "high")
SCOPES = ("model", "layer", "projection", "module")


def groups(names: Sequence[str], scope: str) -> list[tuple[str, ...]]:
    """The modules over which a density holds together.

    Example:
        >>> groups(["layers.0.q", "layers.0.v", "layers.1.q"], "layer")
        [('layers.0.q', 'layers.0.v'), ('layers.1.q',)]
    """
    if scope == "model":
        return [tuple(names)]
    return [(name,) for name in names] if scope == "module" else list(group(names, scope).values())


def scored(adapter: Adapter, unit: str, by: str | Mapping[str, Any], seed: int) -> dict[str, float]:
    """A score for every layer or module: the norm of its update, chance, or what was given.

    Raises:
        UnknownName: a score of a unit that is not there.
        ValueError: a unit has no score, or one that is not finite.
    """
    units = group(list(adapter.modules), unit)
    if by == "magnitude":
        return {u: math.hypot(*(adapter.modules[name].norm() for name in names)) for u, names in units.items()}
    if isinstance(by, str):
        return {u: float(torch.rand((), generator=module_generator(seed, u))) for u in units}
    given = dict(zip(by["units"], by["values"], strict=True)) if {"units", "values"} <= set(by) else dict(by)
    for u, score in given.items():
        if u not in units:
            raise UnknownName(unit, u, list(units))
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"score of {u} is {score!r}; scores must be finite numbers")
    for u in units:
        if u not in given:
            raise ValueError(f"{unit} {u} has no score; every {unit} of the adapter needs one")
    return {u: float(given[u]) for u in units}


def ranked(
    adapter: Adapter, unit: str, scores: Mapping[str, float], density: float, scope: str
) -> tuple[list[str], list[str]]:
    """Modules and units that stay: of each scope the share with the highest scores, at least one, of equals the first.

    Raises:
        ValueError: the scope is not larger than the unit.
    """
    units = group(list(adapter.modules), unit)
    if scope != "model" and (scope, unit) != ("layer", "module"):
        raise ValueError(f"scope {scope!r} holds no choice of unit {unit!r}; allowed: model, or layer for modules")
    pools = [tuple(units)] if scope == "model" else groups(list(units), scope)
    kept: set[str] = set()
    for pool in pools:
        order = sorted(pool, key=lambda u: -scores[u])  # stable: of equals the first
        kept.update(order[: max(1, round(density * len(pool)))])
    stays = {name for u in kept for name in units[u]}
    return [name for name in adapter.modules if name in stays], [u for u in units if u in kept]


def chosen(adapter: Adapter, keep: str | None, modules: str | Sequence[str] | None) -> list[str]:
    """Modules that stay by name: those of the layers ``keep`` and of the projections ``modules``.

    Raises:
        ValueError, UnknownName: nothing would stay, or a name is not there.
    """
    names = list(adapter.modules)
    if not names:
        raise ValueError("the adapter has no modules to prune")
    layers = set(names) if keep is None else _by_layer(names, keep)
    projections = set(names) if modules is None else _by_projection(names, modules)
    chosen = [name for name in names if name in layers and name in projections]
    if not chosen:
        asked = ", ".join(f"{k}={v!r}" for k, v in (("keep", keep), ("modules", modules)) if v is not None)
        raise ValueError(f"{asked} keeps none of the {len(names)} modules")
    return chosen


def _by_layer(names: Sequence[str], keep: str) -> set[str]:
    """The modules of the layers that stay, and those that are in no numbered layer."""
    towers: dict[str, list[tuple[int, tuple[str, ...]]]] = {}  # layers with their numbers, in natural order
    kept: set[str] = set()
    units = group(names, "layer")
    for unit, members in units.items():
        numbers = [int(part) for part in unit.split(".") if part.isdecimal()]
        if not numbers:
            kept.update(members)
            continue
        layers = towers.setdefault(tower(unit), [])
        layers.append((numbers[0] if len(numbers) == 1 else len(layers), members))
    if not towers:
        raise ValueError(f"keep={keep!r}: none of the {len(names)} modules is in a numbered layer")
    if keep in KEEPS:
        picked = [members for layers in towers.values() for _, members in _picked(layers, keep)]
        if not picked:
            most = max(len(layers) for layers in towers.values())
            raise ValueError(f"keep={keep!r} keeps no layer of {most}")
    else:
        numbers_there = {number for layers in towers.values() for number, _ in layers}
        wanted = _numbers(keep, numbers_there)
        picked = [members for layers in towers.values() for number, members in layers if number in wanted]
    return kept.union(*picked)


def _picked(layers: list, keep: str) -> list:
    if keep == "every-other":
        return layers[::2]
    third = KEEPS.index(keep) - 1
    start, stop = ((at * len(layers) + 1) // 3 for at in (third, third + 1))  # to the nearest: 3, 4, 3 of 10
    return layers[start:stop]


def _numbers(keep: str, there: set[int]) -> set[int]:
    """Layer numbers of "0,2,5-7"; each number and each range must name a layer."""
    wanted: set[int] = set()
    for part in keep.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise UnknownName("keep", keep, [*KEEPS, "layer numbers such as 0,2,5-7"])
        low, high = int(match[1]), int(match[2] or match[1])
        found = {number for number in there if low <= number <= high}
        if not found:
            raise ValueError(f"keep={keep!r}: {part.strip()} names no layer; layers are {_ranges(sorted(there))}")
        wanted |= found
    return wanted


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers in short: 0-3,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _by_projection(names: Sequence[str], modules: str | Sequence[str]) -> set[str]:
    wanted = [part.strip() for part in (modules.split(",") if isinstance(modules, str) else modules)]
    kept: set[str] = set()
    for projection in wanted:
        found = [name for name in names if projection in (role(name), base_path(name).split(".")[-1])]
        if not found:
            raise UnknownName("projection", projection, sorted({role(name) for name in names}))
        kept.update(found)
    return kept
