"""LowRank: the truncated SVD, exact or randomised; its interpolative form; CUR; matrices known by their products."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from structmat import arrays
from structmat.projection.certificate import Projection, frobenius
from structmat.projection.device import host, native
from structmat.projection.drivers import svd
from structmat.projection.interpolative import cur, interpolate
from structmat.projection.matrix_free import Explicit, Matrix, distance, is_operator, read_operator
from structmat.projection.placement import where
from structmat.projection.randomized import Basis, basis_svd, best_possible, block_krylov, grow
from structmat.projection.selection import Ladder, Request, Solution, allowed_error, choose, unreachable
from structmat.projection.svd import fill, safe_bound, tails, truncate
from structmat.projection.target import like, rounding
from structmat.structures.interpolative import Interpolative
from structmat.structures.low_rank import LowRank

METHODS = ("auto", "svd", "randomized", "cur")
LARGE = 1024  # smaller sizes have their SVD in a second or two
SHARE = 16  # ranks above this fraction of the size are found sooner by the full SVD
AFFORDABLE = 2**24  # entries of a dense copy (128 MiB) that an operator may be given


class Spectrum(NamedTuple):
    """A truncatable SVD of a matrix, complete or of its part in a random basis."""

    u: np.ndarray  # (m, c)
    s: np.ndarray  # (c,)
    vh: np.ndarray  # (c, n)
    rest: float  # Frobenius norm of what it leaves out
    basis: Basis | None  # the random basis, None for the full SVD


def project_low_rank(target: np.ndarray, request: Request) -> Solution:
    """The nearest matrix of a rank, ``u sqrt(s) @ sqrt(s) vh``.

    Optimal in the Frobenius norm by the full SVD, ``error**2 = sum of the discarded s**2`` (Eckart and Young, Psychometrika
    1, 1936), ``m n min(m, n)``; within about 1 % of that by a random block Krylov space, ``m n rank``
    (:mod:`structmat.projection.randomized`). ``method="cur"`` takes rows and columns of the matrix instead, selected from
    the singular vectors.
    """
    if request.method == "cur" and request.interpolative:
        raise ValueError("interpolative: method='cur' takes a rank, a budget or a tolerance and no interpolative")
    spectrum = None
    if _randomised(request, target.shape[0], target.shape[1]):
        spectrum = random_spectrum(Explicit(target, request.advance), request)
    if spectrum is None:
        spectrum = Spectrum(*svd(target), 0.0, None)
    rank, solution = solve(spectrum, Explicit(target), request)
    if request.method != "cur":
        return solution
    if request.tol is None:
        left, right, indices = cur(target, spectrum.u[:, :rank], spectrum.vh[:rank])
    else:
        rank, (left, right, indices) = _smallest_cur(target, spectrum, rank, request)
        kept = min(rank, len(spectrum.s))
        bound = safe_bound(float(tails(spectrum.s)[kept]), request.norm, max(target.shape))
        solution = solution._replace(lower_bound=bound)
    name = "CUR, pivoted QR of the singular vectors"
    return Solution(LowRank(*fill(left, right, rank)), solution.lower_bound, name, indices)


def _smallest_cur(target: np.ndarray, spectrum: Spectrum, least: int, request: Request) -> tuple[int, Any]:
    """A rank whose rows and columns meet the tolerance where one less does not, and the factors; errors are a posteriori.

    Below ``least``, the rank of the truncated SVD that meets it, nothing can. From there in steps that double, then by
    bisection: the error falls with the rank but for the luck of the selection.
    """
    allowed, most = allowed_error(request), len(spectrum.s)

    def tried(rank: int) -> tuple[float, Any]:
        made = cur(target, spectrum.u[:, :rank], spectrum.vh[:rank])
        return frobenius(target - made[0] @ made[1]), made

    low, high, step = least - 1, least, 1
    error, found = tried(high)
    while error > allowed and high < most:
        low, high, step = high, min(most, high + step), 2 * step
        error, found = tried(high)
    if error > allowed:
        raise unreachable(request, error)
    while high - low > 1:
        middle = (low + high) // 2
        error, made = tried(middle)
        low, high, found = (low, middle, made) if error <= allowed else (middle, high, found)
    return high, found


def solve(spectrum: Spectrum, matrix: Matrix, request: Request) -> tuple[int, Solution]:
    """The rank that is asked for, and the truncated spectrum in the form that is asked for."""
    (m, n), (u, s, vh, rest, basis) = matrix.shape, spectrum
    errors = np.hypot(tails(s), rest)
    gauge = 1 if request.interpolative else 0
    rank = request.rank or choose([Ladder(None, m + n, errors, gauge)], request)[1]
    kept = min(rank, len(s))
    if basis is None:
        bound, name = float(tails(s)[kept]), "truncated SVD (optimal)"
    else:
        bound = best_possible(matrix, basis, s, rest, kept)
        name = f"randomised block Krylov, {basis.q.shape[1]} columns"
        name = name if request.tol is None else f"randomised blocked QB, {basis.q.shape[1]} columns"
    operator: LowRank | Interpolative
    if request.interpolative:
        thin = host(u[:, :kept]), host(s[:kept]), host(vh[:kept])  # pivoting is the host's
        operator, name = interpolate(*thin), f"{name}, interpolative form"
    else:
        operator = LowRank(*(native(x) for x in truncate(u, s, vh, rank)))
    return rank, Solution(operator, safe_bound(bound, request.norm, max(m, n)), name)


def random_spectrum(matrix: Matrix, request: Request, *, always: bool = False) -> Spectrum | None:
    """The spectrum in a random basis; ``None`` where the full SVD is sooner found (never with ``always``)."""
    (m, n), rng = matrix.shape, np.random.default_rng(0 if request.rng is None else request.rng)
    if request.tol is None:
        basis = block_krylov(matrix, max(1, min(most_rank(request, m, n), m, n)), request.norm, rng)
    else:
        most = m + n if always else min(m, n) // (1 if request.method == "randomized" else 4)
        basis = grow(matrix, allowed_error(request), request.norm, most, rng)
    if basis is None:
        return None
    rest = distance(matrix, basis.q, basis.b)
    if request.tol is not None and rest > allowed_error(request) and not always:
        return None
    return Spectrum(*basis_svd(basis), rest, basis)


def most_rank(request: Request, m: int, n: int) -> int:
    """The rank asked for, or the largest that the budget allows."""
    if request.rank is not None:
        return request.rank
    ladder = Ladder(None, m + n, np.empty(0), 1 if request.interpolative else 0)
    low, high = 0, min(m, n)
    while low < high:  # the cost grows with the rank
        middle = (low + high + 1) // 2
        low, high = (middle, high) if ladder.cost(middle) <= (request.limit or 0) else (low, middle - 1)
    return low


def _randomised(request: Request, m: int, n: int) -> bool:
    if request.method != "auto":
        return request.method == "randomized"
    if min(m, n) <= LARGE:
        return False
    return request.tol is not None or SHARE * most_rank(request, m, n) <= min(m, n)


# ---- without a dense matrix ------------------------------------------------------------------------------------------


def project_implicit(W: Any, request: Request, started: float) -> Projection | None:
    """The low-rank projection of an operator, sparse matrix or LinearOperator from its products alone.

    ``request`` has no norm yet: it is taken from the operator. The error is exact, from the images of the unit vectors, 128
    at a time. ``None`` where a dense copy is affordable and the full SVD sooner found. Memory: the random basis
    (``O((m + n) rank)``) and 128 columns.
    """
    if not is_operator(W) or request.method in ("svd", "cur"):
        return None
    matrix, source = read_operator(W, request.advance)
    m, n = matrix.shape
    small = m * n <= AFFORDABLE
    if small and not _randomised(request, m, n):
        return None
    request = replace(request, norm=matrix.norm(), rounding=rounding(source))
    spectrum = random_spectrum(matrix, request, always=not small)
    if spectrum is None:
        return None
    _, solution = solve(spectrum, matrix, request)
    result: Any = like(solution.operator, source)
    exact = result.astype(arrays.dtype_for(matrix.dtype, result.kind)).to("numpy")
    error = distance(matrix, exact.left, exact.right)
    if request.tol is not None and error > request.tol * request.norm:
        raise unreachable(request, error)
    return Projection(
        operator=result,
        error=error,
        relative_error=error / request.norm if request.norm else 0.0,
        lower_bound=min(solution.lower_bound, error),
        method=f"{solution.method}, without a dense matrix{where(source)}",
        seconds=time.perf_counter() - started,
        params=result.nparams,
    )
