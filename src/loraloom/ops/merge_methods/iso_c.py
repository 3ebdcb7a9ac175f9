"""Weighted sum with a flat spectrum."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.spectrum import triples


@merge_methods.register(
    "iso_c",
    paper="https://arxiv.org/abs/2502.04959",
    space="core",
    spaces=("core", "delta", "knots"),
    breaks=("single",),
)
def iso_c(deltas: Float[Tensor, " k m n"], weights: Float[Tensor, " k"]) -> Float[Tensor, " m n"]:
    """Weighted sum whose singular values are all replaced by their mean (Iso-C: Marczak et al. 2025).

    ``sum_i w_i D_i = U S V^T`` becomes ``mean(S) U V^T`` over the numerical rank: directions outside the span of the
    updates, which full-rank code would fill with arbitrary vectors, stay zero.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update; 1 each is the paper's sum.

    Example:
        >>> iso_c(torch.diag(torch.tensor([3.0, 1.0, 0.0]))[None], torch.ones(1)).diagonal()
        tensor([2., 2., 0.])
    """
    found = triples(torch.tensordot(weights, deltas, dims=1))
    if not len(found.values):
        return torch.zeros_like(deltas[0])
    return (found.values.mean() * found.left @ found.right.T).to(deltas.dtype)
