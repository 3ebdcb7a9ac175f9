"""Over-shared output directions are scaled down before the merge."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import inner_method, merge_methods
from loraloom.ops.spectrum import triples


@merge_methods.register("pico", paper="https://arxiv.org/abs/2604.16826", space="core", spaces=("core", "delta"))
def pico(
    deltas: Float[Tensor, " k m n"],
    weights: Float[Tensor, " k"],
    *,
    inner: str = "linear",
    strength: float = 0.5,
) -> Float[Tensor, " m n"]:
    """Calibrate shared output directions, merge, rescale (Pico: Tang and Yang 2026).

    The output directions are the left singular vectors u_i of ``[D_1 ... D_k]``. The energies ``e_t = |u_i^T D_t|^2``
    say how many updates share one: ``n_i = (sum e_t)^2 / sum e_t^2``, from 1 to k. Every update is multiplied by
    ``n_i ** -strength`` along u_i, the calibrated updates are merged by another method, and the result gets the norm
    that this method gives without calibration. The paper's abstract says this much; the measure n and the power are
    ours.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update, for the inner method.
        inner: the merge method in between, one that neither draws nor needs statistics.
        strength: 0 changes nothing; 0.5 makes k aligned updates count as much as k at right angles.

    Raises:
        ValueError: ``strength`` is negative, or ``inner`` is no such method.

    Example:
        >>> both = torch.diag(torch.tensor([1.0, 0.0, 0.0]))
        >>> a, b = both + torch.diag(torch.tensor([0.0, 1.0, 0.0])), both + torch.diag(torch.tensor([0.0, 0.0, 1.0]))
        >>> pico(torch.stack([a, b]), torch.tensor([0.5, 0.5])).diagonal()
        tensor([0.8660, 0.6124, 0.6124])
    """
    if strength < 0:
        raise ValueError(f"strength must be at least 0, got {strength}")
    method = inner_method(inner)
    plain = method(deltas, weights)
    left = triples(torch.cat(list(deltas), dim=1)).left.to(deltas.dtype)
    energy = torch.stack([(left.T @ delta).square().sum(dim=1) for delta in deltas])
    shared = energy.sum(dim=0).square() / energy.square().sum(dim=0).clamp(min=torch.finfo(energy.dtype).tiny)
    less = (left * (1 - shared.clamp(min=1) ** -strength)) @ left.T
    merged = method(torch.stack([delta - less @ delta for delta in deltas]), weights)
    size = float(merged.norm())
    return merged * (float(plain.norm()) / size) if size > 0 else merged
