"""Certificate: what a projection returns, with the numbers that say how good it is."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from structmat import arrays
from structmat.algebra import Product
from structmat.arrays import Array
from structmat.operator import Operator
from structmat.projection.device import DeviceArray, frobenius_norm, native, on_device
from structmat.projection.links import multiplied_out, pair_of, row_slabs
from structmat.structures.chain import Chain

_SMALL = 1 << 16  # entries below which nothing is quicker than the dense matrix
_LARGE = 1 << 22  # entries from which no second dense matrix is held
_SLAB = 128  # columns of a large chain that are multiplied out at a time
_RUN = 4096  # entries of one dot product: too short for BLAS to start threads, which cost more than they save
_SLAB_ENTRIES = 1 << 16  # entries of a pair of factors that are multiplied out at a time
_DEVICE_ENTRIES = 1 << 24  # of one on a device


@dataclass(frozen=True, repr=False)
class Projection:
    """A structured operator near a matrix, and how near: ``lower_bound <= best possible <= error``.

    Attributes
    ----------
    operator
        The structured operator, in the library, device and dtype of the matrix.
    error
        Frobenius norm of the matrix minus ``operator`` as returned, computed in double precision.
    relative_error
        ``error`` divided by the norm of the matrix; 0 for the zero matrix.
    lower_bound
        No member of the family with the same architecture is nearer than this.
    method
        The algorithm, and ``optimal`` where it provably finds the nearest member; the place, where that is not the CPU of a
        matrix there.
    seconds
        Wall time, certificate included.
    params
        Stored numbers of the operator.
    indices
        The rows and columns of the matrix that a CUR decomposition is made of; None for all else.
    bias_correction
        ``(W - A) mean``, ``(m,)``, to be added to the bias of a layer, where a ``mean`` of the inputs was given; else None.
    ridge
        Relative ridge that the algorithm put on a weight which is singular or nearly so; 0 where it needed none.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> p = sm.project(np.diag([3.0, 4.0]), sm.LowRank, rank=1)
    >>> round(p.error, 12), round(p.lower_bound, 12), p.params
    (3.0, 3.0, 4)
    """

    operator: Operator
    error: float
    relative_error: float
    lower_bound: float
    method: str
    seconds: float
    params: int
    indices: tuple[np.ndarray, np.ndarray] | None = None
    bias_correction: Array | None = None
    ridge: float = 0.0

    def __str__(self) -> str:
        fraction = self.params / math.prod(self.operator.shape)
        relative_bound = self.relative_error * self.lower_bound / self.error if self.error else 0.0
        return (
            f"{self.operator._expression()}: relative error {self.relative_error:.4g} (best possible at least "
            f"{relative_bound:.4g}), {self.params} parameters = {fraction:.1%} of dense, {self.method}, "
            f"{self.seconds:.3g} s"
        )

    def __repr__(self) -> str:
        return f"<Projection onto {self}>"


def certify(
    operator: Operator,
    target: np.ndarray,  # (m, n), float64 or complex128
    lower_bound: float,
    method: str,
    started: float,  # time.perf_counter() at the call
) -> Projection:
    """The projection with its exact error, from one dense subtraction; rounding never lifts the bound above it."""
    error, norm = distance(operator, target), frobenius(target)
    return Projection(
        operator=operator,
        error=error,
        relative_error=error / norm if norm else 0.0,
        lower_bound=min(lower_bound, error),
        method=method,
        seconds=time.perf_counter() - started,
        params=operator.nparams,
    )


def distance(operator: Operator, target: np.ndarray) -> float:
    """``||W - A||_F`` by subtraction, without a second dense matrix where it is large.

    A chainable chain is as cheap as reading the matrix: both halves are multiplied out, and their pair some rows at a time.
    Where the matrix is on a device, so is the operator, and it is subtracted there.
    """
    exact = _exact(operator, target)
    if target.size < _SMALL or not isinstance(exact, (Chain, Product)):
        return frobenius(target - _seen(exact.to_dense(), target))
    total, n = 0.0, target.shape[1]
    found = _distance_of_pair(exact, target) if isinstance(exact, Chain) else None
    if found is not None:
        return found
    if target.size < _LARGE:
        return frobenius(target - _seen(exact.to_dense(), target))
    for start in range(0, n, _SLAB):
        width = min(_SLAB, n - start)
        columns = np.zeros((n, width), like=target)
        columns[np.arange(start, start + width), np.arange(width)] = 1.0
        part = _seen(exact @ native(columns), target)
        total = math.hypot(total, frobenius(target[:, start : start + width] - part))
    return total


def _distance_of_pair(chain: Chain, target: np.ndarray) -> float | None:
    """The distance of a dense chainable chain, some rows at a time; ``None`` for a chain that is not of this kind."""
    halves = pair_of([_seen(f, target) for f in chain.factors], chain.patterns)
    if halves is None:
        return None
    rows = None if chain.out_order is None else chain.out_order.T.permutation()  # of W, for each row of the chain
    cols = None if chain.in_order is None else chain.in_order.permutation()
    turned = not on_device(target) and target.flags.f_contiguous and not target.flags.c_contiguous
    if turned:  # rows are runs of memory
        target, rows, cols = target.T, cols, rows
    m, n = target.shape
    kept: slice | np.ndarray = slice(0, n)  # the columns of the chain that are no padding
    if cols is not None and cols.size > n:
        kept = np.flatnonzero(cols < n)
        cols = cols[kept]
    total = 0.0
    for at, slab in row_slabs(halves, _DEVICE_ENTRIES if on_device(target) else _SLAB_ENTRIES, turned):
        picked = at if rows is None else rows[at]
        if isinstance(picked, slice):
            rest = target[picked]
            slab = slab[: len(rest)]
        else:
            inside = picked < m
            rest, slab = target[picked[inside]], slab if inside.all() else slab[inside]
        rest = rest if cols is None else rest[:, cols]
        total = math.hypot(total, frobenius(rest - slab[:, kept]))
    return total


def dense(operator: Operator, home: Any = None) -> np.ndarray:
    """The dense matrix of the stored values, multiplied out in double precision: on the CPU, or where ``home`` is."""
    exact = _exact(operator, home)
    if isinstance(exact, Chain) and exact.shape[0] * exact.shape[1] < _SMALL:
        return _dense_of_small(exact, home)
    return _seen(exact.to_dense(), home)


def _dense_of_small(chain: Chain, home: Any) -> np.ndarray:
    """A chain multiplied out without a plan, which costs more than it saves where it is used once."""
    rows, cols = chain.patterns[0].rows, chain.patterns[-1].cols
    whole = multiplied_out([_seen(f, home) for f in chain.factors], (rows, cols))
    if chain.out_order is not None:
        whole = whole[chain.out_order.permutation()]
    if chain.in_order is not None:
        whole = whole[:, chain.in_order.T.permutation()]
    return whole[: chain.shape[0], : chain.shape[1]]


def _exact(operator: Operator, home: Any) -> Operator:
    """The operator in double precision, of NumPy arrays or where ``home`` is, which is where it is."""
    if not on_device(home):
        operator = operator.to("cpu" if operator.kind == "torch" else "numpy")
    exact = operator.astype(np.complex128 if arrays.is_complex(operator.dtype) else np.float64)
    return exact.to("numpy") if exact.kind == "torch" and not on_device(home) else exact


def _seen(x: Array, home: Any) -> Any:
    """An array of an operator as the algorithms see it."""
    return DeviceArray(x) if on_device(home) else arrays.convert(x, "numpy")


def frobenius(x: np.ndarray) -> float:
    """Frobenius norm, also where the squares of the entries would under- or overflow."""
    if on_device(x):
        norm = float(frobenius_norm(DeviceArray(native(x))))
        return norm if 1e-140 < norm < math.inf else _scaled_norm(x)
    parts = x.ravel(order="K")
    if np.iscomplexobj(parts):
        parts = parts.view(np.finfo(parts.dtype).dtype)  # one pass instead of two strided ones
    with np.errstate(over="ignore", under="ignore"):
        runs = parts[: parts.size // _RUN * _RUN].reshape(-1, _RUN)
        rest = parts[runs.size :]
        norm = math.sqrt(float(np.vecdot(runs, runs).sum() + np.vecdot(rest, rest)))
    return norm if 1e-140 < norm < math.inf else _scaled_norm(x)


def _scaled_norm(x: np.ndarray) -> float:
    largest = float(np.max(np.abs(x), initial=0.0))
    return largest * float(np.linalg.norm(x / largest)) if 0.0 < largest < math.inf else largest
