"""Monarch and two-core Block Tensor-Train: every block gets its truncated SVD, all in one batched call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from structmat.projection.selection import Ladder, Request, Solution, choose
from structmat.projection.svd import safe_bound, singular_values, svd, tails, truncate
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.chain import ceil_div, split_counts
from structmat.structures.monarch import Monarch


class Layout(NamedTuple):
    """``l x k`` blocks of ``s x p`` that cover a matrix; ``contiguous`` says whether a row class is a run of rows."""

    l: int
    k: int
    s: int
    p: int
    contiguous: bool

    @property
    def step(self) -> int:
        """Parameters for each rank."""
        return self.l * self.k * (self.s + self.p)


def layout(shape: tuple[int, int], counts: tuple[int, int], contiguous: bool) -> Layout:
    """The layout of ``counts = (l, k)`` blocks for a matrix of ``shape``."""
    (m, n), (l, k) = shape, counts
    return Layout(l, k, ceil_div(m, l), ceil_div(n, k), contiguous)


def blocks_of(target: np.ndarray, layout: Layout) -> np.ndarray:
    """The blocks ``(k, l, s, p)`` of a matrix, which is extended by zeros where they do not cover it evenly."""
    l, k, s, p, contiguous = layout
    m, n = target.shape
    if (m, n) != (l * s, k * p):
        target = np.pad(target, [(0, l * s - m), (0, k * p - n)])
    if contiguous:
        return target.reshape(l, s, k, p).transpose(2, 0, 1, 3)
    return target.reshape(s, l, k, p).transpose(2, 1, 0, 3)


def nearest_pair(
    target: np.ndarray,  # (m, n)
    request: Request,
    layouts: Sequence[Layout],
) -> tuple[np.ndarray, np.ndarray, float]:
    """``left (l, s, k*r)``, ``right (k, r*l, p)`` nearest to the matrix, and a lower bound of the error.

    The blocks partition the matrix and each is free up to its rank, so that Eckart-Young in every block is optimal:
    ``error**2 = sum over blocks of the discarded s**2`` (Dao et al. 2022, theorem 1, there for rank 1). Padding does not
    change this: rows and columns of zeros change no singular value. Cost: ``m n min(s, p)``.
    """
    if len(layouts) > 1:
        ladders = [Ladder(a, a.step, tails(singular_values(blocks_of(target, a)))) for a in layouts]
        chosen, rank = choose(ladders, request)
        u, s, vh = svd(blocks_of(target, chosen))
    else:
        (chosen,) = layouts
        u, s, vh = svd(blocks_of(target, chosen))
        rank = request.rank or choose([Ladder(chosen, chosen.step, tails(s))], request)[1]
    x, y = truncate(u, s, vh, rank)  # (k, l, s, r) and (k, l, r, p)
    left = x.transpose(1, 2, 0, 3).reshape(chosen.l, chosen.s, chosen.k * rank)
    right = y.transpose(0, 2, 1, 3).reshape(chosen.k, rank * chosen.l, chosen.p)
    tail = float(tails(s)[min(rank, s.shape[-1])])
    return left, right, safe_bound(tail, request.norm, max(chosen.s, chosen.p))


def project_two_factor(target: np.ndarray, request: Request) -> Solution:
    """The nearest Monarch or two-core Block Tensor-Train matrix.

    A budget or tolerance without ``blocks`` compares the default numbers of blocks and 2, 4, 8, ... in both directions up
    to the square root of the smaller size; one block in each direction (low rank) is the last resort for a budget.
    """
    shape = (target.shape[0], target.shape[1])
    contiguous = request.family is BlockTensorTrain
    counts = [split_counts(request.blocks, shape)]
    if request.free and request.blocks is None:
        counts += [(2**i, 2**i) for i in range(1, 32) if 4**i <= min(shape)]
    layouts = list(dict.fromkeys(layout(shape, c, contiguous) for c in counts))
    if request.limit is not None and request.blocks is None:
        layouts = [a for a in layouts if a.step <= request.limit] or [layout(shape, (1, 1), contiguous)]
    left, right, bound = nearest_pair(target, request, layouts)
    if contiguous:
        return Solution(BlockTensorTrain([left, right], shape), bound, "blockwise SVD (optimal)")
    return Solution(Monarch(left, right, shape), bound, "blockwise SVD (optimal)")
