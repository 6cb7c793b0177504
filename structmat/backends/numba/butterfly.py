"""Plans of square butterflies of radix 2, forwards and transposed, with their bits in any order at both ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from structmat.backends.base import ChainLayout
from structmat.backends.numba.network import Level, Network


def applies(layout: ChainLayout, blocks: Sequence[np.ndarray]) -> bool:
    """Whether :class:`ButterflyPlan` serves a chain: real, square, ``n = 2^J >= 4``, one factor of radix 2 per bit."""
    n = layout.patterns[0].rows
    if n < 4 or n & (n - 1) or layout.rows != n or layout.cols != n:
        return False
    if any(p.b != 2 or p.c != 2 or p.rows != n for p in layout.patterns):
        return False
    if any(b.ndim != 4 or b.dtype not in (np.float32, np.float64) or b.dtype != blocks[0].dtype for b in blocks):
        return False
    return sorted(p.d for p in layout.patterns) == [1 << bit for bit in range(n.bit_length() - 1)]


class ButterflyPlan:
    """A butterfly for which :func:`applies` holds; the weights are packed when a layout is first used.

    Parameters
    ----------
    layout, blocks
        The chain, and the values ``(a, d, 2, 2)`` of its factors, left to right, float32 or float64.

    Notes
    -----
    ``3 n log2(n)`` flops per sample. In columns (and short rows) lanes are samples, in rows neighbouring indices.
    """

    def __init__(self, layout: ChainLayout, blocks: Sequence[np.ndarray]) -> None:
        bits = [p.d.bit_length() - 1 for p in layout.patterns]
        self.network = Network(
            layout.rows,
            blocks[0].dtype,
            [Level(bit, block) for bit, block in zip(bits, blocks, strict=True)][::-1],
            None if layout.in_order is None else layout.in_order.permutation(),
            None if layout.out_order is None else np.argsort(layout.out_order.permutation()),
        )

    def columns(self, x: np.ndarray, out: np.ndarray, start: int = 0, stop: int | None = None) -> None:
        """Write ``A x`` for the columns ``start .. stop`` of C-contiguous ``x (n, k)`` to ``out (n, k)``."""
        self.network.columns(x, out, start, x.shape[1] if stop is None else stop)

    def rows(self, x: np.ndarray, out: np.ndarray, start: int = 0, stop: int | None = None) -> None:
        """Write ``x A^T`` for the rows ``start .. stop`` of C-contiguous ``x (k, n)`` to ``out (k, n)``."""
        self.network.rows(x, out, start, x.shape[0] if stop is None else stop)
