"""Pruning an adapter: whole layers, projections or singular directions (structured), or single entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loraloom.adapter import Adapter
from loraloom.ops.choice import SCOPES, chosen, ranked, scored
from loraloom.ops.directions import pruned_directions
from loraloom.ops.entries import Entries
from loraloom.registry import UnknownName

UNITS = ("entry", "rank", "layer", "module")


def prune(  # noqa: PLR0913 - what is dropped, by what, over what
    adapter: Adapter,
    *,
    keep: str | None = None,
    modules: str | Sequence[str] | None = None,
    density: float | None = None,
    unit: str = "entry",
    by: str | Mapping[str, Any] = "magnitude",
    scope: str = "model",
    pattern: str | None = None,
    space: str = "factors",
    rank: int | None = None,
    seed: int = 0,
) -> Adapter:
    """Prune an adapter; nothing is computed before a module of the result is read, unless ``by`` needs its norms.

    By name, ``keep`` and ``modules`` (together: what both keep); the other modules leave the adapter. The choices of
    CoTo's pruning experiments (arXiv 2506.05713):

    - ``keep="every-other"``: the 1st, 3rd, 5th ... of the layers that the adapter has;
    - ``keep="low"``, ``"middle"``, ``"high"``: a third of them, from the input up (of 10 layers: 3, 4, 3);
    - ``keep="0,2,5-7"``: layers by the number in their path (where paths hold two numbers, as in Swin, by their
      place). Each tower (encoder and decoder, text and vision) is pruned by itself. A module that is in no numbered
      layer (a head, an embedding) stays;
    - ``modules="q_proj,v_proj"``: projections by their name in the layer (``self_attn.q_proj``) or its last part.

    By share, ``density``: exactly ``round(density * n)`` of the n units stay, those of the highest score, of equal ones
    the first. A ``unit`` is

    - ``layer`` or ``module``: whole ones, at least one stays; the score is the norm of the update, chance, or ``by``;
    - ``rank``: a singular direction of a module's update, by its singular value or chance. A module that keeps none
      leaves the adapter. ``provenance["record"]["error"]`` fills with the relative errors as modules are read;
    - ``entry``: a single number. Biases, magnitudes and whole tensors are left alone.

    The entries of a ``space``:

    - ``factors``: B and A as they are stored, without scale (in order: modules, B before A, by rows). A young B is
      small beside A's random start and goes first, which can undo the adapter;
    - ``balanced``: B and A with the singular values split evenly, ``U sqrt(S)`` and ``sqrt(S) V^T``: no gauge;
    - ``delta``: the dense updates, one module at a time. What is left has a higher rank and goes back to factors by
      SVD, at ``rank`` or the module's own rank: the saved update is near that, not itself sparse.

    ``pattern="2:4"`` keeps the 2 largest of every 4 neighbours along a row (the dimension that is summed over) instead;
    a shorter rest at the end of a row keeps up to 2.

    The threshold for entries takes two readings of all modules, by histogram of the bit patterns, and holds only the
    few entries next to it; it is found when the first module is read. Entries are compared as float32.

    Args:
        adapter: of any kind for whole modules, ``rank``, ``factors`` and ``balanced``; ``delta`` needs LoRA. For DoRA
            and HiRA directions and balanced entries are those of B A.
        keep: which layers stay.
        modules: which projections stay, a list or a string with commas.
        density: share of units kept, in (0, 1]; 1 keeps the adapter as it is.
        unit: ``entry``, ``rank``, ``layer`` or ``module``, with ``density``.
        by: ``magnitude``; ``random`` as the baseline; or, for layers and modules, their scores by name, such as Shapley
            values: a mapping, or ``{"units": [...], "values": [...]}``.
        scope: the density holds over the whole ``model``, in each ``layer``, or in each ``module``.
        pattern: N:M, in place of ``density``.
        space: ``factors``, ``balanced`` or ``delta``, for entries.
        rank: of the result, with ``space="delta"``.
        seed: of ``by="random"``.

    Returns:
        A lazy adapter. ``provenance["record"]`` says what was reached: modules, directions or entries kept.

    Raises:
        UnknownName: no such projection, choice, unit, scope, space or score.
        ValueError: not just one way to prune; nothing would be kept; density is outside (0, 1]; an entry is not finite
            (when read).
        UnsupportedKind: ``delta`` on DoRA or HiRA; anything but whole layers and modules of MokA; entries of a start
            that moves the base weights (PiSSA).

    Example:
        >>> import torch
        >>> from loraloom.adapter import Factors
        >>> one = Factors(B=torch.tensor([[1.0], [4.0]]), A=torch.tensor([[2.0, 3.0]]))
        >>> a = Adapter({"r": 1}, {f"layers.{n}.{p}": one for n in range(4) for p in ("q", "v")})
        >>> list(prune(a, keep="every-other", modules="q").modules)
        ['layers.0.q', 'layers.2.q']
        >>> prune(a, density=0.5).modules["layers.3.v"].delta()
        tensor([[ 0.,  0.],
                [ 0., 12.]])
        >>> list(prune(a, density=0.25, unit="layer", by={f"layers.{n}": n for n in range(4)}).modules)
        ['layers.3.q', 'layers.3.v']
    """
    arguments: dict[str, Any] = {"keep": keep, "modules": modules, "density": density, "unit": unit, "space": space}
    arguments |= {"scope": scope, "pattern": pattern, "rank": rank, "by": by if isinstance(by, str) else dict(by)}
    record: dict[str, Any] = {}
    provenance = {
        "operation": "prune",
        "arguments": {key: value for key, value in arguments.items() if value is not None},
        "inputs": [dict(adapter.provenance)],
        "seed": seed,
        "record": record,
    }
    _check(keep, modules, density, pattern, unit, scope, by)
    plain = replace(adapter, config={**adapter.config, "inference_mode": True}, provenance=provenance)
    if unit == "entry" and (density is not None or pattern is not None):
        cut = Entries(adapter, density, pattern, space, str(by), scope, rank, seed, record)
        cut.check()
        if density == 1 and rank is None:
            return replace(adapter, provenance=provenance)
        cut.begin()
        return replace(
            plain, modules=adapter.derived(tuple(adapter.modules), cut.read, cut.shape, heavy=space == "delta")
        )
    if rank is not None or space != "factors":
        raise ValueError("space and rank go with unit='entry'")
    if unit == "rank" and density is not None:
        return replace(plain, modules=pruned_directions(adapter, density, str(by), scope, seed, record))
    if density is None:
        names = chosen(adapter, keep, modules)
    else:
        scores = scored(adapter, unit, by, seed)
        names, units = ranked(adapter, unit, scores, density, scope)
        record.update(units=units, units_before=len(scores))
    record.update(modules=len(names), modules_before=len(adapter.modules))
    return replace(plain, modules=adapter.derived(names, adapter.modules.__getitem__, adapter.shape))


def _check(
    keep: str | None,
    modules: str | Sequence[str] | None,
    density: float | None,
    pattern: str | None,
    unit: str,
    scope: str,
    by: str | Mapping[str, Any],
) -> None:
    named = keep is not None or modules is not None
    if sum([named, density is not None, pattern is not None]) != 1:
        raise ValueError("prune takes either keep and/or modules (by name), or density (by share), or pattern (N:M)")
    for what, value, allowed in (("unit", unit, UNITS), ("scope", scope, SCOPES)):
        if value not in allowed:
            raise UnknownName(what, value, list(allowed))
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if isinstance(by, str) and by not in ("magnitude", "random"):
        raise UnknownName("by", by, ["magnitude", "random", "scores by unit"])
    if not isinstance(by, str) and unit not in ("layer", "module"):
        raise ValueError(f"scores by name go with unit='layer' or 'module', not {unit!r}")
    if named and (unit, by, scope) != ("entry", "magnitude", "model"):
        raise ValueError("unit, by and scope go with density: keep and modules name what stays")
    if pattern is not None and unit != "entry":
        raise ValueError(f"pattern goes with unit='entry', not {unit!r}")
