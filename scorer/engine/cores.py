"""All cores at work on a CPU: each has pieces of its own, in place of a share of every operation.

Where operations are split, the faster core waits for the slower one after each of them, thousands of times a second,
and small ones gain nothing. With pieces of its own a core waits once, at the end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_making = threading.Lock()


def side_by_side(compute: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """The results of all pieces, in order, each computed by one core: as many at a time as torch has threads here.

    Gradient and inference modes are those of a new thread: `compute` sets its own. Inside of another's piece there is
    but one core.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [compute(piece) for piece in pieces]
    with _making:
        pool = _pool(threads)
    return list(pool.map(compute, pieces))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """As many threads, whose operations each keep to one core.

    What torch is told there becomes the number for every thread that begins later, so it is told the old one again.
    """
    pool = ThreadPoolExecutor(threads, "pass", initializer=_keep_to_one_core)
    all_began = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(all_began.wait)
    all_began.wait()
    torch.set_num_threads(threads)
    return pool


def _keep_to_one_core() -> None:
    """For this thread."""
    torch.get_num_threads()  # or else its first operation asks, and forgets what was set
    torch.set_num_threads(1)


def _forget_pools() -> None:
    """In a process that was forked there are no threads of the old one."""
    global _making  # noqa: PLW0603 - another thread of the old process may have held it
    _making = threading.Lock()
    _pool.cache_clear()


os.register_at_fork(after_in_child=_forget_pools)
