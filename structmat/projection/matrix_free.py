"""Matrices as their products: what the randomised algorithms need to know of a matrix, dense or not."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from structmat import arrays, linalg
from structmat.arrays import Array
from structmat.operator import Operator
from structmat.projection.certificate import frobenius
from structmat.projection.progress import Advance, quiet
from structmat.structures.external import External, as_operator

CHUNK = 128  # columns at once: the memory of an exact error is this many columns of W


class Matrix(Protocol):
    """A matrix in double precision that can be multiplied from both sides and shown some columns at a time."""

    shape: tuple[int, int]
    dtype: Any
    home: Any  # an array where the operands of products have to be, and results are

    def apply(self, x: np.ndarray) -> np.ndarray:
        """``W x`` for ``x`` of shape ``(n, k)``."""
        ...

    def adjoint(self, y: np.ndarray) -> np.ndarray:
        """``W^H y`` for ``y`` of shape ``(m, k)``."""
        ...

    def columns(self, start: int, stop: int) -> np.ndarray:
        """The columns ``W[:, start:stop]``, not to be written to."""
        ...


class Explicit:
    """A dense array ``(m, n)`` of float64 or complex128; every product moves a progress bar."""

    def __init__(self, array: np.ndarray, advance: Advance = quiet) -> None:
        self.array, self.home, self.advance = array, array, advance
        self.shape = (array.shape[0], array.shape[1])
        self.dtype = array.dtype

    def apply(self, x: np.ndarray) -> np.ndarray:
        """``W x``."""
        self.advance(1, 1)
        return self.array @ x

    def adjoint(self, y: np.ndarray) -> np.ndarray:
        """``W^H y``, without a conjugated copy of ``W``."""
        self.advance(1, 1)
        return (y.conj().T @ self.array).conj().T

    def columns(self, start: int, stop: int) -> np.ndarray:
        """A view."""
        return self.array[:, start:stop]


class Implicit:
    """An operator, known by its products alone; every one of them moves a progress bar.

    Raises ``ValueError`` at the first product that is not finite and ``TypeError`` where the adjoint is missing.
    """

    def __init__(self, operator: Operator, advance: Advance = quiet) -> None:
        self.advance = advance
        self.dtype = np.dtype(np.complex128 if arrays.is_complex(operator.dtype) else np.float64)
        exact = operator.astype(arrays.dtype_for(self.dtype, operator.kind) if operator.kind else self.dtype)
        self.operator = exact.to("numpy")
        self.shape = (int(operator.shape[0]), int(operator.shape[1]))
        self.home = np.empty(0)
        self._by_column: Any = None

    def apply(self, x: np.ndarray) -> np.ndarray:
        """``W x``."""
        self.advance(1, 1)
        return _finite(self.operator @ x, "W @ x")

    def adjoint(self, y: np.ndarray) -> np.ndarray:
        """``W^H y``."""
        self.advance(1, 1)
        try:
            return _finite(self.operator.rmatmat(y), "W.H @ y")
        except (AttributeError, NotImplementedError, TypeError) as error:  # SciPy calls an rmatvec that is None
            raise TypeError(
                f"W: the low-rank projection without a dense matrix needs products with W.H, which {self.operator} does "
                "not have; give it an rmatmat, or pass method='svd'"
            ) from error

    def columns(self, start: int, stop: int) -> np.ndarray:
        """Columns by unit vectors; those of a sparse matrix are read off."""
        matrix = self.operator.matrix if isinstance(self.operator, External) else None
        if matrix is not None and _is_sparse(matrix):
            return _finite(self._sparse(matrix)[:, start:stop].toarray(), "W").astype(self.dtype, copy=False)
        unit = np.zeros((self.shape[1], stop - start), self.dtype)
        unit[np.arange(start, stop), np.arange(stop - start)] = 1.0
        return self.apply(unit)

    def _sparse(self, matrix: Any) -> Any:
        """The sparse matrix by columns, places given twice added up."""
        if self._by_column is None:
            self._by_column = matrix.tocsc(copy=True)
            self._by_column.sum_duplicates()
        return self._by_column

    def norm(self) -> float:
        """Frobenius norm: from the stored numbers where a formula is exact, else by ``n`` products."""
        matrix = self.operator.matrix if isinstance(self.operator, External) else None
        if matrix is not None and _is_sparse(matrix):
            return _finite_number(frobenius(self._sparse(matrix).data))
        return _finite_number(float(linalg.norm(self.operator)))


def is_operator(W: Any) -> bool:
    """Whether ``W`` is an operator, a SciPy sparse matrix or a LinearOperator: something with products of its own."""
    if isinstance(W, Operator):
        return True
    linear = sys.modules.get("scipy.sparse.linalg")
    return _is_sparse(W) or (linear is not None and isinstance(W, linear.LinearOperator))


def read_operator(W: Any, advance: Advance = quiet) -> tuple[Implicit, Array]:
    """``W`` by its products, and an empty array of its library, device and dtype.

    Raises ``ValueError`` for anything but one matrix with at least one row and column.
    """
    operator = as_operator(W)
    if len(operator.shape) != 2 or 0 in operator.shape:
        raise ValueError(f"W: expected one matrix (m, n) with m, n >= 1, got shape {tuple(operator.shape)}")
    library = operator.kind or ("torch" if arrays.is_torch_dtype(operator.dtype) else "numpy")
    where = {} if operator.kind in (None, "numpy") else {"device": operator.device}
    return Implicit(operator, advance), arrays.namespace_of(library).zeros((0,), dtype=operator.dtype, **where)


def chunks(matrix: Matrix) -> Iterator[tuple[int, np.ndarray]]:
    """``(start, columns)`` that cover the matrix from left to right."""
    n = matrix.shape[1]
    for start in range(0, n, CHUNK):
        yield start, matrix.columns(start, min(start + CHUNK, n))


def distance(matrix: Matrix, left: np.ndarray, right: np.ndarray) -> float:
    """``||W - left right||_F`` by subtraction, some columns at a time: ``n`` products and ``2 m n r`` flops."""
    total = 0.0
    for start, columns in chunks(matrix):
        rest = columns - left @ right[:, start : start + columns.shape[1]]
        total = math.hypot(total, frobenius(rest))
    return total


def _is_sparse(W: Any) -> bool:
    sparse = sys.modules.get("scipy.sparse")
    return sparse is not None and sparse.issparse(W)


def _finite(x: np.ndarray, what: str) -> np.ndarray:
    bad = x.size - int(np.count_nonzero(np.isfinite(x)))
    if bad:
        raise ValueError(f"W: {bad} of {x.size} entries of {what} are NaN or infinite")
    return x


def _finite_number(x: float) -> float:
    if not np.isfinite(x):
        raise ValueError(f"W: its norm is {x}: entries are NaN, infinite or too large")
    return x
