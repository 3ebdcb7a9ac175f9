"""Exact weighted sum, by concatenation."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.merge_methods.linear import linear


@merge_methods.register(
    "cat",
    paper="https://arxiv.org/abs/2410.13025",
    linear=True,
    spaces=("delta",),
    lacks="core, knots: a sum is the same in both",
)
def cat(deltas: Float[Tensor, " k *shape"], weights: Float[Tensor, " k"]) -> Float[Tensor, " *shape"]:
    """Exact weighted sum of the updates, their factors side by side (PEFT's ``cat``; Prabhakar et al. 2024).

    The same as ``linear`` in the space ``delta``: the result has the sum of the ranks.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update, as they are.

    Example:
        >>> import torch
        >>> cat(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, -1.0]))
        tensor([-2., -2.])
    """
    return linear(deltas, weights)
