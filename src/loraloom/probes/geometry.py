"""Geometry: where many adapters lie, by the cosines and distances of their updates and a plane that shows most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.adapter import Adapter
from loraloom.ops.overlap import check_comparable, comparable_parts
from loraloom.probes import probes


@dataclass(frozen=True)
class Geometry:
    """Where k adapters lie.

    Attributes:
        norms: Frobenius norms of the k updates.
        cosine: k x k; 0 where one is zero.
        distance: k x k, ``|dW_a - dW_b|``; below 1e-7 of the norms it is rounding.
        positions: k x 2 (k x 1 for two adapters), coordinates on the principal axes, the mean at 0.
        explained: share of the sum of squared distances from the mean that lies along each axis; 0 where all are one.
        neighbours: k x 2, a map by t-SNE that keeps neighbours together; None where it was not asked for.
        perplexity: of that map, how many neighbours count as near.
    """

    norms: tuple[float, ...]
    cosine: tuple[tuple[float, ...], ...]
    distance: tuple[tuple[float, ...], ...]
    positions: tuple[tuple[float, ...], ...]
    explained: tuple[float, ...]
    neighbours: tuple[tuple[float, ...], ...] | None = None
    perplexity: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields by name, tuples as lists."""
        return {
            name: [list(item) if isinstance(item, tuple) else item for item in value]
            if isinstance(value, tuple)
            else value
            for name, value in asdict(self).items()
        }


@probes.register("geometry", paper="https://arxiv.org/abs/2506.05713")
def geometry(
    adapters: Sequence[Adapter],
    *,
    tsne: bool = False,
    perplexity: float | None = None,
    seed: int = 0,
    same_base: bool = True,
) -> Geometry:
    """Cosines, distances and principal components of many adapters, as CoTo compares runs (arXiv 2506.05713).

    All of it follows from the k x k inner products of the updates ``scale * B @ A``, which are computed on the factors
    in float64. The axes are those of a principal component analysis of the dense updates, exactly: nothing is drawn.
    Of each axis the adapter that is farthest out is on the positive side. A module that an adapter lacks is a zero
    update.

    ``tsne`` adds the map of the paper's figure (van der Maaten and Hinton 2008), from the same exact distances. It
    shows who is near whom; its axes, and how far groups are from each other, mean nothing.

    Args:
        adapters: at least two, of one kind; for all kinds but LoRA see :func:`loraloom.interference`.
        tsne: also the map by t-SNE, of at least four adapters.
        perplexity: of the map, in [1, k - 1]; by default (k - 1) / 3, at most 30.
        seed: of the start of the map.
        same_base: refuse adapters of base models of different names.

    Raises:
        ValueError: fewer than two adapters, or four for a map; a perplexity out of range; factors that are not finite.
        AdapterMismatch: kinds, base models or the sizes of a module differ.
        UnsupportedKind: updates that are relative to base weights which their start has moved (PiSSA and the like).

    Example:
        >>> from loraloom.adapter import Factors
        >>> one = Factors(B=torch.eye(2)[:, :1], A=torch.tensor([[1.0, 0.0]]))
        >>> r = geometry([Adapter({}, {"q": one.scaled(x)}) for x in (1.0, 2.0, 6.0)])
        >>> r.distance[0], [round(x, 3) for x, _ in r.positions], [round(share, 3) for share in r.explained]
        ((0.0, 1.0, 5.0), [-2.0, -1.0, 3.0], [1.0, 0.0])
    """
    check_comparable(adapters, same_base, "geometry")
    near = _perplexity(len(adapters), perplexity) if tsne or perplexity is not None else None
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        gram += _gram(name, adapters)
    energy = gram.diagonal().clamp(min=0)  # of factors that cancel, a sum of either sign is left
    sizes = energy[:, None].sqrt() * energy.sqrt()
    cosine = torch.where(sizes > 0, gram / sizes, 0.0).clamp(-1, 1)
    cosine.diagonal().copy_((energy > 0).double())
    distance = (energy[:, None] + energy - 2 * gram).clamp(min=0).sqrt()
    distance.fill_diagonal_(0.0)
    positions, explained = principal_axes(gram, min(2, len(adapters) - 1))
    return Geometry(
        tuple(energy.sqrt().tolist()),
        tuple(map(tuple, cosine.tolist())),
        tuple(map(tuple, distance.tolist())),
        tuple(map(tuple, positions.tolist())),
        tuple(explained.tolist()),
        None if near is None else neighbour_map(distance, near, seed),
        near,
    )


def _perplexity(count: int, asked: float | None) -> float:
    """What was asked for, or a third of the other adapters."""
    if count < 4:
        raise ValueError(f"a map by t-SNE needs at least 4 adapters, got {count}")
    found = min(30.0, (count - 1) / 3) if asked is None else float(asked)
    if not 1 <= found <= count - 1:
        raise ValueError(f"perplexity must be in [1, {count - 1}] for {count} adapters, got {asked!r}")
    return found


def neighbour_map(distance: Float[Tensor, "k k"], perplexity: float, seed: int) -> tuple[tuple[float, ...], ...]:
    """Places on a plane that keep near ones together, by t-SNE (van der Maaten and Hinton 2008), with the mean at 0.

    The start is drawn with ``seed``, and the exact algorithm runs in one thread's order: the same map each time.
    """
    from sklearn.manifold import TSNE

    if not distance.any():
        return tuple((0.0, 0.0) for _ in distance)
    scaled = (distance / distance.max()).numpy()
    options: dict[str, Any] = {"metric": "precomputed", "init": "random", "method": "exact", "learning_rate": "auto"}
    places = TSNE(perplexity=perplexity, random_state=seed, **options).fit_transform(scaled)
    return tuple(map(tuple, (places - places.mean(axis=0)).astype(float).tolist()))


def principal_axes(gram: Float[Tensor, "k k"], axes: int) -> tuple[Float[Tensor, "k axes"], Float[Tensor, " axes"]]:
    """Coordinates of k vectors on their principal axes, from their inner products, and the share of each axis.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
        >>> positions, shares = principal_axes(points @ points.T, 1)
        >>> positions.flatten().abs().round(), shares
        (tensor([2., 0., 2.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    middle = gram - gram.mean(dim=0)
    middle = middle - middle.mean(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh((middle + middle.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    values[values <= 1e-14 * gram.diagonal().max()] = 0.0  # rounding
    positions = (vectors * values.sqrt())[:, :axes]
    farthest = positions.gather(0, positions.abs().argmax(dim=0, keepdim=True))
    total = values.sum()
    shares = values[:axes] / total if total > 0 else values[:axes]
    return torch.where(farthest < 0, -positions, positions) + 0.0, shares


def _gram(name: str, adapters: Sequence[Adapter]) -> Tensor:
    """Inner products of one module's updates, k x k, by two products of all factors side by side."""
    held = [(at, part) for at, part in enumerate(comparable_parts(name, adapters)) if part is not None]
    b = torch.cat([part.scale * part.B.double() for _, part in held], dim=1)
    a = torch.cat([part.A.double() for _, part in held])
    owner = torch.cat([torch.full((part.rank,), at) for at, part in held])
    rows = torch.nn.functional.one_hot(owner, len(adapters)).double().T
    found: Tensor = rows @ ((b.T @ b) * (a @ a.T)).cpu() @ rows.T
    return found
