"""Diagonal plus low rank, ``D + U V``: the bordered matrix that determinants and solutions come from."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from structmat import arrays
from structmat.algebra import Scaled, Sum
from structmat.arrays import Array
from structmat.linalg.base import like, namespace
from structmat.operator import Operator
from structmat.structures.diagonal import Diagonal, Identity
from structmat.structures.low_rank import LowRank


class Bordered(NamedTuple):
    """``D + U V`` with the entries of ``D_1``, all but the ``r`` smallest, eliminated.

    ``matrix = [D_0, U_0; -V_0, I + V_1 D_1^-1 U_1]`` is regular if and only if ``D + U V`` is, as long as ``D_1`` is. Keeping
    ``D_0`` out of the division makes Woodbury's formula hold for singular ``D`` and spares the digits tiny entries cost.
    """

    matrix: Array  # (*batch, 2r, 2r)
    small: Array  # indices of D_0
    large: Array  # indices of D_1
    diagonal: Array  # D_1
    left: Array  # U_1
    right: Array  # V_1
    singular: bool  # whether D_1 has zeros, more than the rank can fill


def bordered(a: Sum) -> Bordered | None:
    """The bordered form of a sum of low-rank terms and at least one diagonal one; ``None`` for any other sum."""
    low = [t for t in a.terms if isinstance(t, LowRank)]
    v: Any = 0
    for t in a.terms:
        if not isinstance(t, LowRank):
            values = _diagonal_values(a, t)
            if values is None or values.ndim > 1:
                return None
            v = v + values
    if not low or len(low) == len(a.terms):
        return None
    xp, v = namespace(a), arrays.cast(v, a.dtype)
    left = xp.concat([_widened(a, t.left) for t in low], axis=-1)
    right = xp.concat([_widened(a, t.right) for t in low], axis=-2)
    order, r = xp.argsort(abs(v)), left.shape[-1]
    small, large = order[:r], order[r:]
    singular = bool((v[large] == 0).any())
    safe = xp.ones_like(v[large]) if singular else v[large]
    core = xp.eye(r, dtype=a.dtype, device=a.device) + (right[..., large] / safe) @ left[..., large, :]
    held = v[small][:, None] * xp.eye(small.shape[0], dtype=a.dtype, device=a.device)
    upper = xp.concat((xp.broadcast_to(held, (*a.batch_shape, *held.shape)), left[..., small, :]), axis=-1)
    lower = xp.concat((-right[..., small], core), axis=-1)
    matrix = xp.concat((upper, lower), axis=-2)
    return Bordered(matrix, small, large, v[large], left[..., large, :], right[..., large], singular)


def _diagonal_values(a: Operator, term: Operator) -> Array | None:
    """The diagonal of a diagonal term, in the library of the sum."""
    if isinstance(term, Diagonal):
        return like(a, term.values)
    if isinstance(term, Identity):
        return like(a, np.ones(term.n))
    if isinstance(term, Scaled):
        v = _diagonal_values(a, term.operator)
        return None if v is None else v * term.scalar
    return None


def _widened(a: Operator, x: Array) -> Array:
    return arrays.namespace(x).broadcast_to(arrays.cast(x, a.dtype), (*a.batch_shape, *x.shape[-2:]))
