"""MokA: each token meets the A of its modality, other modalities look at the text inside the rank space, B is shared.

The plan. What it does to tensors is in ``rankspace.py``, PEFT's layers and hooks in ``integrations/modality.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from loraloom.registry import UnknownName, edge
from loraloom.untrusted import is_number

ATTENTION = ("cross", "none", "uniform", "text-as-query")
KEYS = ("prompt", "after-last-modality", "span", "explicit")
OWN = ("A", "B", "both")
LOGITS = ("paper", "official")


@dataclass(frozen=True)
class MokA:
    """Multimodal low-rank adaptation (MokA, NeurIPS 2025, arXiv 2506.05191, eq. 4 to 13), as a plan without a model.

    For a token x of modality m, ``h = A_m x``; for one that is not text, ``h += weight * softmax(h K^T / sqrt(r)) K``
    with the text's ``A_text x`` as keys and values K; the layer adds ``alpha / r * B h``. One head, no mask between
    earlier and later tokens, no further parameters. Text alone is plain LoRA with ``A_text`` and ``B``.

    Attributes:
        modalities: number of its A by name; 0 is the text's, names may share one (``{"image": 1, "video": 1}``).
        rank: r, or one by name (with ``text``); B has as many columns as the largest, and two of different rank meet
            in the columns that both have.
        alpha: the update is scaled by alpha / r, of the largest r.
        dropout: of the input.
        attention: ``cross``: of the other modalities to the text; ``none``; ``uniform``: the mean of the text is added
            (the paper's "naive interaction"); ``text-as-query``: the text looks at each other modality instead.
        keys: which text is looked at. ``prompt``: what comes before the first label, or before what is generated;
            ``after-last-modality``: of that, what follows the last token of another modality; ``span``: what stands
            between two marker tokens; ``explicit``: the tokens of ``question_mask``. The answer is never looked at
            where ``labels``, ``question_mask`` or ``generate`` tell it from the prompt. In evaluation mode a forward
            pass may have none of them; then all of its text is taken for a prompt, and an answer in it leaks.
        weight: lambda, or one by name.
        span: ids of the markers, for ``keys="span"``.
        logits: ``paper``: h h^T / sqrt(r); ``official``: times (alpha / r)^2, as the official audio-visual code has it.
        tokens: placeholder ids by name, where the model's configuration does not tell them.
        own: what each modality has of its own: ``A`` is MokA; ``B`` is one A and several B's; ``both``, with
            ``attention="none"``, is uni-modal LoRA, for comparison.
        heads: the rank is taken as so many equal parts that attend separately: what a ``cat`` of adapters gives.
        active: names of the modalities (with ``text``) whose tokens get the update; None is all.

    Raises:
        ValueError: a value is not allowed.

    Example:
        >>> moka = MokA(modalities={"image": 1, "audio": 2}, rank=4)
        >>> moka.ranks, moka.scale
        ((4, 4, 4), 4.0)
    """

    modalities: Mapping[str, int]
    rank: int | Mapping[str, int] = 4
    alpha: float = 16.0
    dropout: float = 0.05
    attention: str = "cross"
    keys: str = "prompt"
    weight: float | Mapping[str, float] = 1.0
    span: tuple[int, int] | None = None
    logits: str = "paper"
    tokens: Mapping[str, int] = field(default_factory=dict)
    own: str = "A"
    heads: int = 1
    active: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("attention", ATTENTION), ("keys", KEYS), ("logits", LOGITS), ("own", OWN)):
            if getattr(self, name) not in allowed:
                raise UnknownName(name, getattr(self, name), list(allowed))
        self._check_modalities()
        self._check_names()
        self._check_by_name("rank", lambda rank: _whole(rank) and rank >= 1, "a whole number of at least 1")
        self._check_by_name("weight", is_number, "finite")
        self._check_numbers()
        if self.keys == "span" or self.span is not None:
            span = tuple(self.span) if isinstance(self.span, Sequence) else ()
            if len(span) != 2 or span[0] == span[1] or not all(map(_whole, span)):
                raise ValueError(f"span must be two different ids (start marker, end marker), got {self.span!r}")
            object.__setattr__(self, "span", span)

    def _check_modalities(self) -> None:
        told = self.modalities
        numbers = list(told.values()) if isinstance(told, Mapping) else []
        if not all(map(_whole, numbers)) or set(numbers) != set(range(1, len(set(numbers)) + 1)) or not numbers:
            raise ValueError(f"modalities must number the A's of everything but the text from 1 on, got {told!r}")
        for name in told:
            if not isinstance(name, str) or not name or name == "text" or any(sign in name for sign in ".+[]"):
                raise ValueError(f"a modality may have any name but 'text', without any of . + [ ], got {name!r}")
        object.__setattr__(self, "modalities", dict(told))

    def _check_names(self) -> None:
        if not isinstance(self.tokens, Mapping) or not all(map(_whole, self.tokens.values())):
            raise ValueError(f"tokens must be ids by name, got {self.tokens!r}")
        for name in self.tokens:
            if name not in self.modalities:
                raise UnknownName("tokens: modality", name, list(self.modalities))
        if self.active is None:
            return
        if not isinstance(self.active, str | Sequence):
            raise ValueError(f"active must be names of modalities, got {self.active!r}")
        on = (self.active,) if isinstance(self.active, str) else tuple(self.active)
        object.__setattr__(self, "active", on)
        for name in on:
            if name not in ("text", *self.modalities):
                raise UnknownName("active: modality", name, ["text", *self.modalities])
        for group in self.groups:
            if len({name in on for name in group.split("+")}) > 1:
                raise ValueError(f"active must name all or none of {group}, which share an A, got {on!r}")

    def _check_by_name(self, what: str, right: Callable[[Any], bool], allowed: str) -> None:
        told = getattr(self, what)
        needed = [*(["text"] if what == "rank" else []), *self.modalities]
        if isinstance(told, Mapping) and set(told) != set(needed):
            raise ValueError(f"{what} must be a number, or one for each of {', '.join(needed)}, got {dict(told)}")
        if not all(map(right, told.values() if isinstance(told, Mapping) else [told])):
            raise ValueError(f"{what} must be {allowed}, got {told!r}")
        for name, number in self.modalities.items() if isinstance(told, Mapping) else ():
            first = self.groups[number].split("+")[0]
            if told[name] != told[first]:
                raise ValueError(f"{name} shares its A with {first}, so their {what} must be the same")

    def _check_numbers(self) -> None:
        if not is_number(self.alpha) or self.alpha <= 0:
            raise ValueError(f"alpha must be finite and above 0, got {self.alpha!r}")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if not _whole(self.heads) or self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads must divide the rank {self.width}, got {self.heads!r}")
        if len(set(self.ranks)) > 1 and (self.own == "B" or self.heads > 1):
            raise ValueError("several ranks need an A for each modality (own='A' or 'both') and one head")

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """What has an A of its own, by number: ``text``, then the names that share each, with ``+``."""
        numbers = range(1, max(self.modalities.values()) + 1)
        return ("text", *("+".join(name for name, at in self.modalities.items() if at == i) for i in numbers))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each A, by number."""
        rank = self.rank
        return tuple(rank[name.split("+")[0]] if isinstance(rank, Mapping) else rank for name in self.groups)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """lambda by number; the text's, 1, is never used."""
        weight, others = self.weight, self.groups[1:]
        return (1.0, *(float(weight[n.split("+")[0]] if isinstance(weight, Mapping) else weight) for n in others))

    @cached_property
    def width(self) -> int:
        """Columns of B."""
        return max(self.ranks)

    @property
    def rows(self) -> int:
        """Rows of the stacked A."""
        return self.width if self.own == "B" else sum(self.ranks)

    @property
    def columns(self) -> int:
        """Columns of B, or of the stacked B's."""
        return self.width if self.own == "A" else self.width * len(self.groups)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.width

    def to_json(self) -> dict[str, Any]:
        """What the adapter's configuration holds under ``moka``."""
        told = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            key: dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
            for key, value in told.items()
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> MokA:
        """The plan of a configuration.

        Raises:
            ValueError: a key is missing or not known, or a value is not allowed.
        """
        if strange := sorted(set(told) - {one.name for one in fields(cls)}):
            raise UnknownName("moka: key", strange[0], [one.name for one in fields(cls)])
        return cls(**{"modalities": {}, **told})

    def wrap(self, model: Any, target_modules: str | Sequence[str] = "all-linear", **options: Any) -> Any:
        """Put fresh adapters on a Transformers model: a ``PeftModel`` whose routing finds itself from the inputs.

        Args:
            model: a multimodal model; only its language model is adapted. Of an encoder-decoder both sides are, with
                ``attention="none"``: its encoder has run before there is any text to look at.
            target_modules: names of linear layers, or all of them.
            options: further fields of PEFT's LoraConfig, such as ``modules_to_save=["multi_modal_projector"]``.

        Raises:
            ValueError: a layer is outside of the language model, a module to save is not there, or the model's tokens
                cannot be told apart.
        """
        return edge("modality").wrap(self, model, target_modules, **options)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
