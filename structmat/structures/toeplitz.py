"""Toeplitz and Circulant: constant along diagonals, applied by the fast Fourier transform."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.operator import Operator
from structmat.structures.chain import check_size
from structmat.structures.diagonal import square_size


class Toeplitz(Operator):
    """Toeplitz matrix ``T[i, j] = column[i - j]`` for ``i >= j`` and ``row[j - i]`` above; as ``scipy.linalg.toeplitz``.

    Embedded in a circulant matrix and applied by FFT (Golub and Van Loan, Matrix Computations, 4th ed., section 4.8). The
    transpose exchanges column and row; the adjoint conjugates both.

    Parameters
    ----------
    column
        ``(m,)``, the first column.
    row
        ``(n,)``, the first row, whose first entry is ignored; default the column, conjugated if it is complex (Hermitian).

    Raises
    ------
    ValueError
        If either is empty or has more than one dimension.

    Notes
    -----
    ``m + n`` stored numbers; about ``15 L log2 L`` flops per column with ``L = m + n - 1``. One NaN in ``x`` spreads over
    its whole column of the result.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.Toeplitz([1.0, 2.0, 3.0], [1.0, 5.0]).to_dense().round(12).tolist()
    [[1.0, 5.0], [2.0, 1.0], [3.0, 2.0]]
    """

    __slots__ = ("column", "row")
    fields = ("column", "row")
    column: Array
    row: Array

    def __init__(self, column: Any, row: Any = None) -> None:
        column = _vector(column, "Toeplitz column")
        row = (
            (column.conj() if arrays.is_complex(column.dtype) else column)
            if row is None
            else _vector(row, "Toeplitz row")
        )
        kind, device = arrays.common((column, row), "Toeplitz")
        shape = (column.shape[0], row.shape[0])
        self._init(shape, arrays.promote(column.dtype, row.dtype), kind, device, column=column, row=row)

    def _matmat(self, x: Array) -> Array:
        m, n = self.shape
        xp, dtype = arrays.namespace(self.column), self.dtype
        column, row = arrays.cast(self.column, dtype), arrays.cast(self.row, dtype)
        size = fast_size(m + n - 1)
        gap = xp.zeros((size - m - n + 1,), dtype=dtype, device=arrays.device(column))
        circulant = xp.concat((column, gap, xp.flip(row[1:], axis=0)))
        return convolve(circulant, x, size)[..., :m, :]

    def _transpose(self) -> Operator:
        xp = arrays.namespace(self.row)
        dtype = self.dtype
        corner = arrays.cast(self.column[:1], dtype)
        return Toeplitz(xp.concat((corner, arrays.cast(self.row[1:], dtype))), self.column)

    def _flops(self) -> int:
        return fft_flops(fast_size(sum(self.shape) - 1))

    @classmethod
    def random(cls, shape: tuple[int, int], *, dtype: DType = float, rng: Any = None) -> Toeplitz:
        """A random Toeplitz matrix with independent normal diagonals, scaled so that ``A x`` has the variance of ``x``.

        Examples
        --------
        >>> import structmat as sm
        >>> sm.Toeplitz.random((5, 3), rng=0).shape
        (5, 3)
        """
        m, n = check_size(shape)
        rng = np.random.default_rng(rng)
        return cls(*(arrays.random((size,), dtype, rng, max(n, 1) ** -0.5) for size in (m, n)))


class Circulant(Operator):
    """Circulant matrix ``C[i, j] = column[(i - j) mod n]``: circular convolution, ``C = F^-1 diag(F column) F``.

    The transpose is the circulant of the reversed column. Source: Golub and Van Loan, section 4.8.2.

    Parameters
    ----------
    column
        ``(n,)``, the first column.

    Notes
    -----
    ``n`` stored numbers; about ``15 n log2 n`` flops per column. One NaN in ``x`` spreads over its whole column of the
    result.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.Circulant([1.0, 2.0, 3.0]).to_dense().round(12).tolist()
    [[1.0, 3.0, 2.0], [2.0, 1.0, 3.0], [3.0, 2.0, 1.0]]
    """

    __slots__ = ("column",)
    fields = ("column",)
    column: Array

    def __init__(self, column: Any) -> None:
        column = _vector(column, "Circulant")
        n = column.shape[0]
        self._init((n, n), column.dtype, arrays.kind(column), arrays.device(column), column=column)

    def _matmat(self, x: Array) -> Array:
        return convolve(self.column, x, self.shape[0])

    def _transpose(self) -> Operator:
        xp = arrays.namespace(self.column)
        return Circulant(xp.concat((self.column[:1], xp.flip(self.column[1:], axis=0))))

    def _flops(self) -> int:
        return fft_flops(self.shape[0])

    @classmethod
    def random(cls, shape: int | tuple[int, int], *, dtype: DType = float, rng: Any = None) -> Circulant:
        """A random circulant matrix, scaled so that ``A x`` has the variance of ``x``.

        Examples
        --------
        >>> import structmat as sm
        >>> sm.Circulant.random((5, 5), rng=0).nparams
        5
        """
        n = square_size(shape, "Circulant")
        return cls(arrays.random((n,), dtype, rng, max(n, 1) ** -0.5))


def convolve(kernel: Array, x: Array, size: int) -> Array:
    """Circular convolution of length ``size`` of ``kernel (size,)`` with every column of ``x (..., n, k)``, padded."""
    xp = arrays.namespace(kernel)
    dtype = arrays.promote(kernel.dtype, x.dtype)
    kernel, x = arrays.cast(kernel, dtype), arrays.cast(x, dtype)
    if 0 in tuple(x.shape):  # not every FFT takes empty arrays
        return xp.zeros((*x.shape[:-2], size, x.shape[-1]), dtype=dtype, device=arrays.device(x))
    if arrays.is_complex(dtype):
        product = xp.fft.fft(kernel)[:, None] * xp.fft.fft(x, n=size, axis=-2)
        return arrays.cast(xp.fft.ifft(product, axis=-2), dtype)
    product = xp.fft.rfft(kernel)[:, None] * xp.fft.rfft(x, n=size, axis=-2)
    return arrays.cast(xp.fft.irfft(product, n=size, axis=-2), dtype)


def fast_size(n: int) -> int:
    """The smallest size of at least ``n`` without prime factors above 5."""
    best = 2 ** math.ceil(math.log2(max(n, 1)))
    for five in range(9):
        for three in range(12):
            base = 5**five * 3**three
            if base < best:
                best = min(best, base * 2 ** max(0, math.ceil(math.log2(n / base))))
    return best


def fft_flops(n: int) -> int:
    """Flops of three FFTs of length ``n`` and a product: ``5 n log2 n`` each (Cooley and Tukey 1965)."""
    return int(15 * n * max(1.0, math.log2(max(n, 1)))) + 6 * n


def _vector(x: Any, what: str) -> Array:
    x = arrays.values(x, what, 1)
    if x.ndim != 1 or x.shape[0] == 0:
        raise ValueError(f"{what}: expected one dimension with at least one entry, got shape {tuple(x.shape)}")
    return x
