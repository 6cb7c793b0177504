"""Kernels of our own for whole operators: which they take, what they cost, how they are launched.

Each takes rows of the operator's own dtype with unit stride along the index. What it cannot take, by its shape or because an
address or a stride is not a multiple of 16 bytes, is left to the products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from structmat.arrays import Array
from structmat.backends.base import ChainLayout
from structmat.backends.cuda import sources
from structmat.backends.cuda.roofline import Rates, Work, fused_work
from structmat.backends.cupy import library, memory
from structmat.backends.cupy.launch import launch
from structmat.patterns import AxisOrder

MANY = 1 << 12  # rows from which the choice of a tile no longer depends on their number
ROWS = 2**31 - 1  # of one launch
CAPABILITY = (8, 0)  # that the tensor-core instructions need


class FusedKernel:
    """What the kernels have in common: the operand's checks and the result's allocation.

    Parameters
    ----------
    m, n
        Shape of the operator.
    dtype
        Its dtype, and that of operand and result.
    weights
        Stored numbers.
    rates
        The device.
    """

    name = "fused"

    def __init__(self, m: int, n: int, dtype: np.dtype, weights: int, rates: Rates) -> None:
        self.m, self.n, self.dtype, self.weights, self.rates = m, n, dtype, weights, rates

    def kernel(self, k: int) -> sources.Kernel | None:
        """The kernel for ``k`` rows."""
        raise NotImplementedError

    def call(self, kernel: sources.Kernel, x: int, y: int, rows: int, x_stride: int) -> sources.Launch:
        """The launch for operand and result at these addresses."""
        raise NotImplementedError

    def work(self, k: int) -> Work | None:
        """What ``k`` rows cost; ``None`` where there is no kernel."""
        kernel = self.kernel(k)
        if kernel is None:
            return None
        size = self.dtype.itemsize
        tile = size * (min(k, kernel.rows) * (self.n + self.m / kernel.columns) + self.weights / kernel.columns)
        tiles = -(-k // kernel.rows) * kernel.columns
        return fused_work(self.m, self.n, k, size, self.products(), self.weights, tile, tiles, self.rates)

    def products(self) -> int:
        """Multiply-adds per row."""
        return self.weights

    def rows(self, x: Array) -> Array | None:
        """``x A^T`` for ``x (k, n)``; ``None``, and nothing done, where the kernel does not take it."""
        strides = memory.strides(x)
        k = x.shape[0]
        kernel = self.kernel(k)
        if kernel is None or strides is None or strides[1] != 1 or not 0 < k <= ROWS:
            return None
        if not sources.aligned(x.data.ptr, strides[0], self.dtype.name, k):
            return None
        with memory.device_of(x):
            try:
                y = memory.fresh((k, self.m), self.dtype)
            except MemoryError as error:
                raise memory.explained(f"product of {self.m} x {self.n} with {k} rows", error) from error
            launch(self.call(kernel, x.data.ptr, y.data.ptr, k, strides[0]))
        return y


class FusedChain(FusedKernel):
    """Two factors ``(1, S, K R, Q) (K, R Q, P, 1)``: Monarch, Block Tensor-Train, a merged butterfly; 16-bit types."""

    def __init__(self, layout: ChainLayout, blocks: Sequence[Array], rates: Rates, lanes: bool) -> None:
        self.left, self.right = memory.ready(map(_aligned, blocks), blocks)
        (_, s, depth, q), (k, _, p, _) = layout.patterns
        self.sizes, self.lanes = (k, p, q, s, depth // k), lanes
        super().__init__(layout.rows, layout.cols, self.left.dtype, self.left.size + self.right.size, rates)

    @classmethod
    def of(cls, layout: ChainLayout, blocks: Sequence[Array], rates: Rates) -> FusedChain | None:
        """The kernels of a chain, or ``None``: of one dtype, without a batch, not padded, in one of two output orders."""
        if len(blocks) != 2 or any(b.ndim != 4 or b.dtype != blocks[0].dtype for b in blocks) or layout.in_order:
            return None
        left, right = layout.patterns
        if left.a != 1 or right.d != 1 or 0 in (*left, *right) or left.c % right.a or right.b % left.d:
            return None
        contiguous = AxisOrder((left.b, left.d), (1, 0))
        if layout.out_order not in (None, contiguous) or (layout.rows, layout.cols) != (left.rows, right.cols):
            return None
        lanes = layout.out_order is None and left.b > 1 and left.d > 1
        k, p, q, s = right.a, right.c, left.d, left.b
        shared = rates.shared_bytes
        found = sources.monarch_kernel(blocks[0].dtype.name, k, p, q, s, left.c // k, lanes=lanes, shared=shared)
        return cls(layout, blocks, rates, lanes) if found else None

    def kernel(self, k: int) -> sources.Kernel | None:
        """The kernel for ``k`` rows."""
        rows = None if k >= MANY else 1 << (k - 1).bit_length()
        shared = self.rates.shared_bytes
        return sources.monarch_kernel(self.dtype.name, *self.sizes, lanes=self.lanes, rows=rows, shared=shared)

    def call(self, kernel: sources.Kernel, x: int, y: int, rows: int, x_stride: int) -> sources.Launch:
        """The launch for operand and result at these addresses."""
        return sources.monarch_launch(kernel, x, self.right.data.ptr, self.left.data.ptr, 0, y, rows, x_stride, self.m)


class FusedKron(FusedKernel):
    """A Kronecker product of two factors; 16-bit types."""

    def __init__(self, factors: Sequence[Array], rates: Rates) -> None:
        self.left, self.right = memory.ready(map(_aligned, factors), factors)
        (r, p), (s, q) = self.left.shape, self.right.shape
        self.sizes = r, p, s, q
        super().__init__(r * s, p * q, self.left.dtype, self.left.size + self.right.size, rates)

    @classmethod
    def of(cls, factors: Sequence[Array], rates: Rates) -> FusedKron | None:
        """The kernels of a product, or ``None``: two factors of one dtype without a batch."""
        if len(factors) != 2 or any(f.ndim != 2 or f.dtype != factors[0].dtype for f in factors):
            return None
        (r, p), (s, q) = factors[0].shape, factors[1].shape
        found = sources.kron_kernel(factors[0].dtype.name, r, p, s, q, shared=rates.shared_bytes)
        return cls(factors, rates) if found else None

    def kernel(self, k: int) -> sources.Kernel | None:  # noqa: ARG002 (one for all)
        """The kernel."""
        return sources.kron_kernel(self.dtype.name, *self.sizes, shared=self.rates.shared_bytes)

    def work(self, k: int) -> Work | None:
        """What ``k`` rows cost: the factors stay in the first-level cache of a persistent grid."""
        size = self.dtype.itemsize
        traffic = float(size * (k * (self.m + self.n) + self.weights))
        return Work(2.0 * self.products() * k, traffic, traffic, 1)

    def products(self) -> int:
        """Multiply-adds per row: the right factor first."""
        r, p, s, q = self.sizes
        return p * s * q + r * p * s

    def call(self, kernel: sources.Kernel, x: int, y: int, rows: int, x_stride: int) -> sources.Launch:
        """The launch for operand and result at these addresses."""
        left, right = self.left.data.ptr, self.right.data.ptr
        return sources.kron_launch(kernel, x, left, right, 0, y, rows, x_stride, self.m, self.rates.processors)


class FusedHadamard(FusedKernel):
    """A multiple of Sylvester's Hadamard matrix; float32 and 16-bit types."""

    def __init__(self, n: int, scale: float, dtype: np.dtype, rates: Rates) -> None:
        self.scale = scale
        super().__init__(n, n, dtype, 0, rates)

    @classmethod
    def of(cls, factors: Sequence[Array], rates: Rates) -> FusedHadamard | None:
        """The kernels of a Kronecker product of multiples of ``[[1, 1], [1, -1]]``, or ``None``; reads the factors."""
        dtype = factors[0].dtype
        if len(factors) < 2 or any(f.shape != (2, 2) or f.dtype != dtype for f in factors):
            return None
        if sources.hadamard_kernel(dtype.name, 1 << len(factors)) is None:
            return None
        memory.uncaptured()  # what is read here is not there during a capture
        values = library.cupy().stack(list(factors)).get().astype(np.float64)
        scales = values[:, 0, 0]
        if not np.array_equal(values, scales[:, None, None] * [[1.0, 1.0], [1.0, -1.0]]):
            return None
        return cls(1 << len(factors), math.prod(scales.tolist()), dtype, rates)

    def kernel(self, k: int) -> sources.Kernel | None:  # noqa: ARG002 (one for all)
        """The kernel."""
        return sources.hadamard_kernel(self.dtype.name, self.n)

    def work(self, k: int) -> Work | None:
        """What ``k`` rows cost: one reading and one writing, additions between."""
        traffic = float(2 * self.dtype.itemsize * k * self.n)
        return Work(float(k * self.n * int(math.log2(self.n))), traffic, traffic, 1)

    def call(self, kernel: sources.Kernel, x: int, y: int, rows: int, x_stride: int) -> sources.Launch:
        """The launch for operand and result at these addresses."""
        return sources.hadamard_launch(kernel, x, y, self.scale, rows, x_stride, self.m)


def _aligned(weights: Array) -> Array:
    """Contiguous weights at an address that the kernels can read; a copy of views that are not."""
    weights = library.cupy().ascontiguousarray(weights)
    return weights if sources.aligned(weights.data.ptr, 0, weights.dtype.name, 1) else weights.copy()
