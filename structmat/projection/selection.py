"""Selection: what is asked of a projection, and which member of a family a budget or a tolerance picks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from structmat.operator import Operator
from structmat.patterns import Pattern
from structmat.projection.progress import Advance, quiet

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Request:
    """What the caller asked for, checked: an architecture, and at most one of a rank, a budget and a tolerance."""

    family: type[Operator]
    norm: float  # Frobenius norm of the matrix to project
    limit: int | None = None  # parameters allowed
    tol: float | None = None  # relative error allowed
    rounding: float = 0.0  # relative error that the caller's dtype may add
    rank: int | None = None
    blocks: int | tuple[int, int] | None = None
    shapes: tuple[tuple[int, int], ...] | None = None
    terms: int | None = None
    block: tuple[int, int] | None = None
    places: tuple[Any, Any] | None = None
    radix: int | None = None
    patterns: tuple[Pattern, ...] | None = None
    cores: int | None = None
    order: str | tuple[int, ...] | None = None
    refine: int | bool | None = None
    permutation: str | None = None  # "search"; given index arrays are applied before and after
    layout: str | tuple[str, str] | None = None
    method: str = "auto"
    interpolative: bool = False
    rng: Any = None
    bound: bool = True  # whether a lower bound is wanted; a step of an iteration needs none
    advance: Advance = quiet  # moves a progress bar; an exception that it raises ends the projection

    @property
    def free(self) -> bool:
        """Whether a budget or a tolerance picks the size of the member."""
        return self.limit is not None or self.tol is not None


class Solution(NamedTuple):
    """What a family's solver returns: an operator of NumPy arrays, a lower bound, the name of the method."""

    operator: Operator
    lower_bound: float
    method: str
    indices: tuple[np.ndarray, np.ndarray] | None = None  # rows and columns of a CUR decomposition
    ridge: float = 0.0  # relative ridge on a nearly singular weight


class Ladder(NamedTuple):
    """Members of a family that one spectrum covers: rung ``r`` costs ``r (step - r gauge)`` and has the error ``errors[r]``."""

    member: Any  # the architecture without its rank
    step: int
    errors: np.ndarray  # (rungs + 1,), errors[0] that of the zero matrix
    gauge: int = 0  # identity blocks of r x r in the interpolative form

    def cost(self, rung: int) -> int:
        """Parameters of a rung."""
        return rung * (self.step - rung * self.gauge)


def choose(ladders: Sequence[Ladder], request: Request) -> tuple[Any, int]:
    """``(member, rung)``: least error within ``request.limit``, or fewest parameters within ``request.tol``.

    Raises ``ValueError`` that names the nearest feasible parameter count, or the best error that can be reached.
    """
    rungs = [(float(a.errors[r]), a.cost(r), a.member, r) for a in ladders for r in _worthwhile(a, request)]
    if request.limit is not None:
        fitting = [rung for rung in rungs if rung[1] <= request.limit]
        if not fitting:
            raise infeasible(request, min(rung[1] for rung in rungs))
        best = min(fitting, key=lambda rung: rung[:2])
    else:
        near = [rung for rung in rungs if rung[0] <= allowed_error(request)]
        if not near:
            raise unreachable(request, min(rung[0] for rung in rungs))
        best = min(near, key=lambda rung: (rung[1], rung[0]))
    return best[2], best[3]


def _worthwhile(ladder: Ladder, request: Request) -> range:
    """Rungs up to the first whose error is rounding: higher ones would store noise."""
    floor = max(_EPS * len(ladder.errors), request.rounding / 4) * request.norm  # half a unit of the dtype
    return range(1, 1 + max(1, int(np.argmax(ladder.errors <= max(floor, float(ladder.errors[-1]))))))


def allowed_error(request: Request) -> float:
    """Absolute error that leaves room for rounding to the caller's dtype within ``request.tol``."""
    return max(0.0, (request.tol or 0.0) - request.rounding) * request.norm


def infeasible(request: Request, nearest: int) -> ValueError:
    """The error for a budget that no member meets."""
    return ValueError(
        f"budget: no {request.family.__name__} of this shape has at most {request.limit} parameters; "
        f"the nearest feasible count is {nearest}"
    )


class UnreachableError(ValueError):
    """No member tried meets a tolerance; ``best`` is the least relative error that one has."""

    best: float = math.inf


def unreachable(request: Request, best: float) -> UnreachableError:
    """The error for a tolerance that no member meets; ``best`` is an absolute error."""
    relative = max(best / request.norm if request.norm else 0.0, request.rounding)
    error = UnreachableError(
        f"tol: no {request.family.__name__} tried has a relative error of at most {request.tol:g} in this dtype; "
        f"the best relative error reachable is {relative:.3g}"
    )
    error.best = relative
    return error


def parameter_limit(budget: Any, shape: tuple[int, int]) -> int:
    """The number of parameters that ``budget`` allows: a fraction in (0, 1] of dense as a float, or an int count."""
    if isinstance(budget, (bool, np.bool_)) or not isinstance(budget, (int, float, np.integer, np.floating)):
        raise TypeError(f"budget: expected a fraction (float) or a count (int), got {type(budget).__name__}")
    if isinstance(budget, (int, np.integer)):
        if budget < 1:
            raise ValueError(f"budget: expected a count of at least 1, got {budget}")
        return int(budget)
    if not 0.0 < budget <= 1.0:
        raise ValueError(f"budget: expected a fraction in (0, 1] or an int count of parameters, got {budget}")
    return math.floor(float(budget) * math.prod(shape) + 1e-9)  # 0.29 * 100 is 28.999...


def read_tolerance(tol: Any) -> float:
    """The relative error that ``tol`` allows: a number in (0, 1]."""
    if isinstance(tol, (bool, np.bool_)) or not isinstance(tol, (int, float, np.integer, np.floating)):
        raise TypeError(f"tol: expected a number, got {type(tol).__name__}")
    if not 0.0 < tol <= 1.0:
        raise ValueError(f"tol: expected a relative error in (0, 1], got {tol}")
    return float(tol)
