"""Arrays on the device: how they lie in memory, and what is said when there is no room."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

from structmat.arrays import Array
from structmat.backends.cupy import library

ADVICE = (
    "nothing has been changed; cupy.get_default_memory_pool().free_all_blocks() and torch.cuda.empty_cache() give back what "
    "the two libraries keep for later, and fewer columns at a time need less room"
)
HERE = nullcontext()


def explained(what: str, error: MemoryError) -> MemoryError:
    """The error that says what helps where the device has no room; memory is allocated before anything is launched."""
    return MemoryError(f"{what}: the GPU is out of memory ({error}); {ADVICE}")


def device_of(x: Array) -> AbstractContextManager[Any]:
    """Work on the device of an array, whichever is current."""
    cuda = library.cupy().cuda
    return HERE if cuda.runtime.getDevice() == x.device.id else cuda.Device(x.device.id)


def strides(x: Array) -> tuple[int, ...] | None:
    """Strides in elements, none negative; ``None`` where an array has others."""
    size = x.dtype.itemsize
    found = tuple(0 if n == 1 else s // size for n, s in zip(x.shape, x.strides, strict=True))
    whole = all(n == 1 or (s >= 0 and s % size == 0) for n, s in zip(x.shape, x.strides, strict=True))
    return found if whole else None


def may_overlap(x: Array, y: Array) -> bool:
    """Whether the address ranges of two arrays meet."""
    (a, b), (c, d) = _bounds(x), _bounds(y)
    return a < d and c < b


def _bounds(x: Array) -> tuple[int, int]:
    start = stop = x.data.ptr
    if prod(x.shape) == 0:
        return start, start
    for n, stride in zip(x.shape, x.strides, strict=True):
        if stride < 0:
            start += (n - 1) * stride
        else:
            stop += (n - 1) * stride
    return start, stop + x.dtype.itemsize


def fresh(shape: tuple[int, ...], dtype: Any) -> Array:
    """A new array from the memory pool, values undefined."""
    return library.cupy().empty(shape, dtype)
