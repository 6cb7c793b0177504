"""Diagonal, block-diagonal and block-sparse matrices and single factors in a weighted norm: least squares on the support."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from structmat.patterns import Pattern
from structmat.projection.block_sparse import project_block_sparse
from structmat.projection.certificate import frobenius
from structmat.projection.selection import Ladder, Request, Solution, allowed_error, choose, infeasible, unreachable
from structmat.projection.support import restrict
from structmat.projection.weight import Weight, columns_of
from structmat.projection.weighted_classes import safe
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_sparse import BlockSparse
from structmat.structures.chain import ceil_div, split_counts
from structmat.structures.diagonal import Diagonal


def weighted_diagonal(target: np.ndarray, request: Request, weight: Weight) -> Solution:
    """The best diagonal matrix, ``d_i = (W C)_ii / C_ii``: optimal. Inputs that never fire keep the entry of ``W``."""
    (m, n), c = target.shape, columns_of(weight).matrix
    size = min(m, n)
    if m != n:
        raise ValueError(f"W: expected a square matrix for Diagonal, got shape {(m, n)}")
    if request.limit is not None and request.limit < size:
        raise infeasible(request, size)
    own = np.diagonal(target)
    moved = np.einsum("ij,ji->i", target - np.diag(own), c)  # what is left, moved onto the diagonal
    power = np.real(np.diagonal(c))
    entries = own + np.divide(moved, power, out=np.zeros_like(moved), where=power > 0.0)
    error = weight.norm(target - np.diag(entries))
    return Solution(Diagonal(entries), safe(error, target, weight), "weighted least squares on the diagonal (optimal)")


def weighted_block_diagonal(target: np.ndarray, request: Request, weight: Weight) -> Solution:
    """The best block-diagonal matrix: least squares in every block, ``X_i = W_ii + (sum of the others) C C_ii^+``. Optimal.

    A budget or a tolerance picks among 2, 3, ... blocks. Cost ``m n^2`` and ``n q^2`` for each block of ``q`` columns.
    """
    m, n = target.shape
    if isinstance(request.blocks, tuple):
        raise ValueError(f"blocks: BlockDiagonal takes one number of blocks, got {request.blocks}")
    if not request.free:
        return block_diagonal(target, split_counts(request.blocks, (min(m, n), min(m, n)))[0], weight)[0]
    ladders = [_block_count(target, count, weight) for count in range(min(2, m, n), min(m, n) + 1)]
    if request.limit is not None:
        return block_diagonal(target, choose(ladders, request)[0], weight)[0]
    best = np.inf
    for ladder in sorted(ladders, key=lambda a: (a.step, a.errors[1])):  # by size: the first that is near enough
        if ladder.errors[1] > (1 + 1e-6) * allowed_error(request) + 1e-7 * request.norm:
            best = min(best, float(ladder.errors[1]))
            continue
        solution, error = block_diagonal(target, ladder.member, weight)
        if error <= allowed_error(request):
            return solution
        best = min(best, error)
    raise unreachable(request, best)


def block_diagonal(target: np.ndarray, count: int, weight: Weight) -> tuple[Solution, float]:
    """The best matrix of ``count`` blocks, and its error."""
    m, n = target.shape
    p, q = ceil_div(m, count), ceil_div(n, count)
    found = fit_support(target, Pattern(count, p, q, 1), weight)
    operator = BlockDiagonal(np.ascontiguousarray(found[:, 0]), (m, n))
    error = weight.norm(target - operator.to_dense())
    return Solution(operator, safe(error, target, weight), "weighted least squares in every block (optimal)"), error


def _block_count(target: np.ndarray, count: int, weight: Weight) -> Ladder:
    """Size and error of a number of blocks, from the normal equations of all blocks in one batched call."""
    (m, n), c = target.shape, columns_of(weight).solid
    p, q = ceil_div(m, count), ceil_div(n, count)
    pattern = Pattern(count, p, q, 1)
    w = _pad(target, count * p, count * q)
    c = _pad(c, count * q, count * q) + np.diag((np.arange(count * q) >= n).astype(float))
    inner = restrict(c, Pattern(count, q, q, 1))[0][:, 0]
    rhs = restrict(w @ c, pattern)[0][:, 0]
    x = np.linalg.solve(inner.swapaxes(-1, -2), rhs.swapaxes(-1, -2)).swapaxes(-1, -2)
    norm = weight.norm(target)
    error = max(0.0, norm**2 - np.vdot(x, rhs).real)
    return Ladder(count, count * p * q, np.array([norm, np.sqrt(error)]))


def fit_support(target: np.ndarray, pattern: Pattern, weight: Weight) -> np.ndarray:
    """Blocks ``(a, d, b, c)`` of the best matrix on a support: rows with the same columns share one least-squares problem."""
    n = target.shape[1]
    a, b, c, d = pattern
    w = _pad(target, pattern.rows, pattern.cols)
    blocks = np.array(restrict(w, pattern)[0])
    s = _pad(columns_of(weight).factor, pattern.cols, n)
    rows = np.arange(pattern.rows).reshape(a, b, d)
    cols = np.arange(pattern.cols).reshape(a, c, d)
    for i in range(a):
        for j in range(d):
            outside = w[rows[i, :, j]].copy()
            outside[:, cols[i, :, j]] = 0.0
            # what is left is moved onto the support; the least change where the weight leaves it open
            change = np.linalg.lstsq(s[cols[i, :, j]].conj().T, (outside @ s).conj().T, rcond=None)[0]
            blocks[i, j] += change.conj().T
    return blocks


def _pad(x: np.ndarray, rows: int, cols: int) -> np.ndarray:
    return x if x.shape == (rows, cols) else np.pad(x, [(0, rows - x.shape[0]), (0, cols - x.shape[1])])


def weighted_block_sparse(target: np.ndarray, request: Request, weight: Weight) -> Solution:
    """Least squares on the blocks at the places: optimal for given places, and for those of a flat block butterfly.

    A budget takes the blocks of largest norm, with every input by its own power or without, whichever ends nearer; a
    tolerance as few of the former as it needs, by bisection.
    """
    power = np.sqrt(np.maximum(np.real(np.diagonal(columns_of(weight).matrix)), 0.0))
    if not request.free:
        return _sparse(target, _places(target, request), weight, "(optimal)")[0]
    m, n = target.shape
    if request.limit is not None:
        tried = [_sparse(target, _places(x, request), weight, "") for x in (target * power, target)]
        return min(tried, key=lambda pair: pair[1])[0]
    p, q = _places(target, replace(request, tol=None)).blocks.shape[-2:]
    low, high = 0, ceil_div(m, p) * ceil_div(n, q)
    found, error = _sparse(target, _kept(target * power, request, high * p * q), weight, "")
    if error > allowed_error(request):
        raise unreachable(request, error)
    while high - low > 1:
        middle = (low + high) // 2
        tried, error = _sparse(target, _kept(target * power, request, middle * p * q), weight, "")
        low, high, found = (low, middle, tried) if error <= allowed_error(request) else (middle, high, found)
    return found


def _kept(target: np.ndarray, request: Request, limit: int) -> BlockSparse:
    return _places(target, replace(request, tol=None, limit=limit))


def _places(target: np.ndarray, request: Request) -> BlockSparse:
    """The block-sparse matrix nearest without a weight, whose places are taken."""
    found = project_block_sparse(target, replace(request, norm=frobenius(target))).operator
    if not isinstance(found, BlockSparse):
        raise TypeError(f"expected a BlockSparse, got {type(found).__name__}")
    return found


def _sparse(target: np.ndarray, at: BlockSparse, weight: Weight, note: str) -> tuple[Solution, float]:
    """The best values at the places of another, and their error; the blocks of one row share a least-squares problem."""
    m, n = target.shape
    p, q = at.blocks.shape[-2:]
    w = _pad(target, at.grid[0] * p, at.grid[1] * q)
    s = _pad(columns_of(weight).factor, at.grid[1] * q, n)
    blocks = np.zeros(at.blocks.shape, np.result_type(w, s) if np.iscomplexobj(w) else w.dtype)
    for row in np.unique(at.rows):
        places, first = np.unique(at.cols[at.rows == row], return_index=True)
        slots = np.flatnonzero(at.rows == row)[first]  # of a place that is listed twice the first holds all
        inside = (places[:, None] * q + np.arange(q)).ravel()
        outside = w[row * p : (row + 1) * p].copy()
        own = outside[:, inside]
        outside[:, inside] = 0.0
        change = np.linalg.lstsq(s[inside].conj().T, (outside @ s).conj().T, rcond=None)[0].conj().T
        blocks[slots] = (own + change).reshape(p, len(places), q).transpose(1, 0, 2)
    operator = BlockSparse(blocks, at.rows, at.cols, (m, n))
    error = weight.norm(target - operator.to_dense())
    bound = safe(error, target, weight) if note else 0.0
    return Solution(operator, bound, f"weighted least squares on the blocks {note}".rstrip()), error
