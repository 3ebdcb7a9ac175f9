"""Compress to shared subspaces, then merge."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import inner_method, merge_methods
from loraloom.ops.spectrum import triples

_ROUNDS = 100


@merge_methods.register(
    "ctm",
    paper="https://arxiv.org/abs/2606.03723",
    space="core",
    spaces=("core", "delta", "knots"),
    rank="largest",
    size="size",
)
def ctm(
    deltas: Float[Tensor, " k m n"],
    weights: Float[Tensor, " k"],
    *,
    inner: str = "linear",
    size: int | None = None,
    beta: float = 0.0,
) -> Float[Tensor, " m n"]:
    """Project onto shared subspaces, merge the small coordinates (compress then merge: He et al. 2026).

    For the subspaces alone, update t is brought to the norm ``beta |D_t| + (1 - beta) mean_s |D_s|`` (the mean is over
    those that are not zero). U (m x r) and V (n x r) keep the most of these, ``sum_t |U^T X_t V|^2`` (Tucker-2): from
    the right singular vectors of all on top of each other, each is improved with the other held, until a round adds
    less than 1e-6 of the energy, at most 100 rounds. The r x r coordinates ``U^T D_t V`` of the updates as
    they are, are merged by another method; the result ``U C V^T`` has rank r by construction. As in the authors' code,
    weights do not bear on the subspaces; but an update of weight 0 is left out by ``merge`` before.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update, for the inner method.
        inner: the merge method for the coordinates, one that neither draws nor needs statistics.
        size: r; by default the largest rank of an update.
        beta: how much larger updates count for more, in [0, 1]; the authors search 0, 1/4, 1/2 and 3/4.

    Raises:
        ValueError: ``size`` is below 1, ``beta`` is outside [0, 1], or ``inner`` is no such method.

    Example:
        >>> a, b = torch.diag(torch.tensor([3.0, 0.0, 0.0])), torch.diag(torch.tensor([1.0, 0.0, 0.0]))
        >>> ctm(torch.stack([a, b]), torch.tensor([0.5, 0.5])).diagonal().abs()
        tensor([2., 0., 0.])
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    method = inner_method(inner)
    rank = size or max(len(triples(delta).values) for delta in deltas)
    norms = deltas.flatten(1).norm(dim=1)
    if not norms.any():
        return torch.zeros_like(deltas[0])
    even = norms[norms > 0].mean()
    aims = torch.where(norms > 0, (beta * norms + (1 - beta) * even) / norms, 0.0)
    left, right = _subspaces(aims[:, None, None] * deltas, rank)
    return left @ method(torch.stack([left.T @ delta @ right for delta in deltas]), weights) @ right.T


def _subspaces(targets: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U and V of the Tucker-2 decomposition (higher-order orthogonal iteration), in the type of the targets.

    In float64 throughout: in float32 rounding decides in which round the gain is small enough, and U and V with it.
    """
    stored, targets = targets.dtype, targets.double()
    right, energy = _leading(targets.mT, rank), 0.0
    for _ in range(_ROUNDS):
        left = _leading(targets @ right, rank)
        right = _leading((left.T @ targets).mT, rank)
        kept = float((left.T @ targets @ right).square().sum())
        if kept <= energy * (1 + 1e-6):
            break
        energy = kept
    return left.to(stored), right.to(stored)


def _leading(stack: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of k matrices side by side."""
    return triples(torch.cat(list(stack), dim=1)).left[:, :rank].to(stack.dtype)
