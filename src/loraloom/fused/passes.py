"""Pieces of forward and backward passes that the fused layers share (here, and ``strategies/rankback.py``).

``low`` is the A's of layers on one input, one below the other, (r, in); ``flat`` that input, (tokens, in); ``kept``
which of its entries dropout left, None without dropout; ``p`` the dropout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def each(tensors: Sequence[Any], width: int) -> Iterator[tuple]:
    """So many at a time: autograd takes and gives the tensors of all layers in a row."""
    return zip(*[iter(tensors)] * width, strict=True)


def rows(x: Tensor) -> Tensor:
    """(tokens, columns)."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def placed(y: Tensor, x: Tensor) -> Tensor:
    """Rows in the places that they have in ``x``; no view, as nobody could change one of a function in place."""
    return y.view(*x.shape[:-1], y.shape[-1]).detach()


def in_kind(x: Tensor, kind: torch.dtype) -> Tensor:
    """``x.to(kind)``, at once where there is nothing to do: layers are many."""
    return x if x.dtype is kind else x.to(kind)


def stacked(matrices: Sequence[Tensor], kind: torch.dtype) -> Tensor:
    """One below the other."""
    return in_kind(matrices[0] if len(matrices) == 1 else torch.cat(list(matrices)), kind)


def apart(x: Tensor, lows: Sequence[Tensor], dim: int) -> Sequence[Tensor]:
    """What belongs to each A."""
    return (x,) if len(lows) == 1 else x.split([len(a) for a in lows], dim)


def down(x: Tensor, flat: Tensor, low: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """``A x``, and which entries of x dropout left; drawn for x as it lies in memory, as torch draws."""
    kept = rows(F.dropout(torch.ones_like(x, dtype=low.dtype), p) != 0) if p else None
    return dropped(in_kind(flat, low.dtype), kept, p) @ low.T, kept


def of_lows(ctx: Any, x: Tensor, kept: Tensor | None, up: Tensor) -> Tensor:
    """The gradient of the A's, one below the other, of that of ``A x``."""
    seen = in_kind(in_kind(rows(x), ctx.dtype or x.dtype), up.dtype)
    return torch.mm(up.T, dropped(seen, kept, ctx.p))


def with_update(through: Tensor, up: Tensor, low: Tensor, kept: Tensor | None, p: float) -> Tensor:
    """The gradient of x through the base, and now through the A's; in place where the types are the same."""
    if kept is None:
        return plus(through, up, low, 1.0)
    return through.add_(dropped(torch.mm(up, low), kept, p))


def plus(base: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``base + scale * left @ right`` in the type of ``base``, in place where the types are the same."""
    if base.dtype == left.dtype:
        return base.addmm_(left, right, alpha=scale)
    return torch.addmm(base.to(left.dtype), left, right, alpha=scale).to(base.dtype)


def dropped(x: Tensor, kept: Tensor | None, p: float) -> Tensor:
    """x as dropout left it."""
    return x if kept is None else x * kept / (1 - p)
