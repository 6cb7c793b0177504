"""Indexing: entries, rows and columns, and submatrices of operators, with NumPy's meaning of ``A[key]``."""

from __future__ import annotations

from typing import Any

import numpy as np

from structmat import arrays, rules
from structmat.algebra import Combination, Product, Scaled, Sum, shown
from structmat.arrays import Array
from structmat.operator import Operator

CHUNK = 64  # columns that are formed at once when entries are looked up


class Slice(Combination):
    """Submatrix ``A[rows, :][:, cols]``; the transpose is the submatrix of the transpose. Made by ``A[rows, cols]``."""

    __slots__ = ("operator", "rows", "cols", "repeats")
    fields = ("operator", "rows", "cols")
    operator: Operator
    rows: Array
    cols: Array

    def __init__(self, operator: Operator, rows: Array, cols: Array) -> None:
        size = (rows.shape[0], cols.shape[0])
        repeats = np.unique(arrays.convert(cols, "numpy")).size < size[1]
        self._init_from((operator,), size, "index", operator=operator, rows=rows, cols=cols, repeats=repeats)

    def _matmat(self, x: Array) -> Array:
        xp, n = arrays.namespace(x), self.operator.shape[-1]
        full = xp.zeros((*x.shape[:-2], n, x.shape[-1]), dtype=x.dtype, device=arrays.device(x))
        if not self.repeats:
            full[..., self.cols, :] = x
        elif arrays.kind(x) == "torch":
            full = full.index_add(-2, xp.asarray(self.cols, device=arrays.device(x)), x)
        else:
            xp.add.at(full, (..., self.cols, slice(None)), x)
        return self.operator._matmat(full)[..., self.rows, :]

    def _transpose(self) -> Operator:
        return Slice(self.operator.T, self.cols, self.rows)

    def _flops(self) -> int:
        return self.operator._flops()

    def _expression(self) -> str:
        return f"{shown((self.operator,), (Sum, Product, Scaled))[0]}[{len(self.rows)} rows, {len(self.cols)} cols]"


@rules.fallback("index")
def index(operator: Operator, key: Any) -> Any:
    """``A[key]`` with NumPy's meaning: an entry, a row or column, entries at index pairs, or a submatrix (an operator)."""
    keys = list(key) if isinstance(key, tuple) else [key]
    dots = [i for i, k in enumerate(keys) if k is Ellipsis]
    if dots:
        keys[dots[0] : dots[0] + 1] = [slice(None)] * (3 - len(keys))
    if operator.batch_shape and dots[:1] != [0]:
        raise IndexError(
            f"A[...]: shape {operator.shape} has batch dimensions; index the matrix axes with A[..., rows, cols]"
        )
    keys += [slice(None)] * (2 - len(keys))
    if len(keys) > 2:
        raise IndexError(f"A[...]: {len(keys)} indices for a matrix of shape {operator.shape}")
    rows, cols = (
        _axis_key(k, size, axis) for axis, (k, size) in enumerate(zip(keys, operator.shape[-2:], strict=True))
    )
    if isinstance(rows, slice) or isinstance(cols, slice):
        if isinstance(rows, int):
            return _column(operator.T, rows)[..., cols]
        if isinstance(cols, int):
            return _column(operator, cols)[..., rows]
        rows, cols = (
            np.arange(*k.indices(size)) if isinstance(k, slice) else k
            for k, size in zip((rows, cols), operator.shape[-2:], strict=True)
        )
        if rows.ndim != 1 or cols.ndim != 1:
            raise IndexError("A[...]: index arrays beside a slice must have one dimension")
        return submatrix(operator, rows, cols)
    if isinstance(rows, int) and isinstance(cols, int):
        return _column(operator, cols)[..., rows]
    rows, cols = np.asarray(rows), np.asarray(cols)
    if rows.ndim == 2 and cols.ndim == 2 and rows.shape[1] == 1 and cols.shape[0] == 1:  # numpy.ix_
        return submatrix(operator, rows[:, 0], cols[0])
    rows, cols = np.broadcast_arrays(rows, cols)
    return _entries(operator, rows, cols)


def submatrix(operator: Operator, rows: np.ndarray, cols: np.ndarray) -> Operator:
    """The operator ``A[rows, :][:, cols]``, structured where a rule says how."""
    m, n = operator.shape[-2:]
    if np.array_equal(rows, np.arange(m)) and np.array_equal(cols, np.arange(n)):
        return operator
    return rules.apply("slice", operator, (rows, cols))


@rules.fallback("slice")
def lazy_slice(operator: Operator, places: tuple[np.ndarray, np.ndarray]) -> Operator:
    """The lazy submatrix."""
    return Slice(operator, *places)


def _axis_key(key: Any, size: int, axis: int) -> Any:
    if isinstance(key, slice):
        return key
    where = f"A[...]: index {key} is out of bounds for axis {axis} of size {size}"
    if isinstance(key, (int, np.integer)) and not isinstance(key, (bool, np.bool_)):
        if not -size <= key < size:
            raise IndexError(where)
        return int(key) % size
    key = np.asarray(key)
    if key.dtype == bool:
        if key.shape != (size,):
            raise IndexError(f"A[...]: mask of shape {key.shape} for axis {axis} of size {size}")
        return np.flatnonzero(key)
    if key.size == 0:
        key = key.astype(np.intp)
    if key.dtype.kind not in "iu":
        raise IndexError(f"A[...]: expected integers, slices or masks, got dtype {key.dtype}")
    if key.size and (key.min() < -size or key.max() >= size):
        raise IndexError(where)
    return key % size if size else key


def _column(operator: Operator, j: int) -> Array:
    """Column ``j``, ``(*batch, m)``."""
    return _columns(operator, np.array([j]))[..., 0]


def _entries(operator: Operator, rows: np.ndarray, cols: np.ndarray) -> Array:
    """Entries at places ``(rows, cols)``, from a few columns at a time."""
    wanted, place = np.unique(cols, return_inverse=True)
    place = place.reshape(cols.shape)
    result = _columns(operator, wanted[:CHUNK])[..., rows, np.minimum(place, min(CHUNK, max(1, len(wanted))) - 1)]
    for start in range(CHUNK, len(wanted), CHUNK):
        inside = (place >= start) & (place < start + CHUNK)
        columns = _columns(operator, wanted[start : start + CHUNK])
        result[..., inside] = columns[..., rows[inside], place[inside] - start]
    return result


def _columns(operator: Operator, js: np.ndarray) -> Array:
    """Columns ``js``, ``(*batch, m, len(js))``."""
    kind = operator.kind or ("torch" if arrays.is_torch_dtype(operator.dtype) else "numpy")
    where = {} if kind == "numpy" else {"device": operator.device}
    unit = arrays.namespace_of(kind).zeros((operator.shape[-1], len(js)), dtype=operator.dtype, **where)
    unit[js, np.arange(len(js))] = 1
    return operator._matmat(unit)
