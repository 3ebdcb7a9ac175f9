"""Joint bases of the updates of one module, from small matrices: what the spaces ``core`` and ``knots`` stand on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Side(NamedTuple):
    """Orthonormal columns ``x @ map`` that are singular vectors of updates, and the matrix x in them."""

    map: Float[Tensor, "r p"]
    values: Float[Tensor, " p"]
    rows: Float[Tensor, "p r"]  # (x @ map)^T @ x


class Stacked:
    """The factors of one kind (all B, or all A^T), side by side, seen through small matrices in float64.

    Types of 32 bits and less go through the Gram matrix, which is exact to their own precision; float64 goes through a
    QR decomposition. What is below 3e-7 (float64: 1e-13) of the largest is rounding, and left out.

    Example:
        >>> b, a = Stacked(torch.eye(3)[:, :2]), Stacked(torch.diag(torch.tensor([3.0, 2.0])))
        >>> b.singular(a.roots([1, 1])).values  # of the two updates side by side
        tensor([3., 2.], dtype=torch.float64)
    """

    def __init__(self, x: Float[Tensor, "n r"]) -> None:
        self.exact = x.dtype == torch.float64
        self.tolerance = 1e-13 if self.exact else 3e-7
        self._x = x

    @cached_property
    def _small(self) -> Tensor:
        wide = self._x.double()
        return torch.linalg.qr(wide, mode="r").R if self.exact else wide.T @ wide

    def roots(self, ranks: Sequence[int]) -> list[Float[Tensor, "s p"]]:
        """For each block of columns x_t a matrix L with ``L @ L^T = x_t^T @ x_t``."""
        if self.exact:
            return [torch.linalg.qr(block, mode="r").R.T for block in self._small.split(list(ranks), 1)]
        ends = torch.tensor(list(ranks)).cumsum(0).tolist()
        return [
            self._root(self._small[end - rank : end, end - rank : end]) for rank, end in zip(ranks, ends, strict=True)
        ]

    def root(self) -> Float[Tensor, "r p"]:
        """The root of all columns together."""
        return self.roots([self._x.shape[1]])[0]

    def _root(self, gram: Tensor) -> Tensor:
        """Of columns of length 1 first, so that a gauge with very unequal ones costs no accuracy."""
        length = gram.diagonal().sqrt()
        inverse = torch.where(length > 0, 1 / length, 0.0)
        squares, v = torch.linalg.eigh(inverse[:, None] * gram * inverse)
        kept = squares > self.tolerance**2 * squares.max() if len(squares) else squares > 0
        return length[:, None] * v[:, kept] * squares[kept].sqrt()

    def singular(self, roots: Sequence[Tensor]) -> Side:
        """Left singular vectors and values of ``x @ blockdiag(roots)``, values falling."""
        block = torch.block_diag(*roots) if roots else self._small[:, :0]
        if self.exact:
            u, s, vh = torch.linalg.svd(self._small @ block, full_matrices=False)
            turned, there = vh.T, u.T @ self._small
        else:
            squares, turned = torch.linalg.eigh(block.T @ self._small @ block)
            s, turned = squares.flip(0).clamp(min=0).sqrt(), turned.flip(1)
        kept = s > self.tolerance * s.max() if s.numel() else s > 0
        s = s[kept]
        map_ = block @ (turned[:, kept] / s)
        return Side(map_, s, there[kept] if self.exact else map_.T @ self._small)
