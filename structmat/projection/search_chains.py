"""Search among members without a spectrum: block-diagonal matrices, butterflies and chains of three factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from structmat.patterns import Pattern
from structmat.projection.cost import chain_stages
from structmat.projection.hierarchical import pad, sweep
from structmat.projection.progress import Advance
from structmat.projection.search import Search, last_of
from structmat.projection.selection import Ladder, allowed_error
from structmat.projection.support import block_ladders
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_tensor_train import balanced_radices, chain_patterns
from structmat.structures.butterfly import butterfly_patterns
from structmat.structures.chain import Chain, ceil_div


def block_diagonal(search: Search) -> None:
    """All numbers of blocks, from sums of squares."""
    ladders = block_ladders(search.prepared)
    search.nearest = min([search.nearest, *(a.step for a in ladders)])
    fitting = [a for a in ladders if a.step <= search.cap]
    for a in fitting:
        search.record("BlockDiagonal", a)
    if search.request.tol is None:
        order = sorted(fitting, key=lambda a: (float(a.errors[1]), a.step))
    else:
        goal = allowed_error(search.request)
        order = sorted((a for a in fitting if a.errors[1] <= goal), key=lambda a: a.step)
    if search.weight is not None and search.request.tol is not None:
        found: Any = search.within_tolerance(BlockDiagonal, {})
        order = [] if found is None else [Ladder(found.operator.blocks.shape[0], 0, np.empty(0))]
    for a in order[:1]:
        m, n = search.shape
        stages = chain_stages([Pattern(a.member, ceil_div(m, a.member), ceil_div(n, a.member), 1)])
        search.project(BlockDiagonal, f"BlockDiagonal, {a.member} blocks", {"blocks": a.member}, stages)


def butterflies(search: Search) -> list[tuple[Pattern, ...]]:
    """Butterflies of the default radices and of 2, 4, 8, ... that leave two factors."""
    radices = (None, *(2**i for i in range(1, max(search.shape).bit_length() + 1)))
    found = {tuple(butterfly_patterns(search.shape, radix)) for radix in radices}
    return [c for c in found if len(c) >= 2]


def three_factors(search: Search) -> list[tuple[Pattern, ...]]:
    """Chains of three factors, of ranks 1, 2, 4, ... and the largest within the cap."""
    (m, n), found = search.shape, []
    q, p = balanced_radices(m, 3), balanced_radices(n, 3)
    top = min(max(q[0], 1), max(p[-1], 1))

    def of_rank(rank: int) -> tuple[Pattern, ...]:
        return tuple(Pattern(*t) for t in chain_patterns(q, p, (1, rank, rank, 1)))

    if min(q[0], p[0]) < 2:
        return []
    last = last_of(top, lambda r: sum(t.nparams for t in of_rank(r)) <= search.cap)
    ranks = [last] if search.request.tol is None else [*(2**i for i in range(last.bit_length())), last]
    found += [of_rank(r) for r in dict.fromkeys(ranks) if r > 0]
    if last == 0:
        search.nearest = min(search.nearest, sum(t.nparams for t in of_rank(1)))
    return found


def chains(search: Search, family: type[Chain], candidates: Sequence[tuple[Pattern, ...]], advance: Advance) -> None:
    """Sweep over the candidates within the cap; the best of them, and of those no slower than dense, are projected."""
    order = sorted(candidates, key=lambda c: (sum(p.nparams for p in c), c))
    search.nearest = min([search.nearest, *(sum(p.nparams for p in c) for c in order)])
    fitting = [c for c in order if sum(p.nparams for p in c) <= search.cap]
    if search.weight is not None and search.request.tol is not None:
        smallest_chain(search, family, fitting, advance)
        return
    advance(0, len(fitting))
    swept: list[tuple[float, tuple[Pattern, ...]]] = []
    for c in fitting:
        error = sweep(pad(search.prepared, c), c, bounds=False).error
        swept.append((error, c))
        count = sum(p.nparams for p in c)
        search.record(family.__name__, Ladder(None, count, np.array([search.request.norm, error])))
        advance(1, 0)
        if search.request.tol is not None and error <= allowed_error(search.request):
            break  # by size: the first one that is near enough is the smallest
    fast = [s for s in swept if not search.cost(chain_stages(s[1])).slower]
    best = [min(group, key=lambda s: s[0]) for group in (swept, fast) if group]
    for _, c in dict.fromkeys(best[:1] if search.allow_slower else best):
        add_chain(search, family, c)


def add_chain(search: Search, family: type[Chain], patterns: tuple[Pattern, ...]) -> bool:
    """Project onto a chain; whether that gave an entry."""
    label = f"{family.__name__}, {len(patterns)} factors, patterns {_patterns(patterns)}"
    before = len(search.entries)
    search.project(family, label, {"patterns": [tuple(p) for p in patterns]}, chain_stages(patterns))
    return len(search.entries) > before


def smallest_chain(
    search: Search, family: type[Chain], fitting: Sequence[tuple[Pattern, ...]], advance: Advance
) -> None:
    """Bisect over the candidates by size for one that meets the tolerance in the norm of the weight."""
    low, high = -1, len(fitting)
    while high - low > 1:
        middle = (low + high) // 2 if high < len(fitting) else high - 1  # the largest first: it meets it or none
        advance(0, 1)
        low, high = (low, middle) if add_chain(search, family, fitting[middle]) else (middle, high)
        advance(1, 0)


def _patterns(patterns: Sequence[Pattern]) -> str:
    shown = [f"({p.a},{p.b},{p.c},{p.d})" for p in patterns]
    return " ".join(shown if len(shown) <= 3 else [shown[0], "...", shown[-1]])
