"""Fingerprints of adapters, models and examples: equal where they hold the same, wherever it was read from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
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


def of_model(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Fingerprint of a model: names, types, shapes, and up to 64 entries of each parameter, evenly spaced.

    Training changes nearly all entries, so a few of each tell one training from another; no proof against intent.

    Example:
        >>> of_model({"w": torch.zeros(9)}.items()) == of_model({"w": torch.ones(9)}.items())
        False
    """
    found = []
    for name, tensor in parameters:
        flat = tensor.detach().reshape(-1)
        few = flat[:: max(1, flat.numel() // 64)][:64]
        found.append((name, str(tensor.dtype), tuple(tensor.shape), of_tensor(few)))
    return _digest(found)


def of_data(value: Any) -> str:
    """Fingerprint of nested dataclasses, mappings, sequences, arrays and plain values, such as a task's examples.

    Example:
        >>> import numpy as np
        >>> of_data([1, np.zeros(3)]) == of_data([1, np.zeros(3)]) != of_data([1, np.ones(3)])
        True
    """
    return _digest(value)


def _plain(value: Any) -> Any:
    """What JSON cannot hold, in a form that it can."""
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence | Set):
        return sorted(value) if isinstance(value, Set) else list(value)
    return str(value)


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()
