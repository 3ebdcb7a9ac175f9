"""Fingerprints of adapters: equal where they hold the same numbers, wherever they were read from."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loraloom.adapter import Adapter, Factors

_known: WeakKeyDictionary[Factors, str] = WeakKeyDictionary()  # one is asked for again with every coalition it is in


def of_factors(factors: Factors) -> str:
    """Fingerprint (sha256) of one module's update: of the numbers and how they are stored.

    Example:
        >>> one, same = (Factors(B=torch.ones(2, 1), A=torch.ones(1, 2)) for _ in range(2))
        >>> of_factors(one) == of_factors(same) != of_factors(one.scaled(2.0))
        True
    """
    if factors not in _known:
        parts = [factors.B, factors.A, factors.bias, factors.magnitude]
        told = (factors.scale, factors.kernel, factors.embedding, factors.experts)
        _known[factors] = _digest(told, *(part if part is None else of_tensor(part) for part in parts))
    return _known[factors]


def of_tensor(tensor: Tensor) -> str:
    """Fingerprint of a tensor: type, shape and bits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def of_settings(adapter: Adapter) -> str:
    """Fingerprint of all that is not a module: the configuration but for ``inference_mode``, and whole tensors."""
    config = {key: value for key, value in adapter.config.items() if key != "inference_mode"}
    return _digest(config, {path: of_tensor(tensor) for path, tensor in adapter.extras.items()})


def of_adapter(adapter: Adapter | None) -> str:
    """Fingerprint of a whole adapter; ``base`` is that of none.

    Example:
        >>> of_adapter(None), len(of_adapter(Adapter({"r": 1}, {})))
        ('base', 64)
    """
    if adapter is None:
        return "base"
    return _digest(of_settings(adapter), {name: of_factors(adapter.modules[name]) for name in adapter.modules})


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
