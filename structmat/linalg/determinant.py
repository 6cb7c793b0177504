"""Determinants: every closed form the library knows, for any square operator, definite or not."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from structmat import arrays
from structmat.algebra import Inverse, Product, Scaled, Sum
from structmat.arrays import Array
from structmat.blocks import DirectSum
from structmat.linalg.base import check_square, constant, finish, library_of, like, namespace, parts, unknown
from structmat.linalg.chains import is_square_blocks, order_parity, split, waist
from structmat.linalg.update import bordered
from structmat.operator import Operator
from structmat.rules import apply, fallback, rule
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal, Identity, Zero
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.padding import is_block_diagonal
from structmat.structures.permutation import Permutation

SLOGDET = "slogdet"


class SlogdetResult(NamedTuple):
    """Sign (or phase) and logarithm of the absolute value of a determinant."""

    sign: Any
    logabsdet: Any


def slogdet(A: Operator) -> SlogdetResult:
    """Sign and logarithm of the absolute value of the determinant, ``det(A) = sign * exp(logabsdet)``.

    Parameters
    ----------
    A
        A square operator ``(*batch, n, n)``, real or complex, definite or not.

    Returns
    -------
    SlogdetResult
        ``sign`` of the operator's dtype and ``logabsdet`` of its real dtype, both ``(*batch,)``. A singular operator
        gives ``(0, -inf)``, the empty one ``(1, 0)``, as ``numpy.linalg.slogdet``.

    Raises
    ------
    numpy.linalg.LinAlgError
        If the operator is not square.
    NotImplementedError
        If no closed form is known, e.g. for a sum of two Monarch matrices.

    Notes
    -----
    Products of block determinants; ``det(A (x) B) = det(A)^n_B det(B)^n_A`` (Van Loan 2000); ``det(D + U V) = det(D)
    det(I + V D^-1 U)`` (Golub and Van Loan, 4th ed., section 2.1.4), with the smallest entries of ``D`` kept out of
    the division. Cost: that of the LU factorisations of the stored blocks.

    Examples
    --------
    >>> import structmat as sm
    >>> sign, logabsdet = sm.linalg.slogdet(-2.0 * sm.Identity(3))
    >>> float(sign), round(float(logabsdet), 6)
    (-1.0, 2.079442)
    """
    check_square(A, "slogdet")
    if A.shape[-1] == 0:
        return SlogdetResult(finish(A, 1), finish(A, 0, real=True))
    sign, logabsdet = apply(SLOGDET, A)
    return SlogdetResult(finish(A, sign), finish(A, logabsdet, real=True))


def det(A: Operator) -> Any:
    """The determinant, ``sign * exp(logabsdet)`` of :func:`slogdet`; it overflows where ``slogdet`` does not.

    Parameters
    ----------
    A
        A square operator ``(*batch, n, n)``.

    Returns
    -------
    scalar or array
        ``(*batch,)``, of the operator's dtype.

    Raises
    ------
    numpy.linalg.LinAlgError, NotImplementedError
        As :func:`slogdet`, at the same cost.

    Examples
    --------
    >>> import structmat as sm
    >>> float(sm.linalg.det(sm.Permutation([1, 0, 2])))
    -1.0
    """
    sign, logabsdet = slogdet(A)
    return finish(A, sign * namespace(A).exp(logabsdet))


# ---- rules: (sign, logabsdet) of operators of at least one row -----------------------------------------------------------


@fallback(SLOGDET)
def slogdet_unknown(a: Operator) -> Any:
    """No closed form."""
    raise unknown("slogdet", a)


@rule(SLOGDET, Identity)
def slogdet_identity(_a: Identity) -> Any:
    """det(I) = 1."""
    return 1, 0


@rule(SLOGDET, Zero)
def slogdet_zero(_a: Operator) -> Any:
    """det(0) = 0."""
    return 0, -np.inf


@rule(SLOGDET, Permutation)
def slogdet_permutation(a: Permutation) -> Any:
    """det(P) = (-1)^(n - number of cycles)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = a.shape[-1]
    arcs = (np.ones(n, bool), (np.arange(n), arrays.convert(a.index, "numpy")))
    cycles, _ = connected_components(coo_array(arcs, shape=(n, n)))
    return (-1) ** (n - int(cycles)), 0


@rule(SLOGDET, Dense)
def slogdet_dense(a: Dense) -> Any:
    """LU factorisation."""
    return namespace(a).linalg.slogdet(a.array)


@rule(SLOGDET, Diagonal)
def slogdet_diagonal(a: Diagonal) -> Any:
    """det(diag(v)) = prod v."""
    return _blocks(a.values[..., None, None])


@rule(SLOGDET, LowRank)
def slogdet_low_rank(a: LowRank) -> Any:
    """det(U V) = 0 for rank < n; for rank > n the product is smaller than its factors."""
    if a.rank <= a.shape[-1]:
        return NotImplemented
    return namespace(a).linalg.slogdet(arrays.cast(a.left, a.dtype) @ arrays.cast(a.right, a.dtype))


@rule(SLOGDET, Chain)
def slogdet_chain(a: Chain) -> Any:
    """Product of the determinants of all square blocks, times the signs of the axis orders; 0 for a narrow waist.

    A factor alone is a block-diagonal matrix between two equal shuffles of digits, whose signs cancel.
    """
    if waist(a) < a.shape[-1]:
        return 0, -np.inf
    if a.padded and is_block_diagonal(a):
        return slogdet(split(a))
    if not is_square_blocks(a):
        return NotImplemented
    sign: Any = (-1) ** (order_parity(a.out_order) + order_parity(a.in_order))
    logabsdet: Any = 0
    for f in a.factors:
        s, log = _blocks(arrays.cast(f, a.dtype).reshape(*f.shape[:-4], -1, *f.shape[-2:]))
        sign, logabsdet = sign * s, logabsdet + log
    return sign, logabsdet


@rule(SLOGDET, Kronecker)
def slogdet_kronecker(a: Kronecker) -> Any:
    """det(A (x) B) = det(A)^n_B det(B)^n_A; 0 if a factor is rectangular, because the rank is then below the size."""
    if not all(f.is_square for f in a.factors):
        return 0, -np.inf
    sign, logabsdet = 1, 0
    for f in parts(a, a.factors):
        s, log = slogdet(f)
        times = a.shape[-1] // f.shape[-1]
        sign, logabsdet = sign * like(a, s) ** times, logabsdet + times * like(a, log)
    return sign, logabsdet


@rule(SLOGDET, DirectSum)
def slogdet_direct_sum(a: DirectSum) -> Any:
    """det(diag(A, B)) = det(A) det(B); 0 if a block is rectangular."""
    return _product(a, a.blocks) if all(b.is_square for b in a.blocks) else (0, -np.inf)


@rule(SLOGDET, Product)
def slogdet_product(a: Product) -> Any:
    """det(A B) = det(A) det(B) for square factors; 0 if an inner size is below the outer one."""
    if min(f.shape[-1] for f in a.factors) < a.shape[-1]:
        return 0, -np.inf
    return _product(a, a.factors) if all(f.is_square for f in a.factors) else NotImplemented


@rule(SLOGDET, Scaled)
def slogdet_scaled(a: Scaled) -> Any:
    """det(c A) = c^n det(A)."""
    n, (sign, logabsdet) = a.shape[-1], slogdet(a.operator)
    c = a.scalar if arrays.kind(a.scalar) == library_of(a) else constant(a, a.scalar)
    size = abs(c)
    if not bool((size > 0).all()):
        return 0, -np.inf
    return like(a, sign) * (c / size) ** n, like(a, logabsdet) + n * namespace(a).log(size)


@rule(SLOGDET, Inverse)
def slogdet_inverse(a: Inverse) -> Any:
    """det(A^-1) = 1 / det(A)."""
    sign, logabsdet = slogdet(a.operator)
    if not bool(namespace(a).all(like(a, sign) != 0)):
        raise np.linalg.LinAlgError(f"slogdet: {a.operator} is singular and has no inverse")
    return 1 / sign, -logabsdet


@rule(SLOGDET, Sum)
def slogdet_diagonal_plus_low_rank(a: Sum) -> Any:
    """det(D + U V) = det(D_1) det([D_0, U_0; -V_0, I + V_1 D_1^-1 U_1])."""
    form = bordered(a)
    if form is None:
        return NotImplemented
    if form.singular:
        return 0, -np.inf
    sign, logabsdet = namespace(a).linalg.slogdet(form.matrix)
    s, log = _blocks(form.diagonal[:, None, None])
    return sign * s, logabsdet + log


def _blocks(blocks: Array) -> tuple[Array, Array]:
    """Sign and logarithm of the product of the determinants of blocks ``(..., count, n, n)``."""
    xp = arrays.namespace(blocks)
    sign, logabsdet = xp.linalg.slogdet(blocks)
    return xp.prod(sign, axis=-1), xp.sum(logabsdet, axis=-1)


def _product(a: Operator, operators: tuple[Operator, ...]) -> tuple[Any, Any]:
    sign, logabsdet = 1, 0
    for part in parts(a, operators):
        s, log = slogdet(part)
        sign, logabsdet = sign * like(a, s), logabsdet + like(a, log)
    return sign, logabsdet
