"""Weighted sum, recompressed."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods
from loraloom.ops.merge_methods.linear import linear


@merge_methods.register(
    "svd",
    paper="https://doi.org/10.1007/BF02288367",
    linear=True,
    rank="largest",
    spaces=("delta",),
    lacks="core, knots: a sum is the same in both",
)
def svd(deltas: Float[Tensor, " k *shape"], weights: Float[Tensor, " k"]) -> Float[Tensor, " *shape"]:
    """Weighted sum, cut to the largest rank of the inputs by SVD (PEFT's ``svd``).

    The best approximation of that rank (Eckart and Young 1936), computed on the factors; ``rank``, ``energy`` or
    ``budget`` choose another size.

    Args:
        deltas: the k updates, stacked.
        weights: one weight per update, as they are.

    Example:
        >>> import torch
        >>> svd(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, -1.0]))
        tensor([-2., -2.])
    """
    return linear(deltas, weights)
