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
    updates, which full-rank code would fill with arbitrary vectors, stay zero. A cut to a rank, an energy or a budget
    keeps the largest directions of the sum (see :func:`flattened`).

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update; 1 each is the paper's sum.

    Example:
        >>> iso_c(torch.diag(torch.tensor([3.0, 1.0, 0.0]))[None], torch.ones(1)).diagonal()
        tensor([2.0000, 2.0000, 0.0000])
    """
    found = triples(torch.tensordot(weights, deltas, dims=1))
    if not len(found.values):
        return torch.zeros_like(deltas[0])
    return (found.left * flattened(found.values, deltas.dtype) @ found.right.T).to(deltas.dtype)


def flattened(values: Float[Tensor, " p"], dtype: torch.dtype) -> Float[Tensor, " p"]:
    """Their mean, and 1e-5 (float64: 1e-11) of what they were: more than rounding, so that a cut knows their order.

    Example:
        >>> flattened(torch.tensor([300.0, 100.0]), torch.float32)
        tensor([200.0010, 199.9990])
    """
    return torch.lerp(values.mean(), values, 1e-11 if dtype == torch.float64 else 1e-5)
