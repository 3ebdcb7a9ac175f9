"""Extracting an adapter: the low-rank difference of a fine-tuned model and its base, from their folders."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Factors, Modules, Shape, UnsupportedKind, is_finite
from loraloom.checkpoint import Checkpoint, as_matrix, is_conv1d
from loraloom.ops.certificate import note
from loraloom.ops.checks import check_device, check_size
from loraloom.ops.compress import enough
from loraloom.ops.dense import low_rank
from loraloom.registry import UnknownName

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# Two-dimensional weights of these names, or in a list of that name, are embeddings: PEFT adapts them in another form.
_EMBEDDING = re.compile(
    r"(^|_)(embed|embedding|embeddings|embed_(tokens|positions|in))$|^(wte|wpe|shared)$|attention_bias$"
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # PEFT refuses two layers of theirs
_ROUNDING = 3e-7  # singular values below this share of the largest are rounding of float32


def extract(
    tuned: str | Path,
    base: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    modules: str | Sequence[str] | None = None,
    rest: str = "refuse",
    device: str | None = None,
) -> Adapter:
    """An ordinary LoRA adapter that is nearest to ``tuned - base``, lazily, one weight at a time.

    Every linear and convolutional weight in a numbered layer that differs becomes a module, or those that ``modules``
    names (embeddings too). The difference is taken in float32 (float64 where that is stored) and cut by SVD. Where one
    model is stored in fewer bits, what differs by that rounding alone counts as equal. Names, sizes and the
    configuration tell which weights PEFT cannot adapt; convolutions of groups of several channels look like others, and
    PEFT does not load them.

    Args:
        tuned: folder of the fine-tuned model.
        base: folder of the model that it was tuned from.
        rank: of every module, or its smaller side where that is less; 16 if neither this nor ``energy`` is given.
        energy: or the least rank that keeps this share of the squared singular values of a module, in (0, 1].
        modules: ends of module paths, a list or a string with commas: q_proj,mlp.up_proj.
        rest: other parameters that differ (norms, biases, embeddings, heads): ``refuse``, ``ignore``, or ``keep`` them
            whole: biases as trained biases, others by ``modules_to_save``.
        device: where to compute ("cuda"); the result is in main memory.

    Returns:
        A lazy adapter. ``provenance["record"]`` fills with ``error`` and ``norm`` by module, and names what was
        ignored.

    Raises:
        AdapterMismatch: parameters of one model that the other does not have or has in another size, or a difference
            that is not a module while ``rest`` is ``refuse``.
        UnsupportedKind: a parameter to keep that PEFT cannot hold: an embedding that is the output head too, one that
            Transformers makes of several, or one that is in no layer of its own. A weight that ``modules`` names and
            PEFT cannot adapt: such an embedding, depthwise convolutions, routers of experts, some layers of Mamba.
        ValueError: rank and energy both, or out of range; nothing differs; a weight is not finite (when read).
        UnknownName: a module that is not there; ``rest`` is none of the three.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from safetensors.torch import save_file
        >>> with TemporaryDirectory() as folder:
        ...     for name, value in (("base", 1.0), ("tuned", 1.5)):
        ...         Path(f"{folder}/{name}").mkdir()
        ...         save_file({"h.0.fc.weight": torch.full((2, 3), value)}, f"{folder}/{name}/model.safetensors")
        ...     extract(f"{folder}/tuned", f"{folder}/base", rank=1).modules["h.0.fc"].delta()
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """
    check_size(rank, energy, None)
    if rest not in ("refuse", "ignore", "keep"):
        raise UnknownName("rest", rest, ["refuse", "ignore", "keep"])
    check_device(device)
    new, old = Checkpoint(tuned), Checkpoint(base)
    _check_pair(new, old)
    keys, others = _changed(new, old, modules)
    if others and rest == "refuse":
        raise AdapterMismatch(
            f"{len(others)} parameters differ that no module holds ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}); rest='keep' stores them whole, rest='ignore' leaves them out"
        )
    record: dict[str, Any] = {"error": {}, "norm": {}, "ignored": others if rest == "ignore" else []}
    wanted = None if energy is not None else rank or 16

    def read(name: str) -> Factors:
        difference = _difference(new, old, keys[name]).to(device or "cpu")
        factors, error = _factors(difference, _is_turned(old, keys[name], name), wanted, energy)
        note(record, name, error, factors)
        return replace(factors.to("cpu"), embedding=_is_embedding(old, keys[name]))

    def shape(name: str) -> Shape:
        sizes = old.shape(keys[name])
        out, in_ = sizes[0], torch.Size(sizes[1:]).numel()
        out, in_ = (in_, out) if _is_turned(old, keys[name], name) else (out, in_)
        return Shape(out, in_, min(wanted, out, in_)) if wanted is not None else cached(name)

    cached = cache(lambda name: read(name).shape)
    extras = _Whole(new, _kept(old, others, list(keys)) if rest == "keep" else {})
    arguments = {"rank": wanted, "energy": energy, "tuned": new.folder.name, "base": old.folder.name, "rest": rest}
    provenance = {"operation": "extract", "arguments": arguments, "inputs": [], "record": record}
    return Adapter(_config(old, list(keys), list(extras), wanted), Modules(list(keys), read, shape), extras, provenance)


class _Whole(Mapping[str, Tensor]):
    """Parameters of a checkpoint by their names in the model, read when asked for."""

    def __init__(self, checkpoint: Checkpoint, keys: Mapping[str, str]) -> None:
        self._checkpoint, self._keys = checkpoint, keys

    def __getitem__(self, path: str) -> Tensor:
        return self._checkpoint[self._keys[path]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _kept(old: Checkpoint, others: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Keys of the parameters that are kept whole, by their names in the model.

    PEFT holds a bias of an adapted layer by itself, anything else with all of the module that it lies in.
    """
    live = {key: old.live_name(key) for key in old}
    kept: dict[str, str] = {}
    for key in others:
        path = live[key]
        home = "" if path is None else path.rpartition(".")[0]
        if path is not None and path == f"{home}.bias" and home in names:
            kept[path] = key
            continue
        inside = {
            name: each for each, name in live.items() if home and name is not None and name.startswith(f"{home}.")
        }
        if path is None:
            why = "the model makes one parameter of several"
        elif any(old.tied(each) for each in inside.values()):
            why = "it is the output head too (tied weights)"
        elif not home or any(f"{name}.".startswith(f"{home}.") for name in names):
            why = f"it is not in a layer of its own, but in {home or 'the model'}"
        else:
            kept |= inside
            continue
        raise UnsupportedKind(f"{key} cannot be kept: {why}; rest='ignore' leaves it out")
    return kept


def _is_embedding(old: Checkpoint, key: str) -> bool:
    name = re.sub(r"(\.\d+)?\.weight$", "", key)
    return len(old.shape(key)) == 2 and _EMBEDDING.search(name.rpartition(".")[2]) is not None


def _is_turned(old: Checkpoint, key: str, name: str) -> bool:
    return _is_embedding(old, key) or is_conv1d(old.config, name)


def _why_not(old: Checkpoint, key: str) -> str | None:
    """Why PEFT cannot adapt a weight, if its name, its size or the configuration tells."""
    shape, last = old.shape(key), key.split(".")[-2]
    parts = [old.config, *(part for part in old.config.values() if isinstance(part, dict))]
    if old.tied(key):
        return "it is the output head too (tied weights)"
    if last in ("gate", "router") and shape[0] in [part.get(name) for part in parts for name in _EXPERTS]:
        return "it is a router of experts, which PEFT adapts in few models and at one rank"
    if last in ("conv1d", "out_proj") and old.config.get("model_type") in _MAMBA:
        return "PEFT refuses this layer of Mamba"
    narrow = (len(old.shape(other)) > 2 and old.shape(other)[1] == 1 for other in old)
    if len(shape) > 2 and shape[1] == 1 and sum(narrow) > 1:  # only the first layer of a model sees one channel
        return "it is a grouped convolution, whose weight has no factors of the sizes that PEFT holds"
    return None


def _check_pair(new: Checkpoint, old: Checkpoint) -> None:
    for key in dict.fromkeys([*new, *old]):
        if key not in new or key not in old:
            there, lacks = (old, new) if key not in new else (new, old)
            if _is_copy(there, key):
                continue
            raise AdapterMismatch(f"{key} is not in {lacks.folder}; both models must have the same parameters")
        if new.shape(key) != old.shape(key):
            raise AdapterMismatch(f"{key} is {new.shape(key)} in {new.folder}, {old.shape(key)} in {old.folder}")


def _is_copy(checkpoint: Checkpoint, key: str) -> bool:
    """Whether a parameter is the embedding, stored once more as the output head."""
    same = [other for other in checkpoint if other != key and checkpoint.shape(other) == checkpoint.shape(key)]
    return any(checkpoint.tied(other) and torch.equal(checkpoint[other], checkpoint[key]) for other in same)


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal, in the type of fewer bits."""
    if left.dtype != right.dtype and left.is_floating_point() and right.is_floating_point():
        narrow = max(left.dtype, right.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        left, right = left.to(narrow), right.to(narrow)
    return torch.equal(left, right)


def _changed(new: Checkpoint, old: Checkpoint, modules: str | Sequence[str] | None) -> tuple[dict[str, str], list[str]]:
    """Modules to extract with the keys of their weights, and parameters that differ beside them."""
    ends = [end.strip() for end in modules.split(",")] if isinstance(modules, str) else modules
    layered = [key for key in old if key.endswith(".weight") and len(old.shape(key)) >= 2]
    if ends is None:
        layered = [key for key in layered if re.search(r"(^|\.)\d+\.", key) and not _is_embedding(old, key)]
        chosen = {key for key in layered if _why_not(old, key) is None}
    else:
        chosen = set()
        for end in ends:
            found = {key for key in layered if f".{key}".endswith(f".{end}.weight")}
            if not found:
                raise UnknownName("module", end, sorted({key.split(".")[-2] for key in layered if "." in key}))
            chosen |= found
    differs = [key for key in old if key in new and not _same(new[key], old[key])]
    for key in differs:
        if key in chosen and (why := _why_not(old, key)) is not None:
            raise UnsupportedKind(f"{key} cannot be a module: {why}")
    live = {key: old.live_name(key) for key in differs if key in chosen}
    names = {name.removesuffix(".weight"): key for key, name in live.items() if name is not None}
    if not names:
        raise ValueError(f"{new.folder} does not differ from {old.folder} in any of the {len(chosen)} modules")
    return names, [key for key in differs if live.get(key) is None]


def _difference(new: Checkpoint, old: Checkpoint, key: str) -> Tensor:
    left, right = new[key], old[key]
    working = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    difference = left.to(working) - right.to(working)
    if not is_finite(difference):
        raise ValueError(f"{key}: the difference has NaN or infinite entries")
    return difference


def _factors(difference: Tensor, turned: bool, rank: int | None, energy: float | None) -> tuple[Factors, float]:
    """The difference cut to a rank or an energy, and the relative error of that."""
    kernel = tuple(difference.shape[1:]) if difference.ndim > 2 else None
    matrix = as_matrix(difference, turned)
    if rank is not None:
        b, a, error = low_rank(matrix, min(rank, *matrix.shape))
        return Factors(B=b, A=a, kernel=kernel), error
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    squares = s.double().square()
    kept = max(1, min(enough(squares.tolist(), energy or 1.0), int((s > _ROUNDING * s[0]).sum())))
    root = s[:kept].sqrt()
    whole = float(squares.sum())
    error = math.sqrt(float(squares[kept:].sum()) / whole) if whole > 0 else 0.0
    return Factors(B=u[:, :kept] * root, A=root[:, None] * vh[:kept], kernel=kernel), error


def _config(old: Checkpoint, names: Sequence[str], extras: Sequence[str], rank: int | None) -> dict[str, Any]:
    kinds = [str(name) for name in old.config.get("architectures") or ()]
    task = next((task for end, task in _TASKS.items() for kind in kinds if kind.endswith(end)), None)
    if task == "SEQ_2_SEQ_LM" and not old.config.get("is_encoder_decoder"):
        task = None  # a decoder that sees images, say
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(old.folder),
        "task_type": task,
        "r": rank or 16,
        "lora_alpha": rank or 16,
        "target_modules": list(names),
        "fan_in_fan_out": any(is_conv1d(old.config, name) for name in names),
        "inference_mode": True,
    }
    biases = [path for path in extras if path.endswith(".bias") and path.removesuffix(".bias") in names]
    whole = list(dict.fromkeys(path.rpartition(".")[0] for path in extras if path not in biases))
    return config | ({"bias": "lora_only"} if biases else {}) | ({"modules_to_save": whole} if whole else {})
