"""What PEFT's names and numbers mean: configuration and tensors in PEFT's form <-> Adapter. Pure; reads no files.

One module of an adapter is a few tensors by key (``base_model.model.<module>.lora_A.weight``) and a scale that only the
configuration tells. ``from_state_dict`` brings both together; ``to_state_dict`` and ``settled`` take them apart again,
so that PEFT builds exactly the modules that are there, each with exactly its rank and scale.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Factors, Modules, Shape, UnsupportedKind, is_finite
from loraloom.experts import Grouped, as_stored, expert_part, groups_of, owner_of, parameters_of, spread, with_owners
from loraloom.modalities import MOKA, Stacked, modality_part, plan_of, spread_modalities, stored_shape
from loraloom.starts import moves_base
from loraloom.stream import OnDemand
from loraloom.untrusted import expression, is_number, short, word

PREFIX = "base_model.model."

# What a LoRA configuration may switch on that (B, A, scale) cannot say.
_VARIANTS = (
    *("alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config", "layer_replication"),
    *("megatron_config", "monteclora_config", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config"),
)
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_PART = re.compile(
    r"(?P<module>.+)\.(?:(?P<embedding>(?:lora|hira)_embedding_)(?P<which>[AB])"
    r"|lora_(?P<lora>[AB])\.weight|hira_(?P<hira>[AB])|(?P<bias>lora_B\.bias)|(?P<magnitude>lora_magnitude_vector))"
)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# --- the configuration ------------------------------------------------------------------------------------------------
def matched(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule for ``rank_pattern`` and ``alpha_pattern``: the first key that matches the end of the path wins."""
    for key, value in (pattern or {}).items():
        if expression(rf"(.*\.)?({key})$")(name):
            return value
    return (pattern or {}).get(name, default)


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """Rank that the configuration gives the module ``name`` (of a parameter: its path; see ``paths_of``)."""
    if _is_hira(config):  # PEFT 0.21 gives every HiRA layer of a new adapter r, whatever rank_pattern says
        return int(config.get("r", 32))
    return int(matched(config.get("rank_pattern"), name, config.get("r", 8)))


def _is_hira(config: Mapping[str, Any]) -> bool:
    return str(config.get("peft_type")).upper() == "HIRA"


def scale_of(config: Mapping[str, Any], name: str) -> float:
    """Scale that the configuration gives the module ``name``: alpha / r, alpha / sqrt(r) for rsLoRA, 1 for HiRA.

    Example:
        >>> scale_of({"rank_pattern": {"q_proj": 4}, "lora_alpha": 16, "use_rslora": True}, "layers.0.q_proj")
        8.0
    """
    if _is_hira(config):
        return 1.0
    rank = rank_of(config, name)
    alpha = matched(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def paths_of(config: Mapping[str, Any], name: str) -> list[str]:
    """What PEFT matches patterns against: a module's path, or those of its parameters where these are adapted."""
    owner = re.sub(r"(\.base_layer)+$", "", name)
    return [f"{owner}.{leaf}" for leaf in sorted(parameters_of(config, name))] or [name]


def _path_of_each(config: Mapping[str, Any], rows: Mapping[str, int], where: str) -> dict[str, str]:
    """What PEFT matches patterns against, by module with the rows of its A."""
    # PEFT's names do not tell which parameter of a module it is; ranks may, as all have as many experts, or none.
    found = {name: paths_of(config, name) for name in rows}
    for paths in dict.fromkeys(tuple(each) for each in found.values() if len(each) > 1):
        ranks = {path: rank_of(config, path) for path in paths}
        counts = {name: {rows[name] / rank for rank in ranks.values()} for name in rows if found[name] == [*paths]}
        shared = {1, *(n for n in set.union(*counts.values()) if all({1, n} & each for each in counts.values()))}
        for name in counts:
            found[name] = [path for path in paths if rows[name] / ranks[path] in shared] or [*paths]
            if len({(ranks[path], scale_of(config, path)) for path in found[name]}) > 1:
                which = f"which of {', '.join(paths)} it is of, and these have different ranks or scales"
                raise UnsupportedKind(f"{where}: module {name}: PEFT's names do not tell {which}")
    return {name: each[0] for name, each in found.items()}


def check_config(config: Any, where: str) -> dict[str, Any]:
    """The configuration, if it is one that factors can express; otherwise an error that says what is not."""
    if not isinstance(config, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(config).__name__}")
    kind = config.get("peft_type")
    if str(kind).upper() not in ("LORA", "HIRA", MOKA):
        raise UnsupportedKind(f"{where}: peft_type {short(kind)} is not supported; allowed: LORA, HIRA, {MOKA}")
    plan_of(config, where)
    for key in (*_TARGETS, "target_parameters"):
        held = config.get(key)
        if not all(isinstance(one, str | int | None) for one in (held if isinstance(held, list | set) else [held])):
            raise ValueError(f"{where}: {key} must be a text, a number, or a list of them, got {short(held)}")
    for key in _VARIANTS:
        if config.get(key):
            raise UnsupportedKind(f"{where}: {key} is set; adapters of that variant are not factors B and A alone")
    start = config.get("init_lora_weights")
    if moves_base(start):
        how = "save it with PEFT's path_initial_model_for_weight_conversion to get an ordinary LoRA"
        raise UnsupportedKind(f"{where}: init_lora_weights={start!r} is relative to a changed base model; {how}")
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        _check_numbers(config, where, key, pattern)
    return config


def _check_numbers(config: Mapping[str, Any], where: str, key: str, pattern: str) -> None:
    """Refuse a rank or alpha that is none, for all modules or in a pattern."""
    spread = config.get(pattern) or {}
    if not isinstance(spread, dict):
        raise ValueError(f"{where}: {pattern} must map module names to numbers, got {short(spread)}")
    for name in spread:
        try:
            expression(name)
        except ValueError as error:
            raise ValueError(f"{where}: {pattern} {error}") from None
    for name, number in [(key, config.get(key, 8)), *spread.items()]:
        if not is_number(number):
            raise ValueError(f"{where}: {word(name)} must be a finite number, got {short(number)}")
        if key == "r" and (number < 1 or number != int(number)):
            raise ValueError(f"{where}: rank {word(name)} must be a whole number of at least 1, got {short(number)}")


def digest(config: Mapping[str, Any], names: Iterable[str]) -> str:
    """A mark of one set of modules together with the configuration that selects it."""
    chosen = {key: config.get(key) for key in _TARGETS}
    if isinstance(chosen["target_modules"], list | set | tuple):
        chosen["target_modules"] = sorted(chosen["target_modules"], key=str)
    told = json.dumps([chosen, sorted({owner_of(name) for name in names})], default=sorted, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def settled(config: Mapping[str, Any], ranks: Mapping[str, int], *, bake: bool, retarget: bool) -> dict[str, Any]:
    """The configuration with which PEFT builds exactly these modules.

    Args:
        config: the adapter's configuration.
        ranks: rank by module path, of all modules.
        bake: scales are multiplied into B, so alpha becomes the rank everywhere (and rsLoRA is off).
        retarget: the modules are named one by one, by full path.

    Raises:
        UnsupportedKind: PEFT cannot build them (HiRA, or the parameters of one module, of several ranks).

    Example:
        >>> new = settled({"peft_type": "LORA", "r": 8}, {"a.q": 2, "a.k": 2, "a.v": 3}, bake=True, retarget=True)
        >>> new["r"], new["lora_alpha"], new["alpha_pattern"] == new["rank_pattern"], new["target_modules"]
        (2, 2, True, ['a.q', 'a.k', 'a.v'])
    """
    new = {**config, "inference_mode": True}
    if bake or retarget:
        if isinstance(new.get("init_lora_weights"), str):  # a start that may refuse the new rank, for nothing
            new.update(init_lora_weights=True, eva_config=None, corda_config=None, lora_ga_config=None)
        new = {key: value for key, value in new.items() if key in config or value is not None}
    if bake:
        own = [rank for name, rank in ranks.items() if parameters_of(config, name)]  # PEFT warns of patterns of these
        usual = Counter(own or ranks.values()).most_common(1)[0][0]
        asked = [(path, rank) for name, rank in ranks.items() for path in paths_of(config, name)]
        by_path = dict(asked)
        if twice := next((path for path, rank in asked if by_path[path] != rank), None):
            raise UnsupportedKind(f"{twice}: PEFT's names do not tell apart a module's parameters of different ranks")
        new["r"] = usual
        new["rank_pattern"] = {f"^{re.escape(path)}": rank for path, rank in by_path.items() if rank != usual}
        if _is_hira(config) and new["rank_pattern"]:
            raise UnsupportedKind(f"HiRA modules of different ranks {sorted(set(ranks.values()))}: PEFT loads none")
        if not _is_hira(config):
            new.update(lora_alpha=usual, alpha_pattern=dict(new["rank_pattern"]), use_rslora=False)
    if retarget:
        # PEFT takes a list entry as the end of a path too; sets with a name without a dot are one expression of paths.
        plain = dict.fromkeys(name for name in ranks if not parameters_of(config, name))
        new["target_modules"] = [*plain] if all("." in name for name in plain) else "|".join(map(re.escape, plain))
        left = dict.fromkeys(path for name in ranks if name not in plain for path in paths_of(config, name))
        new |= {"target_parameters": [*left] or None} if "target_parameters" in config else {}
        new.update({key: None for key in _TARGETS[1:] if key in config})
    return new


# --- tensors in PEFT's form -> Adapter --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Source:
    """Tensors by PEFT key: shapes at once, values when asked for."""

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    def checked(self, key: str) -> Tensor:
        """One tensor, refused if any entry is NaN or infinite."""
        return _finite(self.read(key), f"{self.where}: {key.removeprefix(PREFIX)}")


def _finite(tensor: Tensor, what: str) -> Tensor:
    if not is_finite(tensor):
        raise ValueError(f"{what} has NaN or infinite entries")
    return tensor


def _sorted_keys(config: Mapping[str, Any], source: Source) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Keys by module and part (A, B, bias, magnitude), and the keys of everything else by parameter path."""
    parts: dict[str, dict[str, str]] = {}
    rest, saved = [], config.get("modules_to_save")
    wrapped = tuple(map(str, saved)) if isinstance(saved, list | tuple | set) else ()
    for key in source.shapes:
        path = key.removeprefix(PREFIX)
        if path == key or re.search(r"[/\\\0]", path) or not all(path.split(".")):
            raise ValueError(f"{source.where}: {key!r} is not a name PEFT gives; they are {PREFIX}<parameter path>")
        match = _PART.fullmatch(path)
        if match is None:
            if re.search(r"\.(lora|hira)_(?!only)", path):
                raise UnsupportedKind(f"{source.where}: tensor {key!r} belongs to a variant that is not supported")
            copy = re.fullmatch(r"(.+?)\.(modules_to_save|original_module)\..+", path)  # of bias="all"
            if not (copy and copy[1].endswith(wrapped)):
                rest.append(key)
            continue
        found = match.groupdict()
        part = found["which"] or found["lora"] or found["hira"] or ("bias" if found["bias"] else "magnitude")
        if part in parts.setdefault(found["module"], {}):
            raise ValueError(f"{source.where}: module {found['module']} has {part} twice")
        parts[found["module"]][part] = key
    extras = {}
    for key in rest:
        owner, inside, leaf = key.removeprefix(PREFIX).partition(".base_layer.")
        path = f"{owner}.{leaf}" if inside and owner in parts else key.removeprefix(PREFIX)
        if path in extras:
            raise ValueError(f"{source.where}: parameter {path} is there twice")
        extras[path] = key
    return parts, {path: extras[path] for path in sorted(extras, key=_natural)}


def _natural(path: str) -> list[tuple[int, str]]:
    """Sort key by which layer 10 comes after layer 2, whatever order a file has."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _check_module(config: Mapping[str, Any], source: Source, name: str, keys: Mapping[str, str]) -> Shape:
    """Sizes of one module from shapes alone; an error where its tensors do not fit together, or the configuration."""
    what = f"{source.where}: module {name}"
    if ".base_layer." in name:
        why = "PEFT up to 0.21 adds this update twice, later ones may not, so the file does not say what it does"
        raise UnsupportedKind(f"{what} is inside another adapted module (nn.MultiheadAttention): {why}")
    for part in ("A", "B"):
        if part not in keys:
            raise ValueError(f"{what} has no {part}; factors come in pairs")
    a, b = source.shapes[keys["A"]], source.shapes[keys["B"]]
    if len(a) < 2 or len(a) != len(b) or min(a + b) < 1:
        raise ValueError(f"{what}: A {a} and B {b} do not multiply to a matrix")
    for part, switch in (("bias", "lora_bias"), ("magnitude", "use_dora")):
        if bool(config.get(switch)) != (part in keys):
            raise ValueError(f"{what} has {'a' if part in keys else 'no'} {part} but {switch}={config.get(switch)!r}")
        if part in keys and math.prod(source.shapes[keys[part]]) != b[0]:
            raise ValueError(f"{what}: {part} {source.shapes[keys[part]]} does not have {b[0]} entries")
    if plan := plan_of(config, source.where):
        return stored_shape(plan, what, a, b)
    if b[1] * groups_of(a, b) != a[0]:
        raise ValueError(f"{what}: A {a} and B {b} do not have the same rank")
    if groups_of(a, b) > 1 and "magnitude" in keys:
        raise UnsupportedKind(f"{what} is a grouped convolution with DoRA; not supported")
    return Shape(b[0], math.prod(a[1:]), a[0])


def assembled(config: Any, source: Source, provenance: Mapping[str, Any]) -> Adapter:
    """The adapter whose tensors ``source`` holds; sizes are checked now, values when they are read."""
    config = check_config(config, source.where)
    parts, extras = _sorted_keys(config, source)
    if not parts:
        raise ValueError(f"{source.where}: holds no factors (lora_A, lora_B or hira_A, hira_B)")
    config = with_owners(config, parts)
    stored = {name: _check_module(config, source, name, parts[name]) for name in sorted(parts, key=_natural)}
    paths = _path_of_each(config, {name: shape.rank for name, shape in stored.items()}, source.where)
    plan = plan_of(config, source.where)
    for name, path in paths.items() if plan is None else ():
        rank, asked = stored[name].rank, (rank_of(config, path), matched(config.get("rank_pattern"), path, None))
        if rank not in asked and not (parameters_of(config, name) and rank % asked[0] == 0):
            raise ValueError(f"{source.where}: module {name} has rank {rank} but the configuration says {asked[0]}")
    experts = {name: rank_of(config, paths[name]) for name in stored if parameters_of(config, name)}
    groups = {name: groups_of(*(source.shapes[parts[name][part]] for part in "AB")) for name in stored}
    shapes = spread(stored, experts, groups) if plan is None else spread_modalities(plan, stored)

    def read(name: str) -> Factors:
        if plan is not None:
            return modality_part(plan, recent(owner_of(name)), name)
        return whole(name) if name in parts else expert_part(recent(owner_of(name)), name)

    def whole(name: str) -> Factors:
        tensors = {part: source.checked(key) for part, key in parts[name].items()}
        a, b = tensors["A"], tensors["B"]
        if a.dtype not in _FLOATS or b.dtype not in _FLOATS:
            raise UnsupportedKind(f"{source.where}: module {name} is stored as {b.dtype}; allowed: 16 to 64 bit floats")
        kind = Stacked if plan is not None else Grouped if groups[name] > 1 else Factors
        return kind(
            B=b.flatten(1),
            A=a.flatten(1),
            scale=scale_of(config, paths[name]),
            bias=tensors.get("bias"),
            magnitude=tensors["magnitude"].flatten() if "magnitude" in tensors else None,
            kernel=tuple(a.shape[1:]) if a.ndim > 2 else None,
            embedding="_embedding_" in parts[name]["A"].rpartition(".")[2],
        )

    recent = lru_cache(maxsize=2)(whole)  # the experts of one parameter are read one after the other
    held = OnDemand(extras, lambda path: source.checked(extras[path]))
    marked = {**provenance, "targets": digest(config, shapes)}
    return Adapter(config, Modules(list(shapes), read, shapes.__getitem__), held, marked)


def from_state_dict(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str = "state dict") -> Adapter:
    """The adapter held by tensors in PEFT's form; nothing is copied.

    Args:
        config: content of an ``adapter_config.json``.
        tensors: by PEFT key (``base_model.model.<module>.lora_A.weight``).
        where: what error messages call the tensors.

    Raises:
        UnsupportedKind: the adapter is more than factors can say. ValueError: it is damaged. Both name the place.

    Example:
        >>> pair = {"lora_A.weight": torch.ones(1, 2), "lora_B.weight": torch.ones(3, 1)}
        >>> tensors = {f"base_model.model.layers.0.q_proj.{key}": value for key, value in pair.items()}
        >>> a = from_state_dict({"peft_type": "LORA", "r": 1, "lora_alpha": 2}, tensors)
        >>> a.modules["layers.0.q_proj"].scale
        2.0
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return assembled(dict(config), Source(where, shapes, tensors.__getitem__), {})


# --- Adapter -> tensors in PEFT's form --------------------------------------------------------------------------------
def module_tensors(config: Mapping[str, Any], name: str, factors: Factors) -> dict[str, tuple[str, Tensor]]:
    """PEFT's key and tensor of each part (A, B, bias, magnitude) of one module; the scale is not applied.

    Raises:
        AdapterMismatch: a bias or magnitude that the configuration does not have, or the other way round.
        ValueError: a tensor has NaN or infinite entries.
    """
    for part, switch in (("bias", "lora_bias"), ("magnitude", "use_dora")):
        held = getattr(factors, part)
        if bool(config.get(switch)) != (held is not None):
            has = "no" if held is None else "a"
            raise AdapterMismatch(f"module {name} has {has} {part} but {switch}={config.get(switch)!r}")
    kind = "hira" if _is_hira(config) else "lora"
    ones = [1] * (len(factors.kernel) - 1 if factors.kernel else 0)
    end = "" if factors.embedding or kind == "hira" else ".weight"
    stem = f"{PREFIX}{name}.{kind}_" + ("embedding_" if factors.embedding else "")
    a = factors.A.reshape(factors.rank, *factors.kernel) if factors.kernel else factors.A
    parts = {"A": (f"{stem}A{end}", a), "B": (f"{stem}B{end}", factors.B.reshape(*factors.B.shape, *ones))}
    if factors.bias is not None:
        parts["bias"] = (f"{stem}B.bias", factors.bias)
    if factors.magnitude is not None:
        shaped = factors.magnitude.reshape(1, -1, *ones) if ones else factors.magnitude
        parts["magnitude"] = (f"{PREFIX}{name}.lora_magnitude_vector", shaped)
    for part, (_, tensor) in parts.items():
        _finite(tensor, f"module {name}: {part}")
    return parts


def extra_key(adapter: Adapter, path: str) -> str:
    """PEFT's key of a parameter beside the factors: PEFT moves those of an adapted module to ``base_layer``."""
    owners = (path[: dot.start()] for dot in re.finditer(r"\.", path))
    owner = next((owner for owner in owners if owner in adapter.modules), None)
    return PREFIX + (path if owner is None else f"{owner}.base_layer{path.removeprefix(owner)}")


def to_state_dict(adapter: Adapter, *, bake: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Tensors in PEFT's form with their keys, one module at a time.

    Args:
        adapter: what to write.
        bake: multiply the scale into B (and its bias), to go with ``settled(..., bake=True)``. Without it the factors
            are given as they are, for a configuration that already says every scale.

    Example:
        >>> a = Adapter({"peft_type": "LORA"}, {"h.0.q": Factors(B=torch.ones(3, 1), A=torch.ones(1, 2), scale=2.0)})
        >>> [(key, tensor.max().item()) for key, tensor in to_state_dict(a)]
        [('base_model.model.h.0.q.lora_A.weight', 1.0), ('base_model.model.h.0.q.lora_B.weight', 2.0)]
    """
    adapter = as_stored(adapter)
    for name in adapter.modules:
        factors = adapter.modules[name]
        yield from module_tensors(adapter.config, name, factors.baked() if bake else factors).values()
    for path in adapter.extras:
        yield extra_key(adapter, path), _finite(adapter.extras[path], path)
