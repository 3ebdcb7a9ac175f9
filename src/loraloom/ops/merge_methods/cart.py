"""Weighted sum with low-rank deviations from the mean."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.spectrum import triples


@merge_methods.register(
    "cart", paper="https://arxiv.org/abs/2412.12153", space="core", spaces=("core", "delta", "knots")
)
def cart(
    deltas: Float[Tensor, " k m n"],
    weights: Float[Tensor, " k"],
    *,
    density: float = 0.1,
    gain: float = 1.0,
) -> Float[Tensor, " m n"]:
    """Mean plus truncated deviations from it (CART: Choi et al. 2024: centred arithmetic, rank-reduced).

    With the mean ``M = sum |w_i| D_i / sum |w_i|`` the result is ``sum_i w_i (M + k gain SVD_p(D_i - M))``, where SVD_p
    keeps the ``ceil(density * rank)`` largest singular triples of a deviation, and those as large as the last of them.
    Equal weights 1/k give the paper's ``M + lambda sum_i SVD_p(D_i - M)`` with ``gain`` for lambda.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update.
        density: share of each deviation's singular triples kept, in (0, 1].
        gain: the paper's lambda.

    Example:
        >>> updates = torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 1.0]))])
        >>> cart(updates, torch.tensor([0.5, 0.5])).diagonal()
        tensor([2., 1.])
    """
    size = weights.abs().sum()
    if size == 0:
        return torch.zeros_like(deltas[0])
    mean = torch.tensordot(weights.abs() / size, deltas, dims=1)
    total = weights.sum() * mean
    for delta, weight in zip(deltas, weights, strict=True):
        apart = triples(delta - mean)
        if len(apart.values) and apart.values[0] > 1e-6 * float(delta.norm()):  # not just rounding
            last = apart.values[-int(-density * len(apart.values) // 1) - 1]
            kept = apart.first(int((apart.values > last * (1 - 1e-5)).sum()))
            total = total + (len(deltas) * gain * weight * kept.matrix()).to(deltas.dtype)
    return total
