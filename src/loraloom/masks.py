"""Masks over the B factors of an adapter: packed bits by module, their algebra, and the file that holds them."""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from loraloom.adapter import Adapter, AdapterMismatch, UnsupportedKind
from loraloom.experts import as_stored
from loraloom.folders import whole_file
from loraloom.safefile import PICKLES, SafeFile, Writer
from loraloom.untrusted import parse_json

MASK = "lori_mask.safetensors"  # in the folder of an adapter that was trained with it
_MARK = "loraloom_mask"


@dataclass(frozen=True, eq=False)
class Mask(Mapping[str, Tensor]):
    """Which entries of each module's B (out x rank) may be trained; one bit each.

    A mapping from module path to a boolean matrix, unpacked when asked for. ``a & b``, ``a | b`` and ``a - b`` combine
    masks of the same modules.

    Attributes:
        bits: by module, the entries row by row in uint8, the first one in the lowest bit.
        shapes: by module, (out, rank) of B.
        provenance: how it was made, plain JSON.

    Example:
        >>> a = Mask.of({"fc": torch.tensor([[True, False], [True, True]])})
        >>> b = Mask.of({"fc": torch.tensor([[True, False], [False, False]])})
        >>> a, (a - b)["fc"], a.overlap(b)
        (Mask(modules=1, kept=3 of 4), tensor([[False, False],
                [ True,  True]]), 0.3333333333333333)
    """

    bits: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, int]]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Mapping[str, Tensor], provenance: Mapping[str, Any] | None = None) -> Mask:
        """A mask from boolean matrices (out x rank) by module."""
        bits, shapes = {}, {}
        for name, kept in entries.items():
            if kept.dtype != torch.bool or kept.ndim != 2:
                raise ValueError(f"{name}: a mask is a boolean matrix, got {kept.dtype} of {kept.ndim} dimensions")
            bits[name] = torch.from_numpy(np.packbits(kept.cpu().numpy().reshape(-1), bitorder="little"))
            shapes[name] = (kept.shape[0], kept.shape[1])
        return cls(bits, shapes, provenance or {})

    def __getitem__(self, name: str) -> Bool[Tensor, "out rank"]:
        out, rank = self.shapes[name]
        flat = np.unpackbits(self.bits[name].numpy(), count=out * rank, bitorder="little")
        return torch.from_numpy(flat.view(bool)).view(out, rank)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return f"Mask(modules={len(self)}, kept={self.kept} of {self.entries})"

    def count(self, name: str) -> int:
        """How many entries of a module are kept."""
        return int(np.bitwise_count(self.bits[name].numpy()).sum()) if len(self.bits[name]) else 0

    @property
    def kept(self) -> int:
        """How many entries are kept in all."""
        return sum(map(self.count, self))

    @property
    def entries(self) -> int:
        """How many entries all modules have."""
        return sum(out * rank for out, rank in self.shapes.values())

    @property
    def density(self) -> float:
        """The share that is kept."""
        return self.kept / self.entries if self.entries else 0.0

    def __and__(self, other: Mask) -> Mask:
        return self._with(other, torch.bitwise_and)

    def __or__(self, other: Mask) -> Mask:
        return self._with(other, torch.bitwise_or)

    def __sub__(self, other: Mask) -> Mask:
        return self._with(other, lambda a, b: a & ~b)

    def overlap(self, other: Mask) -> float:
        """The share of this mask's kept entries that the other keeps too; about the other's density if unrelated."""
        return (self & other).kept / self.kept if self.kept else 0.0

    def _with(self, other: Mask, combine: Any) -> Mask:
        for name in [*self, *other]:
            if self.shapes.get(name) != other.shapes.get(name):
                sizes = [held.shapes.get(name, "not there") for held in (self, other)]
                raise AdapterMismatch(
                    f"masks of different modules: {name} is {sizes[0]} in one, {sizes[1]} in the other"
                )
        return Mask({name: combine(self.bits[name], other.bits[name]) for name in self}, dict(self.shapes))


def renamed(mask: Mask, name: Callable[[str], str]) -> Mask:
    """The same mask under other names of its modules."""
    bits = {name(one): held for one, held in mask.bits.items()}
    return replace(mask, bits=bits, shapes={name(one): held for one, held in mask.shapes.items()})


def union(masks: Sequence[Mask]) -> Mask | None:
    """The entries that any of the masks keeps; None if there are none."""
    return reduce(Mask.__or__, masks) if masks else None


def support(adapter: Adapter) -> Mask:
    """Where the B factors of an adapter are not 0.

    Example:
        >>> from loraloom.adapter import Factors
        >>> support(Adapter({}, {"fc": Factors(B=torch.eye(2), A=torch.ones(2, 3))})).density
        0.5
    """
    stored = as_stored(adapter)
    return Mask.of({name: stored.modules[name].B != 0 for name in stored.modules}, {"operation": "support"})


def save_mask(mask: Mask, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a mask to one safetensors file, whole or not at all: an eighth of a byte an entry.

    Raises:
        FileExistsError: it is there and ``overwrite`` is off.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     load_mask(save_mask(Mask.of({"fc": torch.eye(3) > 0}), f"{folder}/mask.safetensors"))
        Mask(modules=1, kept=3 of 9)
    """
    target = Path(path)
    about = {"shapes": mask.shapes, "provenance": mask.provenance}
    room = sum(3 * (len(name) + 120) for name in mask) + 4096
    with whole_file(target, overwrite=overwrite) as work, contextlib.closing(Writer(work, room)) as writer:
        for name, bits in mask.bits.items():
            writer.add(name, bits)
        writer.finish({_MARK: json.dumps(about)})
    return target


def load_mask(path: str | Path) -> Mask:
    """Read a mask; of an adapter's folder, the mask that it was trained with.

    Raises:
        FileNotFoundError: there is none.
        UnsupportedKind: it is a pickle.
        ValueError: the file is damaged, or holds something else.

    Example:
        >>> load_mask("nowhere.safetensors")
        Traceback (most recent call last):
        FileNotFoundError: nowhere.safetensors is not there
    """
    where = Path(path)
    if where.is_dir():
        where = where / MASK
    if where.suffix in PICKLES:
        raise UnsupportedKind(f"{where} is a pickle, which can run code; make a mask with `loraloom calibrate`")
    if not where.is_file():
        raise FileNotFoundError(f"{where} is not there")
    file = SafeFile(where)
    try:
        about = parse_json(file.metadata[_MARK], where)
        shapes = {name: (operator.index(out), operator.index(rank)) for name, (out, rank) in about["shapes"].items()}
        provenance = dict(about["provenance"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is no mask of `loraloom calibrate`") from error
    bits = {}
    for name, (out, rank) in shapes.items():
        size = -(-out * rank // 8)
        if min(out, rank) < 0 or file.shapes.get(name) != (size,) or file.types[name] != "U8":
            raise ValueError(f"{where}: {name} does not hold the {size} bytes of a mask of {out} x {rank}")
        bits[name] = file.read(name)
        if out * rank % 8 and int(bits[name][-1]) >> out * rank % 8:
            raise ValueError(f"{where}: {name} has bits behind its last entry")
    if set(file.shapes) != set(shapes):
        raise ValueError(f"{where}: its modules are not those that it names")
    return Mask(bits, shapes, provenance)
