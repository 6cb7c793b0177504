"""One Kronecker-sparse factor: the arithmetic of its blocks, arrays ``(*batch, a, d, b, c)``.

The factor of pattern ``(a, b, c, d)`` is the matrix of shape ``(a*b*d, a*c*d)`` supported on ``I_a (x) 1_{bxc} (x) I_d``,
``y[i, j, l] = sum_k K[i, l, j, k] x[i, k, l]`` (Le, Zheng, Riccietti, Gribonval 2025, definition 2.1). Its ``a*d`` dense
blocks of ``b x c`` are stored contiguously, batch axes first, so that applying it is one batched product.
"""

from __future__ import annotations

import numpy as np

from structmat import arrays
from structmat.arrays import Array
from structmat.patterns import Pattern


def pattern_of(blocks: Array) -> Pattern:
    """The pattern of a factor from the shape of its blocks."""
    a, d, b, c = blocks.shape[-4:]
    return Pattern(a, b, c, d)


def scale_rows(blocks: Array, v: Array) -> Array:
    """Blocks of ``diag(v) @ factor``; ``v`` of shape ``(*batch, a*b*d)``."""
    a, d, b, _ = blocks.shape[-4:]
    return v.reshape(*v.shape[:-1], a, b, d).swapaxes(-1, -2)[..., None] * blocks


def scale_cols(blocks: Array, v: Array) -> Array:
    """Blocks of ``factor @ diag(v)``; ``v`` of shape ``(*batch, a*c*d)``."""
    a, d, _, c = blocks.shape[-4:]
    return blocks * v.reshape(*v.shape[:-1], a, c, d).swapaxes(-1, -2)[..., None, :]


def inverse(blocks: Array) -> Array:
    """Blocks of the inverse; ``LinAlgError`` if a block is singular."""
    xp = arrays.namespace(blocks)
    try:
        return xp.linalg.inv(blocks)
    except RuntimeError as error:  # torch's LinAlgError
        raise np.linalg.LinAlgError(f"inv: singular block ({error})") from error


def fuse(left: Array, right: Array) -> Array | None:
    """Blocks of the product of two factors where it is no larger and costs no more than both; else ``None``.

    Two factors with the same ``a`` and ``d`` multiply block by block.
    """
    p, q = pattern_of(left), pattern_of(right)
    if (p.a, p.d, p.c) != (q.a, q.d, q.b) or p.b * q.c > p.b * p.c + q.b * q.c:
        return None
    dtype = arrays.promote(left.dtype, right.dtype)
    return arrays.cast(left, dtype) @ arrays.cast(right, dtype)
