"""Neighbouring factors with small blocks as one: more arithmetic, but in products long enough to run at speed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from structmat.backends.base import ChainLayout
from structmat.backends.merge import is_rank_one, product
from structmat.patterns import Pattern

SMALL = 8  # inner sizes below which a product is bound by loads and stores
LARGE = 32  # inner size beyond which merging is not worth its arithmetic
GROWTH = 2.6  # arithmetic that a merged pair may cost, over that of the pair


def merged_chain(layout: ChainLayout, blocks: Sequence[np.ndarray]) -> tuple[ChainLayout, tuple[np.ndarray, ...]]:
    """The same chain with pairs of neighbours multiplied out where both are small; itself where there are none."""
    patterns, values = list(layout.patterns), list(blocks)
    i = len(patterns) - 2
    while i >= 0:
        if _worthwhile(patterns[i], patterns[i + 1]):
            values[i : i + 2] = [product(values[i], values[i + 1])]
            patterns[i : i + 2] = [patterns[i].product(patterns[i + 1])]
            i = min(i, len(patterns) - 2)
        else:
            i -= 1
    return layout._replace(patterns=tuple(patterns)), tuple(values)


def _worthwhile(left: Pattern, right: Pattern) -> bool:
    if not is_rank_one(left, right):
        return False
    both = left.product(right)
    small = min(left.b, left.c, right.b, right.c) < SMALL
    return small and max(both.b, both.c) <= LARGE and both.nparams <= GROWTH * (left.nparams + right.nparams)
