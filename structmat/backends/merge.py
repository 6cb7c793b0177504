"""Neighbouring factors of a chain multiplied out: more arithmetic, but in fewer and larger products.

Which neighbours are worth it is a backend's own decision; the product itself is exact and is written with reshapes,
transpositions and one broadcast multiplication, so that it runs on the arrays of every library.
"""

from __future__ import annotations

from structmat import arrays
from structmat.arrays import Array
from structmat.patterns import Pattern


def is_rank_one(left: Pattern, right: Pattern) -> bool:
    """Whether every block of the product of two factors is an outer product, so that merging them costs no sum."""
    return 0 not in (*left, *right) and left.a * left.c == right.a and left.d == right.b * right.d


def product(left: Array, right: Array) -> Array:
    """Blocks of the product of a pair of rank one: ``K[i, l, (j J), (k m)] = L[i, (J l), j, k] R[(i k), l, J, m]``.

    Parameters
    ----------
    left, right
        Blocks ``(*batch, a, d, b, c)`` of two factors of which :func:`is_rank_one` holds.

    Examples
    --------
    >>> import numpy as np
    >>> product(np.ones((1, 2, 3, 2)), np.ones((2, 1, 2, 5))).shape
    (1, 1, 6, 10)
    """
    a, _, b1, c1 = left.shape[-4:]
    _, d, b2, c2 = right.shape[-4:]
    lead = left.ndim - 4, right.ndim - 4
    left = left.reshape(*left.shape[:-4], a, b2, d, b1, c1)
    right = right.reshape(*right.shape[:-4], a, c1, d, b2, c2)
    left = _transposed(left, lead[0], (0, 2, 3, 1, 4))[..., None]  # i l j J k .
    right = _transposed(right, lead[1], (0, 2, 3, 1, 4))[..., None, :, :, :]  # i l . J k m
    both = left * right
    return both.reshape(*both.shape[:-6], a, d, b1 * b2, c1 * c2)


def _transposed(x: Array, lead: int, axes: tuple[int, ...]) -> Array:
    return arrays.namespace(x).permute_dims(x, (*range(lead), *(lead + i for i in axes)))
