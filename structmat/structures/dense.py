"""Dense: a matrix given by all its entries."""

from __future__ import annotations

from typing import Any

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.operator import Operator


class Dense(Operator):
    """A dense matrix as an operator, ``(A x)_i = sum_j a_ij x_j``; adjoint ``conj(a).T``.

    Parameters
    ----------
    array
        ``(*batch, m, n)``, floating or complex; integers and booleans are promoted to float64. Kept as given, not
        copied: later changes of the caller's array change the operator.

    Raises
    ------
    ValueError
        For fewer than two dimensions.
    TypeError
        For arrays that do not hold numbers.

    Notes
    -----
    ``m n`` stored numbers, ``2 m n`` flops per column.

    Examples
    --------
    >>> import structmat as sm
    >>> (sm.Dense([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]) @ [1.0, 1.0]).tolist()
    [3.0, 7.0, 11.0]
    """

    __slots__ = ("array",)
    fields = ("array",)
    array: Array

    def __init__(self, array: Any) -> None:
        array = arrays.values(array, "Dense", 2)
        self._init(tuple(array.shape), array.dtype, arrays.kind(array), arrays.device(array), array=array)

    def _matmat(self, x: Array) -> Array:
        return _like(self.array, x) @ x

    def _rows(self, x: Array) -> Array:
        return x @ _like(self.array, x).swapaxes(-1, -2)

    def _transpose(self) -> Operator:
        return Dense(self.array.swapaxes(-1, -2))

    def to_dense(self) -> Array:
        """The array itself, not a copy."""
        return self.array

    @classmethod
    def random(cls, shape: tuple[int, int], *, dtype: DType = float, rng: Any = None) -> Dense:
        """A random matrix with independent normal entries of variance ``1/n``.

        Examples
        --------
        >>> import structmat as sm
        >>> sm.Dense.random((3, 2), rng=0).shape
        (3, 2)
        """
        return cls(arrays.random(tuple(shape), dtype, rng, max(shape[1], 1) ** -0.5))


def _like(array: Array, x: Array) -> Array:
    """Torch's ``@`` refuses mixed dtypes; NumPy's promotes by itself."""
    return array.to(x.dtype) if arrays.kind(array) == "torch" else array
