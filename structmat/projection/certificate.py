"""Certificate: what a projection returns, with the numbers that say how good it is."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from structmat import arrays
from structmat.operator import Operator


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
    error, norm = frobenius(target - dense(operator)), frobenius(target)
    return Projection(
        operator=operator,
        error=error,
        relative_error=error / norm if norm else 0.0,
        lower_bound=min(lower_bound, error),
        method=method,
        seconds=time.perf_counter() - started,
        params=operator.nparams,
    )


def dense(operator: Operator) -> np.ndarray:
    """The dense matrix of the stored values, multiplied out in double precision on the CPU."""
    host = operator.to("cpu" if operator.kind == "torch" else "numpy")
    exact = np.complex128 if arrays.is_complex(host.dtype) else np.float64
    return arrays.convert(host.astype(exact).to_dense(), "numpy")


def frobenius(x: np.ndarray) -> float:
    """Frobenius norm, also where the squares of the entries would under- or overflow."""
    with np.errstate(over="ignore", under="ignore"):
        norm = float(np.linalg.norm(x))
    if 1e-140 < norm < math.inf:
        return norm
    largest = float(np.max(np.abs(x), initial=0.0))
    return largest * float(np.linalg.norm(x / largest)) if 0.0 < largest < math.inf else largest
