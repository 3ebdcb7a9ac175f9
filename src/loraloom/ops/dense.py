"""From a dense update back to factors: a full SVD where that is small, block subspace iteration where it is not."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.adapter import padded
from loraloom.ops.spectrum import triples

_SMALL = 512  # up to here a full SVD takes a fraction of a second
_OVER = 16  # more directions than are asked for: the last of them converge slowly
_ROUNDS = 6
_GAIN = 1e-4  # iteration stops when the next round would add less than this share of the energy that is kept
_OUTSIDE = 1e-5  # a share of a matrix that is rounding


def low_rank(
    dense: Float[Tensor, "out in"], rank: int, start: Float[Tensor, "out p"] | None = None
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"], float]:
    """Factors of a dense matrix at a rank, and their exact relative error.

    Up to 512 on the smaller side, where the rank is a quarter of it, or where the columns of ``start`` span the
    matrix, the best of that rank by SVD. Otherwise block subspace iteration (Halko, Martinsson and Tropp 2011,
    algorithm 4.4) from ``start`` and random directions, until the next round would add less than 1e-4 of the energy
    that is kept (as the gains of the last two tell), at most 6 rounds: near the best, and deterministic. The singular
    values are split evenly, ``B = U sqrt(S)``; zero columns fill up to the rank.

    Args:
        dense: out x in, finite.
        rank: number of columns of B.
        start: columns that span a first guess of the column space.

    Returns:
        B, A and ``|dense - B A| / |dense|`` (0 for a zero matrix).

    Example:
        >>> b, a, error = low_rank(torch.diag(torch.tensor([3.0, 4.0])), 1)
        >>> (b @ a).diagonal().round(), round(error, 3)
        (tensor([0., 4.]), 0.6)
    """
    size = min(dense.shape)
    found = None if start is None or not rank <= start.shape[1] < size else _spanned(dense, start)
    if found is not None or size <= _SMALL or 4 * rank >= size:
        u, s, vh = torch.linalg.svd(dense, full_matrices=False) if found is None else found
        total, tail = float(s.norm()), float(s[rank:].norm())
        error = tail / total if total > 0 else 0.0
    else:
        u, s, vh = _iterated(dense, rank, start)
        error = -1.0
    root = s[:rank].sqrt()
    b, a = u[:, :rank] * root, root[:, None] * vh[:rank]
    if error < 0:
        error = _error(dense, b, a, s[:rank])
    return padded(b, rank), padded(a.T, rank).T, error


def _spanned(dense: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Singular triples of a matrix that lies in the span of the columns of ``start``; None where a look says no."""
    q = torch.linalg.qr(start.double()).Q.to(dense)
    generator = torch.Generator().manual_seed(0)
    seen = dense @ torch.randn(dense.shape[1], 4, generator=generator, dtype=dense.dtype).to(dense.device)
    if (seen - q @ (q.T @ seen)).norm() > _OUTSIDE * seen.norm():
        return None
    left, values, right = (each.to(dense) for each in triples(q.T @ dense, 10 * torch.finfo(dense.dtype).eps))
    return q @ left, values, right.T


def _iterated(dense: Tensor, rank: int, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triples of a large matrix, a few more than ``rank``."""
    generator = torch.Generator().manual_seed(0)
    held = 0 if start is None else min(start.shape[1], rank)
    draw = torch.randn(dense.shape[1], rank + _OVER - held, generator=generator, dtype=dense.dtype).to(dense.device)
    first = dense @ draw
    if start is not None and held:
        first = torch.cat([start.to(dense)[:, :held] / start.to(dense).norm().clamp(min=1e-30), first], dim=1)
    left, energy, gains = torch.linalg.qr(first).Q, 0.0, [0.0]
    for going_on in reversed(range(1 + _ROUNDS)):
        right, triangle = torch.linalg.qr(dense.T @ left)
        u, s, vh = torch.linalg.svd(triangle.T, full_matrices=False)
        caught = float(s[:rank].double().square().sum())  # what is kept: the directions beyond it turn for much longer
        gains.append(caught - energy)
        expected = gains[-1] * (min(gains[-1] / gains[-2], 1.0) if len(gains) > 3 else 1.0)
        if expected <= caught * _GAIN or not going_on:
            break
        left, energy = torch.linalg.qr(dense @ right).Q, caught
    return left @ u, s, vh @ right.T


def _error(dense: Tensor, b: Tensor, a: Tensor, values: Tensor) -> float:
    """Relative error of a projection: by Pythagoras, or where little is left from the difference itself."""
    whole = sum(float(rows.double().square().sum()) for rows in dense.split(64))
    lost = whole - float(values.double().square().sum())
    if lost < 1e-3 * whole:
        lost = sum(
            float((rows - left @ a).double().square().sum())
            for rows, left in zip(dense.split(64), b.split(64), strict=True)
        )
    return (lost / whole) ** 0.5 if whole > 0 else 0.0
