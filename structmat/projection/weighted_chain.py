"""Butterfly and other chains in a weighted norm: L-BFGS on all factors, from the better of two hierarchical sweeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from structmat.patterns import Pattern
from structmat.projection.certificate import frobenius
from structmat.projection.gradient import project_any_chain
from structmat.projection.hierarchical import ORDERS, balance, check_chainable, pad, parameters, sweep
from structmat.projection.links import apply, multiplied_out
from structmat.projection.progress import Advance, quiet
from structmat.projection.selection import Request, Solution, allowed_error, infeasible, unreachable
from structmat.projection.two_factor import Layout, Place
from structmat.projection.weight import Metric, Weight, columns_of
from structmat.projection.weighted_bounds import AFFORDABLE, least_eigenvalue, two_factor_bound
from structmat.projection.weighted_classes import Classes, Side, safe
from structmat.projection.weighted_support import fit_support
from structmat.structures.block_tensor_train import (
    BlockTensorTrain,
    balanced_radices,
    chain_patterns,
    digit_reversal,
    output_radices,
)
from structmat.structures.butterfly import Butterfly, butterfly_patterns
from structmat.structures.chain import Chain

ITERATIONS = 200
EXACT = 1e-13  # relative error that no iteration improves
_EPS = float(np.finfo(np.float64).eps)

Factors = tuple[np.ndarray, ...]  # (a, d, b, c) each


class Fit(NamedTuple):
    """Factors with their exact weighted error, a lower bound, and how they were found."""

    factors: Factors
    error: float
    lower_bound: float
    method: str


def fit(target: np.ndarray, patterns: Sequence[Pattern], weight: Weight, request: Request, improve: bool = True) -> Fit:
    """The chain of given patterns whose outputs are nearest: a local optimum, never worse than the unweighted projection.

    Two starts: the sweep of ``W``, and the sweep of ``W S`` with ``S`` the weight's part on the blocks of the last factor,
    which takes ``S^-1`` up. The better one is improved on all factors at once (L-BFGS on ``||(W - A) S||^2``, in coordinates
    in which those blocks are white). The error is that of the factors, recomputed.
    """
    metric, order = columns_of(weight), request.order or ORDERS[0]
    if request.permutation == "search":
        raise ValueError("permutation: 'search' is not for a weight; give the index arrays that it finds without one")
    if len(patterns) == 1:
        blocks = fit_support(target, patterns[0], weight)
        error = weight.norm(target - multiplied_out([blocks], target.shape))
        return Fit((blocks,), error, safe(error, target, weight), "weighted least squares on the support (optimal)")
    last, wide, white = patterns[-1], pad(target, patterns), White(metric, patterns[-1])
    side, local = white.side, sweep(white.matrix(wide), patterns, order)
    starts = []
    for factors in (white.back(local.factors), tuple(sweep(wide, patterns, order, bounds=False).factors)):
        starts.append((weight.norm(target - multiplied_out(factors, target.shape)), factors))
    error, factors = min(starts, key=lambda pair: pair[0])
    bound = 0.0
    if not side.ridge:
        bound = math.sqrt(least_eigenvalue(side)) * local.lower_bound
    if improve and request.bound and last.cols <= AFFORDABLE:
        bound = max([bound, *split_bounds(target, patterns, weight)])
    name = "weighted hierarchical SVD"
    if side.decoupled and len(patterns) == 2:
        return Fit(balance(factors), error, safe(bound, target, weight), f"{name} (optimal)")
    if improve and error > EXACT * weight.norm(target):
        improved, steps = white.descend(wide, factors, ITERATIONS, request.advance)
        better = weight.norm(target - multiplied_out(improved, target.shape))
        if better < error:
            factors, error, name = improved, better, f"{name} + {steps} iterations of L-BFGS"
    return Fit(balance(factors), error, safe(bound, target, weight), name)


class White:
    """Coordinates in which the weight's blocks of the last factor of a chain are identities."""

    def __init__(self, metric: Metric, last: Pattern) -> None:
        self.order = np.arange(last.cols).reshape(last.a, last.c, last.d).transpose(0, 2, 1).ravel()  # by blocks
        self.side = Side(metric, self.order, last.a * last.d)
        self.stack = (last.a, last.d, last.c, last.c)

    def matrix(self, wide: np.ndarray) -> np.ndarray:
        """``W S`` with ``S`` those blocks' factors."""
        count, q = self.side.solid.shape[:2]
        blocks = wide[:, self.order].reshape(len(wide), count, q).transpose(1, 0, 2) @ self.side.solid
        result = np.empty(wide.shape, blocks.dtype)
        result[:, self.order] = blocks.transpose(1, 0, 2).reshape(len(wide), -1)
        return result

    def back(self, factors: Sequence[np.ndarray]) -> Factors:
        """The chain times ``S^-1``: only the last factor changes."""
        return (*factors[:-1], factors[-1] @ self.side.inverse.reshape(self.stack))

    def descend(
        self, wide: np.ndarray, factors: Sequence[np.ndarray], iterations: int, advance: Advance = quiet
    ) -> tuple[Factors, int]:
        """:func:`descend` in these coordinates, from there and back."""
        prepared = (*factors[:-1], factors[-1] @ self.side.solid.reshape(self.stack))
        inverse = np.argsort(self.order)
        coupling = self.side.coupling[np.ix_(inverse, inverse)]
        improved, steps = descend(self.matrix(wide), prepared, coupling, advance, iterations)
        return self.back(improved), steps


def step(target: np.ndarray, chain: Chain, weight: Weight, iterations: int) -> Chain:
    """The chain after a few iterations of L-BFGS on all factors, from where it is; for one without axis orders."""
    white = White(columns_of(weight), chain.patterns[-1])
    return chain.with_factors(balance(white.descend(pad(target, chain.patterns), chain.factors, iterations)[0]))


def split_bounds(target: np.ndarray, patterns: Sequence[Pattern], weight: Weight) -> list[float]:
    """Lower bounds from every split of the chain in two: a chain is a member of each of these two-factor sets."""
    found = []
    for s in range(1, len(patterns)):
        left, right = _product(patterns[:s]), _product(patterns[s:])
        rank = left.chain_rank(right)
        if rank is None or left.a != 1 or right.d != 1 or rank >= min(left.b, right.c):
            continue
        at = Layout(left.d, right.a, left.b, right.c, contiguous=False)
        found.append(two_factor_bound(Classes(target, Place(at), weight), rank))
    return found


def _product(patterns: Sequence[Pattern]) -> Pattern:
    result = patterns[0]
    for p in patterns[1:]:
        result = result.product(p)
    return result


def descend(
    target: np.ndarray,
    start: Sequence[np.ndarray],
    gram: np.ndarray,
    advance: Advance = quiet,
    iterations: int = ITERATIONS,
) -> tuple[Factors, int]:
    """Factors with a smaller ``tr(E C E^H)``, ``E`` the target minus the chain, and the number of iterations.

    Cost of an iteration: ``m n^2``, and ``m n b`` for each factor; memory ``n^2`` for each factor.
    """
    from scipy.optimize import minimize

    start = balance(start)
    dtype = np.result_type(target.dtype, gram.dtype, *(f.dtype for f in start))
    shapes = [f.shape for f in start]

    def unpack(x: np.ndarray) -> list[np.ndarray]:
        values = x.view(dtype)
        ends = np.cumsum([math.prod(s) for s in shapes])
        return [part.reshape(s) for part, s in zip(np.split(values, ends[:-1]), shapes, strict=True)]

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        factors = unpack(x)
        rights = [np.eye(len(gram), dtype=dtype)]  # products of the factors right of each, last first
        for factor in reversed(factors):
            rights.append(apply(factor, rights[-1]))
        error = rights.pop() - target
        back = error @ gram
        value = float(np.vdot(error, back).real)
        gradients = []
        for factor, right in zip(factors, reversed(rights), strict=True):
            a, d, b, c = factor.shape
            columns = right.reshape(a, c, d, -1).transpose(0, 2, 3, 1).conj()
            gradients.append((back.reshape(a, b, d, -1).swapaxes(1, 2) @ columns).ravel())
            back = apply(factor.conj().swapaxes(-1, -2), back)
        gradient = np.concatenate(gradients).astype(dtype)
        return value / scale, np.ascontiguousarray(gradient).view(np.float64) * (2.0 / scale)

    first = np.concatenate([f.ravel() for f in start]).astype(dtype).view(np.float64)
    scale, steps, x = 1.0, 0, first
    scale = objective(x)[0] or 1.0
    while steps < iterations:  # anew where the error has shrunk so far that its decrease counts for nothing
        options = {"maxiter": iterations - steps, "maxfun": 2 * iterations, "ftol": 1e-6, "gtol": 0.0, "maxcor": 20}
        result = minimize(objective, x, jac=True, method="L-BFGS-B", options=options, callback=lambda _: advance(1, 1))
        x, steps = np.ascontiguousarray(result.x), steps + max(1, int(result.nit))
        if not 0.0 < result.fun < 0.5:
            break
        scale *= float(result.fun)
    return tuple(np.array(f) for f in unpack(x)), steps


# ---- families ------------------------------------------------------------------------------------------------------------


def weighted_chain(target: np.ndarray, request: Request, weight: Weight) -> Solution:
    """A chain of given patterns, see :func:`fit`."""
    if request.patterns is None:
        raise ValueError("patterns: projection onto a Chain needs the patterns (a, b, c, d) of its factors")
    if not all(p.chain_rank(q) for p, q in pairwise(request.patterns)):
        return fit_any(target, request, weight)
    check_chainable(request.patterns, target.shape)
    found = fit(target, request.patterns, weight, request)
    return Solution(
        Chain(found.factors, (target.shape[0], target.shape[1])), found.lower_bound, found.method, ridge=weight.ridge
    )


def fit_any(target: np.ndarray, request: Request, weight: Weight) -> Solution:
    """A chain that no SVD splits (BLAST, MM*): L-BFGS from its projection without a weight."""
    plain = project_any_chain(target, replace(request, norm=frobenius(target)))
    if not isinstance(plain.operator, Chain):
        raise TypeError(f"expected a Chain, got {type(plain.operator).__name__}")
    metric, (rows, cols) = columns_of(weight), (plain.operator.patterns[0].rows, plain.operator.patterns[-1].cols)
    gram = np.eye(cols, dtype=metric.matrix.dtype)  # the padding is not seen, but stays near zero
    gram[: len(metric.solid), : len(metric.solid)] = metric.solid
    wide = np.pad(target, [(0, rows - target.shape[0]), (0, cols - target.shape[1])])
    factors, steps = descend(wide, plain.operator.factors, gram, request.advance)
    better = plain.operator.with_factors(factors)
    errors = [weight.norm(target - x.to_dense()) for x in (plain.operator, better)]
    name = f"{plain.method} + {steps} iterations of weighted L-BFGS" if errors[1] < errors[0] else plain.method
    operator = better if errors[1] < errors[0] else plain.operator
    return Solution(operator, 0.0, f"{name} (no lower bound known)", ridge=metric.ridge)


def weighted_butterfly(target: np.ndarray, request: Request, weight: Weight) -> Solution:
    """A butterfly of given patterns or radix, see :func:`fit`; a budget or a tolerance compares the radices."""
    shape = (target.shape[0], target.shape[1])
    if request.patterns is not None:
        check_chainable(request.patterns, target.shape, rank=1)
        found = fit(target, request.patterns, weight, request)
    elif request.free:
        found = _choose_radix(target, request, weight)
    else:
        found = fit(target, butterfly_patterns(shape, request.radix), weight, request)
    return Solution(Butterfly(found.factors, shape), found.lower_bound, found.method, ridge=weight.ridge)


def _choose_radix(target: np.ndarray, request: Request, weight: Weight) -> Fit:
    shape = (target.shape[0], target.shape[1])
    radices = (None, *(2**i for i in range(1, max(shape).bit_length() + 1)))
    candidates = {tuple(butterfly_patterns(shape, radix)) for radix in radices}
    longest = max(map(len, candidates))
    candidates = sorted((c for c in candidates if len(c) >= min(2, longest)), key=parameters)
    if request.limit is not None:
        limit = request.limit
        fitting = [c for c in candidates if parameters(c) <= limit]
        if not fitting:
            raise infeasible(request, parameters(candidates[0]))
        starts = [(fit(target, c, weight, request, improve=False).error, i) for i, c in enumerate(fitting)]
        return fit(target, fitting[min(starts)[1]], weight, request)
    best = math.inf
    for c in candidates:  # by size: the first one that is near enough is the smallest
        found = fit(target, c, weight, request)
        if found.error <= allowed_error(request):
            return found
        best = min(best, found.error)
    raise unreachable(request, best)


def weighted_train(target: np.ndarray, request: Request, weight: Weight) -> Solution:
    """A Block Tensor-Train of three and more cores, see :func:`fit`; a budget or a tolerance picks the rank of every link."""
    if request.blocks is not None or request.layout is not None:
        option = "blocks" if request.blocks is not None else "layout"
        raise ValueError(f"{option}: only for two cores, got cores={request.cores}")
    shape, cores = (target.shape[0], target.shape[1]), request.cores or 2
    q, p = balanced_radices(shape[0], cores), balanced_radices(shape[1], cores)

    def patterns(rank: int) -> list[Pattern]:
        return [Pattern(*t) for t in chain_patterns(q, p, (1, *([rank] * (cores - 1)), 1))]

    order = digit_reversal(output_radices(patterns(1), "BlockTensorTrain"))
    padded = np.pad(target, [(0, math.prod(q) - shape[0]), (0, 0)])[order.T.permutation()]
    most = min(shape)
    if request.limit is not None:
        if parameters(patterns(1)) > request.limit:
            raise infeasible(request, parameters(patterns(1)))
        rank = max(r for r in range(1, most + 1) if parameters(patterns(r)) <= request.limit)
        found = fit(padded, patterns(rank), weight, request)
    elif request.tol is not None:
        found = _smallest_rank(padded, patterns, weight, request, most)
    else:
        found = fit(padded, patterns(request.rank or 1), weight, request)
    operator = BlockTensorTrain._rebuild(found.factors, shape, order, None)
    return Solution(operator, found.lower_bound, found.method, ridge=weight.ridge)


def _smallest_rank(
    padded: np.ndarray, patterns: Callable[[int], list[Pattern]], weight: Weight, request: Request, most: int
) -> Fit:
    """The fit of the smallest rank within the tolerance: doubled until it is met, then by bisection."""
    allowed, low, high = allowed_error(request), 0, 1
    found = fit(padded, patterns(high), weight, request)
    while found.error > allowed and high < most:
        low, high = high, min(2 * high, most)
        found = fit(padded, patterns(high), weight, request)
    if found.error > allowed:
        raise unreachable(request, found.error)
    while high - low > 1:
        middle = (low + high) // 2
        tried = fit(padded, patterns(middle), weight, request)
        low, high, found = (low, middle, tried) if tried.error <= allowed else (middle, high, found)
    return found
