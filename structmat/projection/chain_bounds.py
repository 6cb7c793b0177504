"""Lower bounds of chains: how far the matrix is from the two-factor chain at every split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from structmat.patterns import Pattern
from structmat.projection.device import on_device, straight
from structmat.projection.links import adjoint, products, split_view
from structmat.projection.svd import GRAM_SIDE, gram_error, gram_tail, pieces

_LARGE = 1 << 24  # entries from which not every split is looked at


class Split(NamedTuple):
    """Where a chain is cut, as the axes ``(a, p, q, d, b, c)`` of its blocks and their rank."""

    axes: tuple[int, ...]
    rank: int

    @property
    def side(self) -> int:
        """The shorter side of the blocks."""
        return min(self.axes[-2:])


def inner_bound(whole: np.ndarray, patterns: Sequence[Pattern], known: Sequence[int] = ()) -> float:
    """The largest lower bound of ``E_s`` over all splits but the known ones, among those whose Gram matrices are affordable.

    The Gram matrices of the rows of a split are sums over parts of those of a later split, and those of the columns of an
    earlier one, so that two products of the matrix with itself give them all. A split is passed over where powers of its Gram
    matrices already show that its bound is no larger than the best. Of a large matrix only the splits with the largest
    affordable blocks are looked at, which are those that cost most to leave out: the nearer the middle, the more a split
    restricts.
    """
    table, last = products(patterns), len(patterns) - 1
    splits = []
    for s in sorted(set(range(last)) - set(known)):
        left, right = table[0, s], table[s + 1, last]
        axes = split_view(whole, left, right).shape
        if (left.chain_rank(right) or 0) < min(axes[-2:]) <= GRAM_SIDE:
            splits.append(Split(axes, left.chain_rank(right) or 0))
    if whole.size >= _LARGE:
        largest = max((split.side for split in splits), default=0)
        return max((gram_tail(_blocks(whole, s.axes), s.rank) for s in splits if s.side == largest), default=0.0)
    wide = [s for s in splits if s.axes[-2] <= s.axes[-1]]
    tall = [s for s in splits if s.axes[-2] > s.axes[-1]]
    grams = [*_grams(whole, wide, rows=True), *_grams(whole, tall, rows=False)]
    best = 0.0
    for split, gram in sorted(grams, key=lambda found: found[0].side, reverse=True):
        best = max(best, gram_error(gram, split.rank, max(split.axes[-2:]), best))
    return best


def _blocks(whole: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The blocks of a split, a view ``(a, p, q, d, b, c)``: see :func:`structmat.projection.links.split_view`."""
    a, p, q, d, b, c = axes
    return whole.reshape(a, d, b, q, p, c).transpose(0, 4, 3, 1, 2, 5)


def _grams(whole: np.ndarray, splits: Sequence[Split], rows: bool) -> Iterator[tuple[Split, np.ndarray]]:
    """The Gram matrices ``(a, p, q, d, side, side)`` of the rows or columns of all blocks, for every split."""
    ordered = sorted(splits, key=lambda s: s.side, reverse=True)
    if not ordered:
        return
    blocks = _blocks(whole, ordered[0].axes)
    gram = _squares(blocks if rows else adjoint(blocks))
    yield ordered[0], gram
    for split in ordered[1:]:
        a, p, q, d = split.axes[:4]
        old_p, old_q, side = gram.shape[1], gram.shape[2], gram.shape[-1]
        new = split.side  # the digit that leaves the block tells blocks apart; the one that enters it is summed over
        if rows:
            parts = gram.reshape(a, p, old_p // p, old_q, d, new, side // new, new, side // new)
            gram = np.einsum("apyqdbxcx->apxqdbc", parts).reshape(a, p, q, d, new, new)
        else:
            parts = gram.reshape(a, old_p, old_q // q, q, d, side // new, new, side // new, new)
            gram = np.einsum("apxqdybyc->apyqdbc", parts).reshape(a, p, q, d, new, new)
        yield split, gram


def _squares(blocks: np.ndarray) -> np.ndarray:
    """``B B^H`` for every block."""
    out = np.empty((*blocks.shape[:-1], blocks.shape[-2]), blocks.dtype, like=blocks)
    for part in pieces(blocks.shape, on_device(blocks)):
        piece = straight(blocks[part])
        np.matmul(piece, adjoint(piece), out=out[part])
    return out
