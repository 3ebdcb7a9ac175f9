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
- ``linear=True``: the result is ``sum_i c_i(weights) * delta_i``. Then no dense update is ever formed.
"""

from __future__ import annotations

from torch import Tensor

from loraloom.registry import Registry

merge_methods: Registry[..., Tensor] = Registry("merge method", __name__)
