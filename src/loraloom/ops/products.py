"""Updates that are never dense as a whole: what stands for a stack of them, and work by blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, Union

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.stream import ahead

R = TypeVar("R")
T = TypeVar("T")

_BLOCK = 1 << 18  # entries of one update at a time: the blocks of a few updates stay in the cache


@dataclass(frozen=True, eq=False)
class Product:
    """An update ``B @ A`` that is formed a block of rows at a time; like a dense matrix, but only rows can be taken.

    Attributes:
        B: out x r.
        A: r x in.

    Example:
        >>> product = Product(torch.ones(3, 1), torch.tensor([[1.0, 2.0]]))
        >>> product.shape, product[:2], product.every(4)
        (torch.Size([3, 2]), tensor([[1., 2.],
                [1., 2.]]), tensor([1., 1.]))
    """

    B: Float[Tensor, "out r"]
    A: Float[Tensor, "r in"]

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return torch.Size((self.B.shape[0], self.A.shape[1]))

    def numel(self) -> int:
        """Number of entries."""
        return self.shape.numel()

    def __getitem__(self, rows: slice) -> Tensor:
        return self.B[rows] @ self.A

    def every(self, step: int) -> Float[Tensor, " n"]:
        """Every so many entries, flat, from the first one on (to the last bit they may differ from those of rows)."""
        index = torch.arange(0, self.numel(), step, device=self.B.device)
        width = self.shape[1]
        return (self.B[index // width] * self.A.T[index % width]).sum(dim=1)


@dataclass(frozen=True, eq=False)
class Products:
    """What stands for the stack of some updates: the same length, items and type, without the memory.

    Example:
        >>> updates = Products([Product(torch.ones(3, 1), torch.ones(1, 2))])
        >>> len(updates), [update.shape for update in updates]
        (1, [torch.Size([3, 2])])
    """

    parts: Sequence[Product]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        return self.parts[0].B.dtype

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.parts[0].B.device

    def numel(self) -> int:
        """Number of entries of all updates."""
        return sum(part.numel() for part in self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Product]:
        return iter(self.parts)

    def __getitem__(self, at: int) -> Product:
        return self.parts[at]


Update = Union[Float[Tensor, " *shape"], Product]  # noqa: UP007 - jaxtyping's types know no |
Updates = Union[Float[Tensor, " k *shape"], Products]  # noqa: UP007


def as_rows(update: Update) -> Update:
    """The update as a matrix, so that blocks of rows can be taken: all but the last dimension are one.

    Example:
        >>> as_rows(torch.ones(2, 3, 4)).shape
        torch.Size([6, 4])
    """
    if isinstance(update, Product) or update.ndim == 2:
        return update
    return update.reshape(-1, update.shape[-1] if update.ndim else 1)


def blocks_of(matrix: Update) -> list[slice]:
    """Which rows of a matrix are looked at together; a function of its sizes alone.

    Example:
        >>> blocks_of(torch.ones(400, 1000))
        [slice(0, 262, None), slice(262, 400, None)]
    """
    height, width = matrix.shape
    step = max(1, _BLOCK // max(width, 1))
    return [slice(start, min(start + step, height)) for start in range(0, height, step)]


def each_block(matrix: Update, make: Callable[[slice], R]) -> list[R]:
    """What is made of every block of rows of a matrix, in order.

    Example:
        >>> each_block(torch.ones(2, 3), lambda rows: (rows.start, rows.stop))
        [(0, 2)]
    """
    return _several(blocks_of(matrix), make, matrix)


def each_update(updates: Updates, make: Callable[[Update], R]) -> list[R]:
    """What is made of every update, in order.

    Example:
        >>> each_update(torch.ones(2, 3), lambda update: update.numel())
        [3, 3]
    """
    return _several(list(updates), make, updates[0])


def _several(items: Sequence[T], make: Callable[[T], R], like: Update) -> list[R]:
    """On a CPU several at once, by a thread each: threads that share one operation wait for each other at its end."""
    held = like.B if isinstance(like, Product) else like
    threads = torch.get_num_threads() if held.device.type == "cpu" and not held.requires_grad else 1
    if min(threads, len(items)) <= 1 or like.numel() <= _BLOCK:
        return [make(item) for item in items]
    return [made for _, made in ahead(make, items, workers=threads, depth=2 * threads)]
