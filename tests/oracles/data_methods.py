"""Slow, obvious versions of the merges that need data: least squares on the inputs themselves, one entry at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def inputs(seed: int, rows: int, columns: int, count: int) -> list[np.ndarray]:
    """Inputs of ``count`` tasks, rows x columns, of very unequal columns."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(rows, columns)) * rng.uniform(0.1, 3, size=columns) for _ in range(count)]


def grams(data: list[np.ndarray]) -> Tensor:
    return torch.stack([torch.from_numpy(x.T @ x / len(x)) for x in data])


def regression(deltas: Tensor, weights: list[float], data: list[np.ndarray], alpha: float) -> np.ndarray:
    """The D of least ``sum |w| |X (D - sign(w) D_t)^T|^2 / rows``, of equal ones the nearest to the weighted mean.

    The shrunk Gram matrix is that of ``sqrt(alpha) X`` with ``sqrt(1 - alpha)`` times one row more for each column.
    """
    total = sum(abs(w) for w in weights)
    mean = sum(w * d.numpy() for w, d in zip(weights, deltas, strict=True)) / total
    left, right = [], []
    for weight, delta, x in zip(weights, deltas, data, strict=True):
        alone = np.diag(np.sqrt((x**2).sum(axis=0)))
        rows = np.concatenate([alpha**0.5 * x, (1 - alpha) ** 0.5 * alone]) * (abs(weight) / len(x)) ** 0.5
        left.append(rows)
        right.append(rows @ (np.sign(weight) * delta.numpy() - mean).T)
    away, *_ = np.linalg.lstsq(np.concatenate(left), np.concatenate(right), rcond=1e-9)
    return total * (mean + away.T)


def by_information(deltas: Tensor, weights: list[float], information: Tensor) -> Tensor:
    """Entry by entry: ``sum w F d / sum |w| F``, the weighted mean where no F is above 0, times the sum of weights."""
    total = sum(abs(w) for w in weights)
    result = torch.zeros(deltas[0].numel(), dtype=torch.float64)
    flat, known = deltas.flatten(1).tolist(), information.flatten(1).tolist()
    for at in range(len(result)):
        shares = [abs(w) * f[at] for w, f in zip(weights, known, strict=True)]
        if sum(shares) == 0:
            shares = [abs(w) for w in weights]
        signed = [(d[at] if w > 0 else -d[at]) for w, d in zip(weights, flat, strict=True)]
        result[at] = total * sum(s * d for s, d in zip(shares, signed, strict=True)) / sum(shares)
    return result.view(deltas.shape[1:])
