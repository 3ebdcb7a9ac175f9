"""Extracting an adapter: the low-rank difference of a fine-tuned model and its base, from their folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Factors, Modules, Shape, is_finite, truncate
from loraloom.checkpoint import Checkpoint
from loraloom.ops.certificate import note
from loraloom.ops.checks import check_size
from loraloom.ops.dense import low_rank
from loraloom.registry import UnknownName

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_TURNED = ("GPT2", "GPTBigCodeForCausalLM", "ImageGPT", "OpenAIGPT", "DecisionTransformer")  # linear layers of Conv1D


def extract(
    tuned: str | Path,
    base: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    modules: str | Sequence[str] | None = None,
    rest: str = "refuse",
) -> Adapter:
    """An ordinary LoRA adapter that is nearest to ``tuned - base``, lazily, one weight at a time.

    Every linear and convolutional weight in a numbered layer that differs becomes a module, or those that ``modules``
    names. The difference is taken in float32 (float64 where that is stored) and cut by SVD.

    Args:
        tuned: folder of the fine-tuned model.
        base: folder of the model that it was tuned from.
        rank: of every module; 16 if neither this nor ``energy`` is given.
        energy: or the least rank that keeps this share of the squared singular values of a module, in (0, 1].
        modules: ends of module paths, a list or a string with commas: q_proj,mlp.up_proj.
        rest: other parameters that differ (norms, biases, embeddings, heads): ``refuse``, ``ignore``, or ``keep`` them
            whole: biases as trained biases, others by ``modules_to_save``.

    Returns:
        A lazy adapter. ``provenance["record"]`` fills with ``error`` and ``norm`` by module, and names what was
        ignored.

    Raises:
        AdapterMismatch: parameters of one model that the other does not have or has in another size, or a difference
            that is not a module while ``rest`` is ``refuse``.
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
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    if rest not in ("refuse", "ignore", "keep"):
        raise UnknownName("rest", rest, ["refuse", "ignore", "keep"])
    new, old = Checkpoint(tuned), Checkpoint(base)
    _check_pair(new, old)
    turned = any(str(name).startswith(_TURNED) for name in old.config.get("architectures") or ())
    keys, others = _changed(new, old, modules)
    names = list(keys)
    if others and rest == "refuse":
        raise AdapterMismatch(
            f"{len(others)} parameters differ that no module holds ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}); rest='keep' stores them whole, rest='ignore' leaves them out"
        )
    record: dict[str, Any] = {"error": {}, "norm": {}, "ignored": others if rest == "ignore" else []}
    wanted = None if energy is not None else rank or 16

    def read(name: str) -> Factors:
        factors, error = _factors(_difference(new, old, keys[name]), turned, wanted, energy)
        note(record, name, error, factors)
        return factors

    def shape(name: str) -> Shape:
        out, in_ = _matrix_size(old.shape(keys[name]), turned)
        return Shape(out, in_, wanted) if wanted is not None else cached(name)

    cached = cache(lambda name: read(name).shape)
    extras = {path: new[path] for path in others} if rest == "keep" else {}
    provenance = {
        "operation": "extract",
        "arguments": {
            "rank": wanted,
            "energy": energy,
            "tuned": new.folder.name,
            "base": old.folder.name,
            "rest": rest,
        },
        "inputs": [],
        "record": record,
    }
    config = _config(old, names, list(extras), wanted, turned)
    return Adapter(config, Modules(names, read, shape), extras, provenance)


def _check_pair(new: Checkpoint, old: Checkpoint) -> None:
    for key in dict.fromkeys([*new, *old]):
        if key not in new or key not in old:
            where = new.folder if key not in new else old.folder
            raise AdapterMismatch(f"{key} is not in {where}; both models must have the same parameters")
        if new.shape(key) != old.shape(key):
            raise AdapterMismatch(f"{key} is {new.shape(key)} in {new.folder}, {old.shape(key)} in {old.folder}")


def _changed(new: Checkpoint, old: Checkpoint, modules: str | Sequence[str] | None) -> tuple[dict[str, str], list[str]]:
    """Modules to extract with the keys of their weights, and parameters that differ beside them."""
    ends = [end.strip() for end in modules.split(",")] if isinstance(modules, str) else modules
    layered = [key for key in old if key.endswith(".weight") and len(old.shape(key)) >= 2]
    if ends is None:
        chosen = {key for key in layered if re.search(r"(^|\.)\d+\.", key)}
    else:
        chosen = set()
        for end in ends:
            found = {key for key in layered if f".{key}".endswith(f".{end}.weight")}
            if not found:
                raise UnknownName("module", end, sorted({key.split(".")[-2] for key in layered if "." in key}))
            chosen |= found
    differs = [key for key in old if not torch.equal(new[key], old[key])]
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


def _matrix_size(shape: Sequence[int], turned: bool) -> tuple[int, int]:
    out, in_ = shape[0], int(torch.Size(shape).numel() // shape[0])
    return (in_, out) if turned and len(shape) == 2 else (out, in_)


def _factors(difference: Tensor, turned: bool, rank: int | None, energy: float | None) -> tuple[Factors, float]:
    kernel = tuple(difference.shape[1:]) if difference.ndim > 2 else None
    matrix = difference.T if turned and difference.ndim == 2 else difference.flatten(1)
    b, a, error = low_rank(matrix, rank or min(matrix.shape))
    factors = Factors(B=b, A=a, kernel=kernel)
    if energy is None:
        return factors, error
    squares = factors.singular_values().square().cumsum(0)
    enough = int((squares < energy * squares[-1] * (1 - 1e-12)).sum()) + 1 if len(squares) else 1
    return truncate(factors, enough)


def _config(
    old: Checkpoint, names: Sequence[str], extras: Sequence[str], rank: int | None, turned: bool
) -> dict[str, Any]:
    kinds = [str(name) for name in old.config.get("architectures") or ()]
    task = next((task for end, task in _TASKS.items() for kind in kinds if kind.endswith(end)), None)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(old.folder),
        "task_type": task,
        "r": rank or 16,
        "lora_alpha": rank or 16,
        "target_modules": list(names),
        "fan_in_fan_out": turned,
        "inference_mode": True,
    }
    biases = [path for path in extras if path.endswith(".bias") and path.removesuffix(".bias") in names]
    whole = list(dict.fromkeys(path.rpartition(".")[0] for path in extras if path not in biases))
    return config | ({"bias": "lora_only"} if biases else {}) | ({"modules_to_save": whole} if whole else {})
