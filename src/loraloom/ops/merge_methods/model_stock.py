"""Mean, drawn towards the base by the angle between the updates."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods


@merge_methods.register(
    "model_stock",
    paper="https://arxiv.org/abs/2403.19522",
    space="core",
    spaces=("core", "delta"),
    lacks="knots: adapters are at right angles there unless their B depend on each other; the sum would be drawn to 0",
)
def model_stock(deltas: Float[Tensor, " k *shape"], weights: Float[Tensor, " k"]) -> Float[Tensor, " *shape"]:
    """Weighted sum, drawn towards the base by the angle between the updates (Jang et al. 2024).

    The sum is times ``t = k c / (1 + (k - 1) c)`` for the mean cosine c of the updates. The base model is the zero
    update. c is the mean over the pairs, of updates that are not zero, cut to [0, 1]: updates at right angles tell
    nothing of a common direction, and t is 0. One update alone has t = 1.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update; 1/k each is the paper's mean.

    Example:
        >>> model_stock(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([0.5, 0.5]))
        tensor([0.8284, 0.4142])
    """
    total = torch.tensordot(weights, deltas, dims=1)
    flat = [delta.flatten() for delta in deltas]
    norms = [float(one.norm()) for one in flat]
    there = [at for at, norm in enumerate(norms) if norm > 0]
    k = len(there)
    if k < 2:
        return total
    pairs = [(i, j) for i in there for j in there if i < j]
    cosine = sum(float(torch.dot(flat[i], flat[j])) / (norms[i] * norms[j]) for i, j in pairs) / len(pairs)
    cosine = min(max(cosine, 0.0), 1.0)
    return total * (k * cosine / (1 + (k - 1) * cosine))
