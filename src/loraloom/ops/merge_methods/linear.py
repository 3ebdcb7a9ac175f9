"""Weighted sum."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods


@merge_methods.register("linear", paper="https://arxiv.org/abs/2212.04089", linear=True)
def linear(deltas: Float[Tensor, " k *shape"], weights: Float[Tensor, " k"]) -> Float[Tensor, " *shape"]:
    """Weighted sum ``sum_i w_i D_i`` (task arithmetic: Ilharco et al. 2023, section 2).

    The weights are taken as they are: they need not add up to 1, and a negative one takes a task away. In the space
    ``delta`` this is the exact sum of the updates (CoTo's "ensemble", arXiv 2506.05713); in ``factors`` it is CoTo's
    "linear fusion" ``(sum_i w_i B_i)(sum_i w_i A_i)``.

    Args:
        deltas: the k tensors, stacked.
        weights: one weight per tensor.

    Example:
        >>> linear(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, -1.0]))
        tensor([-2., -2.])
    """
    return torch.tensordot(weights, deltas, dims=1)
