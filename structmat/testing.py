"""The conformance kit: what every operator must satisfy, users' own included.

``check_operator(op)`` needs no dense twin: it tests the operator against itself. ``assert_matches(op, dense)`` compares
it with one.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.operator import Operator


def tolerance(*dtypes: DType) -> float:
    """Relative tolerance for results computed in these dtypes: a few hundred roundings of the coarsest of them.

    Examples
    --------
    >>> import numpy as np
    >>> tolerance(np.float64) < 1e-11 < tolerance(np.float32)
    True
    """
    numpy_dtypes = [arrays.dtype_for(arrays.as_dtype(d), "numpy") for d in dtypes]
    return 500 * max(float(np.finfo(d).eps) for d in numpy_dtypes)


def check_operator(operator: Operator, *, rng: Any = 0) -> None:
    """Check that an operator keeps the contract of :class:`structmat.Operator`.

    Shapes and dtypes of all products; the adjoint identity ``<A x, y> = <x, A^H y>`` with conjugation; ``A.T`` against
    ``A.H``; linearity; ``A X`` column by column; row form, stacks and empty operands; ``ValueError`` for wrong shapes;
    operands and stored arrays unchanged; pickle and copies.

    Parameters
    ----------
    operator
        The operator to check, of any library.
    rng
        Seed or generator of the random operands.

    Raises
    ------
    AssertionError
        With what was expected and what came, if a check fails.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.testing.check_operator(sm.Monarch.random((6, 4), rng=0))
    """
    rng = np.random.default_rng(rng)
    m, n = operator.shape[-2:]
    stored = [np.array(arrays.convert(a, "numpy")) for a in operator.arrays]
    tol = tolerance(operator.dtype)
    complex_too = arrays.is_complex(operator.dtype)

    def operand(*shape: int) -> Array:
        x = rng.standard_normal(shape)
        x = x + 1j * rng.standard_normal(shape) if complex_too else x
        target = arrays.dtype_for(operator.dtype, "numpy")
        x = x.astype(target)
        return arrays.convert(x, operator.kind) if operator.kind not in (None, "numpy") else x

    x, y = operand(n, 3), operand(m, 3)
    kept = np.array(arrays.convert(x, "numpy"))
    ax, aty, ahy = operator @ x, operator.T @ y, operator.H @ y
    batch = operator.batch_shape
    _equal(tuple(ax.shape), (*batch, m, 3), "shape of A @ x")
    _equal(tuple(ahy.shape), (*batch, n, 3), "shape of A.H @ y")
    _equal(arrays.dtype_for(ax.dtype, "numpy"), arrays.dtype_for(operator.dtype, "numpy"), "dtype of A @ x")
    _equal((operator.T.shape, operator.H.shape), ((*batch, n, m),) * 2, "shapes of A.T and A.H")
    _equal(operator.T.dtype, operator.dtype, "dtype of A.T")

    host = [_host(v) for v in (x, y, ax, ahy, aty)]
    left = (host[2].conj() * host[1]).sum(-2)
    right = (host[0].conj() * host[3]).sum(-2)
    scale = np.abs(host[2]).max(initial=1) * np.abs(host[1]).max(initial=1) * max(m, 1)
    _close(left, right, tol * scale, "adjoint identity <A x, y> = <x, A.H y>")
    _close(_host(operator.T @ y.conj()), host[3].conj(), tol * _size(host[3]), "A.T @ conj(y) = conj(A.H @ y)")
    _close(_host(operator.T.T @ x), host[2], tol * _size(host[2]), "A.T.T = A")
    _close(_host(operator.conj() @ x.conj()), host[2].conj(), tol * _size(host[2]), "conj(A) conj(x) = conj(A x)")
    u = operand(n, 3)
    expected = 2 * host[2] - _host(operator @ u)
    _close(_host(operator @ (2 * x - u)), expected, tol * max(n, 1) * _size(host[2]), "A (2 x - u) = 2 A x - A u")

    columns = np.stack([_host(operator @ x[:, j]) for j in range(3)], axis=-1)
    _close(columns, host[2], tol * _size(host[2]), "A @ X column by column")
    _close(_host(x.T @ operator.T), np.swapaxes(host[2], -1, -2), tol * _size(host[2]), "row form X.T @ A.T")
    _close(_host(y[:, 0] @ operator), host[4][..., 0], tol * _size(host[4]), "y @ A")
    _close(_host(operator.rmatmat(y)), host[3], tol * _size(host[3]), "rmatmat")
    _close(_host(operator.rmatvec(y[:, 0])), host[3][..., 0], tol * _size(host[3]), "rmatvec")
    if not batch:
        stack = operand(2, n, 3)
        expected = np.stack([_host(operator @ stack[i]) for i in range(2)])
        _close(_host(operator @ stack), expected, tol * _size(expected), "A @ stack of matrices")
        rows = operand(2, 3, n)
        expected = np.stack([_host(rows[i] @ operator.T) for i in range(2)])
        _close(_host(rows @ operator.T), expected, tol * _size(expected), "stack of rows @ A.T")
        _close(_host(operator.matvec(rows)), expected, tol * _size(expected), "matvec of a stack of vectors")
    _equal(tuple((operator @ operand(n, 0)).shape), (*batch, m, 0), "shape for no columns")
    for wrong in (operand(n + 1, 2), operand(n + 1)):
        _raises(ValueError, lambda wrong=wrong: operator @ wrong, f"A @ x for x of shape {tuple(wrong.shape)}")

    for twin, how in ((pickle.loads(pickle.dumps(operator)), "pickle"), (copy.deepcopy(operator), "deepcopy")):
        _equal((type(twin), twin.shape, twin.dtype), (type(operator), operator.shape, operator.dtype), how)
        _close(_host(twin @ x), host[2], 0.0, f"A @ x after {how}")
    _equal(repr(operator).startswith("<"), True, "repr")
    _close(_host(x), kept, 0.0, "the operand, unchanged")
    for before, now in zip(stored, operator.arrays, strict=True):
        _close(_host(now), before, 0.0, "the stored arrays, unchanged")


def assert_matches(operator: Operator, dense: Array, *, tol: float | None = None) -> None:
    """Compare an operator with its dense twin: shape, entries, and products from both sides.

    Parameters
    ----------
    operator
        The operator.
    dense
        Array of the same shape.
    tol
        Tolerance relative to the largest entry; default :func:`tolerance` of the operator's dtype.

    Raises
    ------
    AssertionError
        With the largest difference, if they differ.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> sm.testing.assert_matches(sm.Diagonal([1.0, 2.0]), np.diag([1.0, 2.0]))
    """
    dense = _host(dense)
    tol = tolerance(operator.dtype) if tol is None else tol
    _equal(tuple(operator.shape), tuple(dense.shape), "shape")
    _close(_host(operator.to_dense()), dense, tol * _size(dense), "entries")
    n = dense.shape[-1]
    x = np.cos(np.arange(n * 2).reshape(n, 2)).astype(arrays.dtype_for(operator.dtype, "numpy"))
    x = arrays.convert(x, operator.kind) if operator.kind not in (None, "numpy") else x
    expected = dense @ _host(x)
    _close(_host(operator @ x), expected, tol * max(n, 1) * _size(dense), "A @ x")
    _close(_host(x.T @ operator.T), np.swapaxes(expected, -1, -2), tol * max(n, 1) * _size(dense), "x.T @ A.T")


def allclose(a: Operator, b: Operator, tol: float | None = None) -> bool:
    """Whether two operators are the same matrix to rounding (compared entry by entry).

    Examples
    --------
    >>> import structmat as sm
    >>> sm.testing.allclose(sm.Identity(2) * 2, sm.Diagonal([2.0, 2.0]))
    True
    """
    if a.shape != b.shape:
        return False
    x, y = _host(a.to_dense()), _host(b.to_dense())
    tol = tolerance(a.dtype, b.dtype) if tol is None else tol
    return bool(np.all(np.abs(x - y) <= tol * max(_size(x), _size(y))))


def _host(x: Array) -> np.ndarray:
    return arrays.convert(x, "numpy")


def _size(x: np.ndarray) -> float:
    return float(np.abs(x).max(initial=1))


def _equal(got: Any, expected: Any, what: str) -> None:
    if got != expected:
        raise AssertionError(f"{what}: expected {expected}, got {got}")


def _close(got: np.ndarray, expected: np.ndarray, tol: float, what: str) -> None:
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: expected shape {expected.shape}, got {got.shape}")
    difference = float(np.abs(got - expected).max(initial=0))
    if not difference <= tol:
        raise AssertionError(f"{what}: differs by {difference:.3g}, tolerance {tol:.3g}")


def _raises(kind: type[Exception], action: Any, what: str) -> None:
    try:
        action()
    except kind:
        return
    raise AssertionError(f"{what}: expected {kind.__name__}")
