"""The error certificate: how far each module of a result is from what was asked for, in Frobenius norms.

An operator that cuts something keeps a record ``{"error": {module: |asked - result| / |asked|}, "norm": {module:
|asked|}}`` in the provenance of its result; it fills as modules are read. A module that the result lacks is there too,
with an error of 1. Rounding to the type in which the result is stored is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loraloom.adapter import Factors
from loraloom.untrusted import is_number


def note(record: dict[str, Any], name: str, error: float, result: Factors, asked: float | None = None) -> None:
    """Enter one module: the result is an orthogonal projection of what was asked for, at a relative error.

    The norm of what was asked for follows from the result and the error where ``asked`` does not tell it.

    Example:
        >>> import torch
        >>> record = {}
        >>> note(record, "fc", 0.6, Factors(B=torch.tensor([[4.0]]), A=torch.ones(1, 1)))
        >>> record
        {'error': {'fc': 0.6}, 'norm': {'fc': 5.0}}
    """
    record.setdefault("error", {})[name] = error
    record.setdefault("norm", {})[name] = (
        result.norm() / math.sqrt(max(1 - error**2, 1e-30)) if asked is None else asked
    )


def note_dropped(record: dict[str, Any], norms: Mapping[str, float]) -> None:
    """Enter modules that are not in the result, by the norm of what was asked for: all of it is lost.

    Example:
        >>> record = {}
        >>> note_dropped(record, {"fc": 5.0})
        >>> record
        {'error': {'fc': 1.0}, 'norm': {'fc': 5.0}}
    """
    record.setdefault("error", {}).update({name: float(norm > 0) for name, norm in norms.items()})
    record.setdefault("norm", {}).update(norms)


def chained(first: Mapping[str, Any], second: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Relative error and norm of a module that was projected twice, each time within what was left.

    Example:
        >>> chained({"error": {"fc": 0.6}, "norm": {"fc": 5.0}}, {"error": {"fc": 0.75}, "norm": {"fc": 4.0}}, "fc")
        (0.848..., 5.0)
    """
    then, left = second["error"][name], second["norm"][name]
    if name not in first["error"]:
        return then, left
    asked = first["norm"][name]
    lost = math.hypot(first["error"][name] * asked, then * left)
    return (lost / asked if asked > 0 else 0.0), asked


def total(record: Mapping[str, Any]) -> float | None:
    """Relative error over all modules together; None where nothing was cut.

    Modules without an entry do not count: those of a sum that is not cut; nor does what is no number.

    Example:
        >>> total({"error": {"a": 0.0, "b": 1.0}, "norm": {"a": 4.0, "b": 3.0}})
        0.6
    """
    errors, norms = (_numbers(record.get(key)) for key in ("error", "norm"))
    pairs = [(error, norms[name]) for name, error in errors.items() if name in norms]
    if not pairs:
        return None
    whole = math.hypot(*(norm for _, norm in pairs))
    return math.hypot(*(error * norm for error, norm in pairs)) / whole if whole > 0 else 0.0


def _numbers(told: Any) -> dict[str, float]:
    """What is a number in a map; the record may be that of another program."""
    return {name: value for name, value in told.items() if is_number(value)} if isinstance(told, Mapping) else {}
