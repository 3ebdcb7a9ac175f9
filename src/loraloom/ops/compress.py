"""Compressing an adapter: the best one of a lower rank, of a share of the energy, or within a number of bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import zip_longest
from typing import Any

from loraloom.adapter import Adapter, Factors, UnsupportedKind, spectrum
from loraloom.experts import owner_of, place_of
from loraloom.ops.certificate import note, note_dropped
from loraloom.ops.checks import check_device, check_gauge, check_size
from loraloom.registry import UnknownName
from loraloom.strategies.units import group

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def compress(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | str | None = None,
    scores: Mapping[str, float] | None = None,
    device: str | None = None,
) -> Adapter:
    """The best approximation of every update at a lower rank (Eckart and Young 1936), computed on the factors.

    - ``rank``: that of every module, where it has more.
    - ``energy``: each module keeps its largest singular values until their squares add up to this share of all. 1 drops
      only directions that are rounding (3e-7 of the largest, 1e-13 for float64).
    - ``budget``: all modules share a number of bytes; the direction with the largest ``s^2`` per byte is taken next,
      as long as it fits. A module that keeps none leaves the adapter; the certificate counts it as lost. Experts and
      groups of a convolution, which are stored at one rank, get one.

    A module that loses nothing stays as it is. DoRA's B A is compressed and its magnitude kept, HiRA's B A before it
    multiplies the base weight: the certificate is about B A. As PEFT gives all HiRA modules one rank, those keep the
    largest that any of them needs, and cannot share a budget.

    Args:
        adapter: of any kind but MokA.
        rank: a whole number of at least 1.
        energy: in (0, 1].
        budget: bytes of all factors, as a number or "10MB", "64MiB", or "0.5x" of what they take now.
        scores: how much a byte of each layer or module is worth, with ``budget`` (Shapley values, say); at least 0.
        device: where to compute ("cuda"); by default where the factors are. The result is in main memory then.

    Returns:
        A lazy adapter. ``provenance["record"]`` fills with ``error`` and ``norm`` by module as modules are read;
        rounding to the type of the factors is not in it.

    Raises:
        ValueError: not exactly one of rank, energy and budget, or one that is out of range; no such device.
        UnknownName: scores of a unit that is not there.
        UnsupportedKind: a budget for HiRA; MokA, whose attention sees the factors themselves.

    Example:
        >>> import torch
        >>> wide = Factors(B=torch.eye(3), A=torch.diag(torch.tensor([4.0, 3.0, 0.0])))
        >>> a = Adapter({"r": 3, "lora_alpha": 3}, {"layers.0.q": wide})
        >>> [compress(a, **how).shape("layers.0.q").rank for how in ({"rank": 2}, {"energy": 0.6}, {"budget": "0.4x"})]
        [2, 1, 1]
    """
    record: dict[str, Any] = {"error": {}, "norm": {}}
    arguments = {"rank": rank, "energy": energy, "budget": budget, "scores": None if scores is None else dict(scores)}
    provenance = {
        "operation": "compress",
        "arguments": {key: value for key, value in arguments.items() if value is not None},
        "inputs": [dict(adapter.provenance)],
        "record": record,
    }
    _check(rank, energy, budget, scores)
    check_gauge(adapter, "compress")
    check_device(device)
    if device is not None:
        adapter = adapter.on(device)
    if adapter.kind == "hira" and budget is not None:
        raise UnsupportedKind("HiRA modules must have one rank to be loaded by PEFT, so they cannot share a budget")
    if rank is not None:
        ranks = {name: min(rank, adapter.shape(name).rank) for name in adapter.modules}
    elif budget is not None:
        ranks, lost = _shared_out(adapter, budget, scores)
        note_dropped(record, lost)
    else:
        ranks = {}  # known when a module is read
    if adapter.kind == "hira" and len(set(ranks.values())) != 1:
        needed = ranks.values() or [enough(_squares(one), energy or 1.0) for one in adapter.modules.values()]
        ranks = dict.fromkeys(adapter.modules, max(needed))

    def read(name: str) -> Factors:
        factors = adapter.modules[name]
        asked = None
        if name in ranks and ranks[name] == factors.rank:
            small, error = factors, 0.0
        else:
            found = spectrum(factors)
            asked = float(found.values.norm())
            wanted = ranks[name] if name in ranks else enough(found.values.square().tolist(), energy or 1.0)
            small, error = (factors, 0.0) if wanted == factors.rank else found.cut(wanted)
        note(record, name, error, small, asked)
        return small

    names = tuple(ranks) or tuple(adapter.modules)
    shape = (lambda name: adapter.shape(name)._replace(rank=ranks[name])) if ranks else cache(lambda n: read(n).shape)
    config = {**adapter.config, "inference_mode": True}
    small = replace(adapter, config=config, modules=adapter.derived(names, read, shape), provenance=provenance)
    return small if device is None else small.on("cpu")


def _check(
    rank: int | None, energy: float | None, budget: int | str | None, scores: Mapping[str, float] | None
) -> None:
    if sum(value is not None for value in (rank, energy, budget)) != 1:
        raise ValueError("compress takes one of rank, energy and budget")
    check_size(rank, energy, budget)
    if scores is not None and budget is None:
        raise ValueError("scores share out a budget; give one")
    if budget is not None:
        _bytes(budget, 0)


def _squares(factors: Factors) -> list[float]:
    found: list[float] = factors.singular_values().square().tolist()
    return found


def enough(squares: Sequence[float], energy: float) -> int:
    """How many of the falling squares it takes to make up the share of their sum; at least one, and all for 1.

    Example:
        >>> enough([6.0, 3.0, 1.0], 0.7)
        2
    """
    whole, kept = math.fsum(squares), 0.0
    for count, square in enumerate(squares, start=1):
        kept += square
        if kept >= energy * whole * (1 - 1e-12) and (energy < 1 or count == len(squares)):
            return count
    return 1


def _bytes(budget: int | str, whole: int) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(budget).lower())
    if match is None or (match[2] != "x" and match[2] not in _UNITS):
        raise ValueError(f"budget {budget!r}: expected bytes such as 1000000, 10MB, 64MiB, or 0.5x of the present size")
    return float(match[1]) * (whole if match[2] == "x" else _UNITS[match[2]])


def _shared_out(
    adapter: Adapter, budget: int | str, scores: Mapping[str, float] | None
) -> tuple[dict[str, int], dict[str, float]]:
    """Rank by module: directions by falling gain per byte, as long as they fit; norms of the modules that keep none."""
    worth = _worth(adapter, scores)
    squares, sizes = {}, {}
    for name in adapter.modules:
        factors = adapter.modules[name]
        squares[name] = _squares(factors)
        sizes[name] = (factors.shape.out + factors.shape.in_) * factors.B.element_size()  # of one direction
    left = _bytes(budget, sum(size * adapter.shape(name).rank for name, size in sizes.items()))
    gains = {name: [worth[name] * s for s in each if worth[name] * s > 0] for name, each in squares.items()}
    pools = _pools(gains)
    if not pools:
        raise ValueError("a budget has nothing to share out: no module has both an update and a score above 0")
    costs = [sum({owner_of(name): place_of(name)[1] * sizes[name] for name in pool}.values()) for pool in pools]
    order = []
    for at, pool in enumerate(pools):
        steps = zip_longest(*(gains[name] for name in pool), fillvalue=0.0)
        order += [(-sum(step) / costs[at], at) for step in steps]
    taken = [0] * len(pools)
    for _, at in sorted(order):
        if costs[at] <= left:
            left -= costs[at]
            taken[at] += 1
    if not any(taken):
        raise ValueError(f"budget of {left:.0f} bytes keeps nothing; the smallest direction takes {min(costs)}")
    found = {
        name: min(rank, adapter.shape(name).rank) for rank, pool in zip(taken, pools, strict=True) for name in pool
    }
    ranks = {name: found[name] for name in squares if found.get(name)}
    return ranks, {name: math.fsum(each) ** 0.5 for name, each in squares.items() if name not in ranks}


def _pools(gains: Mapping[str, list[float]]) -> list[list[str]]:
    """Modules that get one rank: all experts and groups, as they are stored at the largest of any; others alone."""
    there = {owner_of(name) for name, each in gains.items() if each}
    pools: dict[str, list[str]] = {}
    for name in gains:
        owner = owner_of(name)
        if owner in there:
            pools.setdefault(name if owner == name else "", []).append(name)
    return list(pools.values())


def _worth(adapter: Adapter, scores: Mapping[str, float] | None) -> dict[str, float]:
    """The score of every module: its own, or that of its layer."""
    worth = dict.fromkeys(adapter.modules, 1.0)
    if scores is None:
        return worth
    layers = group(list(adapter.modules), "layer")
    for unit, score in scores.items():
        if unit not in worth and unit not in layers:
            raise UnknownName("unit", unit, [*layers, *worth])
        if not (math.isfinite(score) and score >= 0):
            raise ValueError(f"score of {unit} is {score}; scores must be finite and at least 0")
        worth.update(dict.fromkeys(layers.get(unit, (unit,)), float(score)))
    return worth
