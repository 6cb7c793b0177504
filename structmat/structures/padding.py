"""Padding: what of a chain lies inside its logical shape."""

from __future__ import annotations

import numpy as np

from structmat import arrays
from structmat.arrays import Array
from structmat.operator import Operator
from structmat.patterns import AxisOrder
from structmat.structures import factor
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense


def is_block_diagonal(a: Chain) -> bool:
    """Whether a chain is one factor of contiguous blocks along the diagonal."""
    return len(a.factors) == 1 and a.in_order is None and a.out_order is None and a.patterns[0].d == 1


def diagonal_parts(a: Chain) -> list[Operator]:
    """The parts along the diagonal of a padded block-diagonal chain: its whole blocks, and those that the shape cuts."""
    count, b, c, _ = a.patterns[0]
    m, n = a.shape[-2:]
    whole = min(count, m // b if b else count, n // c if c else count)
    blocks = a.factors[0][..., :, 0, :, :]
    parts: list[Operator] = [BlockDiagonal(blocks[..., :whole, :, :])] if whole else []
    for i in range(whole, count):
        rows, cols = min(b, max(0, m - i * b)), min(c, max(0, n - i * c))
        if rows or cols:
            parts.append(Dense(blocks[..., i, :rows, :cols]))
    return parts


def masked(a: Chain) -> tuple[Array, ...]:
    """The factors with zeros in the rows and columns that the logical shape cuts off."""
    if not a.padded:
        return a.factors
    m, n = a.shape[-2:]
    rows, cols = np.zeros(a.patterns[0].rows, bool), np.zeros(a.patterns[-1].cols, bool)
    rows[positions(a.out_order, np.arange(m))] = True
    cols[positions(a.in_order.T if a.in_order else None, np.arange(n))] = True
    first, last = a.factors[0], a.factors[-1]
    if len(a.factors) == 1:
        return (factor.scale_cols(factor.scale_rows(first, ones(rows, first)), ones(cols, first)),)
    return factor.scale_rows(first, ones(rows, first)), *a.factors[1:-1], factor.scale_cols(last, ones(cols, last))


def positions(order: AxisOrder | None, index: np.ndarray) -> np.ndarray:
    """Places of indices behind an axis order."""
    return index if order is None else order.permutation()[index]


def ones(mask: np.ndarray, x: Array) -> Array:
    """A mask as 0 and 1 of the library, device and dtype of ``x``."""
    xp = arrays.namespace(x)
    return arrays.cast(xp.asarray(mask, device=arrays.device(x)), x.dtype)
