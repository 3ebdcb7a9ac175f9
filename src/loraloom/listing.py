"""What there is: the registries as rows for the command line and the documentation."""

from __future__ import annotations

import importlib
from typing import Any

from loraloom.registry import Registry, UnknownName

_HOMES = {
    "methods": ("loraloom.ops.merge_methods", "merge_methods"),
    "schedules": ("loraloom.strategies.schedules", "schedules"),
    "tasks": ("loraloom.tasks", "tasks"),
    "models": ("loraloom.models", "models"),
    "probes": ("loraloom.probes", "probes"),
}
KINDS = tuple(_HOMES)


def registry(what: str) -> Registry:
    """The registry behind ``loraloom list WHAT``.

    Raises:
        UnknownName: ``what`` is none of methods, schedules, tasks, models, probes.
    """
    if what not in _HOMES:
        raise UnknownName("kind of technique", what, list(KINDS))
    module, name = _HOMES[what]
    found: Registry = getattr(importlib.import_module(module), name)
    return found


def catalogue(what: str) -> list[dict[str, Any]]:
    """Name, summary, facts and paper of every registered technique of one kind.

    Example:
        >>> [row["name"] for row in catalogue("schedules")]
        ['constant', 'cosine', 'exponential', 'linear', 'sine', 'step']
    """
    techniques = list(registry(what).values())
    facts = dict.fromkeys((name for technique in techniques for name in technique.facts), "")
    return [
        {
            "name": technique.name,
            "summary": technique.summary.replace("``", ""),
            **facts,
            **_plain(technique.facts),
            "paper": technique.paper,
        }
        for technique in techniques
    ]


def _plain(facts: Any) -> dict[str, Any]:
    return {key: ", ".join(value) if isinstance(value, tuple) else value for key, value in facts.items()}
