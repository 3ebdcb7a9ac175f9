"""Weighted mean by Fisher information."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods


@merge_methods.register(
    "fisher",
    paper="https://arxiv.org/abs/2111.09832",
    space="factors",
    spaces=("factors", "delta"),
    lacks="core, knots: the Fisher information is that of entries of B and A, or of the weight",
    statistics="fisher",
)
def fisher(
    deltas: Float[Tensor, " k *shape"],
    weights: Float[Tensor, " k"],
    *,
    floor: float = 1e-6,
    statistics: Float[Tensor, " k *known"] | None = None,
) -> Float[Tensor, " *shape"]:
    """Mean of every entry, weighted by how much each task's likelihood depends on it (Matena and Raffel 2022).

    ``sum_t w_t F_t * D_t / sum_t |w_t| F_t`` with the diagonal Fisher information F_t, times the sum of the absolute
    weights; the base weights cancel out. Where no task depends on an entry this is 0 / 0; there the weighted mean M is
    taken: what is computed is ``M + sum_t |w_t| F_t (D_t - M) / (sum_t |w_t| F_t + floor)`` with a floor relative to
    the mean of the denominator over the tensor. In ``factors`` F is that of B and A, the parameters that were trained;
    the result depends on the gauge. In ``delta`` it is that of the weight matrix, out x in.

    Fishers of different tasks can differ in size by orders of magnitude, as the surer an adapter is, the smaller they
    are. ``loraloom measure`` brings all to one size, as the authors' code does.

    Args:
        deltas: the k tensors, stacked.
        weights: one weight per tensor, which multiplies its Fisher information. The sign of a negative one turns its
            tensor round.
        floor: relative to the mean, above 0.
        statistics: the diagonal Fisher information of each tensor's entries.

    Raises:
        ValueError: ``floor`` is not a number above 0; Fishers are missing, of another size, negative or not finite.

    Example:
        >>> both = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
        >>> fisher(both, torch.tensor([0.5, 0.5]), statistics=torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        tensor([1.5000, 2.0000])
    """
    if not 0 < floor < float("inf"):
        raise ValueError(f"floor must be a number above 0, got {floor}")
    if not deltas.any():
        return torch.zeros_like(deltas[0])
    if statistics is None or statistics.shape != deltas.shape:
        got = "none" if statistics is None else " x ".join(map(str, statistics.shape[1:]))
        want = " x ".join(map(str, deltas.shape[1:]))
        raise ValueError(f"fisher needs statistics: the Fisher information of {want} entries per update, got {got}")
    if not (statistics.min() >= 0 and torch.isfinite(statistics.max())):
        raise ValueError("fisher: Fisher information must be finite numbers from 0 on")
    total = weights.abs().sum()
    if total == 0:
        return torch.zeros_like(deltas[0])
    mean = torch.tensordot(weights / total, deltas, dims=1)
    known, pull = torch.zeros_like(mean), torch.zeros_like(mean)
    for delta, weight, information in zip(deltas, weights, statistics, strict=True):
        share = weight.abs() * information
        known += share
        pull += share * (delta * weight.sign() - mean)
    level = known.mean()
    if level > 0:
        mean += pull / (known + floor * level)
    return total * mean
