"""Certificate: what a projection returns, with the numbers that say how good it is."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from structmat import arrays
from structmat.algebra import Product
from structmat.arrays import Array
from structmat.operator import Operator
from structmat.patterns import AxisOrder, Pattern
from structmat.projection.links import column_blocks, pair_of
from structmat.structures.chain import Chain

_SLAB = 128  # columns of a large chain that are multiplied out at a time
_LARGE = 1 << 22  # entries from which that is done


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
        The algorithm, and ``optimal`` where it provably finds the nearest member.
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
    """``||W - A||_F`` by subtraction; for a large chain some columns at a time, so that no second dense matrix is held."""
    exact = _exact(operator)
    if target.size < _LARGE or not isinstance(exact, (Chain, Product)):
        return frobenius(target - arrays.convert(exact.to_dense(), "numpy"))
    host, total, n = exact.to("numpy"), 0.0, target.shape[1]
    found = _distance_of_pair(host, target) if isinstance(host, Chain) else None
    if found is not None:
        return found
    for start in range(0, n, _SLAB):
        width = min(_SLAB, n - start)
        columns = np.zeros((n, width))
        columns[np.arange(start, start + width), np.arange(width)] = 1.0
        total = math.hypot(total, frobenius(target[:, start : start + width] - host @ columns))
    return total


def _distance_of_pair(chain: Chain, target: np.ndarray) -> float | None:
    """The distance of a dense chainable chain, as cheap as reading the matrix: both halves multiplied out, then their pair.

    ``None`` for a chain that is not of this kind.
    """
    halves = pair_of(chain.factors, chain.patterns)
    if halves is None:
        return None
    (m, n), (left, right) = target.shape, (Pattern(f.shape[0], f.shape[2], f.shape[3], f.shape[1]) for f in halves)
    turned = chain.out_order is not None and chain.out_order == AxisOrder((left.b, left.d), (1, 0))
    rows = None if turned or chain.out_order is None else chain.out_order.permutation()[:m]
    places = np.arange(right.cols) if chain.in_order is None else chain.in_order.permutation()
    total, start = 0.0, 0
    for blocks in column_blocks(halves, (left, right)):
        width = blocks.shape[-1]
        columns = (blocks if turned else blocks.swapaxes(0, 1)).reshape(-1, width)
        columns = columns[:m] if rows is None else columns[rows]
        at = places[start : start + width]
        start += width
        if chain.in_order is None:
            rest = target[:, at[0] : at[0] + width]
            rest = rest - columns[:, : rest.shape[1]]
        else:
            inside = at < n  # the others are padding
            rest = target[:, at[inside]] - columns[:, inside]
        total = math.hypot(total, frobenius(rest))
    return total


def dense(operator: Operator) -> np.ndarray:
    """The dense matrix of the stored values, multiplied out in double precision on the CPU."""
    return arrays.convert(_exact(operator).to_dense(), "numpy")


def _exact(operator: Operator) -> Operator:
    host = operator.to("cpu" if operator.kind == "torch" else "numpy")
    return host.astype(np.complex128 if arrays.is_complex(host.dtype) else np.float64)


def frobenius(x: np.ndarray) -> float:
    """Frobenius norm, also where the squares of the entries would under- or overflow."""
    with np.errstate(over="ignore", under="ignore"):
        norm = float(np.linalg.norm(x))
    if 1e-140 < norm < math.inf:
        return norm
    largest = float(np.max(np.abs(x), initial=0.0))
    return largest * float(np.linalg.norm(x / largest)) if 0.0 < largest < math.inf else largest
