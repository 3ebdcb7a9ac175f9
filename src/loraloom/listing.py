"""What there is: the registries as rows for the command line and the documentation."""

from __future__ import annotations

from typing import Any

from loraloom.registry import Registry, UnknownName

KINDS = ("methods", "schedules", "tasks", "models", "probes")


def registry(what: str) -> Registry:
    """The registry behind ``loraloom list WHAT``.

    Raises:
        UnknownName: ``what`` is none of methods, schedules, tasks, models, probes.
    """
    if what == "methods":
        from loraloom.ops.merge_methods import merge_methods as found
    elif what == "schedules":
        from loraloom.strategies.schedules import schedules as found  # type: ignore[assignment]
    elif what == "tasks":
        from loraloom.tasks import tasks as found  # type: ignore[assignment]
    elif what == "models":
        from loraloom.models import models as found  # type: ignore[assignment]
    elif what == "probes":
        from loraloom.probes import probes as found  # type: ignore[assignment]
    else:
        raise UnknownName("kind of technique", what, list(KINDS))
    return found


def catalogue(what: str) -> list[dict[str, Any]]:
    """Name, summary, facts and paper of every registered technique of one kind.

    Example:
        >>> [row["name"] for row in catalogue("schedules")]
        ['constant', 'cosine', 'exponential', 'linear', 'sine', 'step']
    """
    return [
        {"name": technique.name, "summary": technique.summary, **_plain(technique.facts), "paper": technique.paper}
        for technique in registry(what).values()
    ]


def _plain(facts: Any) -> dict[str, Any]:
    return {key: ", ".join(value) if isinstance(value, tuple) else value for key, value in facts.items()}
