"""Diagonal, Identity and Zero."""

from __future__ import annotations

from typing import Any

import numpy as np

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.operator import Operator


class Diagonal(Operator):
    """A diagonal matrix, ``(A x)_i = v_i x_i``; adjoint ``diag(conj(v))``.

    Parameters
    ----------
    values
        ``(*batch, n)``, floating or complex.

    Notes
    -----
    ``n`` stored numbers and ``n`` flops per column.

    Examples
    --------
    >>> import structmat as sm
    >>> (sm.Diagonal([1.0, 2.0, 3.0]) @ [1.0, 1.0, 1.0]).tolist()
    [1.0, 2.0, 3.0]
    """

    __slots__ = ("values",)
    fields = ("values",)
    values: Array

    def __init__(self, values: Any) -> None:
        values = arrays.values(values, "Diagonal", 1)
        shape = (*values.shape, values.shape[-1])
        self._init(shape, values.dtype, arrays.kind(values), arrays.device(values), values=values)

    def _matmat(self, x: Array) -> Array:
        return self.values[..., None] * x

    def _rows(self, x: Array) -> Array:
        return x * self.values[..., None, :]

    def _transpose(self) -> Operator:
        return self

    def _flops(self) -> int:
        return self.shape[-1]

    @classmethod
    def random(cls, shape: int | tuple[int, int], *, dtype: DType = float, rng: Any = None) -> Diagonal:
        """A random diagonal with independent standard normal entries.

        Examples
        --------
        >>> import structmat as sm
        >>> sm.Diagonal.random((3, 3), rng=0).nparams
        3
        """
        return cls(arrays.random((square_size(shape, "Diagonal"),), dtype, rng))


class Identity(Operator):
    """The identity of size ``n``. It holds no array and so meets arrays of every library.

    Parameters
    ----------
    n
        Size.
    dtype
        Takes part in promotion: a float64 identity times a float32 array is float64, as ``numpy.eye(n) @ x`` is.

    Examples
    --------
    >>> import structmat as sm
    >>> A = sm.Monarch.random((6, 6), rng=0)
    >>> sm.Identity(6) @ A is A
    True
    """

    __slots__ = ("n",)
    fields = ("n", "dtype")
    n: int

    def __init__(self, n: int, dtype: DType = float) -> None:
        n = _size(n, "Identity")
        self._init((n, n), _inexact(dtype, "Identity"), None, None, n=n)

    def _matmat(self, x: Array) -> Array:
        y = arrays.cast(x, result_dtype(self, x))
        return arrays.copy(x) if y is x else y

    _rows = _matmat

    def _transpose(self) -> Operator:
        return self

    def _conj(self) -> Operator:
        return self

    def _flops(self) -> int:
        return 0

    def _cast(self, dtype: DType) -> Operator:
        return Identity(self.n, dtype)

    def _moved(self, library: str, device: Any) -> Operator:  # noqa: ARG002  (there is nothing on a device)
        return Identity(self.n, arrays.dtype_for(self.dtype, library))

    @classmethod
    def random(cls, shape: int | tuple[int, int], *, dtype: DType = float, rng: Any = None) -> Identity:
        """The identity: there is nothing random about it (``rng`` is accepted for uniformity).

        Examples
        --------
        >>> import structmat as sm
        >>> sm.Identity.random((3, 3)).shape
        (3, 3)
        """
        return cls(square_size(shape, "Identity"), dtype)


class Zero(Operator):
    """The zero matrix of a shape. It holds no array and so meets arrays of every library.

    Parameters
    ----------
    shape
        ``(m, n)``.
    dtype
        Takes part in promotion.

    Examples
    --------
    >>> import structmat as sm
    >>> (sm.Zero((2, 3)) @ [1.0, 2.0, 3.0]).tolist()
    [0.0, 0.0]
    """

    __slots__ = ()
    fields = ("shape", "dtype")

    def __init__(self, shape: tuple[int, ...], dtype: DType = float) -> None:
        shape = tuple(_size(s, "Zero") for s in shape)
        if len(shape) < 2:
            raise ValueError(f"Zero: expected a shape (m, n), got {shape}")
        self._init(shape, _inexact(dtype, "Zero"), None, None)

    def _matmat(self, x: Array) -> Array:
        xp, lead = arrays.namespace(x), np.broadcast_shapes(self.batch_shape, tuple(x.shape[:-2]))
        dtype = result_dtype(self, x)
        return xp.zeros((*lead, self.shape[-2], x.shape[-1]), dtype=dtype, device=arrays.device(x))

    def _transpose(self) -> Operator:
        return Zero((*self.batch_shape, self.shape[-1], self.shape[-2]), self.dtype)

    def _conj(self) -> Operator:
        return self

    def _flops(self) -> int:
        return 0

    def _cast(self, dtype: DType) -> Operator:
        return Zero(self.shape, dtype)

    def _moved(self, library: str, device: Any) -> Operator:  # noqa: ARG002  (there is nothing on a device)
        return Zero(self.shape, arrays.dtype_for(self.dtype, library))

    @classmethod
    def random(cls, shape: tuple[int, int], *, dtype: DType = float, rng: Any = None) -> Zero:
        """The zero matrix: there is nothing random about it (``rng`` is accepted for uniformity).

        Examples
        --------
        >>> import structmat as sm
        >>> sm.Zero.random((3, 2)).shape
        (3, 2)
        """
        return cls(tuple(shape), dtype)


def result_dtype(operator: Operator, x: Array) -> DType:
    """Dtype of the result where the operator holds no array that would promote by itself."""
    return arrays.dtype_for(arrays.promote(operator.dtype, x.dtype), arrays.kind(x))


def square_size(shape: int | tuple[int, int], what: str) -> int:
    """The one size of a square shape; ``ValueError`` if it is not square."""
    m, n = (shape, shape) if isinstance(shape, int) else shape
    if m != n:
        raise ValueError(f"{what}: expected a square shape, got {(m, n)}")
    return m


def _size(n: int, what: str) -> int:
    if int(n) != n or n < 0:
        raise ValueError(f"{what}: expected a size of at least 0, got {n}")
    return int(n)


def _inexact(dtype: DType, what: str) -> DType:
    dtype = arrays.as_dtype(dtype)
    if not arrays.is_inexact(dtype):
        raise TypeError(f"{what}: expected a floating or complex dtype, got {dtype}")
    return dtype
