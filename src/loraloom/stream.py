"""Reading when asked for, and ahead: the next few results are made in other threads while the last one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


class OnDemand(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for (not when one asks whether it is there) and not kept.

    Example:
        >>> held = OnDemand(["a"], lambda name: torch.ones(2))
        >>> list(held), held["a"]
        (['a'], tensor([1., 1.]))
    """

    def __init__(self, names: Collection[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def ahead(
    make: Callable[[T], R], items: Iterable[T], *, workers: int = 2, depth: int = 2
) -> Generator[tuple[T, R], None, None]:
    """Each item with what is made of it, in order; up to ``depth`` are made beforehand.

    Threads that make results compute with one torch thread each: several small products side by side are faster than
    one after the other on all cores. Torch takes that for all threads that begin meanwhile; at the end it is the
    caller's number for new ones again.

    An error is raised where its item would have come; no thread is left behind, and nothing more is begun. Close it
    (``contextlib.closing``) where the block that takes the results may fail: the garbage collector would wait for the
    threads in whatever thread it runs, and can wait for ever in one that is just being started.

    Args:
        make: called in other threads, several at once.
        items: in the order of the results.
        workers: threads.
        depth: how many results wait at most, the ones in the making included.

    Example:
        >>> list(ahead(lambda n: n * n, [1, 2, 3]))
        [(1, 1), (2, 4), (3, 9)]
    """
    waiting: deque[tuple[T, Future[R]]] = deque()
    rest = iter(items)
    try:
        with ThreadPoolExecutor(workers, "loraloom-ahead", torch.set_num_threads, (1,)) as pool:
            try:
                for item in rest:
                    waiting.append((item, pool.submit(make, item)))
                    if len(waiting) >= depth:
                        first, made = waiting.popleft()
                        yield first, made.result()
                while waiting:
                    first, made = waiting.popleft()
                    yield first, made.result()
            finally:
                for _, made in waiting:
                    made.cancel()
    finally:
        torch.set_num_threads(torch.get_num_threads())  # of threads that begin later: the pool's have set it to one
