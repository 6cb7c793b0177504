"""Products while a CUDA graph is captured: CuPy refuses them, so cuBLAS is called by a handle of our own.

CuPy's binding raises ``NotImplementedError`` during a capture (github.com/cupy/cupy/issues/6290), since a handle that
allocates its workspace by itself cannot be captured. Ours has a workspace from CuPy's pool, given to it before every
product: ``cublasSetStream`` takes it away. Source: cuBLAS documentation, sections 2.1.4, 2.4.7 and 2.4.8.

A graph writes to the workspace of the stream that it was captured on whenever it is launched, so that graphs of one stream are
to be launched one after another; graphs captured on different streams may run at the same time.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_longlong, c_size_t, c_void_p
from functools import cache
from threading import get_ident
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

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
    """A handle of cuBLAS on one device in one thread, with a workspace for each stream for as long as the stream lives."""

    library: Any
    address: int
    workspaces: WeakKeyDictionary[Any, Array]

    def workspace(self, stream: Any) -> Array:
        """The workspace for a stream: the address of one that is gone may return, and graphs may still use its memory."""
        if stream not in self.workspaces:
            self.workspaces[stream] = memory.fresh((WORKSPACE,), "uint8")
        return self.workspaces[stream]


def gemm(*arguments: int) -> Array:
    """``gemmStridedBatchedEx`` with the arguments of CuPy's binding, the handle left out, on the current stream.

    Returns
    -------
    cupy.ndarray
        The workspace, to be kept for as long as the graph.

    Raises
    ------
    RuntimeError
        If cuBLAS is not found, or reports an error.
    """
    stream = library.cupy().cuda.get_current_stream()
    found = _here()
    own, space = found.library, found.workspace(stream)
    _checked(own.cublasSetStream_v2(found.address, stream.ptr), "cublasSetStream")
    _checked(own.cublasSetWorkspace_v2(found.address, space.data.ptr, space.nbytes), "cublasSetWorkspace")
    _checked(own.cublasGemmStridedBatchedEx(found.address, *arguments), "cublasGemmStridedBatchedEx")
    return space


def prepare() -> None:
    """Make the handle of the current device and thread: to be called before a capture, where it may not be possible.

    Raises
    ------
    RuntimeError
        If cuBLAS is not found, or makes no handle.
    """
    _here()


def _here() -> Handle:
    return handle(library.cupy().cuda.runtime.getDevice(), get_ident())


@cache
def handle(device: int, thread: int) -> Handle:  # noqa: ARG001 (the key: stream and workspace are set on a handle in steps)
    """The handle of the current device and thread, made at its first use and kept."""
    own = _library()
    own.cublasCreate_v2.argtypes = [c_void_p]
    own.cublasSetStream_v2.argtypes = [c_void_p, c_void_p]
    own.cublasSetWorkspace_v2.argtypes = [c_void_p, c_void_p, c_size_t]
    own.cublasGemmStridedBatchedEx.argtypes = GEMM
    address = c_void_p()
    what = "cublasCreate (structmat.backends.cupy.capture.prepare() makes the handle before a capture begins)"
    _checked(own.cublasCreate_v2(ctypes.byref(address)), what)
    return Handle(own, address.value or 0, WeakKeyDictionary())


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
