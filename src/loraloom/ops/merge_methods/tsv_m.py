"""Singular triples of all tasks, made orthogonal."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.spectrum import polar, triples


@merge_methods.register(
    "tsv_m",
    paper="https://arxiv.org/abs/2412.00081",
    space="core",
    spaces=("core", "delta"),
    lacks="knots: an adapter's singular values are all 1 there unless its B depends on others; none are the largest",
)
def tsv_m(
    deltas: Float[Tensor, " k m n"], weights: Float[Tensor, " k"], *, density: float = 1.0
) -> Float[Tensor, " m n"]:
    """Task singular vectors, decorrelated before they are summed (TSV-M: Gargiulo et al. 2025).

    Of every update the ``ceil(density * rank)`` largest singular triples stay. The left vectors of all are put side by
    side and replaced by the nearest orthonormal set (polar factor ``U V^T``), so are the right ones; the result is
    ``U_o diag(w_1 S_1, ..., w_k S_k) V_o^T``. The authors' code keeps ``n // k`` triples of an n x n update; of core
    matrices, n the sum of the ranks, that is all there are.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update; they multiply its singular values.
        density: share of each update's singular triples kept, in (0, 1].

    Example:
        >>> a, b = torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 3.0]))
        >>> tsv_m(torch.stack([a, b]), torch.ones(2))
        tensor([[2., 0.],
                [0., 3.]])
    """
    found = [triples(delta) for delta in deltas]
    found = [one.first(-int(-density * len(one.values) // 1)) for one in found]
    left = polar(torch.cat([one.left for one in found], dim=1).to(deltas.dtype))
    right = polar(torch.cat([one.right for one in found], dim=1).to(deltas.dtype))
    values = torch.cat([float(weight) * one.values for weight, one in zip(weights, found, strict=True)])
    return ((left * values) @ right.T).to(deltas.dtype)
