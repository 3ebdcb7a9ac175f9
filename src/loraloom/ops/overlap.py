"""How the updates of one module lie to each other: small matrices in float64, but for the signs of single entries.

With ``[B_1 ... B_k] = Q_b [R_1 ... R_k]`` and ``[A_1^T ... A_k^T] = Q_a [T_1 ... T_k]`` an update is
``Q_b (s_t R_t T_t^T) Q_a^T``. Angles, lengths and singular values are those of the small matrices in the middle, so
neither Q nor any out x in matrix is formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Factors, is_finite
from loraloom.ops.checks import check_fit, check_linear, which
from loraloom.ops.products import Product, each_block

# Singular values below this share of the largest are rounding of the factors as they are stored.
_EXACT, _STORED = 1e-10, 1e-6


def check_comparable(adapters: Sequence[Adapter], same_base: bool, what: str) -> None:
    """Refuse what cannot be compared, before any factor is read.

    Raises:
        ValueError: fewer than two adapters, or one has no module.
        AdapterMismatch: kinds, base models or the sizes of a module differ.
        UnsupportedKind: an update is relative to base weights that its start has moved.
    """
    if len(adapters) < 2:
        raise ValueError(f"{what} is of several adapters: at least two are needed, got {len(adapters)}")
    check_fit(adapters, same_base)
    for at, adapter in enumerate(adapters):
        if not adapter.modules:
            raise ValueError(f"{which(at, adapters)} has no module")
        if adapter.kind != "moka":
            check_linear(replace(adapter, config={**adapter.config, "use_dora": False}), "compare")
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        shapes = [adapter.shape(name) for adapter in adapters if name in adapter.modules]
        if len(sizes := list(dict.fromkeys((shape.out, shape.in_) for shape in shapes))) > 1:
            raise AdapterMismatch(f"{name}: updates of sizes {sizes[0]} and {sizes[1]} cannot be compared")


def comparable_parts(name: str, adapters: Sequence[Adapter]) -> list[Factors | None]:
    """One module of every adapter; None where it is missing.

    Raises:
        ValueError: factors that are not finite.
        AdapterMismatch: kernels of different sizes.
    """
    parts = [adapter.modules.get(name) for adapter in adapters]
    for at, part in enumerate(parts):
        if part is not None and not (is_finite(part.B) and is_finite(part.A) and math.isfinite(part.scale)):
            raise ValueError(f"{name}: {which(at, adapters)} has NaN or infinite entries")
    kernels = list(dict.fromkeys(part.kernel for part in parts if part is not None))
    if len(kernels) > 1:
        raise AdapterMismatch(f"{name}: kernels of sizes {kernels[0]} and {kernels[1]} cannot be compared")
    return parts


class Core(NamedTuple):
    """One update in the bases that all updates of its module share; of rank 0 where it is missing or zero.

    Attributes:
        matrix: p x q, ``left @ diag(values) @ right.T`` and rounding.
        left: p x r, orthonormal; they span the column space of the update.
        values: its singular values above rounding, falling.
        right: q x r, orthonormal; they span its row space.
    """

    matrix: Float[Tensor, "p q"]
    left: Float[Tensor, "p r"]
    values: Float[Tensor, " r"]
    right: Float[Tensor, "q r"]


def joint_cores(parts: Sequence[Factors | None]) -> list[Core]:
    """The cores of one module's updates; None is an adapter without the module. At least one is not None.

    Example:
        >>> one = Factors(B=torch.eye(3)[:, :1], A=torch.tensor([[3.0, 4.0]]))
        >>> [core.values for core in joint_cores([one, None])]
        [tensor([5.], dtype=torch.float64), tensor([], dtype=torch.float64)]
    """
    held = [part for part in parts if part is not None]
    ranks = [part.rank for part in held]
    left = torch.linalg.qr(torch.cat([part.B.double() for part in held], dim=1), mode="r").R
    right = torch.linalg.qr(torch.cat([part.A.double() for part in held]).T, mode="r").R
    pairs = iter(zip(left.split(ranks, 1), right.split(ranks, 1), strict=True))
    found = []
    for part in parts:
        if part is None:
            matrix, tolerance = left.new_zeros(left.shape[0], right.shape[0]), _EXACT
        else:
            b, a = next(pairs)
            matrix = part.scale * b @ a.T
            tolerance = _EXACT if part.dtype == torch.float64 else _STORED
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        kept = s > tolerance * s[:1]
        found.append(Core(matrix, u[:, kept], s[kept], vh[kept].T))
    return found


def principal_angles(x: Float[Tensor, "n p"], y: Float[Tensor, "n q"]) -> Float[Tensor, " m"]:
    """The m = min(p, q) principal angles of two column spaces, rising, in radians.

    Of orthonormal columns. Where the cosine is close to 1 it tells angles no better than to 1e-8, so small angles come
    from their sines (Bjorck and Golub 1973, section 3).

    Example:
        >>> t = torch.tensor([0.3], dtype=torch.float64)
        >>> principal_angles(torch.eye(2, dtype=torch.float64)[:, :1], torch.stack([t.cos(), t.sin()]))
        tensor([0.3000], dtype=torch.float64)
    """
    if x.shape[1] > y.shape[1]:
        x, y = y, x
    inner = y.T @ x
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(x - y @ inner).flip(0).clamp(max=1)
    return torch.where(cosines.square() < 0.5, cosines.arccos(), sines.arcsin())


def singular_interference(cores: Sequence[Core]) -> float:
    """``|(U^T U - I) S (V^T V - I)|_1`` of all singular vectors side by side (Gargiulo et al. 2025, arXiv 2412.00081).

    The norm is the sum of absolute entries. All triples above rounding take part: these updates have low rank already,
    where the paper keeps the first 1 / k of full weights.

    Example:
        >>> one = Factors(B=torch.eye(3)[:, :1], A=torch.tensor([[3.0, 4.0]]))
        >>> round(singular_interference(joint_cores([one, one])), 6)
        10.0
    """
    u, v = (torch.cat(parts, dim=1) for parts in ([c.left for c in cores], [c.right for c in cores]))
    values = torch.cat([core.values for core in cores])
    one = torch.eye(len(values), dtype=u.dtype, device=u.device)
    return float((((u.T @ u - one) * values) @ (v.T @ v - one)).abs().sum())


def inside(core: Core, others: Sequence[Core]) -> float:
    """Energy (squared Frobenius norm) of an update that lies in the joint core of others: ``|P D Q|^2``.

    P projects on the sum of their column spaces, Q on that of their row spaces.

    Example:
        >>> one = torch.eye(2)
        >>> a, b = joint_cores([Factors(B=2 * one, A=one), Factors(B=one[:, :1], A=one[:1])])
        >>> round(inside(a, [b]), 6), round(inside(b, [a]), 6)
        (4.0, 1.0)
    """
    if len(others) == 1:
        left, right = others[0].left, others[0].right
    else:
        left = _span([other.left * (other.values / other.values[:1]) for other in others])
        right = _span([other.right * (other.values / other.values[:1]) for other in others])
    return float((left.T @ core.matrix @ right).square().sum())


def _span(columns: Sequence[Tensor]) -> Tensor:
    """Orthonormal columns that span all the given ones, less what is rounding."""
    u, s, _ = torch.linalg.svd(torch.cat(list(columns), dim=1), full_matrices=False)
    return u[:, s > _STORED * s[:1]]


def sums_of(cores: Sequence[Core]) -> dict[str, Tensor]:
    """What adds up over modules, k updates against each other, on the CPU.

    Returns:
        ``gram``: k x k inner products. ``apart``: k x k squared distances. ``pairs``: k x k, the interference of each
        two. ``all``: that of all together. ``nuclear``: k sums of singular values. ``inside``: k x k, the energy of
        the row's update in the core of the column's. ``rest``: k energies in the joint core of all others.

    Example:
        >>> one = Factors(B=torch.eye(3)[:, :1], A=torch.tensor([[3.0, 4.0]]))
        >>> sums_of(joint_cores([one, one.scaled(-1.0)]))["gram"].round()
        tensor([[ 25., -25.],
                [-25.,  25.]], dtype=torch.float64)
    """
    k = len(cores)
    flat = torch.stack([core.matrix.flatten() for core in cores])
    sums = {name: torch.zeros(k, k, dtype=torch.float64) for name in ("apart", "pairs", "inside")}
    for i, j in combinations(range(k), 2):
        sums["apart"][i, j] = sums["apart"][j, i] = float((flat[i] - flat[j]).square().sum())
        sums["pairs"][i, j] = sums["pairs"][j, i] = singular_interference([cores[i], cores[j]])
    for i in range(k):
        for j in range(k):
            sums["inside"][i, j] = inside(cores[i], [cores[j]])
    others = [[core for j, core in enumerate(cores) if j != i] for i in range(k)]
    return sums | {
        "gram": (flat @ flat.T).cpu(),
        "all": torch.tensor(singular_interference(cores), dtype=torch.float64),
        "nuclear": torch.stack([core.values.sum() for core in cores]).cpu(),
        "rest": torch.tensor([inside(core, rest) for core, rest in zip(cores, others, strict=True)]).double(),
    }


def signs_of(parts: Sequence[Factors | None]) -> dict[str, Tensor]:
    """Where the entries of each two updates differ in sign, counted and weighed; what adds up over modules.

    Every entry is looked at, a block of rows at a time. An entry that is 0 in one of the two has no sign to differ.
    Entries are formed in float32 (float64 where factors are), as merges form them.

    Returns:
        Four k x k matrices: ``both`` (entries that neither has as 0), ``differ`` (of these, those of unlike signs),
        ``weight`` (sum of |a| |b|) and ``against`` (the part of it where signs differ).

    Example:
        >>> one = Factors(B=torch.ones(2, 1), A=torch.tensor([[3.0, 4.0, 0.0]]))
        >>> found = signs_of([one, Factors(B=torch.tensor([[1.0], [-1.0]]), A=torch.ones(1, 3))])
        >>> {name: found[name][0, 1].item() for name in found}
        {'both': 4.0, 'differ': 2.0, 'weight': 14.0, 'against': 7.0}
    """
    k = len(parts)
    found = {name: torch.zeros(k, k, dtype=torch.float64) for name in ("both", "differ", "weight", "against")}
    held = {at: made for at, part in enumerate(parts) if part is not None and (made := _even(part)) is not None}
    pairs = list(combinations(held, 2))
    if not pairs:
        return found

    def look(rows: slice) -> Tensor:
        entries = {at: product[rows] for at, (product, _) in held.items()}
        return torch.stack([_compared(entries[i] * entries[j]) for i, j in pairs])

    counts = sum(each_block(held[pairs[0][0]][0], look), torch.zeros(len(pairs), 4, dtype=torch.float64))
    for (i, j), (both, differ, weight, total) in zip(pairs, counts.tolist(), strict=True):
        size = held[i][1] * held[j][1]
        told = {"both": both, "differ": differ, "weight": size * weight, "against": size * (weight - total) / 2}
        for name, value in told.items():
            found[name][i, j] = found[name][j, i] = value
    return found


def _even(part: Factors) -> tuple[Product, float] | None:
    """The update over the root mean square of its entries, to a power of two, and that: so no product underflows."""
    size = part.norm() / math.sqrt(max(part.shape.out * part.shape.in_, 1))
    if size == 0:
        return None
    size = 2.0 ** round(math.log2(size))
    working = torch.promote_types(part.dtype, torch.float32)
    return Product((part.B.double() * (part.scale / size)).to(working), part.A.to(working)), size


def _compared(product: Tensor) -> Tensor:
    """Entries that are not 0, those below 0, the sum of absolute values and the sum."""
    counts = [torch.count_nonzero(product), torch.count_nonzero(product < 0), product.abs().sum(), product.sum()]
    return torch.stack([count.double() for count in counts]).cpu()


def angles_of(cores: Sequence[Core]) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """Each pair with the principal angles of its column spaces and of its row spaces.

    Example:
        >>> one = Factors(B=torch.eye(3)[:, :1], A=torch.tensor([[3.0, 4.0]]))
        >>> [(pair, columns.tolist()) for pair, columns, _ in angles_of(joint_cores([one, one]))]
        [((0, 1), [0.0])]
    """
    for i, j in combinations(range(len(cores)), 2):
        a, b = cores[i], cores[j]
        yield (i, j), principal_angles(a.left, b.left), principal_angles(a.right, b.right)
