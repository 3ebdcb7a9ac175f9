"""Starts of training that move the base weights: the factors are then relative to a base that only training saw."""

from __future__ import annotations

_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def moves_base(start: object) -> bool:
    """Whether a value of ``init_lora_weights`` is one of those.

    Example:
        >>> moves_base("pissa_niter_16"), moves_base("gaussian"), moves_base(True)
        (True, False, False)
    """
    return isinstance(start, str) and start.lower().startswith(_MOVES_BASE)
