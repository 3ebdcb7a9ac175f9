"""Regression mean: the update whose outputs are nearest those of all, on their own inputs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.ops.merge_methods import merge_methods

_RIDGE = 1e-6  # times the mean of the diagonal: nothing beside any input that was seen


@merge_methods.register(
    "regmean",
    paper="https://arxiv.org/abs/2212.09849",
    space="knots",
    spaces=("knots", "delta"),
    lacks="core: the Gram matrices are those of the inputs, which core turns into another basis",
    statistics="gram",
)
def regmean(
    deltas: Float[Tensor, " k m n"],
    weights: Float[Tensor, " k"],
    *,
    alpha: float = 0.9,
    statistics: Float[Tensor, " k *known"] | None = None,
) -> Float[Tensor, " m n"]:
    """The update whose outputs are nearest those of all, each on its own task's inputs (RegMean: Jin et al. 2023).

    With the Gram matrix ``G_t = X_t^T X_t / rows`` of the module's inputs in task t it minimises
    ``sum_t |w_t| |X_t (D - D_t)^T|^2 / rows``, so that ``D = (sum_t w_t D_t G_t)(sum_t |w_t| G_t)^-1``; the base
    weights cancel out. The entries off the diagonal of G are first multiplied by ``alpha``, as in the paper's
    algorithm. Inputs that were never seen say nothing; there, and nowhere else, the weighted mean M of the updates is
    taken: what is solved is ``D = M + (sum_t |w_t| (D_t - M) G_t)(sum_t |w_t| G_t + ridge I)^-1``, with a ridge of 1e-6
    of the mean diagonal.

    It acts on the side of the inputs alone, so that in the space ``knots`` it is the same as in ``delta``, at the cost
    of its solve: n^3 / 3 multiplications in float64. Grams measured with a merged adapter on the model
    (``measure(merged, task)``) bring in what earlier merged layers do to the inputs, which is the aim of RegMean++
    (arXiv 2508.03121; there layer by layer in one pass).

    Args:
        deltas: the k updates, or their right parts, stacked.
        weights: one weight per update: so much its task counts. The sign of a negative one turns its update round. The
            result is times the sum of the absolute weights; 1/k each is the paper's.
        alpha: what remains of the Grams off their diagonals, in [0, 1]; the paper mostly has 0.9.
        statistics: the Gram matrix of each update's inputs, n x n, or its diagonal alone, n.

    Raises:
        ValueError: ``alpha`` is outside [0, 1]; Grams are missing, of another size, or not finite.

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> grams = torch.stack([torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([1.0, 2.0]))])
        >>> regmean(torch.stack([a, b]), torch.tensor([0.5, 0.5]), statistics=grams)
        tensor([[0.5000, 1.0000]])
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if not deltas.any():
        return torch.zeros_like(deltas[0])
    columns = deltas.shape[-1]
    if statistics is None or statistics.shape[1:] not in ((columns, columns), (columns,)):
        got = "none" if statistics is None else " x ".join(map(str, statistics.shape[1:]))
        raise ValueError(f"regmean needs statistics: a Gram matrix of {columns} x {columns} per update, got {got}")
    weights = weights.double()
    total = weights.abs().sum()
    if total == 0:
        return torch.zeros_like(deltas[0])
    mean = torch.zeros_like(deltas[0], dtype=torch.float64)
    for delta, weight in zip(deltas, weights, strict=True):
        mean += (weight / total) * delta
    seen = torch.zeros(statistics.shape[1:], dtype=torch.float64, device=deltas.device)
    pull = torch.zeros_like(mean)
    for delta, weight, gram in zip(deltas, weights, statistics, strict=True):
        shrunk = _shrunk(gram, alpha) * weight.abs()
        seen += shrunk
        away = delta.double() * weight.sign() - mean
        pull += away * shrunk if shrunk.ndim == 1 else away @ shrunk
    return (total * (mean + _solved(seen, pull))).to(deltas.dtype)


def _shrunk(gram: Tensor, alpha: float) -> Tensor:
    """The Gram matrix in float64 with its entries off the diagonal times ``alpha``; a diagonal alone stays as it is."""
    if gram.ndim == 1:
        return gram.double()
    shrunk = gram.double() * alpha
    shrunk.diagonal().copy_(gram.diagonal())
    return shrunk


def _solved(seen: Tensor, pull: Tensor) -> Tensor:
    """``pull (seen + ridge I)^-1``; 0 where nothing was seen at all."""
    diagonal = seen if seen.ndim == 1 else seen.diagonal()
    level = diagonal.mean()
    if not torch.isfinite(level):
        raise ValueError("regmean: a Gram matrix has NaN or infinite entries")
    if diagonal.min() < 0:
        raise ValueError("regmean: a Gram matrix is not positive semi-definite")
    if level == 0:
        return torch.zeros_like(pull)
    diagonal += _RIDGE * level  # in place: into the matrix itself
    if seen.ndim == 1:
        return pull / seen
    factor, fault = torch.linalg.cholesky_ex(seen)
    if not fault:
        return torch.cholesky_solve(pull.T, factor).T
    values, vectors = torch.linalg.eigh(seen)  # a singular Gram matrix, stored in 32 bits: rounding made it indefinite
    if values[0] < -1e-4 * values[-1]:
        raise ValueError("regmean: a Gram matrix is not positive semi-definite")
    return (pull @ vectors) / values.clamp(min=float(_RIDGE * level)) @ vectors.T
