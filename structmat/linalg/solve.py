"""Linear systems, inverses, pseudo-inverses and least squares, by the stored blocks wherever they allow it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from structmat import arrays
from structmat.algebra import DirectSum, Inverse, Product, Scaled, Sum
from structmat.arrays import Array, DType
from structmat.linalg.base import adjoint, check, check_square, epsilon, lapack, namespace, parts, unknown
from structmat.linalg.chains import blocks_of, is_block_diagonal, is_square_blocks, split, thin_svd, waist
from structmat.linalg.norms import norm
from structmat.linalg.singular import matrix_rank, svdvals
from structmat.linalg.update import bordered
from structmat.operator import Operator
from structmat.rules import apply, fallback, rule
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal, Identity, Zero
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.permutation import Permutation

SOLVE, PINV, LSTSQ = "solve", "pinv", "lstsq"


class LstsqResult(NamedTuple):
    """Least-squares solution, squared residual norms, rank and singular values (the last two may be ``None``)."""

    solution: Any
    residuals: Any
    rank: Any
    singular_values: Any


# ---- the functions ------------------------------------------------------------------------------------------------------


def solve(A: Operator, b: Array) -> Array:
    """The solution of ``A x = b``.

    Parameters
    ----------
    A
        A square operator ``(*batch, n, n)``.
    b
        An array ``(n,)`` or ``(..., n, k)`` of the operator's library, whose leading dimensions broadcast with the batch.

    Returns
    -------
    array
        ``x`` of the shape of ``b`` (with the broadcast batch), in the promoted dtype.

    Raises
    ------
    numpy.linalg.LinAlgError
        If the operator is not square or is singular.
    ValueError
        If the sizes differ; the message names both shapes.
    TypeError
        If ``b`` is an array of another library or device.
    NotImplementedError
        If the inverse has no closed form and the arrays are not NumPy's, or the operator is batched.

    Notes
    -----
    LU factorisations of the stored blocks, which is backward stable block by block (Golub and Van Loan, section 3.4),
    factor after factor in products; a bordered system for diagonal plus low rank; GMRES for the rest (see
    :class:`structmat.algebra.Inverse`).

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> A = sm.Kronecker([[2.0, 1.0], [1.0, 3.0]], sm.Diagonal([1.0, 2.0]))
    >>> sm.linalg.solve(A, A @ np.arange(4.0)).round(12).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    check_square(A, "solve")
    b = _right_hand_side(A, b, "solve")
    b = arrays.cast(b, arrays.promote(A.dtype, b.dtype))
    if b.ndim == 1:
        return apply(SOLVE, A, b[:, None])[..., 0]
    return apply(SOLVE, A, b)


def inv(A: Operator) -> Operator:
    """The inverse as an operator, ``A.inv()``: structured where an identity allows it, lazy otherwise.

    Parameters
    ----------
    A
        A square operator ``(*batch, n, n)``.

    Raises
    ------
    numpy.linalg.LinAlgError
        If the operator is not square, or is singular (a lazy inverse raises when applied).

    Notes
    -----
    The rules are in ``structmat/identities.py``. To solve systems, :func:`solve` is more accurate.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.linalg.inv(sm.Kronecker.random((6, 6), rng=0))
    <Kronecker(Dense(2x2), Dense(3x3)): 6x6 float64>
    """
    check_square(A, "inv")
    return A.inv()


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
    b = _right_hand_side(A, b, "lstsq")
    columns = b[:, None] if b.ndim == 1 else b
    x, rank, values = apply(LSTSQ, A, (columns, rtol))
    residuals = (abs(A @ x - columns) ** 2).sum(-2)
    if b.ndim == 1:
        x, residuals = x[..., 0], residuals[..., 0]
    return LstsqResult(x, residuals, rank, values)


def _right_hand_side(a: Operator, b: Array, what: str) -> Array:
    """``b`` checked against the rows of ``a``."""
    b = arrays.operand(b, a, what)
    axis = -1 if b.ndim == 1 else -2
    if b.ndim == 0 or b.shape[axis] != a.shape[-2]:
        raise ValueError(
            f"{what}: an operator of shape {a.shape} needs b of shape ({a.shape[-2]},) or (..., {a.shape[-2]}, k), "
            f"got {tuple(b.shape)}"
        )
    try:
        np.broadcast_shapes(a.batch_shape, tuple(b.shape[:-2]))
    except ValueError:
        raise ValueError(f"{what}: batch dimensions of {a.shape} and {tuple(b.shape)} do not broadcast") from None
    return b


# ---- solve: rules for b of shape (..., n, k) ----------------------------------------------------------------------------


@fallback(SOLVE)
def solve_by_inverse(a: Operator, b: Array) -> Any:
    """A^-1 b."""
    return a.inv() @ b


@rule(SOLVE, Dense)
def solve_dense(a: Dense, b: Array) -> Any:
    """LU factorisation."""
    return _lu(a, a.array, b)


@rule(SOLVE, Chain)
def solve_chain(a: Chain, b: Array) -> Any:
    """LU factorisation of the square blocks, factor after factor from the left; a narrow waist is singular."""
    if waist(a) < a.shape[-1]:
        raise np.linalg.LinAlgError(f"solve: {a} has rank at most {waist(a)} and is singular")
    if a.padded and is_block_diagonal(a):
        return solve(split(a), b)
    if not is_square_blocks(a):
        return NotImplemented
    x = b[..., a.out_order.T.permutation(), :] if a.out_order else b
    for p, blocks in zip(a.patterns, a.factors, strict=True):
        x = x.reshape(*x.shape[:-2], p.a, p.b, p.d, x.shape[-1]).swapaxes(-3, -2)
        x = _lu(a, blocks, x).swapaxes(-3, -2)
        x = x.reshape(*x.shape[:-4], p.rows, x.shape[-1])
    return x[..., a.in_order.T.permutation(), :] if a.in_order else x


@rule(SOLVE, Kronecker)
def solve_kronecker(a: Kronecker, b: Array) -> Any:
    """(A (x) B)^-1 b, one factor at a time on the stack of its slices."""
    if not all(f.is_square for f in a.factors):
        raise np.linalg.LinAlgError(f"solve: {a} has rectangular factors, so its rank is below its size")
    sizes, k, x = [f.shape[-1] for f in a.factors], b.shape[-1], b
    for i, f in enumerate(a.factors):
        before, n, after = math.prod(sizes[:i]), sizes[i], math.prod(sizes[i + 1 :])
        x = x.reshape(*x.shape[:-2], before, n, after * k).swapaxes(-3, -2)
        x = solve(f, x.reshape(*x.shape[:-3], n, before * after * k))
        x = x.reshape(*x.shape[:-2], n, before, after * k).swapaxes(-3, -2)
        x = x.reshape(*x.shape[:-3], before * n * after, k)
    return x


@rule(SOLVE, DirectSum)
def solve_direct_sum(a: DirectSum, b: Array) -> Any:
    """Block by block; rectangular blocks are singular."""
    if not all(block.is_square for block in a.blocks):
        raise np.linalg.LinAlgError(f"solve: {a} has rectangular blocks and is singular")
    solved, start = [], 0
    for block in a.blocks:
        solved.append(solve(block, b[..., start : start + block.shape[-1], :]))
        start += block.shape[-1]
    xp = arrays.namespace(b)
    lead = np.broadcast_shapes(*(tuple(p.shape[:-2]) for p in solved))
    return xp.concat([xp.broadcast_to(p, (*lead, *p.shape[-2:])) for p in solved], axis=-2)


@rule(SOLVE, Product)
def solve_product(a: Product, b: Array) -> Any:
    """(A B)^-1 b = B^-1 (A^-1 b) for square factors; a narrow inner size is singular."""
    inner = min(f.shape[-1] for f in a.factors)
    if inner < a.shape[-1]:
        raise np.linalg.LinAlgError(f"solve: {a} has rank at most {inner} and is singular")
    if not all(f.is_square for f in a.factors):
        return NotImplemented
    for f in a.factors:
        b = solve(f, b)
    return b


@rule(SOLVE, Scaled)
def solve_scaled(a: Scaled, b: Array) -> Any:
    """(c A)^-1 b = (A^-1 b) / c."""
    if not abs(a.scalar) > 0:
        raise np.linalg.LinAlgError(f"solve: {a.scalar} times an operator of shape {a.shape} is singular")
    return solve(a.operator, b) / a.scalar


@rule(SOLVE, Inverse)
def solve_inverse(a: Inverse, b: Array) -> Any:
    """(A^-1)^-1 b = A b."""
    return a.operator @ b


@rule(SOLVE, Sum)
def solve_diagonal_plus_low_rank(a: Sum, b: Array) -> Any:
    """[D_0, U_0; -V_0, I + V_1 D_1^-1 U_1] [x_0; y] = [b_0; V_1 D_1^-1 b_1], x_1 = D_1^-1 (b_1 - U_1 y) (Woodbury 1950)."""
    form = bordered(a)
    if form is None:
        return NotImplemented
    if form.singular:
        raise np.linalg.LinAlgError(f"solve: {a} is singular: its diagonal has more zeros than the rank can fill")
    xp, diagonal = namespace(a), arrays.cast(form.diagonal, b.dtype)[:, None]
    left, right = arrays.cast(form.left, b.dtype), arrays.cast(form.right, b.dtype)
    below = right @ (b[..., form.large, :] / diagonal)
    above = xp.broadcast_to(b[..., form.small, :], (*below.shape[:-2], form.small.shape[0], b.shape[-1]))
    inner = _lu(a, form.matrix, xp.concat((above, below), axis=-2))
    size = form.small.shape[0]
    outer = (b[..., form.large, :] - left @ inner[..., size:, :]) / diagonal
    x = xp.concat((inner[..., :size, :], outer), axis=-2)
    return x[..., xp.argsort(xp.concat((form.small, form.large))), :]


def _lu(a: Operator, blocks: Array, b: Array) -> Array:
    """Blocks ``(..., n, n)`` solved for ``b (..., n, k)``; ``LinAlgError`` that names the operator if one is singular."""
    try:
        return lapack("solve", arrays.namespace(b).linalg.solve, arrays.cast(blocks, b.dtype), b)
    except np.linalg.LinAlgError as error:
        raise np.linalg.LinAlgError(f"solve: {a} is singular") from error


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
