"""Singular values, and what follows from them: condition number and rank."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from structmat import arrays
from structmat.algebra import Inverse, Product, Scaled
from structmat.arrays import Array
from structmat.blocks import DirectSum
from structmat.linalg.base import (
    adjoint,
    check,
    check_square,
    constant,
    epsilon,
    finish,
    join,
    lapack,
    like,
    namespace,
    outer,
    parts,
    sort_descending,
    unknown,
)
from structmat.linalg.chains import blocks_of
from structmat.linalg.determinant import slogdet
from structmat.linalg.norms import norm
from structmat.operator import Operator
from structmat.rules import apply, fallback, rule
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal, Identity, Zero
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.permutation import Permutation

SVDVALS, COND, MATRIX_RANK = "svdvals", "cond", "matrix_rank"


def svdvals(A: Operator) -> Array:
    """Singular values, from large to small.

    Parameters
    ----------
    A
        An operator ``(*batch, m, n)``.

    Returns
    -------
    array
        ``(*batch, min(m, n))``, real, as ``numpy.linalg.svdvals``.

    Raises
    ------
    NotImplementedError
        If no closed form is known, e.g. for a Monarch matrix; :func:`norm` with ``2`` is known for all.

    Notes
    -----
    Kronecker products: all products of the factors' values, padded with zeros where a wide and a tall factor meet.
    Low-rank matrices: two QR factorisations and a small SVD (Golub and Van Loan, section 5.2). Cost: that of the SVDs of
    the stored blocks.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.linalg.svdvals(sm.Diagonal([1.0, -3.0, 2.0])).tolist()
    [3.0, 2.0, 1.0]
    """
    check(A, "svdvals")
    size = min(A.shape[-2:])
    return constant(A, 0, (0,), real=True) if size == 0 else finish(A, apply(SVDVALS, A), (size,), real=True)


def cond(A: Operator, p: Any = None) -> Any:
    """Condition number: ``sigma_max / sigma_min``, or ``|A| |A^-1|`` in another norm.

    Parameters
    ----------
    A
        An operator ``(*batch, m, n)``; square for any ``p`` but 2.
    p
        ``None`` or 2 (spectral), 1, ``inf`` or ``"fro"``.

    Returns
    -------
    scalar or array
        ``(*batch,)``, real; ``inf`` for a singular operator.

    Raises
    ------
    numpy.linalg.LinAlgError
        If ``p`` is not 2 and the operator is not square, or only some of a batch are singular; if the operator is empty.
    NotImplementedError
        If the singular values, or for other ``p`` the inverse, have no closed form.

    Notes
    -----
    Kronecker products: the product of the factors' numbers, if all factors are square, all wide or all tall; ``inf`` in
    the 2-norm where wide meets tall. Cost: that of :func:`svdvals`, or of :func:`norm` of ``A`` and of its inverse.

    Examples
    --------
    >>> import structmat as sm
    >>> float(sm.linalg.cond(sm.Diagonal([1.0, -4.0])))
    4.0
    """
    check(A, "cond")
    if 0 in A.shape[-2:]:
        raise np.linalg.LinAlgError(f"cond: not defined for an empty operator, got shape {A.shape}")
    if p is None or p == 2:
        return finish(A, apply(COND, A), real=True)
    check_square(A, "cond")
    size = norm(A, p)
    try:
        inverse = A.inv()
    except np.linalg.LinAlgError:
        if bool((slogdet(A).sign != 0).any()):  # only some of a batch are singular
            raise
        return finish(A, np.inf, real=True)
    if isinstance(inverse, Inverse):
        raise unknown("cond", A)
    return finish(A, size * norm(inverse, p), real=True)


def matrix_rank(A: Operator, rtol: float | None = None) -> Any:
    """Number of singular values above ``rtol`` times the largest.

    Parameters
    ----------
    A
        An operator ``(*batch, m, n)``.
    rtol
        Default ``max(m, n) * eps``, as ``numpy.linalg.matrix_rank``.

    Returns
    -------
    int or array
        ``(*batch,)``, integers.

    Raises
    ------
    NotImplementedError
        If no closed form is known.

    Notes
    -----
    Kronecker products: the product of the factors' ranks, each judged by its own largest singular value. Cost: that of
    :func:`svdvals`.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> int(sm.linalg.matrix_rank(sm.Kronecker(np.ones((2, 3)), sm.Identity(4))))
    4
    """
    check(A, "matrix_rank")
    return apply(MATRIX_RANK, A, rtol)


# ---- singular values ----------------------------------------------------------------------------------------------------


@fallback(SVDVALS)
def svdvals_unknown(a: Operator) -> Any:
    """No closed form."""
    raise unknown("svdvals", a)


@rule(SVDVALS, Identity)
@rule(SVDVALS, Permutation)
def svdvals_unitary(a: Operator) -> Any:
    """Ones."""
    return constant(a, 1, (a.shape[-1],), real=True)


@rule(SVDVALS, Zero)
def svdvals_zero(a: Zero) -> Any:
    """Zeros."""
    return constant(a, 0, (min(a.shape[-2:]),), real=True)


@rule(SVDVALS, Diagonal)
def svdvals_diagonal(a: Diagonal) -> Any:
    """|v|."""
    return sort_descending(abs(a.values))


@rule(SVDVALS, Dense)
def svdvals_dense(a: Dense) -> Any:
    """Singular value decomposition."""
    return lapack("svdvals", namespace(a).linalg.svdvals, a.array)


@rule(SVDVALS, LowRank)
def svdvals_low_rank(a: LowRank) -> Any:
    """sigma(Q R (P T)^H) = sigma(R T^H), and zeros."""
    xp, left, right = namespace(a), arrays.cast(a.left, a.dtype), arrays.cast(a.right, a.dtype)
    core = xp.linalg.qr(left)[1] @ adjoint(xp.linalg.qr(adjoint(right))[1])
    return _fitted(a, lapack("svdvals", xp.linalg.svdvals, core))


@rule(SVDVALS, Chain)
def svdvals_one_factor(a: Chain) -> Any:
    """Those of the blocks of a single factor."""
    if len(a.factors) != 1:
        return NotImplemented
    values = lapack("svdvals", namespace(a).linalg.svdvals, blocks_of(a))
    return _fitted(a, values.reshape(*values.shape[:-2], -1))


@rule(SVDVALS, Kronecker)
def svdvals_kronecker(a: Kronecker) -> Any:
    """All products, and zeros where a wide and a tall factor meet."""
    return _fitted(a, outer([like(a, svdvals(f)) for f in parts(a, a.factors)]))


@rule(SVDVALS, DirectSum)
def svdvals_direct_sum(a: DirectSum) -> Any:
    """Those of the blocks, and zeros."""
    return _fitted(a, join(a, [svdvals(b) for b in parts(a, a.blocks)]))


@rule(SVDVALS, Scaled)
def svdvals_scaled(a: Scaled) -> Any:
    """sigma(c A) = |c| sigma(A)."""
    return abs(a.scalar) * like(a, svdvals(a.operator))


@rule(SVDVALS, Product)
def svdvals_between_permutations(a: Product) -> Any:
    """sigma(P A Q) = sigma(A) for permutations P, Q."""
    rest = [f for f in a.factors if not isinstance(f, Permutation)]
    return svdvals(rest[0]) if len(rest) == 1 else NotImplemented


# ---- condition and rank -------------------------------------------------------------------------------------------------


@fallback(COND)
def cond_from_singular_values(a: Operator) -> Any:
    """sigma_max / sigma_min."""
    try:
        values = svdvals(a)
    except NotImplementedError:
        raise unknown("cond", a) from None
    xp = namespace(a)
    largest, smallest = values[..., 0], values[..., -1]
    singular = smallest == 0
    return xp.where(singular, xp.asarray(np.inf, dtype=values.dtype), largest / xp.where(singular, 1.0, smallest))


@rule(COND, Kronecker)
def cond_kronecker(a: Kronecker) -> Any:
    """cond(A (x) B) = cond(A) cond(B) if all are square, all wide or all tall; the rank falls where wide meets tall."""
    shapes = [f.shape[-2:] for f in a.factors]
    if all(m >= n for m, n in shapes) or all(m <= n for m, n in shapes):
        return math.prod(like(a, cond(f)) for f in parts(a, a.factors))
    return np.inf


@rule(COND, Scaled)
def cond_scaled(a: Scaled) -> Any:
    """cond(c A) = cond(A)."""
    return cond(a.operator) if abs(a.scalar) > 0 else np.inf


@rule(COND, Inverse)
def cond_inverse(a: Inverse) -> Any:
    """cond(A^-1) = cond(A)."""
    return cond(a.operator)


@fallback(MATRIX_RANK)
def rank_from_singular_values(a: Operator, rtol: float | None = None) -> Any:
    """The singular values above the cutoff, counted."""
    try:
        values = svdvals(a)
    except NotImplementedError:
        raise unknown("matrix_rank", a) from None
    xp = namespace(a)
    rtol = max(a.shape[-2:]) * epsilon(a.dtype) if rtol is None else rtol
    return xp.sum(values > rtol * xp.max(values, axis=-1, keepdims=True), axis=-1) if values.shape[-1] else 0


@rule(MATRIX_RANK, Kronecker)
def rank_kronecker(a: Kronecker, rtol: float | None = None) -> Any:
    """rank(A (x) B) = rank(A) rank(B)."""
    return math.prod(like(a, matrix_rank(f, rtol)) for f in parts(a, a.factors))


def _fitted(a: Operator, values: Array) -> Array:
    """Nonnegative values sorted, and cut or padded with zeros to the smaller size of ``a``."""
    xp, size = namespace(a), min(a.shape[-2:])
    values = sort_descending(values)[..., :size]
    if values.shape[-1] == size:
        return values
    zeros = xp.zeros((*values.shape[:-1], size - values.shape[-1]), dtype=values.dtype, device=a.device)
    return xp.concat((values, zeros), axis=-1)
