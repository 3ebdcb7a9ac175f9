"""MokA token by token, as the paper's eq. 4 to 12 read: slow, in float64, with loops over rows and tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loraloom.strategies.modality import MokA

Flags = list[list[bool]]


def looked_at(
    plan: MokA,
    types: Tensor,
    labels: Tensor | None = None,
    question: Tensor | None = None,
    ids: Tensor | None = None,
    segments: Tensor | None = None,
    prompt: int | None = None,
) -> Flags:
    """Whether each token is text that may be looked at."""
    rows, tokens = types.shape
    found = []
    for b in range(rows):
        line = []
        for s in range(tokens):
            mine = [t for t in range(tokens) if segments is None or segments[b, t] == segments[b, s]]
            answered = labels is not None and any(labels[b, t] != -100 for t in mine if t <= s)
            if types[b, s] != 0:
                line.append(False)
            elif question is not None:
                line.append(bool(question[b, s]))
            elif plan.keys == "span":
                markers = [int(ids[b, t]) for t in range(s + 1) if int(ids[b, t]) in plan.span]
                opened = markers[-1:] == [plan.span[0]] and int(ids[b, s]) != plan.span[0]
                line.append(opened and (labels is None or int(labels[b, s]) == -100))
            else:
                followed = plan.keys == "after-last-modality" and any(types[b, t] > 0 for t in mine if t >= s)
                line.append(not answered and not followed and (prompt is None or s < prompt))
        found.append(line)
    return found


def hidden(plan: MokA, a: Tensor, x: Tensor, types: Tensor, looked: Flags, segments: Tensor | None = None) -> Tensor:
    """What B is applied to: rows x tokens x columns of B."""
    rows, tokens = types.shape
    first = [sum(plan.ranks[:number]) for number in range(len(plan.ranks))]
    kinds = types.clamp(min=0)
    entered = torch.zeros(rows, tokens, plan.width, dtype=x.dtype)
    for b in range(rows):
        for s in range(tokens):
            number = int(kinds[b, s])
            mine = a if plan.own == "B" else a[first[number] : first[number] + plan.ranks[number]]
            entered[b, s, : len(mine)] = mine @ x[b, s]
    out = torch.zeros(rows, tokens, plan.columns, dtype=x.dtype)
    for b in range(rows):
        for s in range(tokens):
            same = [t for t in range(tokens) if segments is None or segments[b, t] == segments[b, s]]
            total = entered[b, s].clone()
            for number in range(1, len(plan.groups)):
                if plan.attention == "text-as-query":
                    asks, seen = looked[b][s], [t for t in same if types[b, t] == number]
                else:
                    asks, seen = int(types[b, s]) == number, [t for t in same if looked[b][t]]
                if plan.attention != "none" and asks and seen:
                    total += plan.weights[number] * _found(plan, number, entered[b, s], entered[b, seen])
            if plan.active is not None and not set(plan.groups[int(kinds[b, s])].split("+")) & set(plan.active):
                total = torch.zeros_like(total)
            left = 0 if plan.own == "A" else int(kinds[b, s]) * plan.width
            out[b, s, left : left + plan.width] = total
    return out


def _found(plan: MokA, number: int, query: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """softmax(q K^T / sqrt(r)) K, head by head."""
    size = plan.width // plan.heads
    rank = min(plan.ranks[0], plan.ranks[number]) / plan.heads
    parts = []
    for head in range(plan.heads):
        here = slice(head * size, (head + 1) * size)
        logits = [float(query[here] @ key[here]) / math.sqrt(rank) for key in keys]
        if plan.logits == "official":
            logits = [logit * plan.scale**2 for logit in logits]
        if plan.attention == "uniform":
            logits = [0.0 for _ in logits]
        powers = [math.exp(logit - max(logits)) for logit in logits]
        parts.append(sum(power / sum(powers) * key[here] for power, key in zip(powers, keys, strict=True)))
    return torch.cat(parts)
