"""Lower bounds for sums of two families: blocks in which the sum has a rank that its terms allow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from structmat.algebra import Sum
from structmat.operator import Operator
from structmat.projection.certificate import dense, frobenius
from structmat.projection.drivers import eigh, eigvalsh
from structmat.projection.kronecker import unfold
from structmat.projection.svd import safe_bound, truncated
from structmat.projection.two_factor import Place, blocks_of, layout
from structmat.projection.weight import Weight
from structmat.projection.weighted_bounds import AFFORDABLE, two_factor_bound
from structmat.projection.weighted_classes import Classes, safe
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_sparse import BlockSparse
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.chain import ceil_div
from structmat.structures.diagonal import Diagonal
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch

SUPPORTED = (Diagonal, BlockDiagonal, BlockSparse)
_EPS = float(np.finfo(np.float64).eps)


def lower_bound(target: np.ndarray, operators: Sequence[Operator]) -> float | None:
    """No sum of members of the same architectures is nearer to the matrix than this; ``None`` where nothing is known.

    The rank of a sum is at most the sum of the ranks, so that in any block in which the terms have ranks ``q_1, q_2`` the
    error is at least that of the best approximation of rank ``q_1 + q_2``; blocks without common entries add up:

    - low-rank + Monarch or Block Tensor-Train: the blocks of the layout, rank ``q + r``;
    - low-rank + entries on a support: the two corners of the matrix that the support leaves free, rank ``q``;
    - Kronecker products + entries on a support: rows and columns of the rearranged matrix that it leaves free, rank
      ``terms``.
    """
    if len(operators) != 2:
        return None
    for first, second in (operators, operators[::-1]):
        blocks = _blocks(target, first, second)
        if blocks:
            tail = math.sqrt(math.fsum(max(0.0, truncated(b, rank).bound) for b, rank in blocks if b.size))
            return safe_bound(tail, frobenius(target), max(target.shape))
    return None


def weighted_lower_bound(target: np.ndarray, operators: Sequence[Operator], weight: Weight) -> float | None:
    """No sum of members of the same architectures has a smaller weighted error; ``None`` where nothing is known.

    The largest of

    - ``sqrt(t)`` times the bound without a weight, ``t`` the product of the least eigenvalues of its sides;
    - low-rank + Monarch or Block Tensor-Train: :func:`.weighted_bounds.two_factor_bound` with the ranks added;
    - low-rank + entries on a support, with a weight ``C`` of the columns alone: half of the rows has a support on some columns
      only, whose errors can do no more than leave the Schur complement ``C / C_support`` to the others; there the sum has
      rank ``q``, so that the tail of the singular values of ``W_rest (C / C_support)^(1/2)`` bounds the error (Eckart-Young).

    The first and the third are left out for a nearly singular weight, the first for more than 1024 rows or columns too.
    """
    plain = lower_bound(target, operators)
    sides = [side.matrix for side in (weight.columns, weight.rows) if side is not None]
    found = []
    if plain is not None and not weight.ridge and max(map(len, sides)) <= AFFORDABLE:
        lowest = [eigvalsh(c)[[0, -1]] for c in sides]
        share = math.prod(
            max(0.0, float(low) - 4.0 * _EPS * len(c) * float(high))
            for (low, high), c in zip(lowest, sides, strict=True)
        )
        found.append(math.sqrt(share) * plain)
    for first, second in (operators, operators[::-1]) if len(operators) == 2 else ():
        if type(first) is LowRank and type(second) in (Monarch, BlockTensorTrain):
            counts = _counts(second)
            if counts is not None:
                l, k, rank = counts
                place = Place(layout((target.shape[0], target.shape[1]), (l, k), type(second) is BlockTensorTrain))
                found.append(safe(two_factor_bound(Classes(target, place, weight), rank, first.rank), target, weight))
        elif type(first) is LowRank and isinstance(second, SUPPORTED) and weight.rows is None and not weight.ridge:
            found.append(safe(_beside(target, second, first.rank, weight), target, weight))
    return max(found, default=None)


def _beside(target: np.ndarray, second: Operator, rank: int, weight: Weight) -> float:
    """The weighted error that a matrix of a rank leaves where the support of the other term ends, both halves of the rows."""
    matrix = weight.columns.matrix if weight.columns is not None else np.eye(target.shape[1])
    taken, total = _support(second, (target.shape[0], target.shape[1])), 0.0
    half = (target.shape[0] + 1) // 2
    for rows in (slice(0, half), slice(half, None)):
        inside = taken[rows].any(axis=0)
        c, link = matrix[np.ix_(~inside, ~inside)], matrix[np.ix_(inside, ~inside)]
        if inside.any() and c.size:
            c = c - link.conj().T @ np.linalg.solve(matrix[np.ix_(inside, inside)], link)
        values, vectors = eigh((c + c.conj().T) / 2) if c.size else (np.zeros(0), c)
        values = np.maximum(0.0, values - 4.0 * _EPS * len(matrix) * float(np.linalg.norm(matrix, 2)))
        rest = target[rows][:, ~inside] @ (vectors * np.sqrt(values))
        if rest.size:
            total += max(0.0, truncated(rest, rank).bound)
    return math.sqrt(total)


def _blocks(target: np.ndarray, first: Operator, second: Operator) -> list[tuple[np.ndarray, int]]:
    """Disjoint (stacks of) blocks and the rank that the sum has in each."""
    shape = (target.shape[0], target.shape[1])
    supported = isinstance(second, SUPPORTED)
    if type(first) is LowRank and type(second) in (Monarch, BlockTensorTrain):
        counts = _counts(second)
        if counts is None:
            return []
        l, k, rank = counts
        return [(blocks_of(target, layout(shape, (l, k), type(second) is BlockTensorTrain)), first.rank + rank)]
    if type(first) is LowRank and supported:
        taken = _support(second, shape)
        half = (shape[0] + 1) // 2
        upper, lower = taken[:half].any(axis=0), taken[half:].any(axis=0)
        start = int(np.flatnonzero(upper)[-1]) + 1 if upper.any() else 0
        stop = int(np.flatnonzero(lower)[0]) if lower.any() else shape[1]
        return [(target[:half, start:], first.rank), (target[half:, :stop], first.rank)]
    products = first.terms if isinstance(first, Sum) else (first,)
    if supported and all(type(p) is Kronecker and len(p.factors) == 2 for p in products):
        shapes = tuple((f.shape[0], f.shape[1]) for f in products[0].factors)  # pyright: ignore[reportAttributeAccessIssue]
        taken, matrix = unfold(_support(second, shape), shapes), unfold(target, shapes)
        rows, cols = ~taken.any(axis=1), ~taken.any(axis=0)
        return [(matrix[rows], len(products)), (matrix[~rows][:, cols], len(products))]
    return []


def _counts(operator: Operator) -> tuple[int, int, int] | None:
    """``(row blocks, column blocks, rank)`` of a Monarch or two-core Block Tensor-Train with the default axis orders."""
    factors = operator.factors  # pyright: ignore[reportAttributeAccessIssue]
    if len(factors) != 2:
        return None
    (_, l, s, kr), (k, _, _, p) = (f.shape[-4:] for f in factors)
    fits = ceil_div(operator.shape[0], l) == s and ceil_div(operator.shape[1], k) == p
    default = Monarch.random if type(operator) is Monarch else BlockTensorTrain.random
    like = default((l * s, k * p), blocks=(l, k), rank=1, rng=0)
    orders = (operator.out_order, operator.in_order)  # pyright: ignore[reportAttributeAccessIssue]
    return (l, k, kr // k) if fits and orders == (like.out_order, like.in_order) else None


def _support(operator: Operator, shape: tuple[int, int]) -> np.ndarray:
    """Where a member with the same support may have entries."""
    if isinstance(operator, BlockDiagonal):
        ones: Operator = operator.with_factors(tuple(np.ones_like(f) for f in operator.factors))
    elif isinstance(operator, BlockSparse):
        ones = BlockSparse(np.ones_like(operator.blocks), operator.rows, operator.cols, shape)
    else:
        return np.eye(*shape, dtype=bool)
    return dense(ones) != 0
