"""Which single entries stay: the largest of a scope, of all modules together or of every few neighbours."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter import Adapter, Factors, Shape, UnsupportedKind, is_finite, truncate
from loraloom.ops.certificate import note
from loraloom.ops.checks import check_linear
from loraloom.ops.choice import groups
from loraloom.ops.merge import module_generator
from loraloom.ops.select import Pooled, pooled
from loraloom.ops.spaces import refactor
from loraloom.registry import UnknownName

SPACES = ("factors", "balanced", "delta")
_MOST_OF = 1024  # neighbours of a pattern; hardware knows 4


def _magnitude(values: Tensor, generator: torch.Generator) -> Tensor:
    return values.abs()


def _random(values: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(values.shape, generator=generator).to(values.device)


SCORES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"magnitude": _magnitude, "random": _random}


@dataclass(frozen=True)
class Entries:
    """Unstructured pruning of one adapter, as asked for (see :func:`loraloom.ops.prune.prune`)."""

    adapter: Adapter
    density: float | None
    pattern: str | None
    space: str
    by: str
    scope: str
    rank: int | None
    seed: int
    record: dict[str, Any]
    _thresholds: dict[tuple[str, ...], Pooled] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """Refuse what cannot be done, before anything is read."""
        if self.space not in SPACES:
            raise UnknownName("space", self.space, list(SPACES))
        if self.rank is not None and (self.space != "delta" or self.rank < 1):
            raise ValueError(f"rank must be at least 1 and goes with space='delta', got {self.rank} in {self.space!r}")
        if self.pattern is not None:
            match = re.fullmatch(r"(\d+):(\d+)", self.pattern)
            if match is None or not 1 <= int(match[1]) <= int(match[2]) <= _MOST_OF:
                raise ValueError(f"pattern {self.pattern!r}: expected N:M with 1 <= N <= M <= {_MOST_OF}, such as 2:4")
        elif self.density is not None and self.density < 1 and round(self.density * self.total) < 1:
            raise ValueError(f"density={self.density} keeps none of the {self.total} entries")
        if self.space == "delta" and self.adapter.kind == "hira":
            raise UnsupportedKind("entries of a HiRA update depend on the base weights; use space='factors'")
        if self.adapter.kind != "dora" or self.space == "delta":
            check_linear(self.adapter, "prune entries of")

    def begin(self) -> None:
        """Start the record of what is reached."""
        self.record.update(entries=self.total, kept={})
        if self.pattern is not None:
            most, of = map(int, self.pattern.split(":"))
            rows = [row for name in self.adapter.modules for row in self.sizes(name)]
            kept = sum(count * (length // of * most + min(length % of, most)) for count, length in rows)
        else:
            kept = sum(round((self.density or 0) * self.entries(pool)) for pool in self.pools)
        self.record.update(entries_kept=kept, density=kept / self.total)

    @cached_property
    def pools(self) -> list[tuple[str, ...]]:
        """The modules of each scope."""
        return groups(list(self.adapter.modules), self.scope)

    @cached_property
    def pool_of(self) -> dict[str, tuple[str, ...]]:
        """The scope of each module."""
        return {name: pool for pool in self.pools for name in pool}

    def entries(self, names: tuple[str, ...]) -> int:
        """Number of entries of some modules."""
        return sum(count * length for name in names for count, length in self.sizes(name))

    def sizes(self, name: str) -> list[tuple[int, int]]:
        """Rows and columns of the matrices whose entries are in question."""
        out, in_, rank = self.adapter.shape(name)
        return [(out, in_)] if self.space == "delta" else [(out, rank), (rank, in_)]

    @property
    def total(self) -> int:
        """Number of entries over all modules."""
        return self.entries(tuple(self.adapter.modules))

    def shape(self, name: str) -> Shape:
        """Sizes of one pruned module."""
        shape = self.adapter.shape(name)
        return shape._replace(rank=self.rank or shape.rank)

    def factors(self, name: str) -> Factors:
        """One module, balanced if that is the space."""
        factors = self.adapter.modules[name]
        return truncate(factors, factors.rank)[0] if self.space == "balanced" else factors

    def matrices(self, factors: Factors) -> list[Tensor]:
        """The matrices whose entries are in question."""
        if self.space != "delta":
            return [factors.B, factors.A]
        working = torch.promote_types(factors.dtype, torch.float32)
        return [factors.scale * (factors.B.to(working) @ factors.A.to(working))]

    def scores(self, name: str, matrices: list[Tensor]) -> Tensor:
        """The score of every entry, flat."""
        flat = torch.cat([matrix.flatten() for matrix in matrices])
        return SCORES[self.by](flat, module_generator(self.seed, name)).float().contiguous()

    def stays(self, name: str, matrices: list[Tensor]) -> list[Tensor]:
        """Which entries of each matrix stay."""
        scores = self.scores(name, matrices)
        sizes = [matrix.numel() for matrix in matrices]
        if self.pattern is not None:
            most, of = map(int, self.pattern.split(":"))
            parts = zip(scores.split(sizes), matrices, strict=True)
            return [_neighbours(part.view_as(matrix), most, of) for part, matrix in parts]
        pool = self.pool_of[name]
        with self._lock:  # several modules may be read at once
            if pool not in self._thresholds:
                self._thresholds[pool] = self.threshold(pool)
        mask = self._thresholds[pool].mask(name, scores)
        return [part.view_as(matrix) for part, matrix in zip(mask.split(sizes), matrices, strict=True)]

    def threshold(self, pool: tuple[str, ...]) -> Pooled:
        """What tells the entries of a scope that stay."""
        kept = round((self.density or 0) * self.entries(pool))
        return pooled(pool, lambda name: self.scores(name, self.matrices(self.factors(name))), kept)

    def read(self, name: str) -> Factors:
        """One pruned module."""
        factors = self.factors(name)
        matrices = self.matrices(factors)
        if not all(is_finite(matrix) for matrix in matrices):
            raise ValueError(f"{name}: NaN or infinite entries have no order to prune by")
        stays = self.stays(name, matrices)
        self.record["kept"][name] = sum(int(mask.sum()) for mask in stays)
        pruned = [matrix.masked_fill(~mask, 0) for matrix, mask in zip(matrices, stays, strict=True)]
        if self.space != "delta":
            return replace(factors, B=pruned[0], A=pruned[1])
        cut, error = refactor(pruned[0], self.shape(name).rank, factors.baked(), name)
        note(self.record, name, error, cut)
        return cut


def _neighbours(scores: Tensor, most: int, of: int) -> Tensor:
    """Where the ``most`` largest of every ``of`` neighbours along a row are; of equal ones the first."""
    rows, length = scores.shape
    padded = torch.nn.functional.pad(scores, (0, -length % of), value=-1.0).view(rows, -1, of)
    place = padded.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (place < most).view(rows, -1)[:, :length]
