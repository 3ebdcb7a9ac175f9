"""What an adapter folder says besides the factors: the configuration and the whole tensors of a merge."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Shape
from loraloom.experts import all_parameters, owner_of, parameters_of
from loraloom.registry import UnknownName
from loraloom.stream import OnDemand

# What a LoRA configuration takes over from one of another kind.
_COMMON = (
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "bias", "fan_in_fan_out"),
)


def one_scale(adapters: Sequence[Adapter]) -> bool:
    """Whether all configurations ask for the same scale of every module."""
    keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    asked = [[adapter.config.get(key) or None for key in keys] for adapter in adapters]
    told = [[list(held.items()) if isinstance(held, Mapping) else held for held in each] for each in asked]
    return all(scales == told[0] for scales in told)


def config_of(
    adapters: Sequence[Adapter], shapes: Mapping[str, Shape], *, kept: bool, as_lora: bool = False
) -> dict[str, Any]:
    """The first adapter's configuration, with what the others add and, unless ``kept``, ranks and scales made plain.

    ``as_lora`` makes that of an ordinary LoRA of it.
    """
    config = {**adapters[0].config, "inference_mode": True}
    if as_lora:
        common = {key: config[key] for key in _COMMON if key in config}
        config = {**common, "peft_type": "LORA", "use_dora": False, "inference_mode": True}
    saved = list(dict.fromkeys(name for a in adapters for name in a.config.get("modules_to_save") or ()))
    if saved:
        config["modules_to_save"] = saved
    if parameters := all_parameters(adapters):
        config["target_parameters"] = parameters
    for key, off in (("bias", "none"), ("lora_bias", False)):
        asked = [adapter.config[key] for adapter in adapters if adapter.config.get(key, off) != off]
        if asked:
            config[key] = asked[0]
    if config.get("lora_bias"):
        _check_bias(adapters)
    return config if kept else {**config, **_plain("lora" if as_lora else adapters[0].kind, shapes)}


def _check_bias(adapters: Sequence[Adapter]) -> None:
    """Refuse what PEFT gives no bias of B, where the result has one in every module."""
    biased = {name for adapter in adapters if adapter.config.get("lora_bias") for name in adapter.modules}
    for adapter in adapters:
        for name in adapter.modules:
            if name not in biased and (
                parameters_of(adapter.config, owner_of(name)) or adapter.modules[name].embedding
            ):
                raise AdapterMismatch(
                    f"{name}: another adapter of the merge has a bias of B (lora_bias), which PEFT then wants in every"
                    " module and does not have for an embedding or a single parameter"
                )


def _plain(kind: str, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The entries that say: these ranks, and a scale of 1 everywhere."""
    usual = Counter(shape.rank for shape in shapes.values()).most_common(1)[0][0]
    # PEFT reads the keys as regular expressions for the end of a path; "^" makes one name mean one module.
    ranks = {f"^{re.escape(name)}": shape.rank for name, shape in shapes.items() if shape.rank != usual}
    if kind == "hira":
        return {"r": usual, "rank_pattern": ranks, "init_weights": True}
    scales = {"lora_alpha": usual, "alpha_pattern": dict(ranks), "use_rslora": False}
    return {"r": usual, "rank_pattern": ranks, **scales, "init_lora_weights": True}


def frozen_of(adapters: Sequence[Adapter]) -> list[str]:
    """Whole tensors that change nothing: an adapted module's own weight, which PEFT stores, equal in all that hold it.

    Example:
        >>> from loraloom.adapter import Factors
        >>> a = Adapter({}, {"head": Factors(torch.ones(1, 1), torch.ones(1, 1))}, {"head.weight": torch.ones(1)})
        >>> frozen_of([a, a])
        ['head.weight']
    """

    def agreed(path: str) -> bool:
        holders = [adapter for adapter in adapters if path in adapter.extras]
        if not all(path.endswith(".weight") and path.removesuffix(".weight") in one.modules for one in holders):
            return False
        pairs = ((holders[0].extras[path], other.extras[path]) for other in holders[1:])
        return all(left.dtype == right.dtype and torch.equal(left, right) for left, right in pairs)

    return [path for path in dict.fromkeys(path for one in adapters for path in one.extras) if agreed(path)]


def extras_of(adapters: Sequence[Adapter], weights: Sequence[float], how: str) -> Mapping[str, Tensor]:
    """Whole tensors of the result: those of the one adapter that holds some, or weighted means; and frozen ones.

    Args:
        adapters: whose extras to take.
        weights: one per adapter; none where they differ by module.
        how: ``refuse`` or ``average``, where several adapters hold some.

    Raises:
        AdapterMismatch: several adapters hold some, and ``how`` is ``refuse``; or two do not average.
        ValueError: they have no mean, as the weights add up to 0 or differ by module.
    """
    if how not in ("refuse", "average"):
        raise UnknownName("extras", how, ["refuse", "average"])
    frozen = frozen_of(adapters)
    owner = {path: next(one for one in adapters if path in one.extras) for each in adapters for path in each.extras}
    names = [path for path in owner if path not in frozen]
    holders = [at for at, adapter in enumerate(adapters) if any(name in adapter.extras for name in names)]
    if len(holders) <= 1:
        return OnDemand(owner, lambda path: owner[path].extras[path])
    if how == "refuse":
        raise AdapterMismatch(
            f"{len(holders)} of {len(adapters)} adapters hold whole tensors ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}), which are not updates; extras='average' averages them"
        )
    if not weights:
        raise ValueError("weights that differ by module do not say how to average whole tensors of several adapters")
    held = {name: [at for at in holders if name in adapters[at].extras] for name in names}
    means = {name: _average(name, [(adapters[at].extras[name], weights[at]) for at in held[name]]) for name in names}
    return {path: owner[path].extras[path] for path in frozen} | means


def _average(name: str, held: Sequence[tuple[Tensor, float]]) -> Tensor:
    tensors = [tensor for tensor, _ in held]
    if any(tensor.shape != tensors[0].shape or not tensor.is_floating_point() for tensor in tensors):
        kinds = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors)
        raise AdapterMismatch(f"{name}: tensors that do not average: {kinds}")
    total = sum(weight for _, weight in held)
    if total == 0:
        raise ValueError(f"{name}: the weights of the adapters that hold it add up to 0, so it has no average")
    stored = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    mean = torch.zeros_like(tensors[0], dtype=torch.promote_types(stored, torch.float32))
    for tensor, weight in held:
        mean += (weight / total) * tensor.to(mean.dtype)
    return mean.to(stored)
