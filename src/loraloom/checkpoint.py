"""Whole checkpoints on disk: a model's weights read and written shard by shard, without making the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, Factors, UnsupportedKind
from loraloom.registry import edge
from loraloom.safefile import SafeFile

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint(Mapping[str, Tensor]):
    """The weights in a folder that ``save_pretrained`` wrote, by parameter name; each is read when it is asked for.

    Args:
        folder: with ``model.safetensors``, or its shards and their index.

    Raises:
        FileNotFoundError: no such folder, or no safetensors weights in it.
        ValueError: the index or a shard is damaged, or names a file outside the folder.
        UnsupportedKind: the weights are quantised or a pickle.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from safetensors.torch import save_file
        >>> with TemporaryDirectory() as folder:
        ...     save_file({"fc.weight": torch.ones(2, 3)}, f"{folder}/model.safetensors")
        ...     held = Checkpoint(folder)
        ...     list(held), held.shape("fc.weight")
        (['fc.weight'], (2, 3))
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is not a folder with a model's weights")
        self.config = self._json("config.json") if (self.folder / "config.json").is_file() else {}
        if self.config.get("quantization_config"):
            raise UnsupportedKind(f"{self.folder}: the weights are quantised; use those of the model before that")
        index = self._json(INDEX) if (self.folder / INDEX).is_file() else None
        self.shards: dict[str, SafeFile] = {name: self._open(name) for name in self._names(index)}
        self._shard = {key: name for name, file in self.shards.items() for key in file.shapes}
        if index is not None:
            missing = [key for key in index["weight_map"] if key not in self._shard]
            if missing:
                raise ValueError(f"{self.folder / INDEX}: {missing[0]} is in none of the shards")

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.folder / name} is not valid JSON: {str(error).splitlines()[0]}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{self.folder / name}: expected a JSON object, got {type(found).__name__}")
        return found

    def _names(self, index: dict[str, Any] | None) -> list[str]:
        if index is None:
            if (self.folder / SINGLE).is_file():
                return [SINGLE]
            pickles = sorted(file.name for file in self.folder.glob("*.bin"))
            if pickles:
                raise UnsupportedKind(f"{self.folder / pickles[0]} is a pickle, which can run code; allowed: {SINGLE}")
            raise FileNotFoundError(f"{self.folder} holds neither {SINGLE} nor {INDEX}")
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{self.folder / INDEX}: weight_map must map parameters to files")
        return list(dict.fromkeys(shards.values()))

    def _open(self, name: str) -> SafeFile:
        path = self.folder / name
        if Path(name).name != name or (path.is_symlink() and not self._in_cache(path)):
            raise ValueError(f"{self.folder / INDEX}: {name!r} is not a file of this folder")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there, but {INDEX} names it")
        return SafeFile(path)

    def _in_cache(self, path: Path) -> bool:
        """The hub's cache keeps snapshots as links to ``blobs`` two folders up."""
        return path.resolve().parent == (self.folder.resolve().parent.parent / "blobs")

    def __getitem__(self, key: str) -> Tensor:
        return self.shards[self._shard[key]].read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard)

    def __len__(self) -> int:
        return len(self._shard)

    def __contains__(self, key: object) -> bool:
        return key in self._shard

    def shape(self, key: str) -> tuple[int, ...]:
        """Sizes of one parameter, from the header."""
        return self.shards[self._shard[key]].shapes[key]

    def stored(self, key: str) -> str:
        """Type of one parameter as the file names it, such as BF16."""
        return self.shards[self._shard[key]].types[key]

    def parameter(self, path: str) -> str:
        """The name under which the file holds a parameter of the model.

        Files of a model without its head lack the first part of the path, and the other way round, so the one name
        that ends like the path, or that the path ends with, is it too; so is one that Transformers renames.

        Raises:
            AdapterMismatch: there is none, or more than one.
        """
        if path in self:
            return path
        near = [key for key in self if _ends(key, path)] or [k for name, k in self._live.items() if _ends(name, path)]
        if len(near) == 1:
            return near[0]
        what = f"several fit: {', '.join(near[:3])}" if near else "no parameter of that name"
        tied = " (a tied weight is stored once, under another name)" if not near and "head" in path else ""
        raise AdapterMismatch(f"{self.folder}: {path} is not in the checkpoint; {what}{tied}")

    def live_name(self, key: str) -> str | None:
        """The name in the model of a key of the files; None where the model makes one parameter of several keys."""
        if not self._live:
            return key
        return next((name for name, held in self._live.items() if held == key), None)

    @cached_property
    def _live(self) -> dict[str, str]:
        """Keys by the names that parameters have in the model, where Transformers renames them on loading."""
        kinds = self.config.get("architectures") or [""]
        return edge("renames").live_names(self.folder, str(kinds[0]), self)


def _ends(key: str, path: str) -> bool:
    return key == path or key.endswith("." + path) or path.endswith("." + key)


def as_matrix(weight: Tensor, factors: Factors, fan_in_fan_out: bool, name: str) -> Tensor:
    """A stored weight as the out x in matrix that delta is added to.

    Linear weights are out x in, those of GPT-2's Conv1D (``fan_in_fan_out``) in x out, embeddings num x dim while their
    delta is dim x num, convolutions out x in x kernel.

    Raises:
        AdapterMismatch: the sizes do not fit.
    """
    turned = factors.embedding or (fan_in_fan_out and weight.ndim == 2)
    matrix = weight.T if turned else weight.flatten(1)
    if matrix.shape != factors.shape[:2]:
        raise AdapterMismatch(f"{name}: the weight is {tuple(weight.shape)}, the update {factors.shape[:2]}")
    return matrix


def in_place_of(weight: Tensor, matrix: Tensor, factors: Factors, fan_in_fan_out: bool) -> Tensor:
    """The way back from :func:`as_matrix`: a matrix in the form in which the weight is stored."""
    turned = factors.embedding or (fan_in_fan_out and weight.ndim == 2)
    return (matrix.T if turned else matrix).reshape(weight.shape)


class BaseWeights(Mapping[str, Tensor]):
    """Weights of the base model by module path, out x in, for what an adapter adapts (``merge(base=...)``)."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter) -> None:
        self._checkpoint, self._adapter = checkpoint, adapter
        self._turned = bool(adapter.config.get("fan_in_fan_out"))

    def __getitem__(self, name: str) -> Tensor:
        factors = self._adapter.modules[name]
        weight = self._checkpoint[self._checkpoint.parameter(f"{name}.weight")]
        return as_matrix(weight, factors, self._turned, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapter.modules)

    def __len__(self) -> int:
        return len(self._adapter.modules)


def base_weights(folder: str | Path, adapter: Adapter) -> Mapping[str, Tensor]:
    """What ``merge(..., base=...)`` takes, from the folder of the base model; weights are read when they are needed.

    Args:
        folder: of the base model.
        adapter: one of those to be merged; it tells which modules, and how they are stored.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from safetensors.torch import save_file
        >>> a = Adapter({"peft_type": "HIRA"}, {"fc": Factors(B=torch.ones(2, 1), A=torch.ones(1, 3))})
        >>> with TemporaryDirectory() as folder:
        ...     save_file({"fc.weight": torch.ones(2, 3)}, f"{folder}/model.safetensors")
        ...     base_weights(folder, a)["fc"].shape
        torch.Size([2, 3])
    """
    return BaseWeights(Checkpoint(folder), adapter)
