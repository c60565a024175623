"""Results of a pool of threads or processes, in order, without submitting everything at once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Executor
from typing import Any


def pool_size(workers: int) -> int:
    """How many workers to start: 0 stands for one per core."""
    return workers or os.cpu_count() or 1


def known_length(items: Iterable[Any]) -> int | None:
    """The number of items, where it is known without iterating."""
    return len(items) if isinstance(items, Sized) else None


def in_order(pool: Executor, function: Callable, items: Iterable[Any], *, ahead: int) -> Iterator[Any]:
    """The results of a function in the order of the items.

    Items are taken from the iterable as workers become free: at most 2 x `ahead` are submitted and not yet returned.
    """
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
