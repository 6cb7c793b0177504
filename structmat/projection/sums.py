"""Sums of families, such as low-rank + Monarch: the terms are projected in turn onto what the others leave."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from structmat.algebra import Sum
from structmat.operator import Operator
from structmat.projection import weighted
from structmat.projection.certificate import dense, frobenius
from structmat.projection.progress import Advance, quiet
from structmat.projection.selection import Request, Solution
from structmat.projection.sum_bounds import lower_bound, weighted_lower_bound
from structmat.projection.sum_steps import step_from
from structmat.projection.two_factor import place_of
from structmat.projection.weight import Weight
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch

SWEEPS = 500
WEIGHTED_SWEEPS = 30
SHARES = 8  # parts of a budget that are dealt to the terms
_TRIAL = 3  # sweeps after which starts and shares are compared
_STALLED = 1e-5  # relative decrease of the error at which the sweeps end
_WEIGHTED_STALLED = 3e-4  # a sweep costs a descent for each term
_EXACT = 2e-15  # relative error that is rounding


class Term(NamedTuple):
    """One family of a sum: how it is projected onto, what is asked of it, and whether a budget may still size it."""

    solve: Callable[[np.ndarray, Request], Solution]
    request: Request
    free: bool


class State(NamedTuple):
    """Members of all terms, their dense matrices and the distance of their sum from the matrix."""

    operators: tuple[Operator, ...]
    parts: tuple[np.ndarray, ...]
    error: float


class Problem(NamedTuple):
    """A matrix, the norm in which a sum is to be near it, and the progress bar that every sweep moves."""

    target: np.ndarray
    weight: Weight | None = None
    advance: Advance = quiet

    def norm(self, error: np.ndarray) -> float:
        """The norm that is to be small."""
        return frobenius(error) if self.weight is None else self.weight.norm(error)


def project_sum(target: np.ndarray, request: Request, terms: Sequence[Term], weight: Weight | None = None) -> Solution:
    """A sum of one member of each family near a matrix: a local optimum.

    Block coordinate descent: each term in turn becomes the projection of what the others leave of the matrix. Every step is
    optimal where the projection onto the family is, and one that is not nearer is refused, so that the error never grows.
    The other terms are extrapolated along their last change first (as in accelerated gradient methods) and the plain step is
    taken where that does not pay. Terms of small rank take power steps from where they are instead of SVDs until those stall.
    Starts that are compared after three sweeps: the terms in different orders, each fitted to the remainder of those before
    it, and one from a random perturbation of the matrix.

    A budget is dealt to the terms that have no size of their own, in eighths where they are two, and the best share of a
    few sweeps is taken to the end; the architectures stay as the first fit chose them.

    Source: for low-rank + block-sparse the alternation of Zhou and Tao, "GoDec", ICML 2011, where each half step is optimal
    too; the sum of a flat block butterfly and a low-rank matrix is Chen et al., "Pixelated Butterfly", ICLR 2022.

    With a weight every step is the weighted projection of what the others leave and errors are in its norm. The sum that is
    found without it is one more start, so that the result is never farther than that one.

    Cost: for each sweep one projection for each term, at most 500 sweeps, and 30 more with a weight.
    """
    names = " + ".join(t.request.family.__name__ for t in terms)
    if weight is None:
        problem = Problem(target, None, request.advance)
        state = descend(problem, *_search(problem, request, terms), SWEEPS)
        bound, method, ridge = lower_bound(target, state.operators), f"alternating projections, {names}", 0.0
    else:
        state, ridge = _weighted(target, request, terms, weight), weight.ridge
        bound, method = (
            weighted_lower_bound(target, state.operators, weight),
            f"weighted alternating projections, {names}",
        )
    method += " (no lower bound known)" if bound is None else ""
    return Solution(Sum(*state.operators), bound or 0.0, method, ridge=ridge)


def _weighted(target: np.ndarray, request: Request, terms: Sequence[Term], weight: Weight) -> State:
    """A descent in the norm of a weight from the nearer of two starts: fits with it, and the sum that is found without it."""

    def aware(plain: Sequence[Term]) -> list[Term]:
        return [t._replace(solve=partial(weighted.solve, weight=weight)) for t in plain]

    problem = Problem(target, weight, request.advance)
    frozen, found = _search(problem, request, aware(terms))
    if found.error <= _EXACT * request.norm:
        return found
    plain = Problem(target, None, request.advance)
    others, start = _search(plain, replace(request, norm=frobenius(target)), terms)
    start = descend(plain, others, start, SWEEPS)
    start = start._replace(error=weight.norm(target - sum(start.parts)))
    start = descend(problem, aware(others), start, _TRIAL)
    if start.error < found.error:
        frozen, found = aware(others), start
    return descend(problem, frozen, found, WEIGHTED_SWEEPS)


def _search(problem: Problem, request: Request, terms: Sequence[Term]) -> tuple[list[Term], State]:
    """The terms with the architectures that a budget has chosen, and the best start after a few sweeps."""
    rng = np.random.default_rng(0 if request.rng is None else request.rng)
    best: tuple[State, list[Term]] | None = None
    refused: ValueError | None = None
    for shared in _shared(problem, request, terms):
        try:
            tried = [_start(problem, shared, start) for start in _starts(problem.target, shared, rng)]
        except ValueError as error:  # a share that is too small for its family
            refused = error
            continue
        found = min(tried, key=lambda s: s.error)
        if best is None or found.error < best[0].error:
            best = found, [_frozen(t, o) for t, o in zip(shared, found.operators, strict=True)]
        if found.error <= _EXACT * request.norm:
            break
    if best is None:
        raise refused or ValueError("budget: no share of it fits the terms")
    return best[1], best[0]


def descend(problem: Problem, terms: Sequence[Term], state: State, count: int) -> State:
    """The state after at most ``count`` sweeps, none of which increases the error."""
    norm = problem.norm(problem.target)
    stalled = _STALLED if problem.weight is None else _WEIGHTED_STALLED
    before, momentum, warm = state, 0, any(step_from(operator, problem.weight) for operator in state.operators)
    for _ in range(count):
        problem.advance(1, 1)
        if state.error <= _EXACT * norm:
            break
        now = _sweep(problem, terms, state, before, momentum / (momentum + 3.0), warm) if momentum else None
        if now is None or not now.error < state.error:
            momentum = 0
            now = _sweep(problem, terms, state, state, 0.0, warm)
        gained = max(0.0, state.error - now.error)
        if gained:
            before, state, momentum = state, now, momentum + 1
        if gained <= stalled * state.error:
            if not warm:
                break
            warm, momentum = False, 0
    return state


def _sweep(
    problem: Problem, terms: Sequence[Term], state: State, before: State, step: float, warm: bool = False
) -> State:
    """Every term projected once, the others extrapolated by ``step`` of their last change; without a step, monotone.

    ``warm``: a term goes a step from where it is, if there is one that is much cheaper than its projection.
    """
    operators, parts, error = list(state.operators), list(state.parts), state.error
    for i, term in enumerate(terms):
        others = sum(p for j, p in enumerate(parts) if j != i)
        ahead = others
        if step:
            ahead = others + step * sum(
                p - q for j, (p, q) in enumerate(zip(parts, before.parts, strict=True)) if j != i
            )
        move = step_from(operators[i], problem.weight) if warm else None
        rest = problem.target - ahead
        operator = _fit(rest, term, problem.norm) if move is None else move(rest)
        part = dense(operator)
        now = problem.norm(problem.target - others - part)
        if now <= error or step:
            operators[i], parts[i], error = operator, part, now
    return State(tuple(operators), tuple(parts), error)


def _fit(rest: np.ndarray, term: Term, norm: Callable[[np.ndarray], float]) -> Operator:
    return term.solve(rest, replace(term.request, norm=norm(rest), bound=False)).operator


def _starts(
    target: np.ndarray, terms: Sequence[Term], rng: np.random.Generator
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Orders of the terms, and the matrix that the first of them is fitted to."""
    forward = tuple(range(len(terms)))
    orders = list(itertools.permutations(forward)) if len(terms) <= 3 else [forward, forward[::-1]]
    for order in orders:
        yield order, target
    noise = rng.standard_normal(target.shape) * np.sqrt(np.mean(np.square(np.abs(target))))
    yield forward, target + 0.5 * noise


def _start(problem: Problem, terms: Sequence[Term], start: tuple[tuple[int, ...], np.ndarray]) -> State:
    """The terms fitted one after another to what is left, and a few sweeps."""
    target, (order, first) = problem.target, start
    operators: dict[int, Operator] = {}
    parts: dict[int, np.ndarray] = {}
    rest = first
    for i in order:
        operators[i] = _fit(rest, terms[i], problem.norm)
        parts[i] = dense(operators[i])
        rest = (target if rest is first and first is not target else rest) - parts[i]
    every = range(len(terms))
    state = State(tuple(operators[i] for i in every), tuple(parts[i] for i in every), 0.0)
    state = state._replace(error=problem.norm(target - sum(state.parts)))
    return descend(problem, [_frozen(t, o) for t, o in zip(terms, state.operators, strict=True)], state, _TRIAL)


# ---- budgets --------------------------------------------------------------------------------------------------------


def _shared(problem: Problem, request: Request, terms: Sequence[Term]) -> list[list[Term]]:
    """The terms with every share of the budget that is tried; as they are without a budget.

    Raises ``ValueError`` if there is nothing that a budget could size, or if the other terms use it up.
    """
    if request.limit is None:
        return [list(terms)]
    free = [i for i, t in enumerate(terms) if t.free]
    if not free:
        raise ValueError("budget: every term of the sum has a size of its own; leave one out, or the budget")
    used = sum(_fit(problem.target, t, problem.norm).nparams for t in terms if not t.free)
    left = request.limit - used
    if left < len(free):
        raise ValueError(f"budget: {request.limit} parameters, of which the terms with a size of their own take {used}")
    shared = []
    for share in _deals(len(free)):
        limits = dict(zip(free, share, strict=True))
        shared.append(
            [
                t._replace(request=replace(t.request, limit=max(1, math.floor(left * limits[i])))) if i in limits else t
                for i, t in enumerate(terms)
            ]
        )
    return shared


def _deals(count: int) -> list[tuple[float, ...]]:
    """Shares of a budget among ``count`` terms, every one positive, that add up to 1."""
    parts = max(count, SHARES if count == 2 else 2 + count)
    cuts = itertools.combinations(range(1, parts), count - 1)
    return [tuple((b - a) / parts for a, b in itertools.pairwise((0, *c, parts))) for c in cuts]


def _frozen(term: Term, operator: Operator) -> Term:
    """The term with the architecture that a budget has chosen for it, where it can be read off the operator."""
    request = term.request
    if request.limit is None:
        return term
    first = operator.terms[0] if isinstance(operator, Sum) else operator
    sizes: dict[str, object] = {}
    if type(operator) is LowRank:
        sizes = {"rank": operator.rank}
    elif type(operator) is Monarch:
        sizes = {"rank": operator.rank, "blocks": (operator.left.shape[0], operator.right.shape[0])}
    elif type(operator) is BlockTensorTrain and len(operator.factors) == 2:
        at, rank = place_of(operator)
        sizes = {"rank": rank, "blocks": (at.layout.l, at.layout.k)}
    elif type(operator) is BlockDiagonal:
        sizes = {"blocks": operator.blocks.shape[0]}
    elif type(first) is Kronecker:
        shapes = tuple((int(f.shape[0]), int(f.shape[1])) for f in first.factors)
        sizes = {"shapes": shapes, "terms": len(operator.terms) if isinstance(operator, Sum) else 1}
    return term._replace(request=replace(request, limit=None, **sizes)) if sizes else term
