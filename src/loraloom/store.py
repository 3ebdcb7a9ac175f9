"""PEFT folder <-> Adapter: the only code that knows the file format. Safetensors only, lazy, streamed, atomic.

``load`` reads the configuration and the header of the weight file; factors are read, checked and cloned when asked for,
through a mapping that stays on the file that was opened, even if the folder is replaced later. ``save`` streams module
by module into a temporary sibling folder and renames it, so a folder appears whole or not at all. A killed ``save``
leaves ``.NAME.XXXX.loraloom-tmp`` behind (``load`` refuses it; remove it), and, killed in the instant between the two
renames of an overwrite, the old adapter as ``.NAME.XXXX.loraloom-old``.

Provenance. A loaded adapter's ``provenance`` is what its ``loraloom.json`` says, plus where it was read from (``path``,
``name``, ``stamp``, ``targets``). Operators read no files; they nest what they were given::

    provenance = {"operation": "merge", "arguments": {...}, "seed": 0, "inputs": [a.provenance, b.provenance]}

and may add a free ``record``. ``save`` walks that tree and writes it to ``loraloom.json``: every input read from a
folder gets the sha256 of its weight file, and its local path is left out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Factors, Modules, Shape, UnsupportedKind

CONFIG, WEIGHTS, RECORD, CARD = "adapter_config.json", "adapter_model.safetensors", "loraloom.json", "README.md"
UNFINISHED, REPLACED = ".loraloom-tmp", ".loraloom-old"
PREFIX = "base_model.model."

# What a LoRA configuration may switch on that (B, A, scale) cannot say.
_VARIANTS = (
    "alora_invocation_tokens arrow_config ensure_weight_tying kasa_config layer_replication megatron_config "
    "monteclora_config target_parameters trainable_token_indices use_bdlora use_qalora velora_config"
).split()
# Starts that change the base weight: the factors are then relative to a base that only training saw.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_PART = re.compile(
    r"(?P<module>.+)\.(?:(?P<embedding>(?:lora|hira)_embedding_)(?P<which>[AB])"
    r"|lora_(?P<lora>[AB])\.weight|hira_(?P<hira>[AB])|(?P<bias>lora_B\.bias)|(?P<magnitude>lora_magnitude_vector))"
)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}


# --- the configuration ------------------------------------------------------------------------------------------------
def _matched(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule for ``rank_pattern`` and ``alpha_pattern``: the first key that matches the end of the path wins."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return (pattern or {}).get(name, default)


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """Rank that the configuration gives the module ``name``.

    Example:
        >>> rank_of({"r": 8, "rank_pattern": {"q_proj": 4}}, "layers.0.q_proj")
        4
    """
    return int(_matched(config.get("rank_pattern"), name, config.get("r", 8)))


def scale_of(config: Mapping[str, Any], name: str) -> float:
    """Scale that the configuration gives the module ``name``: alpha / r, alpha / sqrt(r) for rsLoRA, 1 for HiRA.

    Example:
        >>> scale_of({"r": 4, "lora_alpha": 16, "use_rslora": True}, "layers.0.q_proj")
        8.0
    """
    if str(config.get("peft_type")).upper() == "HIRA":
        return 1.0
    rank = rank_of(config, name)
    alpha = _matched(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def as_configured(config: Mapping[str, Any], name: str, factors: Factors) -> bool:
    """Whether the configuration already gives this module its rank and, exactly, its scale."""
    return rank_of(config, name) == factors.rank and scale_of(config, name) == factors.scale


def _check_config(config: Any, where: str) -> dict[str, Any]:
    """The configuration, if it is one that factors can express; otherwise an error that says what is not."""
    if not isinstance(config, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(config).__name__}")
    kind = str(config.get("peft_type", "none")).upper()
    if kind not in ("LORA", "HIRA"):
        raise UnsupportedKind(f"{where}: peft_type {config.get('peft_type')!r} is not supported; allowed: LORA, HIRA")
    for key in _VARIANTS:
        if config.get(key):
            raise UnsupportedKind(f"{where}: {key} is set; adapters of that variant are not factors B and A alone")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
        raise UnsupportedKind(
            f"{where}: init_lora_weights={start!r} is relative to a changed base model; "
            "save it with PEFT's path_initial_model_for_weight_conversion to get an ordinary LoRA"
        )
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        spread = config.get(pattern) or {}
        if not isinstance(spread, dict):
            raise ValueError(f"{where}: {pattern} must map module names to numbers, got {spread!r}")
        for name, number in [(key, config.get(key, 8)), *spread.items()]:
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError(f"{where}: {name} must be a finite number, got {number!r}")
            if key == "r" and (number < 1 or number != int(number)):
                raise ValueError(f"{where}: rank {name} must be a whole number of at least 1, got {number!r}")
    return config


def _digest(config: Mapping[str, Any], names: Iterable[str]) -> str:
    """A mark of one set of modules together with the configuration that selects it."""
    chosen = {key: config.get(key) for key in _TARGETS}
    if isinstance(chosen["target_modules"], list | set | tuple):
        chosen["target_modules"] = sorted(chosen["target_modules"])
    return hashlib.sha256(json.dumps([chosen, sorted(names)], default=sorted, sort_keys=True).encode()).hexdigest()


def settled(config: Mapping[str, Any], ranks: Mapping[str, int], *, bake: bool, retarget: bool) -> dict[str, Any]:
    """The configuration with which PEFT builds exactly these modules.

    Args:
        config: the adapter's configuration.
        ranks: rank by module path, of all modules.
        bake: scales are multiplied into B, so alpha becomes the rank everywhere (and rsLoRA is off).
        retarget: the modules are named one by one, by full path.

    Example:
        >>> new = settled({"peft_type": "LORA", "r": 8}, {"a.q": 2, "a.k": 2, "a.v": 3}, bake=True, retarget=True)
        >>> new["r"], new["lora_alpha"], new["rank_pattern"], new["target_modules"]
        (2, 2, {'^a\\.v': 3}, ['a.q', 'a.k', 'a.v'])
    """
    new = {**config, "inference_mode": True}
    if bake or retarget:
        if isinstance(new.get("init_lora_weights"), str):  # a start that may refuse the new rank, for nothing
            new.update(init_lora_weights=True, eva_config=None, corda_config=None, lora_ga_config=None)
        new = {key: value for key, value in new.items() if key in config or value is not None}
    if bake:
        usual = Counter(ranks.values()).most_common(1)[0][0]
        new["r"] = usual
        new["rank_pattern"] = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
        if str(config.get("peft_type")).upper() != "HIRA":
            new.update(lora_alpha=usual, alpha_pattern=dict(new["rank_pattern"]), use_rslora=False)
    if retarget:
        # PEFT takes a list entry as the end of a path too. A name without a dot would also match deeper modules,
        # so such sets are given as one regular expression, which must match the whole path.
        exact = all("." in name for name in ranks)
        new["target_modules"] = list(ranks) if exact else "|".join(re.escape(name) for name in ranks)
        new.update({key: None for key in _TARGETS[1:] if key in config})
    return new


# --- tensors in PEFT's form -> Adapter --------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Source:
    """Tensors by PEFT key: shapes at once, values when asked for."""

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    def checked(self, key: str) -> Tensor:
        """One tensor, refused if any entry is NaN or infinite."""
        return _finite(self.read(key), f"{self.where}: {key.removeprefix(PREFIX)}")


class _Extras(Mapping[str, Tensor]):
    """Tensors beside the factors by parameter path, read when asked for."""

    def __init__(self, source: _Source, keys: Mapping[str, str]) -> None:
        self._source, self._keys = source, keys

    def __getitem__(self, path: str) -> Tensor:
        return self._source.checked(self._keys[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _finite(tensor: Tensor, what: str) -> Tensor:
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(f"{what} has NaN or infinite entries")
    return tensor


def _sorted_keys(source: _Source) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Keys by module and part (A, B, bias, magnitude), and the keys of everything else by parameter path."""
    parts: dict[str, dict[str, str]] = {}
    rest = []
    for key in source.shapes:
        path = key.removeprefix(PREFIX)
        if path == key or re.search(r"[/\\\0]", path) or not all(path.split(".")):
            raise ValueError(f"{source.where}: {key!r} is not a name PEFT gives; they are {PREFIX}<parameter path>")
        match = _PART.fullmatch(path)
        if match is None:
            if re.search(r"\.(lora|hira)_(?!only)", path):
                raise UnsupportedKind(f"{source.where}: tensor {key!r} belongs to a variant that is not supported")
            rest.append(key)
            continue
        found = match.groupdict()
        part = found["which"] or found["lora"] or found["hira"] or ("bias" if found["bias"] else "magnitude")
        if part in parts.setdefault(found["module"], {}):
            raise ValueError(f"{source.where}: module {found['module']} has {part} twice")
        parts[found["module"]][part] = key
    extras = {}
    for key in rest:
        owner, wrapped, leaf = key.removeprefix(PREFIX).partition(".base_layer.")
        path = f"{owner}.{leaf}" if wrapped and owner in parts else key.removeprefix(PREFIX)
        if path in extras:
            raise ValueError(f"{source.where}: parameter {path} is there twice")
        extras[path] = key
    return parts, extras


def _check_module(config: Mapping[str, Any], source: _Source, name: str, keys: Mapping[str, str]) -> Shape:
    """Sizes of one module from the shapes alone; an error where its tensors do not fit together or the configuration."""
    what = f"{source.where}: module {name}"
    if ".base_layer." in name:
        raise UnsupportedKind(f"{what} is inside another adapted module (nn.MultiheadAttention); not supported")
    for part in ("A", "B"):
        if part not in keys:
            raise ValueError(f"{what} has no {part}; factors come in pairs")
    a, b = source.shapes[keys["A"]], source.shapes[keys["B"]]
    if len(a) < 2 or len(a) != len(b) or min(a + b) < 1:
        raise ValueError(f"{what}: A {a} and B {b} do not multiply to a matrix")
    if b[1] != a[0]:
        if len(a) > 2 and a[0] % b[1] == 0:
            raise UnsupportedKind(f"{what} is a grouped convolution (A {a}, B {b}); not supported")
        raise ValueError(f"{what}: A {a} and B {b} do not have the same rank")
    if a[0] != rank_of(config, name):
        raise ValueError(f"{what} has rank {a[0]} but {CONFIG} says {rank_of(config, name)}")
    for part, switch in (("bias", "lora_bias"), ("magnitude", "use_dora")):
        if bool(config.get(switch)) != (part in keys):
            raise ValueError(f"{what} has {'a' if part in keys else 'no'} {part} but {switch}={config.get(switch)!r}")
        if part in keys and math.prod(source.shapes[keys[part]]) != b[0]:
            raise ValueError(f"{what}: {part} {source.shapes[keys[part]]} does not have {b[0]} entries")
    return Shape(b[0], math.prod(a[1:]), a[0])


def _assembled(config: Any, source: _Source, provenance: Mapping[str, Any]) -> Adapter:
    config = _check_config(config, source.where)
    parts, extras = _sorted_keys(source)
    if not parts:
        raise ValueError(f"{source.where}: holds no factors (lora_A, lora_B or hira_A, hira_B)")
    shapes = {name: _check_module(config, source, name, keys) for name, keys in parts.items()}

    def read(name: str) -> Factors:
        tensors = {part: source.checked(key) for part, key in parts[name].items()}
        a, b = tensors["A"], tensors["B"]
        if a.dtype not in _FLOATS or b.dtype not in _FLOATS:
            raise UnsupportedKind(f"{source.where}: module {name} is stored as {b.dtype}; allowed: 16 to 64 bit floats")
        return Factors(
            B=b.flatten(1),
            A=a.flatten(1),
            scale=scale_of(config, name),
            bias=tensors.get("bias"),
            magnitude=tensors["magnitude"].flatten() if "magnitude" in tensors else None,
            kernel=tuple(a.shape[1:]) if a.ndim > 2 else None,
            embedding="_embedding_" in parts[name]["A"].rpartition(".")[2],
        )

    marked = {**provenance, "targets": _digest(config, shapes)}
    return Adapter(config, Modules(list(parts), read, shapes.__getitem__), _Extras(source, extras), marked)


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
    return _assembled(dict(config), _Source(where, shapes, tensors.__getitem__), {})


def load(path: str | Path) -> Adapter:
    """Open a PEFT folder (LoRA, rsLoRA, DoRA, HiRA) lazily: only the configuration and the header are read now.

    A convolution's A is held as r x (in * kernel), with ``kernel``. An embedding's delta is embedding_dim x
    num_embeddings, the transpose of its weight. ``fan_in_fan_out`` changes nothing: delta is always out x in.

    Raises:
        FileNotFoundError: no such folder, configuration or weight file.
        UnsupportedKind: another PEFT type, a variant that factors cannot express, or a pickle.
        ValueError: the folder is damaged; also on reading a module with NaN or infinite entries.
    """
    folder = Path(path)
    if folder.name.endswith(UNFINISHED):
        raise ValueError(f"{folder} is an unfinished write of a process that was killed; remove it")
    if not folder.is_dir():
        kind = ValueError if folder.exists() else FileNotFoundError
        raise kind(f"{folder} is not a folder with an adapter ({CONFIG} and {WEIGHTS})")
    config = _json(folder / CONFIG)
    where = folder / WEIGHTS
    if not where.is_file():
        pickles = sorted(file.name for file in folder.glob("*.*") if file.suffix in (".bin", ".pt", ".pth", ".pkl"))
        if pickles:
            raise UnsupportedKind(f"{folder / pickles[0]} is a pickle, which can run code; allowed: {WEIGHTS}")
        raise FileNotFoundError(f"{where} is not there")
    try:
        opened = safe_open(where, framework="pt")
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{where} is not a whole safetensors file: {str(error).splitlines()[0]}") from error
    _check_config(config, str(folder / CONFIG))
    past = _json(folder / RECORD) if (folder / RECORD).exists() else {}
    if not isinstance(past, dict):
        raise ValueError(f"{folder / RECORD}: expected a JSON object, got {type(past).__name__}")
    name = folder.absolute().name if folder.is_absolute() else folder.as_posix()
    provenance = {**past, "path": str(folder.resolve()), "name": name, "stamp": _stamp(where)}
    # Cloned: the tensors of one open file share their memory, and a caller may write to what it was given.
    return _assembled(config, _Source(str(where), shapes, lambda key: opened.get_tensor(key).clone()), provenance)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {str(error).splitlines()[0]}") from error


# --- provenance -------------------------------------------------------------------------------------------------------
def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def fingerprint(source: Adapter | str | Path) -> str:
    """sha256 of the weight file of a folder, or of the folder from which an adapter was loaded.

    Raises:
        ValueError: the adapter was not loaded from a folder, or its file has changed since.
        FileNotFoundError: the weight file is not there.
    """
    if not isinstance(source, Adapter):
        with (Path(source) / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    path, stamp = source.provenance.get("path"), source.provenance.get("stamp")
    if path is None:
        raise ValueError(f"{source!r} was not loaded from a folder; only a weight file has a fingerprint")
    if _stamp(Path(path) / WEIGHTS) != stamp:
        raise ValueError(f"{Path(path) / WEIGHTS} has changed since it was loaded")
    return fingerprint(path)
