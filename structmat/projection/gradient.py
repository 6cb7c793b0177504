"""Chains that no SVD solves: all factors at once by a quasi-Newton method, from several starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from structmat.patterns import Pattern
from structmat.projection.blast import is_blast, mirrored, project_blast
from structmat.projection.certificate import dense, frobenius
from structmat.projection.hierarchical import balance, project_chain
from structmat.projection.links import apply, multiplied_out
from structmat.projection.placement import is_chainable
from structmat.projection.progress import Advance
from structmat.projection.selection import Request, Solution
from structmat.projection.svd import safe_bound, truncated
from structmat.structures.chain import Chain

METHODS = ("auto", "svd", "als", "gradient")
RANDOM_STARTS = 3
ITERATIONS = 1000
_TRIAL = 40  # iterations after which random starts are compared
_STALLED = 1e-12  # relative decrease of the squared error at which an iteration is the last


def project_any_chain(target: np.ndarray, request: Request) -> Solution:
    """A chain of given patterns by the method that they allow, or that is asked for.

    Chainable ones are split by SVDs, those of BLAST and MM* solved by alternating least squares; ``method="gradient"`` fits
    any, starting from the result of the others where there is one.
    """
    patterns = request.patterns or ()
    if not patterns:
        return project_chain(target, request)
    chainable = is_chainable(patterns)
    special = is_blast(patterns) or is_blast(mirrored(patterns))
    solved = chainable and request.method not in ("als", "gradient")
    for name in ("order", "refine", "permutation"):
        if getattr(request, name) is not None and not solved:
            raise ValueError(f"{name}: only for chainable patterns and their SVDs; expected none here")
    if request.method == "als" and not special:
        raise ValueError(
            "method: 'als' is for the patterns of BLAST, (b1, p, r, 1) (1, b1, b2, r) (b2, r, q, 1), and their mirror image; "
            "a chainable chain is refined by refine=, any other fitted by method='gradient'"
        )
    if request.method == "gradient":
        check_sizes(patterns, target.shape)
        if special and not chainable:
            return gradient(target, patterns, request, project_blast(target, request))
        return gradient(target, patterns, request, project_chain(target, request) if chainable else None)
    if special and (not chainable or request.method == "als"):
        check_sizes(patterns, target.shape)
        return project_blast(target, request)
    try:
        return project_chain(target, request)
    except ValueError as error:
        fits = all(p.cols == q.rows for p, q in pairwise(patterns))
        if chainable or not fits:
            raise
        raise ValueError(f"{error}; no SVD solves them, method='gradient' fits them") from None


def check_sizes(patterns: Sequence[Pattern], shape: tuple[int, ...]) -> None:
    """``ValueError`` unless the patterns can be multiplied and cover the matrix."""
    for p, q in pairwise(patterns):
        if p.cols != q.rows:
            raise ValueError(f"patterns: {tuple(p)} has {p.cols} columns but {tuple(q)} has {q.rows} rows")
    size = (patterns[0].rows, patterns[-1].cols)
    if size[0] < shape[0] or size[1] < shape[1]:
        raise ValueError(f"patterns: the chain is {size[0]}x{size[1]}, too small for a matrix {shape[0]}x{shape[1]}")


def gradient(target: np.ndarray, patterns: Sequence[Pattern], request: Request, start: Solution | None) -> Solution:
    """A chain near a matrix by L-BFGS on the entries of all factors; never farther than the start that is given.

    Minimises ``||W - K_1 K_2 ... K_L||_F^2`` over the logical shape, so that padding has no weight. The gradient with respect
    to ``K_l`` is the part on its support of ``L^H E R^H`` with ``L``, ``R`` the products of the others, and costs as much as
    two more products of the chain with ``n`` columns. Source of the method: Liu and Nocedal, Math. Programming 45, 1989
    (SciPy's L-BFGS-B). Without a start, the best of three random ones after 40 iterations is taken further. A local optimum;
    the lower bound is what the start has proved, or the entries that no chain of these patterns reaches.
    """
    m, n = target.shape
    norm = request.norm or 1.0
    unit = target / norm
    lower = outside(target, patterns)
    if start is not None:
        factors = [np.asarray(f) for f in start.operator.factors]  # pyright: ignore[reportAttributeAccessIssue]
        first = [f.astype(target.dtype) / norm ** (1 / len(factors)) for f in factors]
        best = _minimise(unit, first, ITERATIONS, request.advance)
        if frobenius(unit - multiplied_out(best, (m, n))) >= frobenius(unit - dense(start.operator) / norm):
            best = first
        lower = max(lower, start.lower_bound)
    else:
        rng = np.random.default_rng(0 if request.rng is None else request.rng)
        trials = [_minimise(unit, _random(patterns, unit, rng), _TRIAL, request.advance) for _ in range(RANDOM_STARTS)]
        best = min(trials, key=lambda factors: frobenius(unit - multiplied_out(factors, (m, n))))
        best = _minimise(unit, best, ITERATIONS, request.advance)
    scaled = balance([f * norm ** (1 / len(best)) for f in best])
    return Solution(Chain(scaled, (m, n)), lower, "L-BFGS on all factors")


def outside(target: np.ndarray, patterns: Sequence[Pattern]) -> float:
    """A lower bound of the distance to any chain: the entries it cannot reach, or the rank that its links leave.

    A product of nonnegative factors with full support vanishes exactly where every product of the chain does.
    """
    m, n = target.shape
    ones = [np.ones((p.a, p.d, p.b, p.c)) / p.c for p in patterns]
    unreached = frobenius(target[multiplied_out(ones, (m, n)) == 0.0])
    inner = min((p.cols for p in patterns[:-1]), default=min(m, n))
    if inner >= min(m, n):
        return unreached
    tail = math.sqrt(max(0.0, truncated(target, inner).bound))
    return max(unreached, safe_bound(tail, frobenius(target), max(m, n)))


def _products(factors: Sequence[np.ndarray], shape: tuple[int, int]) -> list[np.ndarray]:
    """``K_l ... K_L`` for every ``l``, and the identity: ``n`` columns each."""
    cols = factors[-1].shape[0] * factors[-1].shape[1] * factors[-1].shape[3]
    eye = np.eye(cols, shape[1], dtype=factors[-1].dtype)
    return list(accumulate(reversed(factors), lambda x, f: apply(f, x), initial=eye))[::-1]


def _minimise(unit: np.ndarray, factors: Sequence[np.ndarray], iterations: int, advance: Advance) -> list[np.ndarray]:
    """Factors of a smaller squared error: the line search accepts nothing else."""
    from scipy.optimize import minimize

    m, n = unit.shape
    shapes, dtype = [f.shape for f in factors], unit.dtype
    ends = np.cumsum([math.prod(s) for s in shapes])

    def split(x: np.ndarray) -> list[np.ndarray]:
        return [part.reshape(s) for part, s in zip(np.split(x.view(dtype), ends[:-1]), shapes, strict=True)]

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        parts = split(x)
        right = _products(parts, (m, n))
        error = right[0].copy()
        error[:m] -= unit
        error[m:] = 0.0
        squared = frobenius(error) ** 2
        slopes = []
        for f, z in zip(parts, right[1:], strict=True):
            a, d, b, c = f.shape
            out = error.reshape(a, b, d, -1).transpose(0, 2, 1, 3)
            into = z.reshape(a, c, d, -1).transpose(0, 2, 3, 1)
            slopes.append((out @ into.conj()).ravel())
            error = apply(f.conj().swapaxes(-1, -2), error)
        return squared, 2.0 * np.concatenate(slopes).view(np.float64)

    x = np.concatenate([np.ascontiguousarray(f, dtype).ravel() for f in factors]).view(np.float64)
    options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 20, "ftol": _STALLED, "gtol": 1e-14}
    found = minimize(value, x, jac=True, method="L-BFGS-B", options=options, callback=lambda _: advance(1, 1))
    return [part.copy() for part in split(found.x)]


def _random(patterns: Sequence[Pattern], unit: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Normal entries, scaled so that the product has about the norm of the matrix."""
    factors = []
    for p in patterns:
        x = rng.standard_normal((p.a, p.d, p.b, p.c))
        factors.append((x + 1j * rng.standard_normal(x.shape) if unit.dtype.kind == "c" else x).astype(unit.dtype))
    size = frobenius(multiplied_out(factors, (unit.shape[0], unit.shape[1])))
    return [f * (1.0 / size) ** (1 / len(factors)) for f in factors] if size else factors
