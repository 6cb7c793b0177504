"""What chains give without being multiplied out: entries, Frobenius norm, masked factors, parts of padded ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from structmat import arrays
from structmat.arrays import Array
from structmat.blocks import DirectSum
from structmat.linalg.base import adjoint
from structmat.operator import Operator
from structmat.patterns import AxisOrder
from structmat.structures.chain import Chain
from structmat.structures.low_rank import LowRank
from structmat.structures.padding import diagonal_parts, masked, ones, positions


def waist(a: Chain) -> int:
    """The smallest size on the way through a chain: an upper bound of its rank."""
    return min(*a.shape[-2:], *(min(p.rows, p.cols) for p in a.patterns))


def ranks(a: Chain) -> list[int] | None:
    """The ranks of the links between neighbouring factors, or ``None`` if a pair is not chainable."""
    found = [p.chain_rank(q) for p, q in zip(a.patterns, a.patterns[1:], strict=False)]
    return None if None in found else [r for r in found if r is not None]


def is_square_blocks(a: Chain) -> bool:
    """Whether a chain is the product of invertible-by-block factors: square blocks and no padding."""
    return not a.padded and all(p.b == p.c for p in a.patterns)


def blocks_of(a: Chain) -> Array:
    """All blocks of a chain of one factor with its padding set to zero, ``(*batch, a*d, b, c)``."""
    blocks = masked(a)[0]
    return blocks.reshape(*blocks.shape[:-4], a.patterns[0].a * a.patterns[0].d, *blocks.shape[-2:])


def split(a: Chain) -> Operator:
    """A padded block-diagonal chain as the direct sum of its whole blocks and of those that the shape cuts."""
    return DirectSum(*diagonal_parts(a))


def entries(a: Chain, rows: np.ndarray, cols: np.ndarray) -> Array | None:
    """The entries at places ``(rows[t], cols[t])``, ``(*batch, count)``; ``None`` for chains that are not chainable.

    In a chainable chain of ranks ``r`` an entry is a product of one ``r x r'`` matrix per factor (arXiv 2411.04506,
    section 4): the digits ``a`` of the column and ``d`` of the row fix which.
    """
    links = ranks(a)
    if links is None:
        return None
    rows, cols = positions(a.out_order, rows), positions(a.in_order.T if a.in_order else None, cols)
    first, last = a.patterns[0], a.patterns[-1]
    left, right = cols // (last.c * last.d), rows % first.d  # the digits a of the last and d of the first factor
    hit = (rows // (first.b * first.d) == left // (last.a // first.a)) & (cols % last.d == right % last.d)
    result: Any = None
    for i, (p, blocks) in enumerate(zip(a.patterns, a.factors, strict=True)):
        if i == 0:
            j = (rows // first.d % first.b)[:, None]
        else:
            steps = a.patterns[i - 1].d // p.d
            j = np.arange(links[i - 1]) * steps + (right % a.patterns[i - 1].d // p.d)[:, None]
        if i == len(links):
            k = (cols // last.d % last.c)[:, None]
        else:
            q = a.patterns[i + 1]
            k = np.arange(links[i]) + (left // (last.a // q.a) % (q.a // p.a) * links[i])[:, None]
        which, digit = left // (last.a // p.a), right % p.d
        step = blocks[..., which[:, None, None], digit[:, None, None], j[:, :, None], k[:, None, :]]
        step = arrays.cast(step, a.dtype)
        result = step if result is None else result @ step
    return result[..., 0, 0] * ones(hit, result)


def frobenius(a: Chain) -> Array | None:
    """The Frobenius norm, ``(*batch,)``, in ``O(parameters x rank)``; ``None`` for chains that are not chainable.

    From left to right each factor is replaced by the triangular factors of the blocks that meet one block of its right
    neighbour: ``|K M|_F = |R M|_F``, because the columns of ``K`` in different blocks meet different rows of the rest.
    """
    links = ranks(a)
    if links is None:
        return None
    xp = arrays.namespace(a.factors[0])
    carry: Any = None
    for i, (p, blocks) in enumerate(zip(a.patterns, masked(a), strict=True)):
        blocks = arrays.cast(blocks, a.dtype)
        if carry is not None:  # carry: (*batch, a, previous d, r', r)
            steps, r = a.patterns[i - 1].d // p.d, links[i - 1]
            carry = carry.reshape(*carry.shape[:-4], p.a, steps, p.d, *carry.shape[-2:])
            blocks = blocks.reshape(*blocks.shape[:-4], p.a, p.d, r, steps, p.c)
            blocks = carry @ xp.moveaxis(blocks, -2, -4)
            blocks = xp.moveaxis(blocks, -4, -2)
            blocks = blocks.reshape(*blocks.shape[:-5], p.a, p.d, blocks.shape[-3] * steps, p.c)
        if i < len(links):
            times = a.patterns[i + 1].a // p.a
            blocks = blocks.reshape(*blocks.shape[:-1], times, links[i])
            blocks = xp.moveaxis(blocks, -2, -4)
            carry = xp.linalg.qr(blocks)[1]
            carry = carry.reshape(*carry.shape[:-5], p.a * times, p.d, *carry.shape[-2:])
        else:
            carry = xp.linalg.vector_norm(blocks, axis=(-4, -3, -2, -1))
    return carry


def thin_svd(a: Operator) -> tuple[Array, Array, Array]:
    """``(U, s, V^H)`` of a dense or low-rank operator, the latter from two QR factorisations and a small SVD."""
    if isinstance(a, LowRank):
        left, right = (arrays.cast(x, a.dtype) for x in (a.left, a.right))
        xp = arrays.namespace(left)
        (q, r), (p, t) = xp.linalg.qr(left), xp.linalg.qr(adjoint(right))
        u, s, vh = xp.linalg.svd(r @ adjoint(t), full_matrices=False)
        return q @ u, s, vh @ adjoint(p)
    array = a.to_dense()
    return tuple(arrays.namespace(array).linalg.svd(array, full_matrices=False))


def order_parity(order: AxisOrder | None) -> int:
    """0 for an even, 1 for an odd transposition of digits.

    Exchanging neighbouring digits of radices ``p`` and ``q`` has ``C(p,2) C(q,2)`` inversions, once for every value of
    the other digits; each pair of digits that change sides is exchanged once.
    """
    if order is None:
        return 0
    parity, axes, radices = 0, order.axes, order.radices
    for i, first in enumerate(axes):
        for second in axes[i + 1 :]:
            if first > second:
                p, q = radices[first], radices[second]
                parity += order.size // (p * q) * (p * (p - 1) // 2) * (q * (q - 1) // 2) if p * q else 0
    return parity % 2
