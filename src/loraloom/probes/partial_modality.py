"""Partial-modality inference: what an adapter does for the tokens of one modality alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loraloom.adapter import Adapter
from loraloom.modalities import as_moka, own_plan, restricted
from loraloom.probes import probes
from loraloom.probes.game import finite, many


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

    @property
    def shares(self) -> tuple[float, ...] | None:
        """What each keeps of the adapter's gain over the base; None where there is no gain."""
        gain = self.whole - self.base
        return tuple((value - self.base) / gain for value in self.values) if gain > 0 else None

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
        UnsupportedKind: a LoRA that is not of one rank and scale, or of more than linear layers.
        ValueError: a LoRA without ``modalities``, a MokA adapter with them or one that is on for some tokens only, or a
            score that is not finite.

    Example:
        >>> plan = {"modalities": {"image": 1}, "rank": 1}
        >>> moka = Adapter({"peft_type": "MOKA", "moka": plan}, {})
        >>> def score(a):
        ...     return 0.1 if a is None else {None: 0.9, ("text",): 0.8, ("image",): 0.3}[own_plan(a).active]
        >>> partial_modality(moka, score).values
        (0.8, 0.3)
    """
    moka = told_apart(adapter, modalities)
    groups = own_plan(moka).groups

    variants = [*(restricted(moka, group.split("+")) for group in groups), moka, None]
    what = [*(f"for {group} tokens alone" for group in groups), "of the adapter", "of the base"]
    *alone, whole, base = [finite(x, where) for x, where in zip(many(score, variants), what, strict=True)]
    return PartialModality(groups, tuple(alone), whole, base)


def told_apart(adapter: Adapter, modalities: Mapping[str, int] | None = None) -> Adapter:
    """The adapter as a MokA adapter that is on for all tokens; raises as :func:`partial_modality` does.

    Example:
        >>> told_apart(Adapter({"r": 1, "lora_alpha": 1}, {}))
        Traceback (most recent call last):
        ValueError: an adapter of kind lora does not tell its modalities; give them: a number by name, such as image=1
    """
    if adapter.kind != "moka":
        if modalities is None:
            raise ValueError(
                f"an adapter of kind {adapter.kind} does not tell its modalities; give them: a number by name, such as "
                "image=1"
            )
        return as_moka(adapter, modalities)
    if modalities is not None:
        raise ValueError("modalities are for a LoRA; a MokA adapter tells its own")
    if active := own_plan(adapter).active:
        raise ValueError(f"the adapter is on for {', '.join(active)} tokens alone; give the whole one")
    return adapter
