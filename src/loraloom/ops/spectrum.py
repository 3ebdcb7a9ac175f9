"""Singular triples without null directions: what spectral merge methods stand on.

An update of low rank has arbitrary null-space vectors; a method that spreads its spectrum must not see them. So every
decomposition here is cut where singular values are rounding, in float64; results do not depend on the basis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_LARGE = 64  # smaller matrices gain nothing from a basis first
_ROUNDING = 1e-7  # of a matrix of 32 bits, relative to its norm


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


def triples(matrix: Float[Tensor, "m n"], tolerance: float | None = None) -> Triples:
    """Singular triples down to the precision of the matrix's type (float32: 1e-5 of the largest, float64: 1e-10).

    Types of 32 bits and less go through the eigenvalues of the Gram matrix in float64, half the work of an SVD and
    exact to their own precision; a large matrix of low rank goes through an orthonormal basis of its columns first.

    Args:
        matrix: m x n.
        tolerance: another share of the largest, at least 1e-7 for types of 32 bits and less.

    Example:
        >>> triples(torch.diag(torch.tensor([0.0, 3.0, 4.0]))).values
        tensor([4., 3.], dtype=torch.float64)
    """
    exact, wide = matrix.dtype == torch.float64, matrix.double()
    if exact:
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        kept = s > s[:1] * (tolerance or 1e-10)
        return Triples(u[:, kept], s[kept], vh[kept].T)
    q = _range(wide)
    if q is not None:
        inner = _by_gram(q.T @ wide, tolerance or 1e-5)
        return inner._replace(left=q @ inner.left)
    return _by_gram(wide, tolerance or 1e-5)


def _by_gram(wide: Tensor, tolerance: float) -> Triples:
    """Through the smaller of the two Gram matrices."""
    if wide.shape[0] < wide.shape[1]:
        found = _by_gram(wide.T, tolerance)
        return Triples(found.right, found.values, found.left)
    squares, v = torch.linalg.eigh(wide.T @ wide)
    s, v = squares.flip(0).clamp(min=0).sqrt(), v.flip(1)
    kept = s > s[:1] * tolerance
    s, v = s[kept], v[:, kept]
    return Triples(wide @ v / s, s, v)


def _range(wide: Tensor) -> Tensor | None:
    """Orthonormal columns that span a large matrix of low rank up to rounding; None if it is not one."""
    size = min(wide.shape)
    if size < _LARGE:
        return None
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(wide.shape[1], size // 4, generator=generator, dtype=wide.dtype).to(wide.device)
    q = torch.linalg.qr(wide @ draw).Q
    rest = wide - q @ (q.T @ wide)
    return q if float(rest.norm()) <= _ROUNDING * float(wide.norm()) else None


def polar(columns: Float[Tensor, "m p"]) -> Float[Tensor, "m p"]:
    """The nearest matrix with orthonormal columns, ``U V^T`` of the SVD, in float64.

    Directions that the columns lack, down to the precision of their type (as in :func:`triples`), stay out.

    Example:
        >>> polar(torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, 0.0]]))
        tensor([[1., 0.],
                [0., 1.],
                [0., 0.]], dtype=torch.float64)
    """
    found = triples(columns) if columns.dtype == torch.float64 else _by_gram(columns.double(), 1e-5)
    return found.left @ found.right.T
