"""External: a SciPy sparse matrix or LinearOperator as an operator of ours; and ``as_operator``."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.operator import Operator
from structmat.structures.dense import Dense


class External(Operator):
    """Somebody else's matrix, applied by its own product. Made by :func:`as_operator`.

    Parameters
    ----------
    matrix
        A SciPy sparse matrix or array, or a ``scipy.sparse.linalg.LinearOperator``; ``A x`` is ``matrix @ x``, the
        transpose ``matrix.T``.

    Examples
    --------
    >>> import numpy as np, scipy.sparse, structmat as sm
    >>> A = sm.as_operator(scipy.sparse.eye_array(3, format="csr"))
    >>> (A @ np.ones(3)).tolist(), A.nparams
    ([1.0, 1.0, 1.0], 3)
    """

    __slots__ = ("matrix",)
    fields = ("matrix", "dtype")
    matrix: Any

    def __init__(self, matrix: Any, dtype: DType = None) -> None:
        own = np.dtype(matrix.dtype)
        if own.kind not in "fciub":
            raise TypeError(f"as_operator: expected numbers, got dtype {own}")
        if dtype is None:
            dtype = np.dtype(np.float64) if own.kind in "iub" else own
        if own != dtype and hasattr(matrix, "astype"):
            matrix = matrix.astype(dtype)
        self._init(tuple(int(s) for s in matrix.shape), np.dtype(dtype), "numpy", "cpu", matrix=matrix)

    def _matmat(self, x: Array) -> Array:
        (n, k), lead = x.shape[-2:], x.shape[:-2]
        flat = np.moveaxis(x, -2, 0).reshape(n, math.prod(lead) * k)
        y = np.asarray(self.matrix @ flat).astype(np.result_type(self.dtype, x.dtype), copy=False)
        return np.moveaxis(y.reshape(self.shape[-2], *lead, k), 0, -2)

    def _transpose(self) -> Operator:
        return External(self.matrix.T, self.dtype)

    def _conj(self) -> Operator:
        return External(self.matrix.conj() if hasattr(self.matrix, "conj") else self.matrix.H.T, self.dtype)

    def _cast(self, dtype: DType) -> Operator:
        return External(self.matrix, dtype)

    def _moved(self, library: str, device: Any) -> Operator:
        if library != "numpy":
            raise TypeError(f"to: a SciPy {type(self.matrix).__name__} cannot move to {device or library}")
        return self

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The stored values of a sparse matrix; nothing where the object does not show them."""
        data = getattr(self.matrix, "data", None)
        return (data,) if isinstance(data, np.ndarray) else ()

    def _details(self) -> str:
        return type(self.matrix).__name__


def as_operator(x: Any) -> Operator:
    """An operator from an operator, an array, a SciPy sparse matrix or a LinearOperator.

    Parameters
    ----------
    x
        An operator (returned as it is), an array ``(*batch, m, n)`` of any supported library or nested lists, a SciPy
        sparse matrix or array, or an object with ``shape``, ``dtype``, ``@`` and ``.T``.

    Raises
    ------
    TypeError
        For anything else.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.as_operator([[1.0, 2.0]]).shape
    (1, 2)
    """
    if isinstance(x, Operator):
        return x
    scipy_sparse = sys.modules.get("scipy.sparse")
    if scipy_sparse is not None and scipy_sparse.issparse(x):
        return External(x)
    if arrays.kind(x) is not None or isinstance(x, (list, tuple)) or hasattr(x, "__array__"):
        return Dense(x)
    if all(hasattr(x, name) for name in ("shape", "dtype", "matvec", "T")) and len(x.shape) == 2:
        return External(x)
    raise TypeError(
        f"as_operator: expected an operator, an array, a SciPy sparse matrix or a LinearOperator, got {type(x).__name__}"
    )
