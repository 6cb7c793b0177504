"""Eigenvalues, and eigenvectors of Hermitian operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from structmat import arrays
from structmat.algebra import Scaled
from structmat.arrays import Array
from structmat.blocks import DirectSum
from structmat.linalg.base import (
    check_hermitian,
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
    unknown,
)
from structmat.linalg.chains import blocks_of, is_square_blocks, split
from structmat.linalg.diagonal import diagonal
from structmat.linalg.norms import norm
from structmat.operator import Operator
from structmat.rules import apply, fallback, rule
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal, Identity, Zero
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.padding import is_block_diagonal
from structmat.structures.permutation import Permutation

EIGVALS, EIGH = "eigvals", "eigh"


class EighResult(NamedTuple):
    """Ascending real eigenvalues and the unitary operator whose columns are the eigenvectors."""

    eigenvalues: Any
    eigenvectors: Operator


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
        outer([like(a, eigvals(f)) for f in parts(a, a.factors)])
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
    return outer([like(a, p.eigenvalues) for p in found]), Kronecker(*(p.eigenvectors for p in found))


@rule(EIGH, Scaled)
def eigh_scaled(a: Scaled) -> Any:
    """lambda(c A) = c lambda(A) for real c."""
    c = complex(a.scalar)
    if c.imag:
        return NotImplemented
    values, vectors = eigh(a.operator)
    return c.real * like(a, values), vectors
