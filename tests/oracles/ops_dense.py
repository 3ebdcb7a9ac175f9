"""Slow, obvious versions of the operators: dense numpy in float64, and sorting in plain Python."""

from __future__ import annotations

import numpy as np
import torch

from loraloom.adapter import Adapter, Factors


def random_factors(seed: int, out: int, in_: int, rank: int, scale: float = 1.0, **more) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, in_, generator=generator, dtype=torch.float64)
    return Factors(B=b, A=a, scale=scale, **more)


def random_adapter(seed: int, sizes: dict[str, tuple[int, int, int]], scale: float = 1.0, **config) -> Adapter:
    """An adapter with modules of the given (out, in, rank); the configuration says r of the first, and the scale."""
    rank = next(iter(sizes.values()))[2]
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "base_model_name_or_path": "org/base", **config}
    modules = {name: random_factors(100 * seed + at, *size, scale) for at, (name, size) in enumerate(sizes.items())}
    return Adapter(said, modules, provenance={"name": f"adapter-{seed}"})


def delta(factors: Factors) -> np.ndarray:
    return factors.scale * factors.B.double().numpy() @ factors.A.double().numpy()


def ensemble(adapters: list[Adapter], weights: list[float], name: str) -> np.ndarray:
    """Sum of the updates; an adapter without the module adds nothing."""
    return sum(w * delta(a.modules[name]) for a, w in zip(adapters, weights, strict=True) if name in a.modules)


def fusion(adapters: list[Adapter], weights: list[float], name: str) -> np.ndarray:
    """CoTo's linear fusion, the scale in equal parts in both factors."""
    b = a = 0
    for adapter, weight in zip(adapters, weights, strict=True):
        factors = adapter.modules[name]
        b = b + weight * factors.scale**0.5 * factors.B.double().numpy()
        a = a + weight * factors.scale**0.5 * factors.A.double().numpy()
    return b @ a


def best(dense: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """Best approximation of a rank, and its relative error."""
    u, s, vh = np.linalg.svd(dense, full_matrices=False)
    near = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return near, float(np.linalg.norm(dense - near) / np.linalg.norm(dense))


def largest(values: list[float], kept: int) -> list[bool]:
    """Which entries stay: the largest by magnitude, of equal ones the first."""
    order = sorted(range(len(values)), key=lambda at: (-abs(values[at]), at))
    stays = set(order[:kept])
    return [at in stays for at in range(len(values))]
