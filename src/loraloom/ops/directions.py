"""Which singular directions stay."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from loraloom.adapter import Adapter, Factors, Modules, padded, truncate
from loraloom.ops.certificate import note, note_dropped
from loraloom.ops.checks import check_gauge
from loraloom.ops.choice import groups
from loraloom.ops.merge import module_generator


def pruned_directions(
    adapter: Adapter, density: float, by: str, scope: str, seed: int, record: dict[str, Any]
) -> Modules:
    """The modules with ``round(density * n)`` of the n singular directions of each scope, at least one.

    PEFT gives all HiRA modules one rank: zeros fill them up to the largest. A density of 1 leaves modules as they are.

    Raises:
        ValueError: the adapter has no direction at all (every update is zero).
        UnsupportedKind: MokA.
    """
    check_gauge(adapter, "prune directions of")
    values = {name: adapter.modules[name].singular_values().tolist() for name in adapter.modules}
    total = sum(map(len, values.values()))
    if not total:
        raise ValueError("every update of the adapter is zero; there are no directions to prune")
    kept: dict[str, list[int]] = {}
    for pool in groups(list(adapter.modules), scope):
        order = []
        for at, name in enumerate(pool):
            chance = torch.rand(len(values[name]), generator=module_generator(seed, name)).tolist()
            score = values[name] if by == "magnitude" else chance
            order += [(-one, at, index) for index, one in enumerate(score)]
        for _, at, index in sorted(order)[: max(1, round(density * len(order)))]:
            kept.setdefault(pool[at], []).append(index)
    if density == 1:
        ranks = {name: adapter.shape(name).rank for name in values}
    else:
        ranks = {name: len(kept[name]) for name in values if name in kept}
    if adapter.kind == "hira":
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    record.update(directions=total, directions_kept=sum(map(len, kept.values())), error={}, norm={})
    note_dropped(record, {name: math.hypot(*values[name]) for name in values if name not in ranks})

    def read(name: str) -> Factors:
        factors, stays = adapter.modules[name], sorted(kept.get(name, []))
        if density == 1 or len(stays) == factors.rank:
            small, error = factors, 0.0
        elif by == "magnitude":
            small, error = truncate(factors, len(stays))
        else:
            u, s, vh = factors.svd()
            root = s[stays].sqrt()
            b, a = (u[:, stays] * root).to(factors.dtype), (root[:, None] * vh[stays]).to(factors.dtype)
            small, lost = replace(factors.baked(), B=b, A=a), (s.square().sum() - s[stays].square().sum()).clamp(min=0)
            error = float((lost / s.square().sum()).sqrt())
        note(record, name, error, small)
        if small.rank < ranks[name]:
            small = replace(small, B=padded(small.B, ranks[name]), A=padded(small.A.T, ranks[name]).T)
        return small

    return adapter.derived(tuple(ranks), read, lambda name: adapter.shape(name)._replace(rank=ranks[name]))
