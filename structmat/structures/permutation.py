"""Permutation: rows in another order."""

from __future__ import annotations

from typing import Any

import numpy as np

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.operator import Operator
from structmat.structures.diagonal import _inexact, result_dtype, square_size


class Permutation(Operator):
    """A permutation matrix with ``Permutation(p) @ x == x[p]``; the transpose is the inverse, ``x[argsort(p)]``.

    Parameters
    ----------
    index
        Integers ``(n,)`` holding each of ``0..n-1`` once.
    dtype
        Takes part in promotion; the operator stores no values.

    Raises
    ------
    ValueError
        If ``index`` is not a permutation.
    TypeError
        If it does not hold integers.

    Examples
    --------
    >>> import structmat as sm
    >>> (sm.Permutation([2, 0, 1]) @ [10.0, 20.0, 30.0]).tolist()
    [30.0, 10.0, 20.0]
    """

    __slots__ = ("index",)
    fields = ("index", "dtype")
    index: Array

    def __init__(self, index: Any, dtype: DType = float) -> None:
        index = arrays.indices(index, "Permutation")
        n = index.shape[0]
        host = arrays.convert(index, "numpy")
        if n and (host.min() < 0 or host.max() >= n or (np.bincount(host, minlength=n) != 1).any()):
            raise ValueError(f"Permutation: expected each of 0..{n - 1} once")
        self._set_index(index, _inexact(dtype, "Permutation"))

    def _set_index(self, index: Array, dtype: DType) -> None:
        n, kind = index.shape[0], arrays.kind(index)
        numpy = kind == "numpy"  # a NumPy index works on the arrays of every library
        dtype = dtype if numpy else arrays.dtype_for(dtype, kind)
        self._init((n, n), dtype, None if numpy else kind, None if numpy else arrays.device(index), index=index)

    @classmethod
    def _rebuild(cls, *values: Any) -> Permutation:
        permutation = object.__new__(cls)
        permutation._set_index(*values)
        return permutation

    def _matmat(self, x: Array) -> Array:
        return arrays.cast(x[..., self.index, :], result_dtype(self, x))

    def _rows(self, x: Array) -> Array:
        return arrays.cast(x[..., self.index], result_dtype(self, x))

    def _transpose(self) -> Operator:
        if not isinstance(self.index, np.ndarray):
            return self._rebuild(self.index.argsort(), self.dtype)
        inverse = np.empty_like(self.index)
        inverse[self.index] = np.arange(self.index.shape[0], dtype=self.index.dtype)
        return self._rebuild(inverse, self.dtype)

    def _conj(self) -> Operator:
        return self

    def _flops(self) -> int:
        return 0

    def _cast(self, dtype: DType) -> Operator:
        return self._rebuild(self.index, dtype)

    def _moved(self, library: str, device: Any) -> Operator:
        return self._rebuild(arrays.convert(self.index, library, device), arrays.dtype_for(self.dtype, library))

    @classmethod
    def random(cls, shape: int | tuple[int, int], *, dtype: DType = float, rng: Any = None) -> Permutation:
        """A uniformly random permutation.

        Examples
        --------
        >>> import structmat as sm
        >>> sorted(sm.Permutation.random(4, rng=0).index.tolist())
        [0, 1, 2, 3]
        """
        n = square_size(shape, "Permutation")
        return cls(np.random.default_rng(rng).permutation(n), dtype)
