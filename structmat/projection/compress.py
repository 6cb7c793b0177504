"""Compression: fewer parameters for a matrix that already has structure, without forming it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from structmat import arrays, rules
from structmat.algebra import Scaled, Sum
from structmat.arrays import Array
from structmat.linalg import norm
from structmat.operator import Operator
from structmat.patterns import AxisOrder
from structmat.projection.certificate import Projection
from structmat.projection.hierarchical import balance
from structmat.projection.interpolative import interpolate
from structmat.projection.placement import where
from structmat.projection.rounding import (
    added,
    choose_ranks,
    cut,
    link_ranks,
    norm_of,
    parameters,
    same_skeleton,
    spectra,
)
from structmat.projection.selection import Request, infeasible, parameter_limit
from structmat.projection.svd import safe_bound
from structmat.projection.target import like, rounding
from structmat.structures import factor
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.interpolative import Interpolative
from structmat.structures.kronecker import Kronecker

_EPS = float(np.finfo(np.float64).eps)


class Goal(NamedTuple):
    """What is asked for: one of a relative error, a rank and a number of parameters."""

    tol: float | None
    rank: int | None
    limit: int | None


class Cut(NamedTuple):
    """A chain in double precision, cut; ``bound <= best possible`` for its ranks."""

    factors: list[np.ndarray]
    whole: list[np.ndarray]  # before
    norm: float
    bound: float


@rules.fallback("compress")
def compress(operator: Operator, tol: float | None, rank: int | None, budget: float | None) -> Projection:
    """The nearest operator of the same kind with smaller ranks; see :meth:`structmat.Operator.compress`.

    ======================================= =============================================================================
    chain of chainable factors              sweeps of QR factorisations and SVDs over the factors, as in TT-rounding
    (LowRank, Monarch, BlockTensorTrain,    (Oseledets 2011): optimal for two factors, ``max E_s <= best <= error <=
    Chain), their transposes and multiples  sqrt(sum E_s^2)`` for more, ``E_s`` the tail of the singular values of link s
    sum of such chains of one layout        the same for the links side by side
    Interpolative                           the same, in interpolative form again
    sum of Kronecker products of two dense  the same for the rearranged matrix, a low-rank matrix ``sum vec(X) vec(Y)^T``
    factors                                 (Van Loan and Pitsianis 1993): fewer terms, optimal
    Kronecker product with two-factor       every factor by itself: optimal, since ``||A (x) B||`` is a product of norms;
    chains as factors                       a tolerance or budget is divided among them in the best way
    ======================================= =============================================================================

    With a tolerance, an operator than which none smaller is found comes back as it is. Cost ``O((m + n) r^2)`` for a low-rank
    operator; nothing of the size of the matrix is ever formed. Memory: a few times the stored numbers. Computed on the host.
    """
    started = time.perf_counter()
    if sum(option is not None for option in (tol, rank, budget)) != 1:
        raise ValueError("compress: expected exactly one of tol, rank and budget")
    if rank is not None and rank < 1:
        raise ValueError(f"compress: expected a rank of at least 1, got {rank}")
    if tol is not None and not 0 <= tol < math.inf:
        raise ValueError(f"compress: expected a tolerance of at least 0, got {tol}")
    if operator.batch_shape:
        raise _refusal(operator)
    limit = None if budget is None else parameter_limit(budget, (operator.shape[-2], operator.shape[-1]))
    found = _compressed(operator, Goal(tol, rank, limit))
    if tol is not None and found.params > operator.nparams:
        kept = "kept as it is: no smaller one is near enough"
        found = Projection(operator, 0.0, 0.0, 0.0, kept, 0.0, operator.nparams)
    method = found.method + (where(operator.arrays[0]) if operator.arrays else "")
    return replace(found, method=method, seconds=time.perf_counter() - started)


def _compressed(operator: Operator, goal: Goal) -> Projection:
    if isinstance(operator, Scaled):
        return _scaled(_compressed(operator.operator, goal), operator.scalar)
    if isinstance(operator, Interpolative):
        return _compressed_interpolative(operator, goal)
    if isinstance(operator, Chain):
        return _compressed_chain(operator, goal)
    if isinstance(operator, Sum):
        return _compressed_sum(operator, goal)
    if isinstance(operator, Kronecker):
        return _compressed_kronecker(operator, goal)
    raise _refusal(operator)


def _refusal(operator: Operator) -> NotImplementedError:
    return NotImplementedError(
        f"compress: {operator} has no block rank to lower; use structmat.project(A, family, ...), which makes it dense"
    )


def _scaled(p: Projection, scalar: Any) -> Projection:
    size = float(abs(scalar))
    return replace(p, operator=p.operator * scalar, error=p.error * size, lower_bound=p.lower_bound * size)


# ---- chains ------------------------------------------------------------------------------------------------------------


def _compressed_chain(operator: Chain, goal: Goal) -> Projection:
    if not _has_ranks(operator):
        if not (isinstance(operator.T, Chain) and _has_ranks(operator.T)):
            raise _refusal(operator)
        p = _compressed_chain(operator.T, goal)
        return replace(p, operator=p.operator.T)
    found = _cut(_double(operator), goal, operator, operator.factors[0])
    result = like(operator.with_factors(balance(found.factors)), operator.factors[0])
    return _certified(result, _double(result), found, _method(len(found.factors)))


def _has_ranks(operator: Chain) -> bool:
    """Whether it has links that can be cut; of three and more factors only one with a rank above 1 is worth a sweep."""
    ranks = link_ranks(operator.factors)
    return bool(ranks) and (len(ranks) == 1 or max(ranks) > 1)


def _method(count: int) -> str:
    return "QR and SVD of both factors (optimal)" if count == 2 else "rounding: QR and SVD sweeps over the factors"


def _cut(whole: list[np.ndarray], goal: Goal, operator: Operator, source: Array, gauge: int = 0) -> Cut:
    """A chain with links of the ranks that the goal asks for."""
    rounded = spectra(whole)
    norm, unit = rounded.norm, rounding(source)
    own = [len(loss) - 1 for loss in rounded.losses]
    if goal.rank is not None:
        ranks: list[int] | None = [min(goal.rank, r) for r in own]
    else:
        floor = (max(_EPS * max(own), unit / 4) * norm) ** 2
        allowed = (max(0.0, (goal.tol or 0.0) - unit) * norm) ** 2
        limit = goal.limit
        if limit is not None and gauge:  # r (m + n - r) parameters: the plain count of the largest rank that fits
            size, least = parameters(rounded.factors, [1]), min(own)
            fitting = [r for r in range(1, least + 1) if r * (size - r) <= limit]
            limit = size * fitting[-1] if fitting else 0
        ranks = choose_ranks(rounded, allowed, limit, floor if goal.limit is not None else min(floor, allowed))
    if ranks is None:
        nearest = parameters(rounded.factors, [1] * len(own)) - gauge
        raise infeasible(Request(type(operator), norm, limit=goal.limit), nearest)
    tail = math.sqrt(max(float(loss[r]) for loss, r in zip(rounded.losses, ranks, strict=True)))
    size = max(max(f.shape[2:]) for f in whole)
    return Cut(cut(rounded, ranks), whole, norm, safe_bound(tail, norm, size))


def _certified(result: Operator, stored: Sequence[np.ndarray], found: Cut, method: str) -> Projection:
    """The result with its distance, from the stored factors: the norm of the chain of the difference."""
    difference = norm_of(added(found.whole, stored, -1.0))
    ranks = [*(link_ranks(found.whole) or []), *(link_ranks(stored) or [])]
    error = difference + _EPS * (4 + sum(ranks)) * found.norm
    return Projection(
        operator=result,
        error=error,
        relative_error=error / found.norm if found.norm else 0.0,
        lower_bound=min(error, found.bound),
        method=method,
        seconds=0.0,
        params=result.nparams,
    )


def _double(operator: Any) -> list[np.ndarray]:
    """The factors of a chain in double precision; what is padding set to zero."""
    exact = np.complex128 if arrays.is_complex(operator.dtype) else np.float64
    factors = [arrays.convert(f, "numpy").astype(exact) for f in operator.factors]
    rows, cols = operator.patterns[0].rows, operator.patterns[-1].cols
    factors[0] = factor.scale_rows(
        factors[0], _inside(rows, operator.shape[-2], operator.out_order and operator.out_order.T)
    )
    factors[-1] = factor.scale_cols(factors[-1], _inside(cols, operator.shape[-1], operator.in_order))
    return factors


def _inside(size: int, logical: int, order: AxisOrder | None) -> np.ndarray:
    """1 where an index of a chain's own order lies inside the logical shape, 0 in the padding."""
    mask = (np.arange(size) < logical).astype(np.float64)
    return mask if order is None else mask[order.permutation()]


def _compressed_interpolative(operator: Interpolative, goal: Goal) -> Projection:
    plain = operator.to_low_rank()
    found = _cut(_double(plain), goal, operator, operator.basis, gauge=1)
    left, right = found.factors[0][0, 0], found.factors[1][0, 0]  # left has orthonormal columns
    if operator.side == "rows":
        made = interpolate(left, np.ones(left.shape[1]), right, "rows")
    else:
        q, triangle = np.linalg.qr(right.conj().T)
        made = interpolate(left @ triangle.conj().T, np.ones(left.shape[1]), q.conj().T, "columns")
    result: Any = like(made, operator.basis)
    return _certified(result, _double(result.to_low_rank()), found, f"{_method(2)}, interpolative form")


# ---- sums and Kronecker products ---------------------------------------------------------------------------------------


def _compressed_sum(operator: Sum, goal: Goal) -> Projection:
    terms = [(t.operator, t.scalar) if isinstance(t, Scaled) else (t, 1.0) for t in operator.terms]
    terms = [(t.to_low_rank() if isinstance(t, Interpolative) else t, c) for t, c in terms]
    if all(isinstance(t, Kronecker) for t, _ in terms):
        return _compressed_kronecker_sum(operator, terms, goal)
    chains = [t for t, _ in terms if isinstance(t, Chain)]
    if len(chains) < len(terms) or not _alike(chains):
        raise _refusal(operator)
    if not link_ranks(chains[0].factors):  # transposes of chains
        p = _compressed_sum_of_chains([(t.T, c) for t, c in terms], goal, operator)  # pyright: ignore[reportArgumentType]
        return replace(p, operator=p.operator.T)
    return _compressed_sum_of_chains(terms, goal, operator)


def _alike(chains: Sequence[Chain]) -> bool:
    """Whether chains can be added link by link."""
    ends = {(c.out_order, c.in_order, c.shape, c.patterns[0].rows, c.patterns[-1].cols) for c in chains}
    if len(ends) > 1:
        return False
    if not link_ranks(chains[0].factors):
        chains = [c.T for c in chains]  # pyright: ignore[reportAssignmentType]
    return bool(link_ranks(chains[0].factors)) and all(same_skeleton(chains[0].factors, c.factors) for c in chains)


def _compressed_sum_of_chains(terms: Sequence[tuple[Any, Any]], goal: Goal, operator: Sum) -> Projection:
    (first, scalar), *others = terms
    whole = _double(first)
    whole[0] = whole[0] * scalar
    for chain, c in others:
        whole = added(whole, _double(chain), c)
    source = arrays.cast(first.factors[0], arrays.dtype_for(operator.dtype, first.kind))
    found = _cut(whole, goal, operator, source)
    family = type(first) if len({type(t) for t, _ in terms}) == 1 else Chain
    made = family._rebuild(tuple(balance(found.factors)), first.shape[-2:], first.out_order, first.in_order)
    result = like(made, source)
    return _certified(result, _double(result), found, _method(len(found.factors)))


def _compressed_kronecker_sum(operator: Sum, terms: Sequence[tuple[Any, Any]], goal: Goal) -> Projection:
    """Fewer terms: the rearranged matrix ``sum vec(X) vec(Y)^T`` is low-rank."""
    shapes = {tuple(f.shape for f in t.factors) for t, _ in terms}
    dense = all(type(f) is Dense for t, _ in terms for f in t.factors)
    if len(shapes) > 1 or not dense or len(terms[0][0].factors) != 2:
        raise _refusal(operator)
    (first, second), source = shapes.pop(), terms[0][0].factors[0].array
    source = arrays.cast(source, arrays.dtype_for(operator.dtype, operator.kind))
    exact = np.complex128 if arrays.is_complex(operator.dtype) else np.float64

    def stacked(parts: Sequence[tuple[Any, Any]], i: int) -> np.ndarray:
        vectors = [
            arrays.convert(t.factors[i].array, "numpy").astype(exact).ravel() * (1.0 if i else c) for t, c in parts
        ]
        return np.stack(vectors, axis=-1 if i == 0 else 0)[None, None]

    found = _cut([stacked(terms, 0), stacked(terms, 1)], goal, operator, source)
    x, y = (f[0, 0] for f in balance(found.factors))
    columns = [np.ascontiguousarray(c).reshape(first) for c in x.T]
    made = [Kronecker(c, row.reshape(second)) for c, row in zip(columns, y, strict=True)]
    results: list[Any] = [like(term, source) for term in made]
    kept = [(term, 1.0) for term in results]
    result = results[0] if len(results) == 1 else Sum(*results)
    return _certified(result, [stacked(kept, 0), stacked(kept, 1)], found, "QR and SVD of the rearranged sum (optimal)")


def _compressed_kronecker(operator: Kronecker, goal: Goal) -> Projection:
    """Every two-factor chain among the factors by itself.

    With orthogonal truncations ``<A, A'> = ||A'||**2``, so that the captured norm is the product of those of the factors and
    the best product for given ranks is that of the best factors.
    """
    places = [i for i, f in enumerate(operator.factors) if _single_link(f)]
    if not places:
        raise _refusal(operator)
    chains: list[Any] = [operator.factors[i] for i in places]
    chains = [c if _has_ranks(c) else c.T for c in chains]
    tables = [spectra(_double(c)) for c in chains]
    fixed = sum(f.nparams for i, f in enumerate(operator.factors) if i not in places)
    losses = [t.losses[0] / t.norm**2 if t.norm else np.zeros(len(t.losses[0])) for t in tables]
    steps = [parameters(t.factors, [1]) for t in tables]
    ranks = _divided(losses, steps, goal, fixed, operator)
    parts = [_compressed(operator.factors[i], Goal(None, r, None)) for i, r in zip(places, ranks, strict=True)]
    factors = list(operator.factors)
    norms = [norm_of(_double(c)) for c in chains]
    for i, p in zip(places, parts, strict=True):
        factors[i] = p.operator
    result = Kronecker(*factors)
    total = math.prod(norms) * math.prod(_norm(f) for i, f in enumerate(operator.factors) if i not in places)
    shares = [p.error / n if n else 0.0 for p, n in zip(parts, norms, strict=True)]
    least = [p.lower_bound / n if n else 0.0 for p, n in zip(parts, norms, strict=True)]
    unit = max(rounding(c.factors[0]) for c in chains)
    relative = _together(shares) + (4 * unit * len(parts) if unit > 4 * _EPS else 8 * _EPS * len(parts))
    bound = max(0.0, _together(least) - 8 * _EPS * len(parts))
    relative = relative if total else 0.0
    method = "QR and SVD of every factor (optimal)"
    return Projection(result, relative * total, relative, min(bound, relative) * total, method, 0.0, result.nparams)


def _single_link(operator: Operator) -> bool:
    return (
        isinstance(operator, Chain) and len(operator.factors) == 2 and (_has_ranks(operator) or _has_ranks(operator.T))  # pyright: ignore[reportArgumentType]
    )


def _norm(operator: Operator) -> float:
    """Frobenius norm of a factor, exactly and in double precision."""
    return float(norm(operator.astype(np.complex128 if arrays.is_complex(operator.dtype) else np.float64)))


def _together(shares: Sequence[float]) -> float:
    """Relative error of a Kronecker product from those of its factors: ``1 - prod (1 - e**2)``, without cancellation."""
    return math.sqrt(-math.expm1(sum(math.log1p(-(min(e, 1.0 - 1e-16) ** 2)) for e in shares)))


def _divided(
    losses: Sequence[np.ndarray], steps: Sequence[int], goal: Goal, fixed: int, operator: Operator
) -> tuple[int, ...]:
    """Ranks of the factors: the fewest parameters within a tolerance, or the least error within a limit.

    The logarithms of the captured shares add up: the factors are merged one by one, and what is neither smaller nor better
    than another choice is dropped.
    """
    if goal.rank is not None:
        return tuple(min(goal.rank, len(loss) - 1) for loss in losses)
    front: list[tuple[int, float, tuple[int, ...]]] = [(fixed, 0.0, ())]
    for loss, step in zip(losses, steps, strict=True):
        with np.errstate(divide="ignore"):
            lost = -np.log1p(-np.minimum(loss, 1.0))
        merged = [(c + step * r, e + float(lost[r]), (*taken, r)) for c, e, taken in front for r in range(1, len(loss))]
        front = []
        for choice in sorted(merged):
            if not front or choice[1] < front[-1][1]:
                front.append(choice)
    if goal.limit is not None:
        fitting = [choice for choice in front if choice[0] <= goal.limit]
        if not fitting:
            raise infeasible(Request(type(operator), 1.0, limit=goal.limit), front[0][0])
        return fitting[-1][2]
    tol = max(0.0, (goal.tol or 0.0) - len(losses) * 4 * _EPS)
    allowed = -math.log1p(-(tol**2)) if tol < 1.0 else math.inf
    near = [choice for choice in front if choice[1] <= allowed]
    return (near[0] if near else front[-1])[2]
