"""Products while a CUDA graph is captured: CuPy refuses them, so cuBLAS is called by a handle of our own.

CuPy's binding raises ``NotImplementedError`` during a capture (github.com/cupy/cupy/issues/6290), since a handle that
allocates its workspace by itself cannot be captured. This one has a workspace from CuPy's pool, given to it before every
product: ``cublasSetStream`` takes it away. Source: cuBLAS documentation, sections 2.1.4, 2.4.7 and 2.4.8.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_longlong, c_size_t, c_void_p
from functools import cache
from typing import Any, NamedTuple

from structmat.arrays import Array
from structmat.backends.cupy import library, memory

WORKSPACE = 32 << 20  # bytes, as recommended for compute capability 9.0
LIBRARIES = ("libcublas.so.13", "libcublas.so.12", "cublas64_13.dll", "cublas64_12.dll")  # the one CuPy has loaded
GEMM = [
    c_void_p, c_int, c_int, c_int, c_int, c_int, c_void_p,  # handle, flags, m, n, k, alpha
    c_void_p, c_int, c_int, c_longlong, c_void_p, c_int, c_int, c_longlong, c_void_p,  # A and B: type, ld, stride; beta
    c_void_p, c_int, c_int, c_longlong, c_int, c_int, c_int,  # C; batch, compute type, algorithm
]  # fmt: skip


class Handle(NamedTuple):
    """A handle of cuBLAS on one device, with its workspace."""

    library: Any
    address: int
    workspace: Array


def gemm(*arguments: int) -> None:
    """``gemmStridedBatchedEx`` with the arguments of CuPy's binding, the handle left out, on the current stream.

    Raises
    ------
    RuntimeError
        If cuBLAS is not found, or reports an error.
    """
    cuda = library.cupy().cuda
    found = handle(cuda.runtime.getDevice())
    own = found.library
    _checked(own.cublasSetStream_v2(found.address, cuda.get_current_stream().ptr), "cublasSetStream")
    space = found.workspace
    _checked(own.cublasSetWorkspace_v2(found.address, space.data.ptr, space.nbytes), "cublasSetWorkspace")
    _checked(own.cublasGemmStridedBatchedEx(found.address, *arguments), "cublasGemmStridedBatchedEx")


def prepare() -> None:
    """Make the handle of the current device: to be called before a capture in which it would be made, and may not be.

    Raises
    ------
    RuntimeError
        If cuBLAS is not found, or makes no handle.
    """
    handle(library.cupy().cuda.runtime.getDevice())


@cache
def handle(device: int) -> Handle:  # noqa: ARG001 (a part of the key: handles belong to a device)
    """The handle of the current device, made at its first use and kept."""
    own = _library()
    own.cublasCreate_v2.argtypes = [c_void_p]
    own.cublasSetStream_v2.argtypes = [c_void_p, c_void_p]
    own.cublasSetWorkspace_v2.argtypes = [c_void_p, c_void_p, c_size_t]
    own.cublasGemmStridedBatchedEx.argtypes = GEMM
    address = c_void_p()
    what = "cublasCreate (structmat.backends.cupy.capture.prepare() makes the handle before a capture begins)"
    _checked(own.cublasCreate_v2(ctypes.byref(address)), what)
    return Handle(own, address.value or 0, memory.fresh((WORKSPACE,), "uint8"))


def _library() -> Any:
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(f"cuBLAS is none of {', '.join(LIBRARIES)}: products cannot be captured into a CUDA graph")


def _checked(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what} failed with status {status}")
