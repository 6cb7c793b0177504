"""Trace, diagonal, singular values and eigenvalues, and what follows from them: condition number and rank."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from structmat import arrays
from structmat.algebra import DirectSum, Inverse, Product, Scaled, Sum
from structmat.arrays import Array
from structmat.linalg.base import (
    adjoint,
    check,
    check_hermitian,
    check_square,
    columns,
    constant,
    epsilon,
    finish,
    join,
    lapack,
    like,
    namespace,
    parts,
    sort_descending,
    unknown,
)
from structmat.linalg.chains import blocks_of, entries, is_block_diagonal, is_square_blocks, split
from structmat.linalg.determinant import slogdet
from structmat.linalg.norms import norm
from structmat.operator import Operator
from structmat.rules import apply, fallback, rule
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal, Identity, Zero
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.permutation import Permutation

TRACE, DIAGONAL, SVDVALS, EIGVALS, EIGH = "trace", "diagonal", "svdvals", "eigvals", "eigh"
COND, MATRIX_RANK = "cond", "matrix_rank"


class EighResult(NamedTuple):
    """Ascending real eigenvalues and the unitary operator whose columns are the eigenvectors."""

    eigenvalues: Any
    eigenvectors: Operator


# ---- the functions ------------------------------------------------------------------------------------------------------


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


def eigvals(A: Operator) -> Array:
    """Eigenvalues, in no particular order.

    Parameters
    ----------
    A
        A square operator ``(*batch, n, n)``.

    Returns
    -------
    array
        ``(*batch, n)``, complex, or real where the library's ``eigvals`` of the stored blocks is.

    Raises
    ------
    numpy.linalg.LinAlgError
        If the operator is not square.
    NotImplementedError
        If no closed form is known.

    Notes
    -----
    Kronecker products of square factors: all products; ``U V``: those of ``V U`` and zeros. Cost: that of the stored blocks.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> A = sm.Kronecker([[0.0, 1.0], [-1.0, 0.0]], sm.Diagonal([1.0, 2.0]))
    >>> np.sort(sm.linalg.eigvals(A).imag).tolist()
    [-2.0, -1.0, 1.0, 2.0]
    """
    check_square(A, "eigvals")
    if A.shape[-1] == 0:
        return constant(A, 0, (0,))
    values = like(A, apply(EIGVALS, A))
    shape = (*A.batch_shape, A.shape[-1])
    return values if tuple(values.shape) == shape else namespace(A).broadcast_to(values, shape)


def eigh(A: Operator) -> EighResult:
    """Eigenvalues and eigenvectors of a Hermitian operator, ``A @ V = V @ Diagonal(eigenvalues)``.

    Parameters
    ----------
    A
        A square operator ``(*batch, n, n)``; batches of dense operators only. It is checked to be Hermitian to rounding.

    Returns
    -------
    EighResult
        ``eigenvalues (*batch, n)``, real and ascending, and ``eigenvectors``, a unitary operator of the structure of ``A``
        times a permutation.

    Raises
    ------
    numpy.linalg.LinAlgError
        If the operator is not square or not Hermitian.
    NotImplementedError
        If no closed form is known, or for a Kronecker product that is Hermitian though its factors are not.

    Notes
    -----
    Kronecker products and block-diagonal matrices factor by factor (Van Loan 2000). Cost: that of the stored blocks.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> A = sm.Kronecker([[2.0, 1.0], [1.0, 2.0]], sm.Diagonal([1.0, -1.0]))
    >>> w, V = sm.linalg.eigh(A)
    >>> w.round(12).tolist(), bool(np.allclose(A @ V.to_dense(), V.to_dense() * w))
    ([-3.0, -1.0, 1.0, 3.0], True)
    """
    check_square(A, "eigh")
    if A.shape[-1] == 0:
        return EighResult(constant(A, 0, (0,), real=True), A)
    if A.batch_shape and not isinstance(A, Dense):
        raise NotImplementedError(f"eigh: batches are known for dense operators only, got {A}")
    values, vectors = apply(EIGH, A)
    values = finish(A, values, (A.shape[-1],), real=True)
    if isinstance(A, Dense):
        return EighResult(values, vectors)
    order = np.argsort(arrays.convert(values, "numpy"), kind="stable")
    return EighResult(values[order], vectors @ Permutation(order, A.dtype).T)


def eigvalsh(A: Operator) -> Array:
    """Eigenvalues of a Hermitian operator, ascending: the first part of :func:`eigh`, at its cost.

    Parameters
    ----------
    A
        A square operator ``(*batch, n, n)``, checked to be Hermitian to rounding.

    Returns
    -------
    array
        ``(*batch, n)``, real.

    Raises
    ------
    numpy.linalg.LinAlgError, NotImplementedError
        As :func:`eigh`.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.linalg.eigvalsh(sm.Diagonal([3.0, -1.0])).tolist()
    [-1.0, 3.0]
    """
    check_square(A, "eigvalsh")
    return eigh(A).eigenvalues


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
        return _outer([like(a, diagonal(f)) for f in parts(a, a.factors)])
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
    return _fitted(a, _outer([like(a, svdvals(f)) for f in parts(a, a.factors)]))


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


# ---- eigenvalues --------------------------------------------------------------------------------------------------------


@fallback(EIGVALS)
def eigvals_unknown(a: Operator) -> Any:
    """No closed form."""
    raise unknown("eigvals", a)


@rule(EIGVALS, Identity)
@rule(EIGVALS, Zero)
@rule(EIGVALS, Diagonal)
def eigvals_diagonal(a: Operator) -> Any:
    """The diagonal."""
    return diagonal(a)


@rule(EIGVALS, Dense)
def eigvals_dense(a: Dense) -> Any:
    """QR algorithm."""
    return lapack("eigvals", namespace(a).linalg.eigvals, a.array)


@rule(EIGVALS, LowRank)
def eigvals_low_rank(a: LowRank) -> Any:
    """lambda(U V) = lambda(V U) and zeros."""
    xp, left, right = namespace(a), arrays.cast(a.left, a.dtype), arrays.cast(a.right, a.dtype)
    values = lapack("eigvals", xp.linalg.eigvals, right @ left if a.rank < a.shape[-1] else left @ right)
    zeros = xp.zeros((*values.shape[:-1], a.shape[-1] - values.shape[-1]), dtype=values.dtype, device=a.device)
    return xp.concat((values, zeros), axis=-1)


@rule(EIGVALS, Chain)
def eigvals_block_diagonal(a: Chain) -> Any:
    """Those of square blocks along the diagonal."""
    if not is_block_diagonal(a):
        return NotImplemented
    if not is_square_blocks(a):
        return eigvals(split(a)) if a.padded else NotImplemented
    values = lapack("eigvals", namespace(a).linalg.eigvals, blocks_of(a))
    return values.reshape(*values.shape[:-2], -1)


@rule(EIGVALS, DirectSum)
def eigvals_direct_sum(a: DirectSum) -> Any:
    """Those of square blocks."""
    return join(a, [eigvals(b) for b in parts(a, a.blocks)]) if all(b.is_square for b in a.blocks) else NotImplemented


@rule(EIGVALS, Kronecker)
def eigvals_kronecker(a: Kronecker) -> Any:
    """All products, for square factors."""
    return (
        _outer([like(a, eigvals(f)) for f in parts(a, a.factors)])
        if all(f.is_square for f in a.factors)
        else NotImplemented
    )


@rule(EIGVALS, Scaled)
def eigvals_scaled(a: Scaled) -> Any:
    """lambda(c A) = c lambda(A)."""
    return a.scalar * like(a, eigvals(a.operator))


@fallback(EIGH)
def eigh_unknown(a: Operator) -> Any:
    """No closed form."""
    raise unknown("eigh", a)


@rule(EIGH, Identity)
@rule(EIGH, Zero)
@rule(EIGH, Diagonal)
def eigh_diagonal(a: Operator) -> Any:
    """The diagonal, with unit vectors."""
    values = like(a, diagonal(a))
    check_hermitian("eigh", a, values[..., None, None])
    return values.real, Identity(a.shape[-1], a.dtype)


@rule(EIGH, Dense)
def eigh_dense(a: Dense) -> Any:
    """LAPACK's Hermitian solver."""
    check_hermitian("eigh", a, a.array)
    values, vectors = lapack("eigh", namespace(a).linalg.eigh, a.array)
    return values, Dense(vectors)


@rule(EIGH, Chain)
def eigh_block_diagonal(a: Chain) -> Any:
    """Block by block, for square blocks along the diagonal."""
    if not is_block_diagonal(a):
        return NotImplemented
    if not is_square_blocks(a):
        return eigh(split(a)) if a.padded else NotImplemented
    blocks = blocks_of(a)
    check_hermitian("eigh", a, blocks)
    values, vectors = lapack("eigh", namespace(a).linalg.eigh, blocks)
    return values.reshape(-1), BlockDiagonal(vectors)


@rule(EIGH, DirectSum)
def eigh_direct_sum(a: DirectSum) -> Any:
    """Block by block; a Hermitian direct sum has no rectangular blocks, unless what hangs over is zero."""
    if not all(b.is_square for b in a.blocks):
        return NotImplemented
    found = [eigh(b) for b in parts(a, a.blocks)]
    return join(a, [p.eigenvalues for p in found]), DirectSum(*(p.eigenvectors for p in found))


@rule(EIGH, Kronecker)
def eigh_kronecker(a: Kronecker) -> Any:
    """Factorwise: products of eigenvalues, Kronecker products of eigenvectors."""
    if not all(f.is_square for f in a.factors):
        return NotImplemented
    try:
        found = [eigh(f) for f in parts(a, a.factors)]
    except np.linalg.LinAlgError:
        if norm(a - a.H) <= 10 * a.shape[-1] * epsilon(a.dtype) * norm(a):
            raise NotImplementedError(
                f"eigh: {a} is Hermitian but its factors are not, e.g. two skew ones; use numpy.linalg.eigh(A.to_dense())"
            ) from None
        raise
    return _outer([like(a, p.eigenvalues) for p in found]), Kronecker(*(p.eigenvectors for p in found))


@rule(EIGH, Scaled)
def eigh_scaled(a: Scaled) -> Any:
    """lambda(c A) = c lambda(A) for real c."""
    c = complex(a.scalar)
    if c.imag:
        return NotImplemented
    values, vectors = eigh(a.operator)
    return c.real * like(a, values), vectors


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


# ---- small steps --------------------------------------------------------------------------------------------------------


def _outer(vectors: list[Array]) -> Array:
    """All products of one entry of each vector ``(*batch, n_i)``, the last index fast."""
    result = vectors[0]
    for x in vectors[1:]:
        result = result[..., :, None] * x[..., None, :]
        result = result.reshape(*result.shape[:-2], -1)
    return result


def _fitted(a: Operator, values: Array) -> Array:
    """Nonnegative values sorted, and cut or padded with zeros to the smaller size of ``a``."""
    xp, size = namespace(a), min(a.shape[-2:])
    values = sort_descending(values)[..., :size]
    if values.shape[-1] == size:
        return values
    zeros = xp.zeros((*values.shape[:-1], size - values.shape[-1]), dtype=values.dtype, device=a.device)
    return xp.concat((values, zeros), axis=-1)
