"""Trace and diagonal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from structmat import arrays
from structmat.algebra import Scaled, Sum
from structmat.arrays import Array
from structmat.blocks import DirectSum
from structmat.linalg.base import (
    check,
    columns,
    constant,
    finish,
    join,
    like,
    namespace,
    outer,
    parts,
)
from structmat.linalg.chains import entries
from structmat.operator import Operator
from structmat.rules import apply, fallback, rule
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal, Identity, Zero
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.permutation import Permutation

TRACE, DIAGONAL = "trace", "diagonal"


def trace(A: Operator) -> Any:
    """Sum of the main diagonal.

    Parameters
    ----------
    A
        An operator ``(*batch, m, n)``; as in NumPy it need not be square.

    Returns
    -------
    scalar or array
        ``(*batch,)``, of the operator's dtype.

    Notes
    -----
    ``tr(A (x) B) = tr(A) tr(B)`` for square factors; otherwise the sum of :func:`diagonal`, at its cost.

    Examples
    --------
    >>> import structmat as sm
    >>> float(sm.linalg.trace(sm.Kronecker([[1.0, 2.0], [3.0, 4.0]], sm.Identity(3))))
    15.0
    """
    check(A, "trace")
    return finish(A, apply(TRACE, A))


def diagonal(A: Operator) -> Array:
    """The main diagonal.

    Parameters
    ----------
    A
        An operator ``(*batch, m, n)``.

    Returns
    -------
    array
        ``(*batch, min(m, n))``, of the operator's dtype.

    Notes
    -----
    ``diag(A (x) B) = diag(A) (x) diag(B)`` if all factors but the first are square, else entry by entry; chains with
    links of rank ``r`` from their digits in ``O(n r^2)`` per factor. Any other operator is applied to unit columns, 64
    at once: ``min(m, n)`` applications, exact, without the dense matrix.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.linalg.diagonal(sm.LowRank([[1.0], [2.0]], [[3.0, 4.0]])).tolist()
    [3.0, 8.0]
    """
    check(A, "diagonal")
    size = min(A.shape[-2:])
    return constant(A, 0, (0,)) if size == 0 else finish(A, apply(DIAGONAL, A), (size,))


# ---- trace --------------------------------------------------------------------------------------------------------------


@fallback(TRACE)
def trace_of_diagonal(a: Operator) -> Any:
    """The sum of the diagonal."""
    return namespace(a).sum(diagonal(a), axis=-1)


@rule(TRACE, Kronecker)
def trace_kronecker(a: Kronecker) -> Any:
    """tr(A (x) B) = tr(A) tr(B) for square factors."""
    if not all(f.is_square for f in a.factors):
        return NotImplemented
    return math.prod(like(a, trace(f)) for f in parts(a, a.factors))


@rule(TRACE, LowRank)
def trace_low_rank(a: LowRank) -> Any:
    """tr(U V) = sum of U * V^T."""
    size = min(a.shape[-2:])
    return namespace(a).sum(a.left[..., :size, :] * a.right[..., :size].swapaxes(-1, -2), axis=(-2, -1))


@rule(TRACE, Sum)
def trace_sum(a: Sum) -> Any:
    """tr(A + B) = tr(A) + tr(B)."""
    return sum(like(a, trace(t)) for t in parts(a, a.terms))


@rule(TRACE, Scaled)
def trace_scaled(a: Scaled) -> Any:
    """tr(c A) = c tr(A)."""
    return a.scalar * like(a, trace(a.operator))


@rule(TRACE, DirectSum)
def trace_direct_sum(a: DirectSum) -> Any:
    """tr(diag(A, B)) = tr(A) + tr(B) for square blocks."""
    return sum(like(a, trace(b)) for b in parts(a, a.blocks)) if all(b.is_square for b in a.blocks) else NotImplemented


# ---- diagonal -----------------------------------------------------------------------------------------------------------


@fallback(DIAGONAL)
def diagonal_of_columns(a: Operator) -> Any:
    """The diagonals of blocks of columns."""
    xp, size = namespace(a), min(a.shape[-2:])
    pieces = [xp.linalg.diagonal(block[..., start : start + block.shape[-1], :]) for start, block in columns(a, size)]
    return xp.concat(pieces, axis=-1)


@rule(DIAGONAL, Identity)
def diagonal_identity(a: Identity) -> Any:
    """Ones."""
    return constant(a, 1, (a.n,))


@rule(DIAGONAL, Zero)
def diagonal_zero(a: Zero) -> Any:
    """Zeros."""
    return constant(a, 0, (min(a.shape[-2:]),))


@rule(DIAGONAL, Diagonal)
def diagonal_diagonal(a: Diagonal) -> Any:
    """The values."""
    return namespace(a).asarray(a.values, copy=True)


@rule(DIAGONAL, Permutation)
def diagonal_permutation(a: Permutation) -> Any:
    """Ones at the fixed points."""
    return arrays.convert(a.index, "numpy") == np.arange(a.shape[-1])


@rule(DIAGONAL, Dense)
def diagonal_dense(a: Dense) -> Any:
    """The stored entries."""
    return namespace(a).asarray(namespace(a).linalg.diagonal(a.array), copy=True)


@rule(DIAGONAL, Chain)
def diagonal_chain(a: Chain) -> Any:
    """Entry by entry, one small matrix per factor."""
    index = np.arange(min(a.shape[-2:]))
    values = entries(a, index, index)
    return NotImplemented if values is None else values


@rule(DIAGONAL, Kronecker)
def diagonal_kronecker(a: Kronecker) -> Any:
    """diag(A (x) B) = diag(A) (x) diag(B) if all factors but the first are square; else the entries are looked up."""
    if all(f.is_square for f in a.factors[1:]):
        return outer([like(a, diagonal(f)) for f in parts(a, a.factors)])
    result, index = 1, np.arange(min(a.shape[-2:]))
    rows = np.unravel_index(index, [f.shape[-2] for f in a.factors])
    cols = np.unravel_index(index, [f.shape[-1] for f in a.factors])
    for f, i, j in zip(a.factors, rows, cols, strict=True):
        result = result * like(a, f.array[..., i, j] if isinstance(f, Dense) else f[..., i, j])
    return result


@rule(DIAGONAL, Sum)
def diagonal_sum(a: Sum) -> Any:
    """diag(A + B) = diag(A) + diag(B)."""
    return sum(like(a, diagonal(t)) for t in parts(a, a.terms))


@rule(DIAGONAL, Scaled)
def diagonal_scaled(a: Scaled) -> Any:
    """diag(c A) = c diag(A)."""
    return a.scalar * like(a, diagonal(a.operator))


@rule(DIAGONAL, DirectSum)
def diagonal_direct_sum(a: DirectSum) -> Any:
    """The diagonals of square blocks, one after the other."""
    if not all(b.is_square for b in a.blocks):
        return NotImplemented
    return join(a, [diagonal(b) for b in parts(a, a.blocks)])
