"""Probes: what can be learned of adapters by scoring them. A probe knows no model, it calls a ``score``.

A probe is one file of this folder: a registered function ``NAME(adapters..., score, *, knobs)`` that returns a frozen
result with ``to_json()``. A score is any ``Callable[[Adapter], float]``; higher is better. What the factors alone tell
(``interference``, ``geometry``) takes none.
"""

from __future__ import annotations

from typing import Any

from loraloom.registry import Registry

probes: Registry[..., Any] = Registry("probe", __name__)
