"""Whole checkpoints on disk: a model's weights read and written shard by shard, without making the model."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, UnsupportedKind
from loraloom.folders import UNFINISHED
from loraloom.registry import edge
from loraloom.safefile import SafeFile
from loraloom.untrusted import read_json, word

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Models of Transformers whose linear layers of these names are of its class Conv1D: stored in x out.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
_CONV1D_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
# Classes with an output head over the vocabulary, which may be the input embedding once more.
_HEADED = r"(LMHead\w*|DoubleHeads\w*|For(CausalLM|MaskedLM|PreTraining|ConditionalGeneration|ImageTextToText))"


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
        if self.folder.name.endswith(UNFINISHED):
            raise ValueError(f"{self.folder} is an unfinished write of a process that was killed; remove it")
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is not a folder with a model's weights")
        self.config = self._json("config.json") if (self.folder / "config.json").is_file() else {}
        if self.config.get("quantization_config"):
            raise UnsupportedKind(f"{self.folder}: the weights are quantised; use those of the model before that")
        index = self._json(INDEX) if (self.folder / INDEX).is_file() else None
        self.shards: dict[str, SafeFile] = {name: self._open(name) for name in self._names(index)}
        if index is not None and (self.folder / SINGLE).is_file() and list(self.shards) != [SINGLE]:
            raise ValueError(f"{self.folder} holds both {SINGLE} and {INDEX}, of other files; remove one of them")
        self._shard: dict[str, str] = {}
        for name, file in self.shards.items():
            for key in file.shapes:
                if self._shard.setdefault(key, name) != name:
                    raise ValueError(f"{self.folder}: {key} is both in {self._shard[key]} and in {name}")
        if index is not None:
            missing = [key for key in index["weight_map"] if key not in self._shard]
            if missing:
                raise ValueError(f"{self.folder / INDEX}: {missing[0]} is in none of the shards")

    def _json(self, name: str) -> dict[str, Any]:
        found = read_json(self.folder / name)
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
            raise ValueError(f"{self.folder}: {name!r} is not a file of this folder")
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder}: {word(name)} is not there, but {INDEX} names it")
        return SafeFile(path)

    def _in_cache(self, path: Path) -> bool:
        """The hub's cache keeps snapshots as links to ``blobs`` two folders up."""
        return Path(os.path.realpath(path)).parent == (self.folder.resolve().parent.parent / "blobs")

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
        tied = (
            " (a tied weight is stored once, as the embedding: untie it first)" if not near and "head" in path else ""
        )
        raise AdapterMismatch(f"{self.folder}: {path} is not in the checkpoint; {what}{tied}")

    def turned(self, key: str, adapter: Adapter, name: str, shape: tuple[int, ...] | None = None) -> bool:
        """Whether a weight is stored as the transpose of a module's update: embeddings, and GPT-2's Conv1D.

        The sizes tell, except where the weight is square. Then it is the layer's name in the models that are known to
        have such layers, and ``fan_in_fan_out`` in others: PEFT stores one for all modules, that of the last one.

        Args:
            key: of the weight.
            adapter: whose module it is.
            name: of the module.
            shape: of the weight, if it is not the one in the files.

        Raises:
            AdapterMismatch: the sizes do not fit either way.
        """
        shape = self.shape(key) if shape is None else shape
        out, in_, _ = adapter.shape(name)
        plain = len(shape) > 1 and (shape[0], math.prod(shape[1:])) == (out, in_)
        across = shape == (in_, out)
        family = self.config.get("model_type") in _CONV1D
        turned = is_conv1d(self.config, name) if family else bool(adapter.config.get("fan_in_fan_out"))
        if plain and not across:
            return False
        if across and (turned or adapter.modules[name].embedding):
            return True
        if not plain:
            raise AdapterMismatch(f"{key} is {shape}, the update of {name} is {out} x {in_}")
        return False

    def tied(self, key: str) -> bool:
        """Whether a parameter is the input embedding and, at the same time, the output head of the model.

        Told from the configuration: its class has a head over the vocabulary, and the weights are tied, or it does not
        say and no head is stored.
        """
        shape = self.shape(key)
        parts = [self.config, *(part for part in self.config.values() if isinstance(part, dict))]
        if len(shape) != 2 or shape[0] not in [part.get("vocab_size") for part in parts] or re.search(r"\.\d+\.", key):
            return False
        if not any(re.search(f"{_HEADED}$", str(kind)) for kind in self.config.get("architectures") or ()):
            return False
        said = [part["tie_word_embeddings"] for part in parts if part.get("tie_word_embeddings") is not None]
        if said:
            return bool(said[0])
        return not any(
            other != key and self.shape(other) == shape and not re.search(r"\.\d+\.", other) for other in self
        )

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


def is_conv1d(config: Mapping[str, Any], name: str) -> bool:
    """Whether a layer of a model of Transformers is a Conv1D, which is stored in x out.

    Example:
        >>> [is_conv1d({"model_type": "gpt2"}, name) for name in ("transformer.h.0.attn.c_proj", "lm_head")]
        [True, False]
    """
    return config.get("model_type") in _CONV1D and name.rpartition(".")[2] in _CONV1D_LAYERS


def as_matrix(weight: Tensor, turned: bool) -> Tensor:
    """A stored weight as the out x in matrix that an update is added to; a view where that is possible.

    Args:
        weight: out x in, or out x in x kernel.
        turned: it is stored in x out (see :meth:`Checkpoint.turned`).
    """
    return weight.T if turned else weight.flatten(1)


class BaseWeights(Mapping[str, Tensor]):
    """Weights of the base model by module path, out x in, for what adapters adapt (``merge(base=...)``)."""

    def __init__(self, checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> None:
        self._checkpoint = checkpoint
        self._holder: dict[str, Adapter] = {}  # the first adapter that has the module
        for adapter in adapters:
            for name in adapter.modules:
                self._holder.setdefault(name, adapter)

    def __getitem__(self, name: str) -> Tensor:
        adapter = self._holder[name]
        key = self._checkpoint.parameter(f"{name}.weight")
        return as_matrix(self._checkpoint[key], self._checkpoint.turned(key, adapter, name))

    def __contains__(self, name: object) -> bool:
        return name in self._holder

    def __iter__(self) -> Iterator[str]:
        return iter(self._holder)

    def __len__(self) -> int:
        return len(self._holder)


def base_weights(folder: str | Path, *adapters: Adapter) -> Mapping[str, Tensor]:
    """What ``merge(..., base=...)`` takes, from the folder of the base model; weights are read when they are needed.

    Args:
        folder: of the base model.
        adapters: all that are to be merged; they tell which modules, and how they are stored.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from safetensors.torch import save_file
        >>> from loraloom.adapter import Factors
        >>> a = Adapter({"peft_type": "HIRA"}, {"fc": Factors(B=torch.ones(2, 1), A=torch.ones(1, 3))})
        >>> with TemporaryDirectory() as folder:
        ...     save_file({"fc.weight": torch.ones(2, 3)}, f"{folder}/model.safetensors")
        ...     base_weights(folder, a)["fc"].shape
        torch.Size([2, 3])
    """
    return BaseWeights(Checkpoint(folder), adapters)
