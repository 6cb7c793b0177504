"""Diagonal and block-sparse: the nearest member keeps the entries on its support, which may be chosen by their size."""

from __future__ import annotations

from typing import Any

import numpy as np

from structmat.projection.certificate import frobenius
from structmat.projection.selection import Ladder, Request, Solution, choose, infeasible
from structmat.structures.block_sparse import BlockSparse, flat_block_butterfly
from structmat.structures.chain import ceil_div
from structmat.structures.diagonal import Diagonal

Places = tuple[np.ndarray, np.ndarray]


def project_diagonal(target: np.ndarray, request: Request) -> Solution:
    """The nearest diagonal matrix: the entries on the diagonal. The error is the norm of the others."""
    m, n = target.shape
    if m != n:
        raise ValueError(f"W: a Diagonal is square, got shape {target.shape}")
    if request.limit is not None and request.limit < n:
        raise infeasible(request, n)
    outside = target.copy()
    np.fill_diagonal(outside, 0.0)
    return Solution(Diagonal(np.diagonal(target).copy()), frobenius(outside), "entries on the diagonal (optimal)")


def project_block_sparse(target: np.ndarray, request: Request) -> Solution:
    """The nearest block-sparse matrix: the blocks at the given places, by default those of a flat block butterfly.

    A budget or a tolerance without ``places`` keeps the blocks of largest norm, which is optimal: the squared error is the
    sum of the squared norms of the others.
    """
    m, n = target.shape
    default = max(1, round(min(m, n) ** 0.5))
    p, q = request.block or (default, default)
    grid = (ceil_div(m, p), ceil_div(n, q))
    padded = np.pad(target, [(0, grid[0] * p - m), (0, grid[1] * q - n)])
    blocks = padded.reshape(grid[0], p, grid[1], q).transpose(0, 2, 1, 3)
    if request.places is not None:
        rows, cols = _checked(request.places, grid)
    elif request.free:
        rows, cols = _largest(blocks, request)
    else:
        rows, cols = flat_block_butterfly(grid)
    if request.limit is not None and len(rows) * p * q > request.limit:
        raise infeasible(request, len(rows) * p * q)
    kept = blocks[rows, cols]
    _, first = np.unique(rows * grid[1] + cols, return_index=True)
    again = np.ones(len(rows), bool)
    again[first] = False
    kept[again] = 0.0  # a place that is listed twice holds the sum of its blocks
    rest = blocks.copy()
    rest[rows, cols] = 0.0
    return Solution(BlockSparse(kept, rows, cols, (m, n)), frobenius(rest), "blocks at the places (optimal)")


def _largest(blocks: np.ndarray, request: Request) -> Places:
    """Places of the blocks of largest norm, as many as the budget allows or the tolerance needs, sorted by row."""
    energy = np.square(np.abs(blocks)).sum(axis=(2, 3))
    order = np.argsort(-energy, axis=None, kind="stable")
    ascending = np.cumsum(energy.ravel()[order][::-1])
    errors = np.sqrt(np.append(ascending[::-1], 0.0))
    ladder = Ladder(None, blocks.shape[2] * blocks.shape[3], errors)
    kept = np.sort(order[: choose([ladder], request)[1]])
    rows, cols = np.unravel_index(kept, energy.shape)
    return rows, cols


def _checked(places: Any, grid: tuple[int, int]) -> Places:
    """``(rows, cols)`` as index arrays on the grid; ``ValueError`` otherwise."""
    arrays = [np.asarray(v) for v in places]
    if len(arrays) != 2 or any(v.ndim != 1 or (v.size and v.dtype.kind not in "iu") for v in arrays):
        raise ValueError("places: expected two integer arrays (rows, columns) of blocks")
    rows, cols = (v.astype(np.intp) for v in arrays)
    if len(rows) != len(cols):
        raise ValueError(f"places: {len(rows)} rows but {len(cols)} columns")
    for what, index, size in (("rows", rows, grid[0]), ("columns", cols, grid[1])):
        if index.size and not (index.min() >= 0 and index.max() < size):
            raise ValueError(
                f"places: {what} lie in {index.min()}..{index.max()}, expected 0..{size - 1} on a grid of {grid}"
            )
    return rows, cols
