"""Arrays that begin at a line of the cache, so that no aligned vector of theirs lies across two."""

from __future__ import annotations

import math

import numpy as np

LINE = 64  # bytes


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new C-contiguous array, values undefined, a view of one with some room in front."""
    size = math.prod(shape)
    room = np.empty(size + LINE // dtype.itemsize, dtype)
    start = -room.ctypes.data % LINE // dtype.itemsize
    return room[start : start + size].reshape(shape)


def copy(values: np.ndarray) -> np.ndarray:
    """A C-contiguous copy."""
    copied = empty(values.shape, values.dtype)
    copied[...] = values
    return copied
