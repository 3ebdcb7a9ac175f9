"""Merge methods: one function a file, found by being there.

A method sees k stacked tensors and k weights and returns one tensor; it knows no adapter, no rank and no file. What is
equal for all methods (alignment, spaces, scales, output rank, seeds, streaming, provenance) is in ``ops/merge.py``.

A file ``NAME.py`` holds one decorated function ``NAME(deltas, weights, *, knobs)``:

- every knob is keyword-only and has a default; it is checked in the function, which the driver calls once on zeros to
  have bad knobs (or a number of adapters that the method cannot serve) refused before any file is read;
- a method that draws has a keyword ``generator: torch.Generator`` and no other source of chance;
- ``paper``: where it comes from;
- ``breaks``: the contract laws that it breaks, of those in tests/contracts/test_merge_methods.py;
- ``space``: the space it runs in by default (``delta`` where left out);
- ``spaces``: those it supports (all of ``ops/spaces.py`` where left out);
- ``lacks``: why not some others, as ``core, knots: the reason``, for the docs and the message;
- ``rank="largest"``: without a size that is asked for, the result has the largest rank of the inputs;
- ``size``: name of the knob that is the rank of the result where it is given, as far as the ranks of the inputs go;
- ``statistics``: what the method asks to know of each adapter ("gram", "fisher"); it comes as a keyword argument;
- ``linear=True``: the result is ``sum_i c_i(weights) * delta_i``. Then no dense update is ever formed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from loraloom.registry import Registry

merge_methods: Registry[..., Tensor] = Registry("merge method", __name__)


def inner_method(name: str) -> Callable[..., Tensor]:
    """A method that runs inside another one, with its default knobs.

    Raises:
        ValueError: no such method, or one that draws, needs statistics or runs in a space of its own.

    Example:
        >>> inner_method("linear").__name__
        'linear'
    """
    technique = merge_methods[name]
    draws = "generator" in inspect.signature(technique.function).parameters
    if draws or "statistics" in technique.facts or technique.facts.get("spaces") == ("units",):
        raise ValueError(f"method {name!r} cannot run inside another: it draws, needs statistics or sees units")
    return technique.function
