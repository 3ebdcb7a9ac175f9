"""Singular triples without null directions: what spectral merge methods stand on.

An update of low rank has arbitrary null-space vectors; a method that spreads its spectrum must not see them. So every
decomposition here is cut where singular values are rounding, in float64; results do not depend on the basis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Triples(NamedTuple):
    """``matrix = left @ diag(values) @ right.T``, values falling and above rounding."""

    left: Float[Tensor, "m p"]
    values: Float[Tensor, " p"]
    right: Float[Tensor, "n p"]

    def first(self, count: int) -> Triples:
        """The largest ``count``."""
        return Triples(self.left[:, :count], self.values[:count], self.right[:, :count])

    def matrix(self) -> Float[Tensor, "m n"]:
        """What they add up to."""
        return (self.left * self.values) @ self.right.T


def triples(matrix: Float[Tensor, "m n"]) -> Triples:
    """Singular triples down to the precision of the matrix's type (float32: 1e-5 of the largest, float64: 1e-10).

    Example:
        >>> triples(torch.diag(torch.tensor([0.0, 3.0, 4.0]))).values
        tensor([4., 3.], dtype=torch.float64)
    """
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = s > s[:1] * (1e-10 if matrix.dtype == torch.float64 else 1e-5)
    return Triples(u[:, kept], s[kept], vh[kept].T)


def polar(columns: Float[Tensor, "m p"]) -> Float[Tensor, "m p"]:
    """The nearest matrix with orthonormal columns, ``U V^T`` of the SVD; directions that the columns lack stay out.

    Example:
        >>> polar(torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, 0.0]]))
        tensor([[1., 0.],
                [0., 1.],
                [0., 0.]], dtype=torch.float64)
    """
    found = triples(columns)
    return found.left @ found.right.T
