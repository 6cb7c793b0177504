"""Launches of our own kernels: compiled once for a device and kept, on CuPy's current stream, with exact argument widths."""

from __future__ import annotations

from functools import cache
from typing import Any

from structmat.arrays import Array
from structmat.backends.cuda.sources import Kernel, Launch, transpose_kernel, transpose_launch
from structmat.backends.cupy import library, memory
from structmat.patterns import Pattern

OPTIONS = ("-std=c++17",)
FREE_SHARED = 48 << 10  # bytes of dynamic shared memory that every launch may use


def launch(call: Launch) -> None:
    """Launch a kernel on the current stream of the current device; it can be captured into a CUDA graph.

    The first launch of a kernel on a device compiles it (about a second; CuPy keeps the result on disk), which is not
    possible during a capture: apply the operator once before.
    """
    kernel = call.kernel
    function = _function(library.cupy().cuda.runtime.getDevice(), kernel)
    function(call.grid, (kernel.threads, 1, 1), call.arguments, shared_mem=kernel.shared)


def exchanged(x: Array, pattern: Pattern) -> Array:
    """``x (n, k)``, rows in memory, with the digits of ``n = a c d`` in the order ``(a, d, c)``: one pass, rows again."""
    (n, k), size = x.shape, x.dtype.itemsize
    kernel = transpose_kernel(size)
    if kernel is None:
        raise ValueError(f"expected elements of 2, 4, 8 or 16 bytes, got {x.dtype}")
    y = memory.fresh((k, n), x.dtype)
    a, _, c, d = pattern
    stride = x.strides[1] // size if k > 1 else n
    launch(transpose_launch(kernel, x.data.ptr, y.data.ptr, k, a, c, d, stride, n))
    return y.T


@cache
def _function(device: int, kernel: Kernel) -> Any:  # noqa: ARG001 (a part of the key: modules belong to a device)
    """The compiled kernel on the current device."""
    module = library.cupy().RawModule(code=kernel.source, options=OPTIONS, name_expressions=[kernel.name])
    function = module.get_function(kernel.name)
    if kernel.shared > FREE_SHARED:
        function.max_dynamic_shared_size_bytes = kernel.shared
    return function
