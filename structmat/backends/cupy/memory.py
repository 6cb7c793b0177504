"""Arrays on the device: how they lie in memory, and what is said when there is no room."""

from __future__ import annotations

from collections.abc import Iterable
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


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return library.cupy().cuda.get_current_stream().is_capturing()


def uncaptured() -> None:
    """``RuntimeError`` during a capture: what is made only once, to be kept, would not be there before the graph runs."""
    if capturing():
        raise RuntimeError(
            "the first application of an operator makes arrays that are kept, which cannot be captured into a CUDA graph; "
            "apply it once, to an operand of the same dtype and shape, before the capture begins"
        )


def ready(made: Iterable[Array], given: Iterable[Array]) -> tuple[Array, ...]:
    """Arrays to be kept: what was not given but made here is finished, since it may be read on any stream from now on.

    Parameters
    ----------
    made
        What is to be kept: arrays that were given, views of them, or new ones, made on the current stream.
    given
        The caller's arrays.

    Raises
    ------
    RuntimeError
        During the capture of a CUDA graph, if one of them is new.
    """
    found, known = tuple(made), {x.data.ptr for x in given}
    if any(x.size and x.data.ptr not in known for x in found):
        uncaptured()
        library.cupy().cuda.get_current_stream().synchronize()
    return found


def fresh(shape: tuple[int, ...], dtype: Any) -> Array:
    """A new array from the memory pool, values undefined."""
    return library.cupy().empty(shape, dtype)
