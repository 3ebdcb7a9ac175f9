"""Flat spectrum over common and task-specific directions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.merge_methods.iso_c import flattened
from loraloom.ops.spectrum import polar, triples


@merge_methods.register(
    "iso_cts",
    paper="https://arxiv.org/abs/2502.04959",
    space="core",
    spaces=("core", "delta", "knots"),
    breaks=("single",),
)
def iso_cts(
    deltas: Float[Tensor, " k m n"], weights: Float[Tensor, " k"], *, common: float = 0.8
) -> Float[Tensor, " m n"]:
    """Flat spectrum over common and task-specific directions (Iso-CTS: Marczak et al. 2025).

    The weighted sum has the numerical rank R. Each update gets ``o = round((R - int(common * R)) / k)`` directions of
    its own (of halves the even one, at most R // k), the ``c = R - k o`` largest singular triples of the sum are the
    common ones: the authors' division, so that R directions are used. What the common ones leave of an update,
    ``w_t (D_t - U_c U_c^T D_t)``, gives its o largest triples. All left vectors together, and all right ones, are
    replaced by the nearest orthonormal sets; every singular value becomes the mean of all. A cut keeps those that were
    the largest (see :func:`loraloom.ops.merge_methods.iso_c.flattened`).

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update; 1 each is the paper's sum.
        common: share of the directions that are common, in (0, 1]; 1 is ``iso_c``.

    Raises:
        ValueError: ``common`` is outside (0, 1].

    Example:
        >>> a, b = torch.diag(torch.tensor([4.0, 2.0, 0.0])), torch.diag(torch.tensor([4.0, 0.0, 1.0]))
        >>> iso_cts(torch.stack([a, b]), torch.ones(2), common=0.3).diagonal()
        tensor([3.6667, 3.6667, 3.6666])
    """
    if not 0 < common <= 1:
        raise ValueError(f"common must be in (0, 1], got {common}")
    whole = triples(torch.tensordot(weights, deltas, dims=1))
    rank = len(whole.values)
    own = min(round((rank - int(common * rank)) / len(deltas)), rank // len(deltas))
    shared = whole.first(rank - len(deltas) * own)
    found = [shared]
    for delta, weight in zip(deltas, weights, strict=True):
        update = float(weight) * delta.double()
        rest = update - shared.left @ (shared.left.T @ update)
        found.append(triples(rest.to(deltas.dtype)).first(own))
    values = torch.cat([one.values for one in found])
    if not len(values):
        return torch.zeros_like(deltas[0])
    left = polar(torch.cat([one.left for one in found], dim=1).to(deltas.dtype))
    right = polar(torch.cat([one.right for one in found], dim=1).to(deltas.dtype))
    return (left * flattened(values, deltas.dtype) @ right.T).to(deltas.dtype)
