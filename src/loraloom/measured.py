"""Statistics of an adapter on its task, by module path, and the file that holds them; no model is needed to read one.

``integrations/statistics.py`` measures them, ``merge(..., statistics=[...])`` uses them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loraloom.adapter import UnsupportedKind
from loraloom.folders import whole_file
from loraloom.safefile import PICKLES, SafeFile, Writer
from loraloom.stream import OnDemand

KINDS = ("gram", "fisher")
_MARK = "loraloom_statistics"  # in the file's metadata: the kind


@dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, Tensor]):
    """Statistics of one adapter by module path; read when asked for, where they are in a file.

    Attributes:
        kind: ``gram`` or ``fisher``.
        tensors: by module path.
        about: where they come from, in words: task, model, examples, and for Fisher information space and labels.

    Example:
        >>> Statistics("gram", {"fc": torch.eye(2)}, {"task": "digits"})
        Statistics(kind='gram', modules=1, task='digits')
    """

    kind: str
    tensors: Mapping[str, Tensor]
    about: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind of statistics must be one of {', '.join(KINDS)}, got {self.kind!r}")

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        told = "".join(f", {key}={value!r}" for key, value in self.about.items())
        return f"Statistics(kind={self.kind!r}, modules={len(self)}{told})"


def save_statistics(statistics: Statistics, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write statistics to one safetensors file, whole or not at all; memory holds one module at a time.

    Raises:
        FileExistsError: it is there and ``overwrite`` is off.
        ValueError: they do not say their kind (a plain mapping), or one has NaN or infinite entries.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = save_statistics(Statistics("gram", {"fc": torch.eye(2)}), f"{folder}/fc.safetensors")
        ...     load_statistics(path)["fc"]
        tensor([[1., 0.],
                [0., 1.]])
    """
    target = Path(path)
    if not isinstance(statistics, Statistics):
        raise ValueError(f"only statistics that say their kind are saved (Statistics), got {type(statistics).__name__}")
    room = sum(len(name) + 100 for name in statistics) + 1000
    with whole_file(target, overwrite=overwrite) as work, contextlib.closing(Writer(work, room)) as writer:
        for name in statistics:
            writer.add(name, _finite(statistics[name], f"{target}: {name}"))
        writer.finish({"format": "pt", _MARK: statistics.kind, **statistics.about})
    return target


def load_statistics(path: str | Path) -> Statistics:
    """Open a file of ``save_statistics`` lazily: a tensor is read, and checked, when it is asked for.

    Raises:
        FileNotFoundError: there is no such file.
        UnsupportedKind: it is a pickle.
        ValueError: it is damaged, or holds something else.

    Example:
        >>> load_statistics("nowhere.safetensors")
        Traceback (most recent call last):
        FileNotFoundError: nowhere.safetensors is not there
    """
    where = Path(path)
    if where.suffix in PICKLES:
        raise UnsupportedKind(f"{where} is a pickle, which can run code; allowed: files of `loraloom measure`")
    if not where.is_file():
        raise FileNotFoundError(f"{where} is not there")
    file = SafeFile(where)
    about = {key: value for key, value in file.metadata.items() if key != "format"}
    kind = about.pop(_MARK, None)
    if kind not in KINDS:
        raise ValueError(f"{where} holds no statistics of `loraloom measure` (its kind is {kind!r})")
    held = OnDemand(file.shapes, lambda name: _finite(file.read(name), f"{where}: {name}"))
    return Statistics(kind, held, about)


def _finite(tensor: Tensor, what: str) -> Tensor:
    if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise ValueError(f"{what} has NaN or infinite entries")
    return tensor
