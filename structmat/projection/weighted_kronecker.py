"""Kronecker products and sums of them in a weighted norm: alternating least squares from the nearest Kronecker weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

from structmat.algebra import Sum
from structmat.projection.certificate import dense, frobenius
from structmat.projection.drivers import eigvalsh, singular_values
from structmat.projection.kronecker import (
    Shapes,
    cheapest_split,
    check_shapes,
    near_square_splits,
    parameters,
    project_kronecker,
    unfold,
    unfolding_bound,
)
from structmat.projection.progress import Advance, quiet
from structmat.projection.selection import Ladder, Request, Solution, allowed_error, choose, infeasible, unreachable
from structmat.projection.svd import tails
from structmat.projection.weight import Metric, Weight, columns_of
from structmat.projection.weighted_classes import safe
from structmat.structures.kronecker import Kronecker, kronecker_shapes

SWEEPS = 50
STALLED = 1e-3  # relative decrease of the error in one sweep at which the iteration stops
EXACT = 1e-12  # relative error that no sweep improves
_EPS = float(np.finfo(np.float64).eps)

Terms = list[list[np.ndarray]]  # for every product its factors


class Fit(NamedTuple):
    """Terms with their exact weighted error."""

    terms: Terms
    error: float
    history: tuple[float, ...] = ()


class Unfolded:
    """A target and its weight seen through the shapes of Kronecker factors: what all numbers of terms share."""

    def __init__(self, target: np.ndarray, shapes: Shapes, weight: Weight, advance: Advance = quiet) -> None:
        self.advance = advance
        self.target, self.shapes, self.weight, self.metric = target, shapes, weight, columns_of(weight)
        self.white, self.inverses, self.share = whitened(target, shapes, self.metric)
        two = len(shapes) == 2
        self.errors = tails(singular_values(unfold(self.white, shapes))) if two else np.zeros(0)

    def fit(self, terms: int) -> Fit:
        """The nearest sum found: alternating least squares from the better of two starts, which it never makes worse."""
        starts = [self.exact(unwhitened(self.nearest(self.white, terms), self.inverses))]
        norm = self.weight.norm(self.target)
        if starts[0].error > EXACT * norm:
            starts.append(self.exact(self.nearest(self.target, terms)))
        start = min(starts, key=lambda fit: fit.error)
        if start.error <= EXACT * norm or (self.share == 1.0 and len(self.shapes) == 2):
            return start
        found, history = alternate(self.target, start.terms, self.shapes, self.metric, self.advance)
        return min(start, self.exact(found, history), key=lambda fit: fit.error)

    def nearest(self, matrix: np.ndarray, terms: int) -> Terms:
        """The nearest sum without a weight."""
        request = Request(Kronecker, frobenius(matrix), shapes=self.shapes, terms=terms)
        operator = project_kronecker(matrix, request).operator
        products = operator.terms if isinstance(operator, Sum) else (operator,)
        return [[dense(f) for f in product.factors] for product in products if isinstance(product, Kronecker)]

    def exact(self, terms: Terms, history: Sequence[float] = ()) -> Fit:
        """Terms with their error."""
        whole = sum((reduce(np.kron, factors) for factors in terms), np.zeros(()))
        return Fit(terms, self.weight.norm(self.target - whole), tuple(history))

    def bound(self, terms: int) -> float:
        """``sqrt(t)`` times the tail in the Kronecker weight ``K``, where ``C >= t K``; 0 for a nearly singular weight."""
        if self.metric.ridge or self.share == 0.0:
            return 0.0
        if len(self.shapes) == 2:
            return math.sqrt(self.share) * float(self.errors[min(terms, len(self.errors) - 1)])
        return math.sqrt(self.share) * unfolding_bound(unfold(self.white, self.shapes), terms)


def whitened(target: np.ndarray, shapes: Shapes, metric: Metric) -> tuple[np.ndarray, list[np.ndarray], float]:
    """``W (S_1 (x) S_2 ...)`` for the partial traces ``S_i S_i^H`` of the weight, the inverses of ``S_i``, and ``t``.

    ``t`` is the least eigenvalue of the weight relative to the Kronecker product ``K`` of its partial traces: ``C >= t K``;
    1 where the weight is that product.
    """
    sizes = [n for _, n in shapes]
    tensor = metric.solid.reshape(*sizes, *sizes)
    total = float(np.trace(metric.solid).real)
    factors = []
    for i in range(len(sizes)):
        axes = list(range(len(sizes)))
        labels = [*axes, *(a if a != i else len(sizes) for a in axes)]
        partial = np.einsum(tensor, labels, [i, len(sizes)])
        factors.append(np.linalg.cholesky(partial / total ** (1.0 - 1.0 / len(sizes))))
    inverses = [np.linalg.inv(s) for s in factors]
    white = apply_right(target, factors)
    product = reduce(np.kron, [s @ s.conj().T for s in factors])
    if np.abs(product - metric.solid).max() <= 16 * _EPS * np.abs(metric.solid).max():
        return white, inverses, 1.0
    adjoints = [x.conj().T for x in inverses]
    coupling = apply_right(apply_right(metric.solid, adjoints).conj().T, adjoints)
    lowest = 0.0 if metric.ridge else float(eigvalsh((coupling + coupling.conj().T) / 2)[0])
    return white, inverses, max(0.0, min(1.0, lowest) - 8.0 * _EPS * len(coupling))


def apply_right(matrix: np.ndarray, factors: Sequence[np.ndarray]) -> np.ndarray:
    """``matrix (F_1 (x) F_2 (x) ...)``, one factor after another."""
    rows, sizes = len(matrix), [len(f) for f in factors]
    for i, f in enumerate(factors):
        view = matrix.reshape(rows, math.prod(sizes[:i]), sizes[i], -1)
        matrix = np.einsum("raib,ij->rajb", view, f, optimize=True)
    return matrix.reshape(rows, -1)


def unwhitened(terms: Terms, inverses: Sequence[np.ndarray]) -> Terms:
    """Every factor times the inverse of its own whitening."""
    return [[f @ x for f, x in zip(factors, inverses, strict=True)] for factors in terms]


def alternate(
    target: np.ndarray, terms: Terms, shapes: Shapes, metric: Metric, advance: Advance = quiet
) -> tuple[Terms, list[float]]:
    """Better terms and the damped error after every sweep, which never grows: all terms' ``i``-th factors at once.

    With the other factors ``P_t`` fixed, ``sum_t A_t (x) P_t`` is linear in the ``A_t``, whose normal equations are
    ``[A_1 ... A_T] G = H`` with ``G[(t,j),(s,k)] = sum (P_t^T conj(P_s))[q,u] C[jq,ku]`` and
    ``H[i,(s,k)] = sum (W C)[ip,ku] conj(P_s)[p,u]``. Cost of a sweep: ``T^2 n^2 + (T n_i)^3`` for each factor; memory
    ``n^2`` for each factor.
    """
    count, weighted = len(shapes), target @ metric.solid
    grams = [_split(metric.solid, [n for _, n in shapes], [n for _, n in shapes], i) for i in range(count)]
    products = [_split(weighted, [m for m, _ in shapes], [n for _, n in shapes], i) for i in range(count)]
    energy = max(0.0, float(np.vdot(target, weighted).real))
    terms, history = [list(factors) for factors in terms], []
    best = [list(factors) for factors in terms]
    for _ in range(SWEEPS):
        advance(1, 1)
        rest = energy
        for i in range(count):
            _normalise(terms, i)
            others = [
                reduce(np.kron, [f for j, f in enumerate(factors) if j != i], np.ones((1, 1))) for factors in terms
            ]
            rest = energy - _update(terms, i, others, grams[i], products[i])
        error = math.sqrt(max(0.0, rest))
        if history and not error < history[-1]:
            break
        history.append(error)
        best = [list(factors) for factors in terms]
        if error <= 1e-7 * math.sqrt(energy) or (len(history) > 1 and history[-2] - error <= STALLED * history[-2]):
            break
    return best, history


def _split(matrix: np.ndarray, rows: Sequence[int], cols: Sequence[int], i: int) -> np.ndarray:
    """The matrix as ``(row i, col i, other rows, other cols)``."""
    view = matrix.reshape(math.prod(rows[:i]), rows[i], -1, math.prod(cols[:i]), cols[i], math.prod(cols[i + 1 :]))
    moved = view.transpose(1, 4, 0, 2, 3, 5)
    return np.ascontiguousarray(moved).reshape(rows[i], cols[i], -1, math.prod(cols) // cols[i])


def _normalise(terms: Terms, i: int) -> None:
    """Move the norms of the other factors of each term into its ``i``-th."""
    for factors in terms:
        for j, f in enumerate(factors):
            norm = float(np.linalg.norm(f))
            if j != i and norm > 0.0:
                factors[j], factors[i] = f / norm, factors[i] * norm


def _update(terms: Terms, i: int, others: list[np.ndarray], gram: np.ndarray, product: np.ndarray) -> float:
    """Put the best ``i``-th factors into the terms; returns by how much they lower ``tr(W C W^H)``."""
    t, (m, n) = len(terms), terms[0][i].shape
    p = np.stack(others)  # (t, rest rows, rest cols)
    inner = np.einsum("tpq,spu->tsqu", p, p.conj(), optimize=True).reshape(t * t, -1)
    g = (gram.reshape(n * n, -1) @ inner.T).reshape(n, n, t, t).transpose(2, 0, 3, 1).reshape(t * n, t * n)
    h = (product.reshape(m * n, -1) @ p.conj().reshape(t, -1).T).reshape(m, n, t).transpose(0, 2, 1).reshape(m, t * n)
    g = (g + g.conj().T) / 2
    old = np.concatenate([factors[i] for factors in terms], axis=1)
    ridge = 1e-10 * float(np.trace(g).real) / len(g)
    # a step from the old factors: nearly dependent terms stay where they are instead of growing against each other
    step = np.linalg.solve((g + max(ridge, 1e-300) * np.eye(len(g))).T, (h - old @ g).T).T
    new = old + step
    for s, factors in enumerate(terms):
        factors[i] = np.ascontiguousarray(new[:, s * n : (s + 1) * n])
    return float(2.0 * np.vdot(new, h).real - np.vdot(new, new @ g).real)


def weighted_kronecker(target: np.ndarray, request: Request, weight: Weight) -> Solution:
    """The Kronecker product, or sum of products of two factors, whose outputs are nearest: a local optimum.

    Optimal for two factors where the weight is a Kronecker product of their sizes (one SVD, Van Loan-Pitsianis 1993 after
    whitening). A budget compares the splits by their spectra in the nearest Kronecker weight; a tolerance bisects the number
    of terms of each.
    """
    shape = (target.shape[0], target.shape[1])
    shapes = request.shapes or tuple(kronecker_shapes(shape))
    check_shapes(shapes, shape)
    if len(shapes) == 1 and not request.free and (request.terms or 1) == 1:
        return Solution(Kronecker(target.copy()), 0.0, "copy (exact)")
    if len(shapes) != 2 and (request.free or len(shapes) == 1):
        raise ValueError(f"shapes: a budget and a tolerance need two factors, terms at least two; got {len(shapes)}")
    splits = [shapes]
    if request.free and request.shapes is None:
        splits = near_square_splits(shape)
        if request.limit is not None:
            splits = [a for a in splits if parameters(a) <= request.limit] or [cheapest_split(shape)]
    seen = [Unfolded(target, a, weight, request.advance) for a in splits]
    if request.tol is not None:
        chosen, found = _smallest(seen, request)
    elif request.limit is not None:
        if min(map(parameters, splits)) > request.limit:
            raise infeasible(request, min(map(parameters, splits)))
        chosen, terms = choose([Ladder(a, parameters(a.shapes), a.errors) for a in seen], request)
        found = chosen.fit(terms)
    else:
        chosen, found = seen[0], seen[0].fit(request.terms or 1)
    closed = chosen.share == 1.0 and len(shapes) == 2
    products = [Kronecker(*_balanced(factors)) for factors in found.terms]
    zeros = [np.zeros(s, target.dtype) for s in chosen.shapes]
    products += [Kronecker(*zeros) for _ in range(len(products), request.terms or 1)]
    bound = safe(chosen.bound(len(products)), target, weight)
    name = "weighted Van Loan-Pitsianis SVD (optimal)" if closed else "weighted alternating least squares"
    name += f", {len(found.history)} sweeps" if found.history else ""
    return Solution(products[0] if len(products) == 1 else Sum(*products), bound, name, ridge=weight.ridge)


def _smallest(seen: Sequence[Unfolded], request: Request) -> tuple[Unfolded, Fit]:
    """The split and number of terms with the fewest parameters that meet the tolerance."""
    best: tuple[Unfolded, Fit] | None = None
    allowed, nearest = allowed_error(request), math.inf
    for a in seen:
        most, step = len(a.errors) - 1, parameters(a.shapes)
        if best is not None:
            most = min(most, (parameters(best[0].shapes) * len(best[1].terms) - 1) // step)
        low, high, found = 0, 1, None
        while most >= 1:  # upwards first: many terms are dear to fit
            found = a.fit(min(high, most))
            nearest = min(nearest, found.error)
            if found.error <= allowed or high >= most:
                break
            low, high = high, 2 * high
        if found is None or found.error > allowed:
            continue
        high = len(found.terms)
        while high - low > 1:
            middle = (low + high) // 2
            tried = a.fit(middle)
            low, high, found = (low, middle, tried) if tried.error <= allowed else (middle, high, found)
        best = a, found
    if best is None:
        raise unreachable(request, nearest)
    return best


def _balanced(factors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Factors of equal norm with the same product."""
    norms = [float(np.linalg.norm(f)) for f in factors]
    if not all(norms):
        return list(factors)
    mean = math.exp(sum(map(math.log, norms)) / len(norms))
    return [np.ascontiguousarray(f * (mean / norm)) for f, norm in zip(factors, norms, strict=True)]
