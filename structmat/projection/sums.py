"""Sums of families, such as low-rank + Monarch: the terms are projected in turn onto what the others leave."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from structmat.algebra import Sum
from structmat.operator import Operator
from structmat.projection.certificate import dense, frobenius
from structmat.projection.selection import Request, Solution
from structmat.projection.sum_bounds import lower_bound
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch

SWEEPS = 500
SHARES = 8  # parts of a budget that are dealt to the terms
_TRIAL = 3  # sweeps after which starts and shares are compared
_STALLED = 1e-5  # relative decrease of the error at which the sweeps end
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


def project_sum(target: np.ndarray, request: Request, terms: Sequence[Term]) -> Solution:
    """A sum of one member of each family near a matrix: a local optimum.

    Block coordinate descent: each term in turn becomes the projection of what the others leave of the matrix. Every step is
    optimal where the projection onto the family is, and one that is not nearer is refused, so that the error never grows.
    The other terms are extrapolated along their last change first (as in accelerated gradient methods) and the plain step is
    taken where that does not pay. Starts that are compared after three sweeps: the terms in different orders, each fitted to
    the remainder of those before it, and one from a random perturbation of the matrix.

    A budget is dealt to the terms that have no size of their own, in eighths where they are two, and the best share of a
    few sweeps is taken to the end; the architectures stay as the first fit chose them.

    Source: for low-rank + block-sparse the alternation of Zhou and Tao, "GoDec", ICML 2011, where each half step is optimal
    too; the sum of a flat block butterfly and a low-rank matrix is Chen et al., "Pixelated Butterfly", ICLR 2022.

    Cost: for each sweep one projection for each term, at most 500 sweeps.
    """
    rng = np.random.default_rng(0 if request.rng is None else request.rng)
    best: tuple[State, list[Term]] | None = None
    refused: ValueError | None = None
    for shared in _shared(target, request, terms):
        try:
            found = min(
                (_start(target, shared, start) for start in _starts(target, shared, rng)), key=lambda s: s.error
            )
        except ValueError as error:  # a share that is too small for its family
            refused = error
            continue
        if best is None or found.error < best[0].error:
            best = found, [_frozen(t, o) for t, o in zip(shared, found.operators, strict=True)]
        if found.error <= _EXACT * request.norm:
            break
    if best is None:
        raise refused or ValueError("budget: no share of it fits the terms")
    state = descend(target, best[1], best[0], SWEEPS)
    bound = lower_bound(target, state.operators)
    names = " + ".join(t.request.family.__name__ for t in terms)
    method = f"alternating projections, {names}" + (" (no lower bound known)" if bound is None else "")
    return Solution(Sum(*state.operators), bound or 0.0, method)


def descend(target: np.ndarray, terms: Sequence[Term], state: State, count: int) -> State:
    """The state after at most ``count`` sweeps, none of which increases the error."""
    norm = frobenius(target)
    before, momentum = state, 0
    for _ in range(count):
        if state.error <= _EXACT * norm:
            break
        now = _sweep(target, terms, state, before, momentum / (momentum + 3.0)) if momentum else None
        if now is None or not now.error < state.error:
            momentum = 0
            now = _sweep(target, terms, state, state, 0.0)
        if not now.error < state.error:
            break
        gained = state.error - now.error
        before, state, momentum = state, now, momentum + 1
        if gained <= _STALLED * state.error:
            break
    return state


def _sweep(target: np.ndarray, terms: Sequence[Term], state: State, before: State, step: float) -> State:
    """Every term projected once, the others extrapolated by ``step`` of their last change; without a step, monotone."""
    operators, parts, error = list(state.operators), list(state.parts), state.error
    for i, term in enumerate(terms):
        others = sum(p for j, p in enumerate(parts) if j != i)
        ahead = others
        if step:
            ahead = others + step * sum(
                p - q for j, (p, q) in enumerate(zip(parts, before.parts, strict=True)) if j != i
            )
        operator = _fit(target - ahead, term)
        part = dense(operator)
        now = frobenius(target - others - part)
        if now <= error or step:
            operators[i], parts[i], error = operator, part, now
    return State(tuple(operators), tuple(parts), error)


def _fit(rest: np.ndarray, term: Term) -> Operator:
    return term.solve(rest, replace(term.request, norm=frobenius(rest))).operator


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


def _start(target: np.ndarray, terms: Sequence[Term], start: tuple[tuple[int, ...], np.ndarray]) -> State:
    """The terms fitted one after another to what is left, and a few sweeps."""
    order, first = start
    operators: dict[int, Operator] = {}
    parts: dict[int, np.ndarray] = {}
    rest = first
    for i in order:
        operators[i] = _fit(rest, terms[i])
        parts[i] = dense(operators[i])
        rest = (target if rest is first and first is not target else rest) - parts[i]
    every = range(len(terms))
    state = State(tuple(operators[i] for i in every), tuple(parts[i] for i in every), 0.0)
    state = state._replace(error=frobenius(target - sum(state.parts)))
    return descend(target, [_frozen(t, o) for t, o in zip(terms, state.operators, strict=True)], state, _TRIAL)


# ---- budgets --------------------------------------------------------------------------------------------------------


def _shared(target: np.ndarray, request: Request, terms: Sequence[Term]) -> list[list[Term]]:
    """The terms with every share of the budget that is tried; as they are without a budget.

    Raises ``ValueError`` if there is nothing that a budget could size, or if the other terms use it up.
    """
    if request.limit is None:
        return [list(terms)]
    free = [i for i, t in enumerate(terms) if t.free]
    if not free:
        raise ValueError("budget: every term of the sum has a size of its own; leave one out, or the budget")
    used = sum(_fit(target, t).nparams for t in terms if not t.free)
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
        (_, l, _, kr), (k, *_) = operator.factors[0].shape, operator.factors[1].shape
        sizes = {"rank": kr // k, "blocks": (l, k)}
    elif type(operator) is BlockDiagonal:
        sizes = {"blocks": operator.blocks.shape[0]}
    elif type(first) is Kronecker:
        shapes = tuple((int(f.shape[0]), int(f.shape[1])) for f in first.factors)
        sizes = {"shapes": shapes, "terms": len(operator.terms) if isinstance(operator, Sum) else 1}
    return term._replace(request=replace(request, limit=None, **sizes)) if sizes else term
