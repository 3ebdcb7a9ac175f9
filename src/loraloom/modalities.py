"""MokA adapters: one module a modality, packed as the layer holds them (all A's stacked, one B).

Module ``...q_proj[image]`` has the factors B and A_image, so that operators that treat each module by itself are right
for each modality. B is shared: what would give the modalities of a layer different B's is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from loraloom.adapter import Adapter, AdapterMismatch, Factors, Modules, Shape, UnsupportedKind, padded
from loraloom.strategies.modality import MokA

MOKA = "MOKA"
# What MokA adapters must have in common to merge.
_SAME = ("modalities", "attention", "keys", "weight", "span", "logits", "tokens", "own", "active")
# What a MokA configuration takes over from a LoRA's.
_KEPT = (
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode", "modules_to_save", "bias"),
    *("r", "lora_alpha", "lora_dropout", "target_modules"),
)


@dataclass(frozen=True, eq=False)
class Stacked(Factors):
    """The stacked A's and B's of one MokA layer, which may be of other numbers; ``experts`` counts the B's."""

    def __post_init__(self) -> None:
        pass

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.B.shape[1]


# --- the configuration ------------------------------------------------------------------------------------------------
def plan_of(config: Mapping[str, Any], where: str = "configuration") -> MokA | None:
    """The MokA plan of a configuration; None for any other kind.

    Raises:
        ValueError: the plan is damaged, or not that of this configuration.
    """
    if str(config.get("peft_type")).upper() != MOKA:
        return None
    told = config.get("moka")
    if not isinstance(told, Mapping):
        raise ValueError(f"{where}: peft_type MOKA needs its plan under moka, got {told!r}")
    try:
        plan = MokA.from_json(told)
    except ValueError as error:
        raise ValueError(f"{where}: moka: {str(error).removeprefix('moka: ')}") from error
    for key in ("use_dora", "lora_bias"):
        if config.get(key):
            raise UnsupportedKind(f"{where}: {key} is set, which MokA layers do not have")
    if config.get("r", plan.width) != plan.width:
        raise ValueError(f"{where}: r is {config['r']!r}, the plan under moka has rank {plan.width}")
    return plan


def own_plan(adapter: Adapter) -> MokA:
    """The plan of a MokA adapter.

    Raises:
        UnsupportedKind: it is of another kind.
    """
    plan = plan_of(adapter.config)
    if plan is None:
        raise UnsupportedKind(f"this is for MokA adapters, which tell tokens apart; not for one of kind {adapter.kind}")
    return plan


def stored_shape(plan: MokA, what: str, a: Sequence[int], b: Sequence[int]) -> Shape:
    """Sizes of a stored layer; an error where they are not those of the plan."""
    if len(a) != 2 or len(b) != 2 or a[0] != plan.rows or b[1] != plan.columns:
        raise ValueError(
            f"{what}: A {tuple(a)} and B {tuple(b)}; the plan asks for {plan.rows} rows and {plan.columns} columns"
        )
    return Shape(b[0], a[1], plan.width)


# --- one module a modality --------------------------------------------------------------------------------------------
def spread_modalities(plan: MokA, stored: Mapping[str, Shape]) -> dict[str, Shape]:
    """Sizes by module, one a modality; where ranks differ, all have the largest.

    Example:
        >>> spread_modalities(MokA({"image": 1}), {"q": Shape(3, 4, 4)})
        {'q[text]': Shape(out=3, in_=4, rank=4), 'q[image]': Shape(out=3, in_=4, rank=4)}
    """
    return {f"{owner}[{group}]": shape for owner, shape in stored.items() for group in plan.groups}


def modality_part(plan: MokA, stored: Factors, name: str) -> Factors:
    """The factors of one modality of a stored layer; rows of 0 fill A up to the columns of B."""
    at = plan.groups.index(name[name.rindex("[") + 1 : -1])
    above = 0 if plan.own == "B" else sum(plan.ranks[:at])
    left = 0 if plan.own == "A" else at * plan.width
    a = padded(stored.A[above : above + plan.ranks[at]].T, plan.width).T
    b = stored.B[:, left : left + plan.width]
    return Factors(B=b.contiguous(), A=a.contiguous(), scale=stored.scale)


def packed_modalities(adapter: Adapter) -> Adapter:
    """The adapter with a layer's modalities packed.

    Raises:
        AdapterMismatch: a modality is missing, or has another rank than the plan says.
    """
    plan = plan_of(adapter.config)
    if plan is None or not any(name.endswith("]") for name in adapter.modules):
        return adapter
    owners: dict[str, list[str]] = {}
    for name in adapter.modules:
        owners.setdefault(name[: name.rindex("[")], []).append(name)
    for owner, names in owners.items():
        if names != [f"{owner}[{group}]" for group in plan.groups]:
            raise AdapterMismatch(f"{owner} needs the modalities {', '.join(plan.groups)}; it has {', '.join(names)}")
        for name in names:
            if (rank := adapter.shape(name).rank) != plan.width:
                raise AdapterMismatch(f"{name} has rank {rank}, the plan says {plan.width}")

    def read(owner: str) -> Factors:
        return packed_factors(plan, owner, [adapter.modules[name] for name in owners[owner]])

    def shape(owner: str) -> Shape:
        return adapter.shape(owners[owner][0])._replace(rank=plan.columns)

    return replace(adapter, modules=Modules(tuple(owners), read, shape))


def packed_factors(plan: MokA, owner: str, parts: Sequence[Factors]) -> Factors:
    """One stored layer out of its modalities.

    Raises:
        AdapterMismatch: what is shared differs between them.
    """
    if len({part.scale for part in parts}) > 1:
        parts = [part.baked() for part in parts]
    first = parts[0]
    for what, is_shared in (("B", plan.own == "A"), ("A", plan.own == "B")):
        if is_shared and not all(torch.equal(getattr(part, what), getattr(first, what)) for part in parts):
            raise AdapterMismatch(f"{owner}: the modalities have come to different {what}'s, and MokA shares it")
    own = list(zip(parts, plan.ranks, strict=True))
    if any(part.A[rank:].any() for part, rank in own):
        raise AdapterMismatch(f"{owner}: a modality's A has more than the rows of its rank, {plan.ranks}")
    a = first.A if plan.own == "B" else torch.cat([part.A[:rank] for part, rank in own])
    b = first.B if plan.own == "A" else torch.cat([part.B for part in parts], dim=1)
    return Stacked(B=b, A=a, scale=first.scale, experts=1 if plan.own == "A" else len(parts))


# --- merging ----------------------------------------------------------------------------------------------------------
def ready_to_merge(
    adapters: Sequence[Adapter], weights: Sequence[float] | Mapping[str, Sequence[float]], space: str
) -> tuple[list[Adapter], dict[str, Any]]:
    """The adapters as a linear method merges them rightly, and the plan of the result as a configuration holds it.

    In ``factors`` A's and B's are averaged in their places; scales go into B, for A enters the attention. In ``delta``
    they stand side by side and each adapter's attend by themselves, as so many heads: the result is exactly the
    weighted sum of the updates. A layer that an adapter lacks is zero there.

    Raises:
        AdapterMismatch: the plans differ in more than alpha, dropout and, where no head needs it, rank.
        ValueError: weights that differ between the modalities of a layer, or in ``factors`` do not add up to 1.
    """
    plans = [own_plan(adapter) for adapter in adapters]
    first = plans[0]
    _check_weights(weights, space)
    for key in _SAME:
        for plan in plans[1:]:
            if (mine := getattr(plan, key)) != (others := getattr(first, key)):
                raise AdapterMismatch(f"MokA adapters of different {key} do not merge: {others!r} and {mine!r}")
    attends = first.attention in ("cross", "text-as-query")
    scales = {plan.scale for plan in plans}
    if attends and first.logits == "official" and len(scales) > 1:
        raise AdapterMismatch(f"MokA adapters whose logits have other scales do not merge: {sorted(scales)}")
    if space == "factors":
        if len({(plan.ranks, plan.heads) for plan in plans}) > 1:
            raise AdapterMismatch("MokA adapters of different ranks or heads do not merge in factors; use method cat")
        return [_each(adapter, Factors.baked) for adapter in adapters], first.to_json()
    if len(plans) == 1:
        return list(adapters), first.to_json()
    if any(len(set(plan.ranks)) > 1 for plan in plans):
        raise AdapterMismatch("MokA adapters whose modalities have several ranks do not go side by side; use factors")
    if attends and len({plan.width // plan.heads for plan in plans}) > 1:
        raise AdapterMismatch("MokA adapters that attend at different ranks do not go side by side")
    heads, width = sum(plan.heads for plan in plans) if attends else 1, sum(plan.width for plan in plans)
    return _filled(adapters), replace(first, heads=heads, rank=width, alpha=first.scale * width).to_json()


def _check_weights(weights: Sequence[float] | Mapping[str, Sequence[float]], space: str) -> None:
    by_module = weights if isinstance(weights, Mapping) else {"": weights}
    of_layer: dict[str, Sequence[float]] = {}
    for name, each in by_module.items():
        owner = name.rpartition("[")[0]
        if of_layer.setdefault(owner, each) != each:
            raise ValueError(f"{owner}: the modalities of a layer share B, so they need the same weights")
        if space == "factors" and abs(sum(each) - 1) > 1e-6:
            raise ValueError(
                f"{owner and owner + ': '}weights {list(each)} do not add up to 1; in factors they enter A, and with it"
                " the attention; use space='delta'"
            )


def _each(adapter: Adapter, change: Callable[[Factors], Factors]) -> Adapter:
    """The adapter with every module changed when it is read; sizes stay."""
    modules = Modules(tuple(adapter.modules), lambda name: change(adapter.modules[name]), adapter.shape)
    return replace(adapter, modules=modules)


def _filled(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with zeros for layers that only others have."""
    holders: dict[str, Adapter] = {}
    for adapter in adapters:
        holders = {**dict.fromkeys(adapter.modules, adapter), **holders}

    def filled(adapter: Adapter) -> Adapter:
        width = own_plan(adapter).width

        def shape(name: str) -> Shape:
            return holders[name].shape(name)._replace(rank=width)

        def read(name: str) -> Factors:
            if name in adapter.modules:
                return adapter.modules[name]
            size, like = shape(name), holders[name].modules[name].B
            return Factors(B=like.new_zeros(size.out, size.rank), A=like.new_zeros(size.rank, size.in_))

        return replace(adapter, modules=Modules(tuple(holders), read, shape))

    return [filled(adapter) for adapter in adapters]


# --- what one modality does -------------------------------------------------------------------------------------------
def text_only(adapter: Adapter) -> Adapter:
    """What a MokA adapter does to text: an ordinary LoRA of B and the text's A.

    Raises:
        UnsupportedKind: it is no MokA adapter, or off for text.

    Example:
        >>> one = Factors(B=torch.ones(3, 1), A=torch.ones(1, 2))
        >>> config = {"peft_type": "MOKA", "r": 1, "moka": {"modalities": {"image": 1}, "rank": 1}}
        >>> text_only(Adapter(config, {"q[text]": one, "q[image]": one}))
        Adapter(kind='lora', base='', modules=1, extras=0)
    """
    plan = own_plan(adapter)
    if plan.active is not None and "text" not in plan.active:
        raise UnsupportedKind(f"this MokA adapter does nothing to text: it is on for {', '.join(plan.active)} alone")
    rank = plan.ranks[0]
    config = {key: value for key, value in adapter.config.items() if key != "moka"} | {"peft_type": "LORA"}
    names = {name.removesuffix("[text]"): name for name in adapter.modules if name.endswith("[text]")}

    def read(name: str) -> Factors:
        part = adapter.modules[names[name]]
        return replace(part, B=part.B[:, :rank].contiguous(), A=part.A[:rank])

    modules = Modules(tuple(names), read, lambda name: adapter.shape(names[name])._replace(rank=rank))
    made = {"operation": "text only", "inputs": [dict(adapter.provenance)]}
    return replace(adapter, config=config, modules=modules, provenance=made)


def as_moka(adapter: Adapter, modalities: Mapping[str, int]) -> Adapter:
    """A LoRA as the MokA adapter that does just the same: every modality has the same A, nothing is looked at.

    Raises:
        UnsupportedKind: it is no LoRA of linear layers, of one rank and scale, without biases of B.

    Example:
        >>> one = Factors(B=torch.ones(3, 1), A=torch.ones(1, 2))
        >>> list(as_moka(Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, {"q": one}), {"image": 1}).modules)
        ['q[text]', 'q[image]']
    """
    told = adapter.config
    strange = next((key for key in ("rank_pattern", "alpha_pattern", "lora_bias") if told.get(key)), adapter.kind)
    if strange != "lora":
        raise UnsupportedKind(
            f"only a LoRA of one rank and scale, without biases of B, is a MokA adapter; not {strange}"
        )
    if experts := next((name for name in adapter.modules if name.endswith("]")), None):
        raise UnsupportedKind(f"{experts} is an expert; MokA adapts linear layers")
    rank, alpha = int(told.get("r", 8)), float(told.get("lora_alpha", 8))
    plan = MokA(modalities, rank=rank, alpha=alpha, attention="none")
    owners = {f"{name}[{group}]": name for name in adapter.modules for group in plan.groups}
    modules = Modules(
        tuple(owners), lambda name: adapter.modules[owners[name]], lambda name: adapter.shape(owners[name])
    )
    config = {key: told[key] for key in _KEPT if key in told}
    return replace(adapter, config={**config, "peft_type": MOKA, "moka": plan.to_json()}, modules=modules)


def restricted(adapter: Adapter, active: Sequence[str]) -> Adapter:
    """The same MokA adapter, its update on for the tokens of the named modalities alone (``text`` is one).

    Raises:
        UnsupportedKind: it is no MokA adapter.
        ValueError: a name that it does not have, or one of several that share an A.
    """
    plan = own_plan(adapter)
    return replace(adapter, config={**adapter.config, "moka": replace(plan, active=tuple(active)).to_json()})
