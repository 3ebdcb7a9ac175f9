"""Partial-modality inference: what an adapter does for the tokens of one modality alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loraloom.adapter import Adapter
from loraloom.modalities import as_moka, plan_of, restricted
from loraloom.probes import probes


@dataclass(frozen=True)
class PartialModality:
    """Scores with the update on for all tokens, for those of one modality alone, and for none.

    Attributes:
        modalities: ``text`` first; names that share an A stand as one, with ``+``.
        values: score with the update on for the tokens of each of them alone.
        whole: score of the adapter as it is.
        base: score without it.
    """

    modalities: tuple[str, ...]
    values: tuple[float, ...]
    whole: float
    base: float

    def to_json(self) -> dict[str, Any]:
        """All fields by name, tuples as lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@probes.register("partial-modality", paper="https://arxiv.org/abs/2506.05191")
def partial_modality(
    adapter: Adapter, score: Callable[[Adapter | None], float], *, modalities: Mapping[str, int] | None = None
) -> PartialModality:
    """How much of an adapter's gain each modality's tokens bring (MokA, section 3 and figure 1).

    The paper's finding of plain LoRA: switched on for text tokens alone it does nearly as well as for all, for image or
    audio tokens alone far worse. Text tokens are looked at as keys whether or not their own update is on.

    Args:
        adapter: a MokA adapter, or a LoRA of one rank together with ``modalities``.
        score: called with each variant, and with None for the base.
        modalities: number by name, as in :class:`loraloom.MokA`; for a LoRA.

    Raises:
        ValueError: a LoRA without ``modalities``, or a score that is not finite.

    Example:
        >>> plan = {"modalities": {"image": 1}, "rank": 1}
        >>> moka = Adapter({"peft_type": "MOKA", "moka": plan}, {})
        >>> def score(a):
        ...     return 0.1 if a is None else {None: 0.9, ("text",): 0.8, ("image",): 0.3}[plan_of(a.config).active]
        >>> partial_modality(moka, score).values
        (0.8, 0.3)
    """
    plan = plan_of(adapter.config)
    if plan is None:
        if modalities is None:
            raise ValueError("an adapter that is no MokA does not tell its modalities; give modalities={name: number}")
        adapter = as_moka(adapter, modalities)
        plan = plan_of(adapter.config)
    assert plan is not None

    def asked(variant: Adapter | None, what: str) -> float:
        value = float(score(variant))
        if not math.isfinite(value):
            raise ValueError(f"the score {what} is {value}")
        return value

    alone = [asked(restricted(adapter, group.split("+")), f"for {group} tokens alone") for group in plan.groups]
    return PartialModality(plan.groups, tuple(alone), asked(adapter, "of the adapter"), asked(None, "of the base"))
