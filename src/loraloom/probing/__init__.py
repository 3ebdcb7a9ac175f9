"""Probes as a user asks for them: adapters and tasks to a page, the model loaded once.

One module a probe: ``NAME_report`` asks and ``NAME_report_of`` shows a result. Both are found here by their names.
"""

from __future__ import annotations

import importlib
from typing import Any

from loraloom.probing.shapley import scores_in

__all__ = ["scores_in"]


def __getattr__(name: str) -> Any:
    probe = name.removesuffix("_of").removesuffix("_report")
    if not probe or probe == name.removesuffix("_of"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{probe}"), name)
    except ModuleNotFoundError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
