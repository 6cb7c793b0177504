"""Rounding: the ranks of a chain lowered by sweeps over its factors, without the matrix that they stand for.

The chain counterpart of TT-rounding (Oseledets, SIAM J. Sci. Comput. 33, 2011, algorithm 2). Factors are arrays
``(a, d, b, c)``, neighbours chainable; a link of rank ``r`` is a stack of ``b x r`` and ``r x c`` blocks
(:mod:`structmat.projection.links`). A factor whose blocks have orthonormal columns leaves the Frobenius norm of what
follows alone, so that every singular value of a link is one of the blocks of the whole matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from structmat.patterns import Pattern
from structmat.projection.certificate import frobenius
from structmat.projection.drivers import svd
from structmat.projection.links import left_blocks, left_view, right_blocks, right_view
from structmat.projection.svd import tails
from structmat.structures.factor import pattern_of

Factors = list[np.ndarray]


class Rounded(NamedTuple):
    """A chain in the gauge in which its links can be cut, and what cutting costs."""

    factors: Factors  # all but the first with orthonormal rows in every block
    losses: list[np.ndarray]  # for every link the squared error (t + 1,) of rank 0, 1, ... t
    norm: float


def link_ranks(factors: Sequence[np.ndarray]) -> list[int] | None:
    """Rank of every link; ``None`` if two neighbours are not chainable."""
    ranks = [p.chain_rank(q) for p, q in pairwise(pattern_of(f) for f in factors)]
    return None if None in ranks else [rank or 0 for rank in ranks]


def orthogonalise(factors: Sequence[np.ndarray]) -> Factors:
    """The same chain with orthonormal columns in the blocks of all factors but the last, which carries the norm."""
    found = list(factors)
    for i in range(len(found) - 1):
        left, right = pattern_of(found[i]), pattern_of(found[i + 1])
        q, triangle = np.linalg.qr(left_view(found[i], left, right))
        found[i], found[i + 1] = _joined(q, triangle @ right_view(found[i + 1], left, right), left, right)
    return found


def norm_of(factors: Sequence[np.ndarray]) -> float:
    """Frobenius norm of a chain."""
    return frobenius(orthogonalise(factors)[-1])


def spectra(factors: Sequence[np.ndarray]) -> Rounded:
    """The singular values of every link, by QR factorisations from the left and SVDs from the right.

    Cost for links of rank ``r``: the stored numbers times ``r``, twice.
    """
    found = orthogonalise(factors)
    norm = frobenius(found[-1])
    losses = []
    for i in range(len(found) - 1, 0, -1):
        left, right = pattern_of(found[i - 1]), pattern_of(found[i])
        u, s, vh = svd(right_view(found[i], left, right))
        losses.append(np.square(tails(s)))
        x = left_view(found[i - 1], left, right) @ (u * s[..., None, :])
        found[i - 1], found[i] = _joined(x, vh, left, right)
    return Rounded(found, losses[::-1], norm)


def cut(rounded: Rounded, ranks: Sequence[int]) -> Factors:
    """The chain with its links cut to these ranks, from left to right.

    The discarded parts are orthogonal to each other and to the result, and none is larger than the loss of its link alone:
    ``max(losses) <= best possible**2 <= error**2 <= sum(losses)``.
    """
    found = list(rounded.factors)
    for i, rank in enumerate(ranks):
        left, right = pattern_of(found[i]), pattern_of(found[i + 1])
        u, s, vh = svd(left_view(found[i], left, right))
        rest = (s[..., :rank, None] * vh[..., :rank, :]) @ right_view(found[i + 1], left, right)
        found[i], found[i + 1] = _joined(u[..., :rank], rest, left, right)
    return found


def _joined(x: np.ndarray, y: np.ndarray, left: Pattern, right: Pattern) -> tuple[np.ndarray, np.ndarray]:
    """Both factors from blocks ``(..., b, t)`` and ``(..., t, c)`` of a link, whose rank becomes ``t``."""
    p, q, rank = right.a // left.a, left.d // right.d, x.shape[-1]
    return left_blocks(x, left._replace(c=p * rank)), right_blocks(y, right._replace(b=rank * q))


def added(first: Sequence[np.ndarray], second: Sequence[np.ndarray], sign: float = 1.0) -> Factors:
    """The chain of ``first + sign * second``, links side by side; both of the same patterns but for the ranks."""
    ranks = [link_ranks(first) or [], link_ranks(second) or []]
    total = []
    for i, (f, g) in enumerate(zip(first, second, strict=True)):
        inner = [(r[i - 1] if i else 1, r[i] if i + 1 < len(first) else 1) for r in ranks]
        six = [_by_links(x, *r) for x, r in zip((f, g), inner, strict=True)]
        (a, d, _, b, c, _), ends = six[0].shape, (i == 0, i + 1 == len(first))
        rows, cols = (1 if ends[side] else inner[0][side] + inner[1][side] for side in (0, 1))
        out = np.zeros((a, d, rows, b, c, cols), np.result_type(f, g))
        out[:, :, : inner[0][0], :, :, : inner[0][1]] += six[0]
        out[:, :, rows - inner[1][0] :, :, :, cols - inner[1][1] :] += six[1] * (sign if ends[0] else 1.0)
        total.append(out.reshape(a, d, rows * b, c * cols))
    return total


def _by_links(factor: np.ndarray, before: int, after: int) -> np.ndarray:
    """Blocks ``(a, d, b, c)`` with the ranks of both links as axes: ``(a, d, r, b/r, c/r', r')``."""
    a, d, b, c = factor.shape
    return factor.reshape(a, d, before, b // before, c // after, after)


def same_skeleton(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> bool:
    """Whether two chains have the same patterns but for the ranks of their links, so that they can be added."""
    shapes = []
    for factors in (first, second):
        ranks = link_ranks(factors)
        if ranks is None or 0 in ranks:
            return False
        pairs = zip(factors, [1, *ranks], [*ranks, 1], strict=True)
        shapes.append([(f.shape[0], f.shape[1], f.shape[2] // r, f.shape[3] // t) for f, r, t in pairs])
    return shapes[0] == shapes[1]


def parameters(factors: Sequence[np.ndarray], ranks: Sequence[int]) -> int:
    """Stored numbers of the chain with these ranks instead of its own."""
    own = link_ranks(factors) or []
    total = 0
    for i, f in enumerate(factors):
        size = f.size
        for link in (i - 1, i):
            if 0 <= link < len(ranks):
                size = size // own[link] * ranks[link]
        total += size
    return total


def choose_ranks(rounded: Rounded, allowed: float, limit: int | None, floor: float) -> list[int] | None:
    """Ranks with the fewest parameters within a squared error, or the least error within ``limit`` parameters.

    One rank at a time is given up, of the link that loses least for each parameter: optimal for one link, good for more.
    Ranks that hold less than ``floor`` squared are given up first. ``None`` if not even ranks of 1 meet the limit.
    """
    losses = rounded.losses
    ranks = [max(1, int(np.argmax(loss <= floor))) for loss in losses]
    current = parameters(rounded.factors, ranks)
    while limit is None or current > limit:
        best: tuple[float, int, int] | None = None
        spent = math.fsum(loss[r] for loss, r in zip(losses, ranks, strict=True))
        for i, (loss, r) in enumerate(zip(losses, ranks, strict=True)):
            lost = float(loss[r - 1] - loss[r])
            if r == 1 or (limit is None and spent + lost > allowed):
                continue
            count = parameters(rounded.factors, [*ranks[:i], r - 1, *ranks[i + 1 :]])
            rate = lost / (current - count)
            if best is None or rate < best[0]:
                best = (rate, i, count)
        if best is None:
            return ranks if limit is None else None
        _, i, current = best
        ranks[i] -= 1
    return ranks
