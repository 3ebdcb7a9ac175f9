"""Reading ahead: the next few results are made in other threads while the last one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def ahead(make: Callable[[T], R], items: Iterable[T], *, workers: int = 2, depth: int = 2) -> Iterator[tuple[T, R]]:
    """Each item with what is made of it, in order; up to ``depth`` are made beforehand.

    Threads that make results compute with one torch thread each: several small products side by side are faster than
    one after the other on all cores, and the threads of the caller are left as they are.

    An error is raised where its item would have come; no thread is left behind, and nothing more is begun.

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
