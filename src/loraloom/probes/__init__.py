"""Probes: what can be learned of adapters by scoring them. A probe knows no model, it calls a ``score``.

A probe is one file of this folder: a registered function ``NAME(adapters..., score, *, knobs)`` that returns a frozen
result with ``to_json()``. A score is any ``Callable[[Adapter], float]``; higher is better. One with a method ``many``
is asked for several at once (``probes.game.many``), so a probe asks for all that it knows it will need in one call.
What the factors alone tell (``interference``, ``geometry``) takes no score.
"""

from __future__ import annotations

from typing import Any

from loraloom.registry import Registry

probes: Registry[..., Any] = Registry("probe", __name__)
