"""Compress to shared subspaces, then merge."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import inner_method, merge_methods
from loraloom.ops.spectrum import triples


@merge_methods.register(
    "ctm", paper="https://arxiv.org/abs/2606.03723", space="core", spaces=("core", "delta"), rank="largest"
)
def ctm(
    deltas: Float[Tensor, " k m n"],
    weights: Float[Tensor, " k"],
    *,
    inner: str = "linear",
    size: int | None = None,
) -> Float[Tensor, " m n"]:
    """Project onto shared subspaces, merge the small coordinates (compress then merge: He et al. 2026).

    U and V are the first r left singular vectors of the updates side by side, and right ones of the updates on top of
    each other. The r x r coordinates ``U^T D_t V`` are merged by another method; the result ``U C V^T`` has rank r by
    construction. The paper's abstract says this much; how it weighs the adapters for the subspaces was not at hand.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update, for the inner method.
        inner: the merge method for the coordinates, one that neither draws nor needs statistics.
        size: r; by default the largest rank of an update.

    Raises:
        ValueError: ``size`` is below 1, or ``inner`` is no such method.

    Example:
        >>> a, b = torch.diag(torch.tensor([3.0, 0.0, 0.0])), torch.diag(torch.tensor([1.0, 0.0, 0.0]))
        >>> ctm(torch.stack([a, b]), torch.tensor([0.5, 0.5])).diagonal().abs()
        tensor([2., 0., 0.])
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    method = inner_method(inner)
    rank = size or max(len(triples(delta).values) for delta in deltas)
    left = triples(torch.cat(list(deltas), dim=1)).left[:, :rank].to(deltas.dtype)
    right = triples(torch.cat(list(deltas), dim=0)).right[:, :rank].to(deltas.dtype)
    if not left.shape[1]:
        return torch.zeros_like(deltas[0])
    return left @ method(torch.stack([left.T @ delta @ right for delta in deltas]), weights) @ right.T
