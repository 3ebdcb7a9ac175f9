"""LoRI: A stays as it was drawn, and of B only the entries that a calibrated mask keeps are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.adapter import Adapter
from loraloom.experts import as_stored
from loraloom.masks import Mask, union
from loraloom.ops.choice import SCOPES, groups
from loraloom.ops.merge import module_generator
from loraloom.ops.select import pooled
from loraloom.registry import UnknownName, edge

STARTS = ("reuse", "fresh", "keep")


@dataclass(frozen=True)
class LoRI:
    """LoRA with reduced interference (LoRI, COLM 2025, arXiv 2504.07448), as a plan that knows no model.

    A is frozen at random values; without a mask all of B is trained (LoRI-D), with one only the entries that it keeps
    (LoRI-S). The A's of different tasks are independent, so that ``<dW_s, dW_t> = tr(B_s^T B_t A_t A_s^T)`` is nearly 0
    whatever the B's are, as long as the ranks are far below the width.

    Attributes:
        mask: of :func:`calibrate`; None trains all of B.
        seed: of A. Each module's A is a function of (seed, task, module path): it can always be had again.
        task: a name that makes this task's A independent of other tasks' with the same seed.
        shared: draw the same A for every task: updates then interfere as much as their B's do.
        start: which A, and which B. ``reuse``: with a mask, the A of the run that it was calibrated from (a mask keeps
            entries of certain directions, the rows of that A); without one, drawn from the seed. ``fresh``: another A
            than that, as the official code has it; then only how many entries the mask keeps in each row and module
            carries over. ``keep``: A and B as they are in the model, to go on training. Or an adapter, for its stored
            A. B starts at 0, except with ``keep``.
        protect: masks whose entries are not trained, whatever ``mask`` says.

    Raises:
        ValueError: a value is not allowed, or ``reuse`` does not know the A of the mask.

    Example:
        >>> lori = LoRI(seed=0, task="digits")
        >>> lori.a("layers.0.q", rank=2, fan_in=4).abs().max() <= 0.5
        tensor(True)
    """

    mask: Mask | None = None
    seed: int = 0
    task: str = ""
    shared: bool = False
    start: str | Adapter = "reuse"
    protect: tuple[Mask, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be a whole number in [0, 2**64), got {self.seed!r}")
        if isinstance(self.start, str) and self.start not in STARTS:
            raise UnknownName("start", self.start, list(STARTS))
        for mask in (*([] if self.mask is None else [self.mask]), *self.protect):
            if not isinstance(mask, Mask):
                raise ValueError(f"a mask is a Mask, as calibrate or Mask.of makes one, got {type(mask).__name__}")
        if self.start == "reuse" and self.mask is not None and not self.mask.provenance.get("a"):
            raise ValueError(
                "the mask does not tell the A of the adapter that it was calibrated from; "
                "give that adapter as start, or start='fresh'"
            )

    @property
    def origin(self) -> dict[str, Any] | None:
        """What A is drawn from, as plain JSON; None where it is not drawn but kept or taken over."""
        if self.start == "keep" or isinstance(self.start, Adapter):
            return None
        if self.start == "reuse" and self.mask is not None:
            return dict(self.mask.provenance["a"])
        drawn = {"seed": self.seed, "task": "" if self.shared else self.task}
        return {**drawn, "fresh": True} if self.start == "fresh" else drawn

    def a(self, name: str, rank: int, fan_in: int) -> Float[Tensor, "rank fan_in"]:
        """The frozen A of a module: uniform in +-1/sqrt(fan_in), as PEFT starts A (Kaiming uniform, a = sqrt 5).

        Args:
            name: module path.
            rank: its rows.
            fan_in: its columns.

        Raises:
            ValueError: A is not drawn with this ``start``.
        """
        if self.origin is None:
            raise ValueError("A is not drawn with this start: it is taken as it is")
        origin = self.origin
        key = f"lori/{origin['task']}/{'fresh/' if origin.get('fresh') else ''}{name}"
        uniform = torch.rand(rank, fan_in, generator=module_generator(origin["seed"], key))
        return (uniform * 2 - 1) / fan_in**0.5

    def allowed(self, name: str, shape: tuple[int, int]) -> Tensor | None:
        """Which entries of a module's B (out x rank) are trained; None if all are.

        Raises:
            ValueError: a mask does not have the module, or at another size.
        """
        for held in (*(() if self.mask is None else (self.mask,)), *self.protect):
            if name not in held:
                raise ValueError(f"the mask has no module {name}; it has {', '.join(list(held)[:3])}, ...")
            if held.shapes[name] != shape:
                told = " x ".join(map(str, held.shapes[name]))
                raise ValueError(f"{name}: the mask is {told}, B is {shape[0]} x {shape[1]}")
        if self.mask is None and not self.protect:
            return None
        kept = torch.ones(shape, dtype=torch.bool) if self.mask is None else self.mask[name]
        for held in self.protect:
            kept = kept & ~held[name]
        return kept

    def attach(self, peft_model: Any, adapter_name: str = "default") -> None:
        """Freeze A and make B sparse on a live PEFT model, in place; ``save_pretrained`` writes an ordinary LoRA.

        Raises:
            ValueError: the adapter is no LoRA, its start has changed the base, or the mask does not fit.
        """
        edge("sparse").attach(self, peft_model, adapter_name)

    def detach(self, peft_model: Any, adapter_name: str = "default") -> None:
        """Turn the adapter back into an ordinary LoRA of PEFT, with the values it has now."""
        edge("sparse").detach(peft_model, adapter_name)


def calibrate(
    source: Adapter | Mapping[str, Tensor],
    *,
    density: float = 0.1,
    scope: str = "model",
    exclude: Mask | Sequence[Mask] = (),
) -> Mask:
    """A mask that keeps the largest entries of B (LoRI, section 3; |B| alone: neither A nor the scale counts).

    Exactly ``round(density * n)`` entries of each scope of n are kept; of equal ones the first by module and index. All
    modules are read twice, one at a time, and nothing is sorted.

    Args:
        source: a trained adapter (a whole LoRI-D run, or a short one), or a score for each entry of B by module, such
            as gradients (``gradient_scores``); their magnitudes count.
        density: share of the entries to keep, in (0, 1].
        scope: where the density holds: over the whole model, or in each layer, projection or module.
        exclude: masks whose entries are not taken, so that tasks are disjoint; n still counts all entries.

    Raises:
        ValueError: the density keeps nothing or more than is left, or a score is not finite.

    Example:
        >>> from loraloom.adapter import Factors
        >>> a = Adapter({}, {"fc": Factors(B=torch.tensor([[1.0, -3.0], [2.0, 0.0]]), A=torch.ones(2, 5))})
        >>> calibrate(a, density=0.5)["fc"]
        tensor([[False,  True],
                [ True, False]])
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    if scope not in SCOPES:
        raise UnknownName("scope", scope, list(SCOPES))
    excluded = union([exclude] if isinstance(exclude, Mask) else list(exclude))
    entries: Mapping[str, Tensor]
    entries = _Trained(source) if isinstance(source, Adapter) else source
    shapes = entries.shapes if isinstance(entries, _Trained) else {n: (len(t), t.shape[1]) for n, t in entries.items()}
    if excluded is not None and dict(excluded.shapes) != dict(shapes):
        raise ValueError("an excluded mask is of other modules or ranks than the adapter")

    def free(name: str) -> Tensor | None:
        return None if excluded is None else ~excluded[name].flatten()

    def scores(name: str) -> Tensor:
        flat, left = entries[name].detach().cpu().flatten().abs(), free(name)
        return flat if left is None else flat[left]

    kept: dict[str, Tensor] = {}
    for pool in groups(list(shapes), scope):
        count = round(density * sum(out * rank for out, rank in (shapes[name] for name in pool)))
        left = sum(out * rank for out, rank in (shapes[name] for name in pool))
        left -= 0 if excluded is None else sum(map(excluded.count, pool))
        if not 1 <= count <= left:
            where = "the model" if scope == "model" else pool[0]
            raise ValueError(f"density={density} is {count} entries of {where}; from 1 to {left} can be kept")
        found = pooled(pool, scores, count)
        for name in pool:
            mask, left_in = found.mask(name, scores(name)), free(name)
            if left_in is not None:
                mask = torch.zeros(left_in.numel(), dtype=torch.bool).masked_scatter_(left_in, mask)
            kept[name] = mask.view(shapes[name])
    about = {"operation": "calibrate", "density": density, "scope": scope, "excluded": excluded is not None}
    return Mask.of({name: kept[name] for name in shapes}, {**about, **_source(source)})


class _Trained(Mapping[str, Tensor]):
    """The B factors of an adapter by module as they are stored, read when asked for."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = as_stored(adapter)
        self.shapes = {name: self._size(name, adapter) for name in self._adapter.modules}

    def _size(self, name: str, adapter: Adapter) -> tuple[int, int]:
        if name not in adapter.modules:  # of several, such as the groups of a convolution: B is narrower than A is high
            return len(self[name]), self[name].shape[1]
        return adapter.shape(name).out, adapter.shape(name).rank

    def __getitem__(self, name: str) -> Tensor:
        return self._adapter.modules[name].B

    def __iter__(self) -> Any:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _source(source: Adapter | Mapping[str, Tensor]) -> dict[str, Any]:
    """Where the entries came from, and what their A was drawn from, if that is known."""
    if not isinstance(source, Adapter):
        return {"source": "scores", "a": None}
    trained = source.provenance
    lori = trained.get("record", {}).get("lori", {}) if trained.get("operation") == "train" else {}
    return {"source": str(trained.get("name", "")), "a": lori.get("a")}
