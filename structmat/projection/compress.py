"""Compression: fewer parameters for a matrix that already has block-rank structure, without forming it."""

from __future__ import annotations

import math
import time
from typing import TypeGuard

import numpy as np

from structmat import arrays, rules
from structmat.operator import Operator
from structmat.patterns import AxisOrder
from structmat.projection.certificate import Projection
from structmat.projection.selection import Ladder, Request, choose, parameter_limit
from structmat.projection.svd import safe_bound, svd, tails, truncate
from structmat.projection.target import like, rounding
from structmat.structures import factor
from structmat.structures.chain import Chain


@rules.fallback("compress")
def compress(operator: Operator, tol: float | None, rank: int | None, budget: float | None) -> Projection:
    """The nearest operator of the same family with a smaller rank; see :meth:`structmat.Operator.compress`.

    Every block ``U V`` is brought to ``Q_1 (R_1 R_2^H) Q_2^H`` by two QR factorisations and the small core truncated by its
    SVD, which is optimal (Eckart-Young in every block). Cost ``O((m + n) r^2)`` for a low-rank operator.
    """
    started = time.perf_counter()
    if sum(option is not None for option in (tol, rank, budget)) != 1:
        raise ValueError("compress: expected exactly one of tol, rank and budget")
    if rank is not None and rank < 1:
        raise ValueError(f"compress: expected a rank of at least 1, got {rank}")
    if tol is not None and not 0 <= tol < math.inf:
        raise ValueError(f"compress: expected a tolerance of at least 0, got {tol}")
    if not _has_one_link(operator) or operator.batch_shape:
        raise NotImplementedError(
            f"compress: {operator} has no block rank to lower; use structmat.project(A, family, ...), which makes it dense"
        )
    if operator.patterns[0].a != 1:  # a transpose of the normal form
        p = compress(operator.T, tol, rank, budget)
        return Projection(p.operator.T, p.error, p.relative_error, p.lower_bound, p.method, p.seconds, p.params)
    source = operator.factors[0]
    u, v = _links(operator)
    q1, r1 = np.linalg.qr(u)
    q2, r2 = np.linalg.qr(v.conj().swapaxes(-1, -2))
    x, s, yh = svd(r1 @ r2.conj().swapaxes(-1, -2))
    k, l = u.shape[:2]
    errors = tails(s)
    norm = float(errors[0])
    m, n = operator.shape[-2:]
    limit = None if budget is None else parameter_limit(budget, (m, n))
    request = Request(type(operator), norm, limit=limit, tol=tol, rounding=rounding(source))
    if rank is None:
        rank = choose([Ladder(None, k * l * (u.shape[2] + v.shape[3]), errors)], request)[1]
    rank = min(rank, s.shape[-1])
    x, yh = truncate(x, s, yh, rank)
    left = (q1 @ x).transpose(1, 2, 0, 3).reshape(1, l, u.shape[2], k * rank)
    right = (yh @ q2.conj().swapaxes(-1, -2)).transpose(0, 2, 1, 3).reshape(k, 1, rank * l, v.shape[3])
    result = like(operator.with_factors((left, right)), source)
    tail = float(errors[rank])
    error = tail + (rounding(source) if source.dtype != left.dtype else np.finfo(np.float64).eps * len(errors)) * norm
    return Projection(
        operator=result,
        error=error,
        relative_error=error / norm if norm else 0.0,
        lower_bound=min(error, safe_bound(tail, norm, max(u.shape[2], v.shape[3]))),
        method="QR of both factors, blockwise SVD of the core (optimal)",
        seconds=time.perf_counter() - started,
        params=result.nparams,
    )


def _has_one_link(operator: Operator) -> TypeGuard[Chain]:
    if not isinstance(operator, Chain) or len(operator.factors) != 2:
        return False
    p, q = operator.patterns
    normal, transposed = (p.a, q.d) == (1, 1), (p.d, q.a) == (1, 1)
    return (normal and p.chain_rank(q) is not None) or (transposed and q.T.chain_rank(p.T) is not None)


def _links(operator: Chain) -> tuple[np.ndarray, np.ndarray]:
    """Both factors of every block in double precision, ``(k, l, s, r)`` and ``(k, l, r, p)``; padding set to zero."""
    exact = np.complex128 if arrays.is_complex(operator.dtype) else np.float64
    left, right = (arrays.convert(f, "numpy").astype(exact) for f in operator.factors)
    rows, cols = operator.patterns[0].rows, operator.patterns[-1].cols
    left = factor.scale_rows(left, _inside(rows, operator.shape[-2], operator.out_order and operator.out_order.T))
    right = factor.scale_cols(right, _inside(cols, operator.shape[-1], operator.in_order))
    l, s, kr = left.shape[-3:]
    k, rl, p = right.shape[0], *right.shape[-2:]
    return left.reshape(l, s, k, kr // k).transpose(2, 0, 1, 3), right.reshape(k, rl // l, l, p).transpose(0, 2, 1, 3)


def _inside(size: int, logical: int, order: AxisOrder | None) -> np.ndarray:
    """1 where an index of a chain's own order lies inside the logical shape, 0 in the padding."""
    mask = (np.arange(size) < logical).astype(np.float64)
    return mask if order is None else mask[order.permutation()]
