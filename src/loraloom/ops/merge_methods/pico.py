"""Over-shared output directions are scaled down before the merge."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import inner_method, merge_methods
from loraloom.ops.spectrum import triples


@merge_methods.register(
    "pico",
    paper="https://arxiv.org/abs/2604.16826",
    space="core",
    spaces=("core", "delta"),
    lacks="knots: all output directions are equally crowded there; nothing would be calibrated",
)
def pico(
    deltas: Float[Tensor, " k m n"],
    weights: Float[Tensor, " k"],
    *,
    inner: str = "linear",
    strength: float = 1.0,
) -> Float[Tensor, " m n"]:
    """Calibrate shared output directions, merge, rescale (Pico: Tang and Yang 2026).

    The output directions are the left singular vectors u_i of ``[D_1 ... D_k]``, and ``c_i = s_i^2 / sum_j s_j^2`` is
    how crowded each is. Along u_i every update is multiplied by ``1 / (1 + strength (T - 1) c_i)``, T the number of
    updates that are not zero; the calibrated updates are merged by another method, and the result is brought to the
    norm ``sum_t |w_t| |D_t|``, with weights 1/k the mean norm of the updates. So do the authors, but that they take
    u_i and s_i from ``[B_1 ... B_k]``, which depends on the gauge of the factors, and have no weights.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update, for the inner method.
        inner: the merge method in between, one that neither draws nor needs statistics.
        strength: 1 is the paper's; 0 calibrates nothing.

    Raises:
        ValueError: ``strength`` is negative, or ``inner`` is no such method.

    Example:
        >>> both = torch.diag(torch.tensor([1.0, 0.0, 0.0]))
        >>> a, b = both + torch.diag(torch.tensor([0.0, 1.0, 0.0])), both + torch.diag(torch.tensor([0.0, 0.0, 1.0]))
        >>> pico(torch.stack([a, b]), torch.tensor([0.5, 0.5])).diagonal()
        tensor([1.0783, 0.6470, 0.6470])
    """
    if strength < 0:
        raise ValueError(f"strength must be at least 0, got {strength}")
    method = inner_method(inner)
    found = triples(torch.cat(list(deltas), dim=1))
    left, energy = found.left.to(deltas.dtype), found.values.square().to(deltas.dtype)
    norms = deltas.flatten(1).norm(dim=1)
    others = max(int((norms > 0).sum()) - 1, 0)
    kept = 1 / (1 + strength * others * energy / energy.sum()) if len(energy) else energy
    less = (left * (1 - kept)) @ left.T
    merged = method(torch.stack([delta - less @ delta for delta in deltas]), weights)
    size = float(merged.norm())
    return merged * (float(weights.abs() @ norms) / size) if size > 0 else merged
