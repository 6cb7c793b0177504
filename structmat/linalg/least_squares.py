"""Pseudo-inverses and least squares, by the stored blocks wherever they allow it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from structmat import arrays
from structmat.algebra import Inverse, Product, Scaled
from structmat.arrays import Array, DType
from structmat.blocks import DirectSum
from structmat.linalg.base import (
    adjoint,
    check,
    epsilon,
    lapack,
    namespace,
    parts,
    right_hand_side,
    unknown,
)
from structmat.linalg.chains import blocks_of, thin_svd
from structmat.linalg.norms import norm
from structmat.linalg.singular import matrix_rank, svdvals
from structmat.operator import Operator
from structmat.rules import apply, fallback, rule
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal, Identity, Zero
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.permutation import Permutation

PINV, LSTSQ = "pinv", "lstsq"


class LstsqResult(NamedTuple):
    """Least-squares solution, squared residual norms, rank and singular values (the last two may be ``None``)."""

    solution: Any
    residuals: Any
    rank: Any
    singular_values: Any


def pinv(A: Operator, rtol: float | None = None) -> Operator:
    """The Moore-Penrose pseudo-inverse as an operator of the same structure.

    Parameters
    ----------
    A
        An operator ``(*batch, m, n)``.
    rtol
        Singular values up to ``rtol`` times the largest count as zero; default ``max(m, n) * eps`` as with NumPy's
        ``rtol``. The factors of a Kronecker product are each judged by their own largest value.

    Returns
    -------
    Operator
        ``(*batch, n, m)``.

    Raises
    ------
    NotImplementedError
        If no closed form is known.

    Notes
    -----
    ``pinv(A (x) B) = pinv(A) (x) pinv(B)`` always; of a diagonal ``1/v``, and 0 where ``v`` is; of block-diagonal
    matrices blockwise; of ``U V`` by two QR factorisations and a small SVD (Golub and Van Loan, section 5.5). Cost: that of
    the SVDs of the stored blocks.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.linalg.pinv(sm.Diagonal([2.0, 0.0, -4.0])).values.tolist()
    [0.5, 0.0, -0.25]
    """
    check(A, "pinv")
    return apply(PINV, A, rtol)


def lstsq(A: Operator, b: Array, rtol: float | None = None) -> LstsqResult:
    """The ``x`` of least norm among those that minimise ``|A x - b|``.

    Parameters
    ----------
    A
        An operator ``(*batch, m, n)``.
    b
        An array ``(m,)`` or ``(..., m, k)`` of the operator's library.
    rtol
        As for :func:`pinv`.

    Returns
    -------
    LstsqResult
        ``solution (n,)`` or ``(..., n, k)``; ``residuals``, the squared norms of ``A x - b``, ``()`` or ``(..., k)`` (always
        given); ``rank`` and ``singular_values``, ``None`` where they have no closed form.

    Raises
    ------
    ValueError
        If the sizes differ; the message names both shapes.
    numpy.linalg.LinAlgError
        If the iteration does not converge.
    NotImplementedError
        If no closed form is known and the operator is batched or does not hold NumPy arrays.

    Notes
    -----
    By SVD for dense and low-rank operators, by :func:`pinv` where that has a rule, and else by LSMR (Fong and Saunders,
    SIAM J. Sci. Comput. 33(5), 2011, ``scipy.sparse.linalg.lsmr``) to a relative backward error of a few eps.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> A = sm.LowRank([[1.0], [1.0]], [[1.0, 1.0]])
    >>> sm.linalg.lstsq(A, np.array([1.0, 3.0])).solution.round(12).tolist()
    [1.0, 1.0]
    """
    check(A, "lstsq")
    b = right_hand_side(A, b, "lstsq")
    columns = b[:, None] if b.ndim == 1 else b
    x, rank, values = apply(LSTSQ, A, (columns, rtol))
    residuals = (abs(A @ x - columns) ** 2).sum(-2)
    if b.ndim == 1:
        x, residuals = x[..., 0], residuals[..., 0]
    return LstsqResult(x, residuals, rank, values)


# ---- pinv ---------------------------------------------------------------------------------------------------------------


@fallback(PINV)
def pinv_unknown(a: Operator, _rtol: float | None = None) -> Any:
    """No closed form."""
    raise unknown("pinv", a)


@rule(PINV, Identity)
@rule(PINV, Permutation)
@rule(PINV, Zero)
def pinv_adjoint(a: Operator, _rtol: float | None = None) -> Any:
    """P^+ = P^T, 0^+ = 0^T."""
    return a.T


@rule(PINV, Diagonal)
def pinv_diagonal(a: Diagonal, rtol: float | None = None) -> Any:
    """diag(v)^+ = diag(1/v), 0 where |v| is up to the cutoff."""
    return Diagonal(_reciprocal(a, a.values, rtol)) if a.shape[-1] else a


@rule(PINV, Dense)
@rule(PINV, LowRank)
def pinv_svd(a: Operator, rtol: float | None = None) -> Any:
    """(U S V^H)^+ = V S^+ U^H."""
    u, s, vh = thin_svd(a)
    left, right = adjoint(vh) * _reciprocal(a, s, rtol)[..., None, :], adjoint(u)
    return LowRank(left, right) if isinstance(a, LowRank) else Dense(left @ right)


@rule(PINV, Chain)
def pinv_one_factor(a: Chain, rtol: float | None = None) -> Any:
    """Blockwise for a single factor, the orders exchanged; the cutoff is that of the largest value of all blocks."""
    if len(a.factors) != 1:
        return NotImplemented
    xp, blocks = namespace(a), blocks_of(a)
    u, s, vh = lapack("pinv", lambda x: xp.linalg.svd(x, full_matrices=False), blocks)
    weights = _reciprocal(a, s.reshape(*s.shape[:-2], s.shape[-2] * s.shape[-1]), rtol).reshape(s.shape)
    inverse = (adjoint(vh) * weights[..., None, :]) @ adjoint(u)
    p = a.patterns[0]
    return a._rebuild(
        (inverse.reshape(*inverse.shape[:-3], p.a, p.d, p.c, p.b),),
        (a.shape[-1], a.shape[-2]),
        a.in_order.T if a.in_order else None,
        a.out_order.T if a.out_order else None,
    )


@rule(PINV, Kronecker)
def pinv_kronecker(a: Kronecker, rtol: float | None = None) -> Any:
    """(A (x) B)^+ = A^+ (x) B^+, always."""
    return Kronecker(*(pinv(f, rtol) for f in parts(a, a.factors)))


@rule(PINV, DirectSum)
def pinv_direct_sum(a: DirectSum, rtol: float | None = None) -> Any:
    """diag(A, B)^+ = diag(A^+, B^+), with the cutoff of the largest value of all blocks."""
    if a.batch_shape:
        return NotImplemented
    sizes = [float(norm(b, 2)) for b in a.blocks]
    cutoff = (_default(a) if rtol is None else rtol) * max(sizes)
    return DirectSum(*(pinv(b, cutoff / s if s else 0.0) for b, s in zip(a.blocks, sizes, strict=True)))


@rule(PINV, Scaled)
def pinv_scaled(a: Scaled, rtol: float | None = None) -> Any:
    """(c A)^+ = A^+ / c, and 0 for c = 0."""
    if not abs(a.scalar) > 0:
        return Zero((*a.batch_shape, a.shape[-1], a.shape[-2]), a.dtype)
    return pinv(a.operator, rtol) * (1 / a.scalar)


@rule(PINV, Product)
def pinv_between_permutations(a: Product, rtol: float | None = None) -> Any:
    """(P A Q)^+ = Q^T A^+ P^T for permutations P, Q; (A B)^+ is not B^+ A^+ in general."""
    if sum(not isinstance(f, Permutation) for f in a.factors) != 1:
        return NotImplemented
    first, *others = (f.T if isinstance(f, Permutation) else pinv(f, rtol) for f in reversed(a.factors))
    for other in others:
        first = first @ other
    return first


@rule(PINV, Inverse)
def pinv_inverse(a: Inverse, _rtol: float | None = None) -> Any:
    """(A^-1)^+ = A."""
    return a.operator


def _default(a: Operator) -> float:
    return max(a.shape[-2:]) * epsilon(a.dtype)


def _reciprocal(a: Operator, values: Array, rtol: float | None) -> Array:
    """1/v, and 0 where ``|v|`` is at most ``rtol`` times the largest along the last axis."""
    if not values.shape[-1]:
        return values
    xp, size = arrays.namespace(values), abs(values)
    large = size > (_default(a) if rtol is None else rtol) * xp.max(size, axis=-1, keepdims=True)
    one = xp.ones_like(values)
    return xp.where(large, one / xp.where(large, values, one), xp.zeros_like(values))


# ---- least squares: rules for (b, rtol), with b of shape (..., m, k); they return (x, rank, singular values) -------------


@fallback(LSTSQ)
def lstsq_by_pinv(a: Operator, problem: tuple[Array, float | None]) -> Any:
    """A^+ b where the pseudo-inverse has a rule, else LSMR."""
    b, rtol = problem
    try:
        x = pinv(a, rtol) @ b
    except NotImplementedError:
        return _lsmr(a, b), None, None
    try:
        return x, matrix_rank(a, rtol), svdvals(a)
    except NotImplementedError:
        return x, None, None


@rule(LSTSQ, Dense)
@rule(LSTSQ, LowRank)
def lstsq_svd(a: Operator, problem: tuple[Array, float | None]) -> Any:
    """V S^+ U^H b, with the rank and the singular values."""
    b, rtol = problem
    u, s, vh = thin_svd(a)
    dtype: DType = arrays.promote(a.dtype, b.dtype)
    u, vh, b = (arrays.cast(x, dtype) for x in (u, vh, b))
    x = adjoint(vh) @ (_reciprocal(a, s, rtol)[..., :, None] * (adjoint(u) @ b))
    return x, matrix_rank(a, rtol), svdvals(a)


def _lsmr(a: Operator, b: Array) -> Array:
    """The least-squares solutions by LSMR, column after column."""
    if arrays.kind(b) != "numpy" or a.batch_shape:
        raise NotImplementedError(
            f"lstsq: {a} has no closed form and SciPy's LSMR takes single NumPy operators only; "
            "use numpy.linalg.lstsq(A.to_dense(), b)"
        )
    from scipy.sparse.linalg import lsmr

    operator, dtype = a.to_scipy(), np.result_type(a.dtype, b.dtype)
    rows = np.moveaxis(b, -2, -1).reshape(-1, a.shape[-2]).astype(dtype)
    x = np.empty((rows.shape[0], a.shape[-1]), dtype)
    tolerance = 4 * epsilon(dtype)
    for i, row in enumerate(rows):
        solution, reason, *_ = lsmr(
            operator, row, atol=tolerance, btol=tolerance, conlim=0.0, maxiter=20 * max(a.shape)
        )
        if reason == 7:
            raise np.linalg.LinAlgError(f"lstsq: LSMR did not converge for {a} in {20 * max(a.shape)} iterations")
        x[i] = solution
    return np.moveaxis(x.reshape(*b.shape[:-2], b.shape[-1], a.shape[-1]), -1, -2)
