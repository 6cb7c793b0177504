"""Butterfly and other chains: one factor after another is split off by batched SVDs, from the left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from structmat.patterns import Pattern
from structmat.projection.certificate import frobenius
from structmat.projection.selection import Request, Solution, allowed_error, infeasible, unreachable
from structmat.projection.support import restrict
from structmat.projection.svd import fill, gram_tail, left_svd, safe_bound, tails
from structmat.structures.butterfly import Butterfly, butterfly_patterns
from structmat.structures.chain import Chain

_ROUNDING = 1e-13  # relative error below which a better lower bound says nothing


class Sweep(NamedTuple):
    """Factors ``(a, d, b, c)`` of a chain near a matrix, their distance from it, and a lower bound of the distance."""

    factors: tuple[np.ndarray, ...]
    error: float
    lower_bound: float


def sweep(target: np.ndarray, patterns: Sequence[Pattern]) -> Sweep:
    """A chain near a matrix: hierarchical factorization from left to right with orthonormal left factors.

    At every split the active blocks ``T`` are cut into ``U (U^H T)`` by a truncated SVD; ``U`` becomes a factor and
    ``U^H T`` is active next. The discarded parts are orthogonal to each other (as in TT-SVD), so that
    ``error**2 = sum of the discarded s**2 <= sum E_s**2`` with ``E_s`` the distance to the two-factor set at split ``s``,
    and ``max E_s <= best possible <= error <= sqrt(L - 1) max E_s``. Members are recovered to rounding. Source: Le, Zheng,
    Riccietti, Gribonval, "Butterfly factorization with error guarantees", SIAM J. Matrix Anal. Appl. 46(4), 2025
    (arXiv 2411.04506), algorithm with orthonormalisation; the bound: Oseledets, SIAM J. Sci. Comput. 33, 2011.

    Parameters
    ----------
    target
        ``(rows, columns)`` of the chain, float64 or complex128.
    patterns
        Chainable patterns, left to right, of any ranks. A chain whose product is not dense keeps the entries on its support.

    Notes
    -----
    ``O(n^2)`` for the square radix-2 chain; the lower bound costs as much again, and is left at the first split where the
    error is rounding.
    """
    remaining = list(accumulate(reversed(patterns), lambda product, p: p.product(product)))[::-1]
    whole, outside = restrict(target, remaining[0])
    norm, discarded, first = frobenius(target), outside**2, 0.0
    active, factors = whole, []
    for i, left in enumerate(patterns[:-1]):
        right = remaining[i + 1]
        rank = left.chain_rank(right) or 0
        blocks = split_view(active, left, right)
        u, s = left_svd(blocks)
        u = u[..., :rank]
        tail = float(tails(s)[min(rank, s.shape[-1])])
        discarded += tail**2
        first = first if i else tail
        x, y = fill(u, u.conj().swapaxes(-1, -2) @ blocks, rank)
        factors.append(left_blocks(x, left))
        active = right_blocks(y, right)
    factors.append(np.array(active) if active is whole else active)
    error = math.sqrt(discarded)
    bound = safe_bound(first, norm, max(target.shape))
    if error > _ROUNDING * norm:
        bound = max([bound, *inner_bounds(whole, patterns)])
    return Sweep(balance(factors), error, math.hypot(bound, outside))


def inner_bounds(whole: np.ndarray, patterns: Sequence[Pattern]) -> list[float]:
    """Lower bounds of ``E_s`` at every split after the first, 0 where it is not affordable."""
    heads = list(accumulate(patterns, Pattern.product))
    rests = list(accumulate(reversed(patterns), lambda product, p: p.product(product)))[::-1]
    pairs = list(zip(heads, rests[1:], strict=False))[1:]
    return [gram_tail(split_view(whole, left, right), left.chain_rank(right) or 0) for left, right in pairs]


def split_view(active: np.ndarray, left: Pattern, right: Pattern) -> np.ndarray:
    """The blocks ``(a1, p, q, d2, b1, c2)`` that a chainable pair holds at its rank; ``p = a2/a1``, ``q = d1/d2``.

    ``active`` are the blocks ``(a1, d2, b1 q, p c2)`` of a factor with the pattern of the product.
    """
    p, q = right.a // left.a, left.d // right.d
    return active.reshape(left.a, right.d, left.b, q, p, right.c).transpose(0, 4, 3, 1, 2, 5)


def left_blocks(x: np.ndarray, left: Pattern) -> np.ndarray:
    """Blocks ``(a, d, b, c)`` of the left factor from ``(a1, p, q, d2, b1, r)``."""
    return x.transpose(0, 2, 3, 4, 1, 5).reshape(left.a, left.d, left.b, left.c)


def right_blocks(y: np.ndarray, right: Pattern) -> np.ndarray:
    """Blocks ``(a, d, b, c)`` of the right factor from ``(a1, p, q, d2, r, c2)``."""
    return y.transpose(0, 1, 3, 4, 2, 5).reshape(right.a, right.d, right.b, right.c)


def balance(factors: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The same chain with factors of nearly equal norm, by exact powers of two: the sweep leaves all of it in the last."""
    norms = [frobenius(f) for f in factors]
    if not all(norms):
        return tuple(factors)
    logs = np.log2(norms)
    shifts = np.diff(np.rint(np.cumsum(logs.mean() - logs)), prepend=0.0)  # whole numbers that add up to 0
    return tuple(f * 2.0**shift for f, shift in zip(factors, shifts, strict=True))


def project_chain(target: np.ndarray, request: Request) -> Solution:
    """A chain of given patterns; optimal for one and two factors, else within ``sqrt(L - 1)`` of the best."""
    if request.patterns is None:
        raise ValueError("patterns: projection onto a Chain needs the patterns (a, b, c, d) of its factors")
    patterns = request.patterns
    check_chainable(patterns, target.shape)
    found = sweep(pad(target, patterns), patterns)
    shape = (target.shape[0], target.shape[1])
    return Solution(Chain(found.factors, shape), found.lower_bound, method(patterns))


def project_butterfly(target: np.ndarray, request: Request) -> Solution:
    """A butterfly matrix of given patterns or radix.

    A budget or a tolerance compares the default patterns and the radices 2, 4, 8, ... that leave at least two factors.
    """
    shape = (target.shape[0], target.shape[1])
    if request.patterns is not None:
        patterns = request.patterns
        check_chainable(patterns, target.shape, rank=1)
        found = sweep(pad(target, patterns), patterns)
    elif request.free:
        patterns, found = choose_radix(target, request)
    else:
        patterns = tuple(butterfly_patterns(shape, request.radix))
        found = sweep(pad(target, patterns), patterns)
    return Solution(Butterfly(found.factors, shape), found.lower_bound, method(patterns))


def choose_radix(target: np.ndarray, request: Request) -> tuple[tuple[Pattern, ...], Sweep]:
    """The radix with the least error within the budget, or the fewest parameters within the tolerance."""
    shape = (target.shape[0], target.shape[1])
    radices = (None, *(2**i for i in range(1, max(shape).bit_length() + 1)))
    candidates = {tuple(butterfly_patterns(shape, radix)) for radix in radices}
    longest = max(map(len, candidates))
    candidates = sorted((c for c in candidates if len(c) >= min(2, longest)), key=parameters)
    if request.limit is not None:
        fitting = [c for c in candidates if parameters(c) <= request.limit]
        if not fitting:
            raise infeasible(request, parameters(candidates[0]))
        found = [(c, sweep(pad(target, c), c)) for c in fitting]
        return min(found, key=lambda pair: pair[1].error)
    best = math.inf
    for c in candidates:  # by size: the first one that is near enough is the smallest
        found = sweep(pad(target, c), c)
        if found.error <= allowed_error(request):
            return c, found
        best = min(best, found.error)
    raise unreachable(request, best)


def parameters(patterns: Sequence[Pattern]) -> int:
    """Stored numbers of a chain."""
    return sum(p.nparams for p in patterns)


def pad(target: np.ndarray, patterns: Sequence[Pattern]) -> np.ndarray:
    """The matrix extended by zeros to the size of the chain."""
    m, n = target.shape
    rows, cols = patterns[0].rows, patterns[-1].cols
    return target if (rows, cols) == (m, n) else np.pad(target, [(0, rows - m), (0, cols - n)])


def method(patterns: Sequence[Pattern]) -> str:
    """What the sweep is for a chain of this length."""
    names = {1: "entries on the support (optimal)", 2: "blockwise SVD (optimal)"}
    return names.get(len(patterns), "hierarchical SVD from left to right")


def check_chainable(patterns: Sequence[Pattern], shape: tuple[int, ...], rank: int | None = None) -> None:
    """``ValueError`` unless neighbours are chainable (with ``rank`` if given) and the chain covers the matrix."""
    for p, q in pairwise(patterns):
        found = p.chain_rank(q)
        if found is None:
            raise ValueError(f"patterns: neighbours {tuple(p)} and {tuple(q)} are not chainable")
        if rank is not None and found != rank:
            raise ValueError(f"patterns: neighbours {tuple(p)} and {tuple(q)} have rank {found}, expected {rank}")
    size = (patterns[0].rows, patterns[-1].cols)
    if size[0] < shape[0] or size[1] < shape[1]:
        raise ValueError(f"patterns: the chain is {size[0]}x{size[1]}, too small for a matrix {shape[0]}x{shape[1]}")
