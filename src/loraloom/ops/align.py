"""Aligning an adapter to another: the same update in factors that are near the other's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Factors, is_finite
from loraloom.ops.checks import check_gauge
from loraloom.registry import UnknownName

GAUGES = ("orthogonal", "invertible")
_WORST = 1e6  # a P of a worse condition would cost the update more digits than nearness is worth


def align(adapter: Adapter, to: Adapter, *, by: str = "invertible") -> Adapter:
    """The adapter with every module's ``(B, A)`` replaced by ``(B P^-1, P A)``; the update is the same.

    P minimises ``|B P^-1 - B_to|^2 + |P A - A_to|^2`` (with the square root of the scale in each factor): over
    ``orthogonal`` matrices in closed form (Procrustes: ``P = V U^T`` of ``B^T B_to + A A_to^T = U S V^T``), over
    ``invertible`` ones by L-BFGS from the best of three starts, the orthogonal one and the closed forms of either term.
    It is the LoRA* of CoTo (arXiv 2506.05713), which minimises the gap between the fused and the averaged update: for
    weights w and 1 - w that gap is ``w (1 - w) |(B P^-1 - B_to)(P A - A_to)|``, at most half of this sum.

    All that is needed of the factors are r x r products. A module that only the adapter has stays as it is. Biases,
    magnitudes and whole tensors do not depend on the gauge and stay.

    Args:
        adapter: the one to bring near, of any kind but MokA.
        to: the one to come near to.
        by: ``invertible`` or ``orthogonal``.

    Returns:
        A lazy adapter. ``provenance["record"]["distance"]`` fills with ``[before, after]`` by module as modules are
        read: the square root of the sum above.

    Raises:
        AdapterMismatch: a module differs in size or rank (see :func:`loraloom.ops.compress.compress` for ranks).
        UnknownName: ``by`` is neither.
        UnsupportedKind: MokA, whose attention sees the factors themselves.

    Example:
        >>> one = Factors(B=torch.tensor([[1.0], [2.0]]), A=torch.tensor([[3.0, 1.0]]))
        >>> other = Factors(B=-2 * one.B, A=-one.A / 2)
        >>> a, b = (Adapter({"r": 1, "lora_alpha": 1}, {"fc": factors}) for factors in (one, other))
        >>> align(b, to=a).modules["fc"].B.round(decimals=3)
        tensor([[1.],
                [2.]])
    """
    if by not in GAUGES:
        raise UnknownName("by", by, list(GAUGES))
    check_gauge(adapter, "align")
    for name in adapter.modules:
        if name in to.modules and adapter.shape(name) != to.shape(name):
            raise AdapterMismatch(f"{name}: {adapter.shape(name)} does not align to {to.shape(name)}")
    distances: dict[str, list[float]] = {}

    def read(name: str) -> Factors:
        factors = adapter.modules[name]
        if name not in to.modules:
            return factors
        aligned, distances[name] = _aligned(factors, to.modules[name], by)
        return aligned

    provenance: dict[str, Any] = {
        "operation": "align",
        "arguments": {"by": by},
        "inputs": [dict(adapter.provenance), dict(to.provenance)],
        "record": {"distance": distances},
    }
    modules = adapter.derived(tuple(adapter.modules), read, adapter.shape, heavy=to.heavy)
    return replace(adapter, modules=modules, provenance=provenance)


def _aligned(factors: Factors, to: Factors, by: str) -> tuple[Factors, list[float]]:
    root, other = math.sqrt(abs(factors.scale)), math.sqrt(abs(to.scale))
    turned = math.copysign(1.0, factors.scale * to.scale)
    b, a = root * factors.B.double(), root * factors.A.double()
    b_to, a_to = turned * other * to.B.double(), other * to.A.double()
    gauge = _Gauge(b.T @ b, b.T @ b_to, a @ a.T, a @ a_to.T, float(b_to.square().sum() + a_to.square().sum()))
    p = gauge.orthogonal() if by == "orthogonal" else gauge.invertible()
    eye = torch.eye(len(p), dtype=p.dtype, device=p.device)
    before, after = gauge.cost(eye), gauge.cost(p)
    if after >= before:
        return factors, [math.sqrt(before)] * 2
    inverse = p.T if by == "orthogonal" else torch.linalg.inv(p)
    new_b, new_a = factors.B.double() @ inverse, p @ factors.A.double()
    aligned = replace(factors, B=new_b.to(factors.dtype), A=new_a.to(factors.dtype))
    return aligned, [math.sqrt(before), math.sqrt(after)]


class _Gauge:
    """The sum of squares as a function of P, from r x r matrices: tr X'GX - 2 tr X'C + tr PHP' - 2 tr PD, X = P^-1."""

    def __init__(self, g: Tensor, c: Tensor, h: Tensor, d: Tensor, rest: float) -> None:
        self.g, self.c, self.h, self.d, self.rest = g, c, h, d, rest

    def cost(self, p: Tensor) -> float:
        x = torch.linalg.inv(p)
        value = (x * (self.g @ x - 2 * self.c)).sum() + (p * (p @ self.h - 2 * self.d.T)).sum() + self.rest
        return max(float(value), 0.0)

    def slope(self, p: Tensor) -> Tensor:
        x = torch.linalg.inv(p)
        return 2 * (p @ self.h - self.d.T) - 2 * x.T @ (self.g @ x - self.c) @ x.T

    def orthogonal(self) -> Tensor:
        u, _, vh = torch.linalg.svd(self.c + self.d)
        return (u @ vh).T

    def invertible(self) -> Tensor:
        start = min(self._starts(), key=self.cost)
        if self.cost(start) <= 1e-20 * self.rest:
            return start
        found = _descend(self.cost, self.slope, start)
        return min((p for p in (start, found) if _sound(p)), key=self.cost)

    def _starts(self) -> list[Tensor]:
        """The orthogonal optimum, and the optimum of either term where it is invertible."""
        from_a = torch.linalg.pinv(self.h, hermitian=True) @ self.d
        from_b = torch.linalg.pinv(self.g, hermitian=True) @ self.c
        found = [self.orthogonal()]
        if _sound(from_a):
            found.append(from_a.T)
        if _sound(from_b):
            found.append(torch.linalg.inv(from_b))
        return found


def _sound(p: Tensor) -> bool:
    if not is_finite(p):
        return False
    values = torch.linalg.svdvals(p)
    return float(values[-1]) * _WORST > float(values[0])


def _descend(cost: Callable[[Tensor], float], slope: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    from scipy.optimize import minimize

    def tensor(flat: Any) -> Tensor:
        return torch.from_numpy(np.asarray(flat)).view_as(start).to(start)

    def value(flat: Any) -> tuple[float, Any]:
        p = tensor(flat)
        if not _sound(p):
            return math.inf, np.zeros_like(flat)
        return cost(p), slope(p).cpu().numpy().ravel()

    scale = cost(start)  # so that the solver's tolerances are relative
    found = minimize(
        lambda flat: tuple(part / scale for part in value(flat)),
        start.cpu().numpy().ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 500, "ftol": 1e-14, "gtol": 1e-12},
    )
    return tensor(found.x)
