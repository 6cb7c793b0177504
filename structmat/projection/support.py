"""Block-diagonal and dense: the nearest member keeps the entries of its support."""

from __future__ import annotations

import numpy as np

from structmat.patterns import Pattern
from structmat.projection.certificate import frobenius
from structmat.projection.device import native, on_device, straight
from structmat.projection.selection import Ladder, Request, Solution, choose, infeasible
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.chain import ceil_div, split_counts
from structmat.structures.dense import Dense


def restrict(
    target: np.ndarray,  # (a*b*d, a*c*d)
    pattern: Pattern,
) -> tuple[np.ndarray, float]:
    """Blocks ``(a, d, b, c)`` of the entries on the support of a pattern (NumPy's: a view), and the norm of all the others."""
    if pattern.a == pattern.d == 1:
        return target[None, None], 0.0
    outside = target.copy()
    if on_device(target):  # whose einsum is no view
        a, b, c, d = pattern
        i, l = np.arange(a)[:, None], np.arange(d)
        outside.reshape(a, b, d, a, c, d)[i, :, l, i, :, l] = 0.0
    else:
        _on_support(outside, pattern)[...] = 0.0
    return _on_support(target, pattern), frobenius(outside)


def _on_support(target: np.ndarray, pattern: Pattern) -> np.ndarray:
    a, b, c, d = pattern
    return np.einsum("ijlikl->iljk", straight(target).reshape(a, b, d, a, c, d))


def project_block_diagonal(target: np.ndarray, request: Request) -> Solution:
    """The nearest block-diagonal matrix: the entries on the blocks. The error is the norm of the others.

    A budget or a tolerance picks among 2, 3, ... blocks (one block would be the dense matrix).
    """
    m, n = target.shape
    if isinstance(request.blocks, tuple):
        raise ValueError(f"blocks: BlockDiagonal takes one number of blocks, got {request.blocks}")
    if request.free:
        count = choose(block_ladders(target), request)[0]
    else:
        count = split_counts(request.blocks, (min(m, n), min(m, n)))[0]
    p, q = ceil_div(m, count), ceil_div(n, count)
    padded = np.pad(target, [(0, count * p - m), (0, count * q - n)])
    blocks, outside = restrict(padded, Pattern(count, p, q, 1))
    operator = BlockDiagonal(native(blocks[:, 0].copy()), (m, n))
    return Solution(operator, outside, "entries on the blocks (optimal)")


def block_ladders(target: np.ndarray) -> list[Ladder]:
    """Size and error of every number of blocks, from sums along the rows: ``O(m)`` for each after one pass."""
    m, n = target.shape
    squares = np.square(np.abs(target))
    before = np.pad(np.cumsum(squares, axis=1), [(0, 0), (1, 0)])  # two sums, not a difference: no cancellation
    after = np.pad(np.cumsum(squares[:, ::-1], axis=1)[:, ::-1], [(0, 0), (0, 1)])
    norm, rows = frobenius(target), np.arange(m)
    ladders = []
    for count in range(min(2, m, n), min(m, n) + 1):
        p, q = ceil_div(m, count), ceil_div(n, count)
        start = rows // p * q
        outside = before[rows, np.minimum(start, n)].sum() + after[rows, np.minimum(start + q, n)].sum()
        ladders.append(Ladder(count, count * p * q, np.array([norm, np.sqrt(outside)])))
    return ladders


def project_dense(target: np.ndarray, request: Request) -> Solution:
    """The matrix itself, copied."""
    if request.limit is not None and request.limit < target.size:
        raise infeasible(request, target.size)
    return Solution(Dense(native(target.copy())), 0.0, "copy (exact)")
