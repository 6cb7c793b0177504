"""Neighbouring factors with small blocks as one: more arithmetic, but in products long enough to run at speed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from structmat.backends.base import ChainLayout
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
            values[i : i + 2] = [_product(values[i], values[i + 1])]
            patterns[i : i + 2] = [patterns[i].product(patterns[i + 1])]
            i = min(i, len(patterns) - 2)
        else:
            i -= 1
    return layout._replace(patterns=tuple(patterns)), tuple(values)


def _worthwhile(left: Pattern, right: Pattern) -> bool:
    if left.a * left.c != right.a or left.d != right.b * right.d:  # not a pair of rank one
        return False
    both = left.product(right)
    small = min(left.b, left.c, right.b, right.c) < SMALL
    return small and max(both.b, both.c) <= LARGE and both.nparams <= GROWTH * (left.nparams + right.nparams)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Blocks of the product of a pair of rank one: ``K[i, l, (j J), (k m)] = L[i, (J l), j, k] R[(i k), l, J, m]``."""
    a, _, b1, c1 = left.shape
    _, d, b2, c2 = right.shape
    left = left.reshape(a, b2, d, b1, c1)
    right = right.reshape(a, c1, d, b2, c2)
    return np.einsum("iJljk,iklJm->iljJkm", left, right).reshape(a, d, b1 * b2, c1 * c2)
