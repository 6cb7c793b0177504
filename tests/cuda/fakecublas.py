"""cuBLAS for the stand-in: ``gemmStridedBatchedEx`` on raw pointers of host memory, byte by byte as the library reads them.

Column-major semantics, BLAS's own checks of leading dimensions, the combinations of types that exist, and what a GPU does
not report: every address must lie in one live allocation, and the results of a batch must not overlap.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import weakref

import ml_dtypes
import numpy as np

TYPES = {
    2: np.dtype(np.float16),
    14: np.dtype(ml_dtypes.bfloat16),
    0: np.dtype(np.float32),
    1: np.dtype(np.float64),
    4: np.dtype(np.complex64),
    5: np.dtype(np.complex128),
}
COMPUTE_32F, COMPUTE_32F_FAST_TF32, COMPUTE_64F = 68, 77, 70
ALLOWED = {(2, 68), (14, 68), (0, 68), (0, 77), (4, 68), (4, 77), (1, 70), (5, 70)}
OWN = 77  # the handle that the library of the stand-in gives away
SCALARS = {68: np.float32, 77: np.float32, 70: np.float64}


class CUBLASError(RuntimeError):
    """As in CuPy."""


def whole(array):
    """The allocation that a NumPy array is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


class Allocations:
    """The live allocations, to find the one that an address belongs to."""

    def __init__(self):
        self.starts, self.owners = [], {}

    def add(self, array, device=0):
        array = whole(array)
        start = array.__array_interface__["data"][0]
        known = self.owners.get(start)
        if array.nbytes and (known is None or known[0]() is not array):
            if known is None:
                bisect.insort(self.starts, start)
            owner = weakref.ref(array, lambda ref: self._forget(start, ref))
            self.owners[start] = owner, start + array.nbytes, device

    def _forget(self, start, ref):
        if self.owners.get(start, (None,))[0] is ref:
            del self.owners[start]
            self.starts.pop(bisect.bisect_left(self.starts, start))

    def check(self, address, size, what):
        place = bisect.bisect_right(self.starts, address) - 1
        if place < 0 or address + size > self.owners[self.starts[place]][1]:
            raise MemoryError(f"illegal address: {what} touches {size} bytes at {address:#x}, outside any allocation")
        if state["graph"] is not None:
            state["graph"].append((self.owners[self.starts[place]][0], what))

    def device(self, address):
        """The device that an address belongs to."""
        return self.owners[self.starts[bisect.bisect_right(self.starts, address) - 1]][2]


allocations = Allocations()
log = []  # one entry per call: (m, n, k, batch, stream)
state = {"capturing": False, "stream": 0, "graph": None}


def _scalar(address, dtype):
    return np.frombuffer((ctypes.c_char * np.dtype(dtype).itemsize).from_address(address), dtype)[0]


def _view(address, rows, cols, ld, stride, batch, dtype, what):
    """``batch`` column-major matrices as an array ``(batch, rows, cols)``."""
    if ld < max(1, rows):
        raise CUBLASError(f"CUBLAS_STATUS_INVALID_VALUE: leading dimension {ld} of {what} for {rows} rows")
    if address % dtype.itemsize:
        raise CUBLASError(f"misaligned address of {what}")
    if stride < 0 or min(rows, cols, batch) == 0:
        raise CUBLASError(f"{what}: stride {stride}, sizes {(rows, cols, batch)}")
    size = dtype.itemsize
    extent = ((batch - 1) * stride + (cols - 1) * ld + rows) * size
    allocations.check(address, extent, what)
    buffer = (ctypes.c_char * extent).from_address(address)
    return np.ndarray((batch, rows, cols), dtype, buffer, strides=(stride * size, size, ld * size))


def _tf32(x):
    """Rounded to 10 bits of mantissa, as tensor cores take float32."""
    parts = np.ascontiguousarray(x).view(np.float32)
    bits = parts.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x0FFF + ((bits >> 13) & 1)) & 0xFFFFE000).astype(np.uint32)
    return rounded.view(np.float32).view(x.dtype)


def gemmStridedBatchedEx(
    handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB,
    beta, C, Ctype, ldc, strideC, batch, compute, algo,
):  # fmt: skip
    if state["capturing"] and handle != OWN:
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    if transa not in (0, 1) or transb not in (0, 1) or not Atype == Btype == Ctype or (Ctype, compute) not in ALLOWED:
        raise CUBLASError(
            f"CUBLAS_STATUS_NOT_SUPPORTED: flags {transa, transb}, types {Atype, Btype, Ctype}, {compute}"
        )
    if max(m, n, k, lda, ldb, ldc, batch) >= 1 << 31 or handle == 0:
        raise CUBLASError("CUBLAS_STATUS_INVALID_VALUE")
    dtype = TYPES[Ctype]
    scalar = dtype if dtype.kind == "c" else SCALARS[compute]
    a = _view(A, *((k, m) if transa else (m, k)), lda, strideA, batch, dtype, "A")
    b = _view(B, *((n, k) if transb else (k, n)), ldb, strideB, batch, dtype, "B")
    c = _view(C, m, n, ldc, strideC, batch, dtype, "C")
    devices = {allocations.device(address) for address in (A, B, C)} | ({handle - 1} if handle != OWN else set())
    if len(devices) > 1:
        raise MemoryError(f"illegal address: operands and handle are of the devices {sorted(devices)}")
    if batch > 1:
        ends = sorted((i * strideC + j * ldc) for i in range(batch) for j in range(n))
        if any(y - x < m for x, y in itertools.pairwise(ends)):
            raise CUBLASError("results of the batch overlap")
    inner = dtype if dtype.kind == "c" else np.dtype(SCALARS[compute])
    left, right = ((x.swapaxes(1, 2) if flag else x).astype(inner) for x, flag in ((a, transa), (b, transb)))
    if compute == COMPUTE_32F_FAST_TF32:
        left, right = _tf32(left), _tf32(right)
    factor = _scalar(beta, scalar)
    with np.errstate(all="ignore"):  # a GPU does not warn
        made = _scalar(alpha, scalar) * (left @ right)
        c[...] = (made + factor * c.astype(inner) if factor else made).astype(dtype)
    log.append((m, n, k, batch, state["stream"]))
