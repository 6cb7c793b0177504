"""Threads and workspaces: the batch is split over Python threads, which compiled code lets run side by side.

The number of threads is Numba's (``numba.set_num_threads``, ``NUMBA_NUM_THREADS``). No kernel calls BLAS, so nothing is
oversubscribed. Each thread has a workspace of its own, kept from one call to the next.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from numba.core import config
from numba.np.ufunc import parallel

from structmat.backends.numba.memory import empty

_settings: Any = config

KEPT_BYTES = 1 << 27  # a larger workspace is given back after the call
SERIAL_SECONDS = 1.5e-4  # predicted work below which a second thread costs more than it saves

_pool: tuple[int, ThreadPoolExecutor] | None = None
_lock = threading.Lock()


class Scratch(threading.local):
    """The calling thread's scratch array of one dtype, aligned to a cache line; grown when more is needed, then kept."""

    def __init__(self, dtype: np.dtype) -> None:
        self.kept = np.empty(0, dtype)

    def grow(self, elements: int) -> np.ndarray:
        """The array, of at least so many elements."""
        made = empty((max(elements, 4096),), self.kept.dtype)
        if made.nbytes <= KEPT_BYTES:
            self.kept = made
        return made

    @staticmethod
    def of(dtype: np.dtype) -> Scratch:
        """The one for float32 or for float64."""
        return _scratch[dtype.char]


_scratch = {char: Scratch(np.dtype(char)) for char in "fd"}


def workspace(dtype: np.dtype, elements: int) -> np.ndarray:
    """The calling thread's scratch array of at least so many elements."""
    scratch = Scratch.of(dtype)
    return scratch.kept if scratch.kept.size >= elements else scratch.grow(elements)


def get_num_threads() -> int:
    """Numba's number of threads, without starting its pool: that would change the number of threads of torch too."""
    return numba.get_num_threads() if parallel._is_initialized else _settings.NUMBA_NUM_THREADS


def split(part: Callable[[int, int], object], total: int, grain: int, seconds: float) -> None:
    """``part(start, stop)`` over ``0 .. total`` in as many pieces as there are threads, at multiples of ``grain``.

    Serial where the predicted ``seconds`` do not pay for a second thread, or where there is one piece only.
    """
    pieces = -(-total // grain)
    if seconds < SERIAL_SECONDS or pieces < 2 or (threads := min(get_num_threads(), pieces)) < 2:
        part(0, total)
        return
    bounds = [min(total, pieces * i // threads * grain) for i in range(threads + 1)]
    others: list[Future[object]] = []
    try:
        pool = _executor(threads - 1)
        first = pool.submit(part, bounds[1], bounds[2])
    except RuntimeError:  # the interpreter is about to end and starts no more threads
        part(0, total)
        return
    try:
        others.append(first)
        for i in range(2, threads):
            others.append(pool.submit(part, bounds[i], bounds[i + 1]))
        part(bounds[0], bounds[1])
    finally:  # the result must not be left while somebody still writes to it
        errors = [error for other in others if (error := other.exception()) is not None]
    if errors:
        raise errors[0]


def _executor(workers: int) -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None or _pool[0] < workers:  # a smaller one ends with its last caller
            _pool = workers, ThreadPoolExecutor(workers, thread_name_prefix="structmat")
        return _pool[1]


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
