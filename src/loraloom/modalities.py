"""MokA adapters: one module a modality, packed as the layer holds them (all A's stacked, one B).

Module ``...q_proj[image]`` has the factors B and A_image, so that operators that treat each module by itself are right
for each modality. B is shared: what gives the modalities of a layer different B's cannot be stored, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loraloom.adapter import Adapter, AdapterMismatch, Factors, Modules, Shape, UnsupportedKind
from loraloom.strategies.modality import MokA

MOKA = "MOKA"


@dataclass(frozen=True, eq=False)
class Stacked(Factors):
    """B and the stacked A's of one MokA layer; ``rank`` is that of the layer, not the rows of A."""

    groups: int = 1  # B's that stand side by side

    def __post_init__(self) -> None:
        pass

    @property
    def rank(self) -> int:
        """Columns of one B."""
        return self.B.shape[1] // self.groups


def plan_of(config: Mapping[str, Any], where: str = "configuration") -> MokA | None:
    """The MokA plan of a configuration; None for any other kind.

    Raises:
        ValueError: the plan is damaged.
    """
    if str(config.get("peft_type")).upper() != MOKA:
        return None
    told = config.get("moka")
    if not isinstance(told, Mapping):
        raise ValueError(f"{where}: peft_type MOKA needs its plan under moka, got {told!r}")
    try:
        return MokA.from_json(told)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def stored_shape(plan: MokA, what: str, a: Sequence[int], b: Sequence[int]) -> Shape:
    """Sizes of a stored layer; an error where they are not those of the plan."""
    if len(a) != 2 or len(b) != 2 or a[0] != plan.rows or b[1] != plan.columns:
        raise ValueError(
            f"{what}: A {tuple(a)} and B {tuple(b)}; the plan asks for {plan.rows} rows and {plan.columns} columns"
        )
    return Shape(b[0], a[1], plan.width)


def spread_modalities(plan: MokA, stored: Mapping[str, Shape]) -> dict[str, Shape]:
    """Sizes by module, one a modality.

    Example:
        >>> spread_modalities(MokA({"image": 1}), {"q": Shape(3, 4, 4)})
        {'q[text]': Shape(out=3, in_=4, rank=4), 'q[image]': Shape(out=3, in_=4, rank=4)}
    """
    return {
        f"{owner}[{group}]": shape._replace(rank=rank)
        for owner, shape in stored.items()
        for group, rank in zip(plan.groups, plan.ranks, strict=True)
    }


def modality_part(plan: MokA, stored: Factors, name: str) -> Factors:
    """The factors of one modality of a stored layer."""
    at = plan.groups.index(name[name.rindex("[") + 1 : -1])
    rank, above = plan.ranks[at], sum(plan.ranks[:at])
    a = stored.A if plan.own == "B" else stored.A[above : above + rank]
    left = 0 if plan.own == "A" else at * plan.width
    b = stored.B[:, left : left + rank]
    return Factors(B=b.contiguous(), A=a.clone(), scale=stored.scale, bias=stored.bias)


def packed_modalities(adapter: Adapter) -> Adapter:
    """The adapter with a layer's modalities packed, its plan at the ranks that they have."""
    plan = plan_of(adapter.config)
    if plan is None or not any(name.endswith("]") for name in adapter.modules):
        return adapter
    owners: dict[str, list[str]] = {}
    for name in adapter.modules:
        owners.setdefault(name[: name.rindex("[")], []).append(name)
    ranks: dict[str, set[int]] = {}
    for owner, names in owners.items():
        if [name[len(owner) + 1 : -1] for name in names] != list(plan.groups):
            raise AdapterMismatch(
                f"{owner} has {len(names)} of the modalities {', '.join(plan.groups)}; all are needed"
            )
        for group, name in zip(plan.groups, names, strict=True):
            ranks.setdefault(group, set()).add(adapter.shape(name).rank)
    several = next((group for group, found in ranks.items() if len(found) > 1), None)
    if several is not None:
        raise UnsupportedKind(f"MokA has one rank for all layers; {several} has {sorted(ranks[several])}")
    by_name = {"text": ranks["text"], **{name: ranks[plan.groups[at]] for name, at in plan.modalities.items()}}
    settled = {name: next(iter(found)) for name, found in by_name.items()}
    rank: Any = settled["text"] if len(set(settled.values())) == 1 else settled
    # alpha over rank stays what it was; where scales are baked, the configuration's alpha says so
    now = replace(plan, rank=rank, alpha=plan.alpha / plan.width * max(settled.values()))
    config = {**adapter.config, "moka": now.to_json(), "r": now.width}
    if now.width != plan.width:
        config["lora_alpha"] = now.alpha

    def read(owner: str) -> Factors:
        return packed_factors(now, owner, [adapter.modules[name] for name in owners[owner]])

    def shape(owner: str) -> Shape:
        first = adapter.shape(owners[owner][0])
        return first._replace(rank=now.width)

    return replace(adapter, config=config, modules=Modules(tuple(owners), read, shape))


def packed_factors(plan: MokA, owner: str, parts: Sequence[Factors]) -> Factors:
    """One stored layer out of its modalities.

    Raises:
        AdapterMismatch: what is shared differs between them.
    """
    if len({part.scale for part in parts}) > 1:
        parts = [part.baked() for part in parts]
    widest = max(parts, key=lambda part: part.rank)
    if plan.own == "A" and not all(torch.equal(part.B, widest.B[:, : part.rank]) for part in parts):
        raise AdapterMismatch(
            f"{owner}: the modalities have come to different B's, and MokA has one; allowed are operators that treat "
            "B alike in all of them: merge linear in factors, cat, scale"
        )
    if plan.own == "B" and not all(torch.equal(part.A, widest.A) for part in parts):
        raise AdapterMismatch(f"{owner}: the modalities have come to different A's, and this adapter has one")
    a = widest.A if plan.own == "B" else torch.cat([part.A for part in parts])
    b = widest.B if plan.own == "A" else torch.cat([part.B for part in parts], dim=1)
    groups = 1 if plan.own == "A" else len(parts)
    return Stacked(B=b, A=a, scale=parts[0].scale, bias=parts[0].bias, groups=groups)


# --- what operators need ----------------------------------------------------------------------------------------------
def merged_plan(adapters: Sequence[Adapter], *, side_by_side: bool) -> dict[str, Any]:
    """The plan of a merge, as the configuration holds it.

    Factors that are averaged stay in their places. Factors side by side (``cat``) attend each by themselves, so that
    the result is exactly the weighted sum of the updates: as many heads as there were.

    Raises:
        AdapterMismatch: the adapters have other modalities, attention, keys, weights or scales of their logits.
    """
    plans = [plan for adapter in adapters if (plan := plan_of(adapter.config))]
    fixed = ("modalities", "attention", "keys", "weight", "span", "logits", "tokens", "own", "active")
    for plan in plans:
        for key in fixed:
            if getattr(plan, key) != getattr(plans[0], key):
                mine, others = getattr(plan, key), getattr(plans[0], key)
                raise AdapterMismatch(f"MokA adapters of different {key} do not merge: {others!r} and {mine!r}")
        if plan.logits == "official" and plan.scale != plans[0].scale:
            raise AdapterMismatch(f"MokA adapters whose logits are scaled by {plans[0].scale} and {plan.scale} differ")
        if not side_by_side and (plan.rank, plan.heads) != (plans[0].rank, plans[0].heads):
            raise AdapterMismatch("MokA adapters of different ranks or heads merge by cat only")
    first = plans[0]
    if not side_by_side or len(plans) == 1:
        return first.to_json()
    if len({plan.width // plan.heads for plan in plans}) > 1 or any(len(set(plan.ranks)) > 1 for plan in plans):
        raise AdapterMismatch("cat of MokA adapters needs the same rank for all of them and all of their modalities")
    heads, width = sum(plan.heads for plan in plans), sum(plan.width for plan in plans)
    return replace(first, heads=heads, rank=width, alpha=first.scale * width).to_json()


def text_only(adapter: Adapter) -> Adapter:
    """What a MokA adapter does to text: an ordinary LoRA of B and the text's A.

    Raises:
        UnsupportedKind: it is no MokA adapter.

    Example:
        >>> one = Factors(B=torch.ones(3, 1), A=torch.ones(1, 2))
        >>> config = {"peft_type": "MOKA", "r": 1, "moka": {"modalities": {"image": 1}, "rank": 1}}
        >>> text_only(Adapter(config, {"q[text]": one, "q[image]": one}))
        Adapter(kind='lora', base='', modules=1, extras=0)
    """
    if plan_of(adapter.config) is None:
        raise UnsupportedKind(f"text only is for MokA adapters, this one is of kind {adapter.kind}")
    config = {**{key: value for key, value in adapter.config.items() if key != "moka"}, "peft_type": "LORA"}
    names = {name.removesuffix("[text]"): name for name in adapter.modules if name.endswith("[text]")}
    modules = Modules(tuple(names), lambda name: adapter.modules[names[name]], lambda name: adapter.shape(names[name]))
    made = {"operation": "text only", "inputs": [dict(adapter.provenance)]}
    return replace(adapter, config=config, modules=modules, provenance=made)


def as_moka(adapter: Adapter, modalities: Mapping[str, int]) -> Adapter:
    """A LoRA as the MokA adapter that does just the same: every modality has the same A, nothing is looked at.

    Raises:
        UnsupportedKind: it is no LoRA of one rank and scale.

    Example:
        >>> one = Factors(B=torch.ones(3, 1), A=torch.ones(1, 2))
        >>> list(as_moka(Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, {"q": one}), {"image": 1}).modules)
        ['q[text]', 'q[image]']
    """
    if adapter.kind != "lora" or adapter.config.get("rank_pattern") or adapter.config.get("alpha_pattern"):
        raise UnsupportedKind(f"only a LoRA of one rank and scale can be taken as MokA, not this {adapter.kind}")
    rank, alpha = int(adapter.config.get("r", 8)), float(adapter.config.get("lora_alpha", 8))
    plan = MokA(modalities, rank=rank, alpha=alpha, attention="none")
    owners = {f"{name}[{group}]": name for name in adapter.modules for group in plan.groups}
    modules = Modules(
        tuple(owners), lambda name: adapter.modules[owners[name]], lambda name: adapter.shape(owners[name])
    )
    return replace(adapter, config={**adapter.config, "peft_type": MOKA, "moka": plan.to_json()}, modules=modules)


def restricted(adapter: Adapter, active: Sequence[str]) -> Adapter:
    """The same MokA adapter, its update on for the tokens of the named modalities alone (``text`` is one)."""
    plan = plan_of(adapter.config)
    if plan is None:
        raise UnsupportedKind(f"only MokA adapters tell tokens apart, this one is of kind {adapter.kind}")
    return replace(adapter, config={**adapter.config, "moka": replace(plan, active=tuple(active)).to_json()})
