"""MokA: each token meets the A of its modality, other modalities look at the text inside the rank space, B is shared.

The plan. What it does to tensors is in ``rankspace.py``, PEFT's layers and hooks in ``integrations/modality.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loraloom.registry import UnknownName, edge

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
        rank: r, or one by name (with ``text``); B has as many columns as the largest.
        alpha: the update is scaled by alpha / r.
        dropout: of the input.
        attention: ``cross``: of the other modalities to the text; ``none``; ``uniform``: the mean of the text is added
            (the paper's "naive interaction"); ``text-as-query``: the text looks at each other modality instead.
        keys: which text is looked at. ``prompt``: what comes before the first label, or before what is generated;
            ``after-last-modality``: of that, what follows the last token of another modality; ``span``: what stands
            between two marker tokens; ``explicit``: the tokens of ``question_mask``. Never the answer: it would leak.
        weight: lambda, or one by name.
        span: ids of the markers, for ``keys="span"``.
        logits: ``paper``: h h^T / sqrt(r); ``official``: times (alpha / r)^2, as the official audio-visual code has it.
        tokens: placeholder ids by name, where the model's configuration does not tell them.
        own: what each modality has of its own: ``A`` is MokA; ``B`` is one A and several B's, ``both`` is uni-modal
            LoRA, for comparison.
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
        places = sorted(set(self.modalities.values()))
        if not places or "text" in self.modalities or places != list(range(1, len(places) + 1)):
            raise ValueError(
                f"modalities must number the A's of everything but the text from 1 on, got {dict(self.modalities)}"
            )
        for what in ("rank", "weight"):
            told = getattr(self, what)
            needed = {*self.modalities, *(["text"] if what == "rank" else [])}
            if isinstance(told, Mapping) and set(told) != needed:
                raise ValueError(f"{what} must be a number, or one for each of {', '.join(sorted(needed))}")
        self._check_numbers()
        if self.keys == "span" and self.span is None:
            raise ValueError("keys='span' needs span=(id of the start marker, id of the end marker)")
        strange = {*(self.active or ()), *self.tokens} - {"text", *self.modalities}
        if strange:
            raise UnknownName("modality", min(strange), ["text", *self.modalities])

    def _check_numbers(self) -> None:
        for name, number in self.modalities.items():
            if self._rank(name) != self.ranks[number] or self._weight(name) != self.weights[number]:
                raise ValueError(f"{name} shares its A with another modality, so rank and weight must be the same")
        if not all(isinstance(r, int) and r >= 1 for r in self.ranks):
            raise ValueError(f"rank must be a whole number of at least 1, got {self.rank!r}")
        if not all(math.isfinite(w) for w in self.weights) or not 0 < self.alpha < math.inf:
            raise ValueError(f"weight and alpha must be finite and alpha above 0, got {self.weight!r}, {self.alpha!r}")
        if len(set(self.ranks)) > 1 and (self.own == "B" or self.heads > 1):
            raise ValueError("several ranks need an A for each modality and one head")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads must divide the rank {self.width}, got {self.heads!r}")

    def _rank(self, name: str) -> int:
        return self.rank[name] if isinstance(self.rank, Mapping) else self.rank

    def _weight(self, name: str) -> float:
        return float(self.weight[name] if isinstance(self.weight, Mapping) else self.weight)

    @property
    def groups(self) -> tuple[str, ...]:
        """What has an A of its own, by number: ``text``, then the names that share each."""
        count = max(self.modalities.values())
        others = ["+".join(n for n, at in self.modalities.items() if at == i) for i in range(1, count + 1)]
        return ("text", *others)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each A, by number."""
        return tuple(self._rank(name.split("+")[0]) for name in self.groups)

    @property
    def weights(self) -> tuple[float, ...]:
        """lambda by number; that of the text is 1 and counts where the text is the query."""
        return (1.0, *(self._weight(name.split("+")[0]) for name in self.groups[1:]))

    @property
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
        told = asdict(self) | {"modalities": dict(self.modalities), "tokens": dict(self.tokens)}
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in told.items()}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> MokA:
        """The plan of a configuration.

        Raises:
            ValueError: a key is missing or not known, or a value is not allowed.
        """
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in told.items()}
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"moka: {str(error).split('__init__() ')[-1]}") from None

    def wrap(self, model: Any, target_modules: str | Sequence[str] = "all-linear", **options: Any) -> Any:
        """Put fresh adapters on a Transformers model: a ``PeftModel`` whose routing finds itself from the inputs.

        Args:
            model: a multimodal model; only its language model is adapted (of an encoder-decoder both sides).
            target_modules: names of linear layers, or all of them.
            options: further fields of PEFT's LoraConfig, such as ``modules_to_save=["multi_modal_projector"]``.

        Raises:
            ValueError: a layer is outside of the language model, or the model's tokens cannot be told apart.
        """
        return edge("modality").wrap(self, model, target_modules, **options)
