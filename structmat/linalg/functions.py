"""Cholesky factor and exponential, for the structures whose structure they keep."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from structmat import arrays
from structmat.algebra import Scaled, Sum
from structmat.arrays import Array
from structmat.blocks import DirectSum
from structmat.linalg.base import check_hermitian, check_square, constant, epsilon, lapack, like, namespace, unknown
from structmat.linalg.chains import is_square_blocks, split
from structmat.linalg.diagonal import diagonal, trace
from structmat.operator import Operator
from structmat.rules import apply, fallback, rule
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal, Identity, Zero
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.padding import is_block_diagonal

CHOLESKY, EXPM = "cholesky", "expm"


def cholesky(A: Operator) -> Operator:
    """The lower triangular operator ``L`` with ``A = L @ L.H`` and a positive diagonal.

    Parameters
    ----------
    A
        A Hermitian positive definite operator ``(*batch, n, n)``; both are checked, to rounding.

    Returns
    -------
    Operator
        Of the structure of ``A``.

    Raises
    ------
    numpy.linalg.LinAlgError
        If the operator is not square, not Hermitian or not positive definite.
    NotImplementedError
        If the factor has no closed form of the same structure.

    Notes
    -----
    Dense, diagonal and block-diagonal operators, direct sums and Kronecker products of them, factor by factor (Van Loan
    2000; two negative definite factors are allowed). Cost: that of the stored blocks.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.linalg.cholesky(sm.Kronecker(sm.Diagonal([4.0, 9.0]), sm.Identity(2))).to_dense().diagonal().tolist()
    [2.0, 2.0, 3.0, 3.0]
    """
    check_square(A, "cholesky")
    return apply(CHOLESKY, A) if A.shape[-1] else A


def expm(A: Operator) -> Operator:
    """The matrix exponential, where it keeps the structure.

    Parameters
    ----------
    A
        A square operator ``(*batch, n, n)``.

    Raises
    ------
    numpy.linalg.LinAlgError
        If the operator is not square.
    NotImplementedError
        If the exponential has no closed form of a structure.

    Notes
    -----
    ``exp(A (x) I + I (x) B) = exp(A) (x) exp(B)`` (but ``exp(A (x) B)`` has no such form); ``exp(U V) = I + U phi(V U) V``
    with ``phi(z) = (e^z - 1) / z`` (Higham, Functions of Matrices, 2008, sections 1.2 and 10.1, 10.7.4). Blocks by
    scaling and squaring. Cost: that of the stored blocks.

    Examples
    --------
    >>> import structmat as sm
    >>> A = sm.Kronecker([[0.0, 1.0], [0.0, 0.0]], sm.Identity(2)) + sm.Kronecker(sm.Identity(2), sm.Zero((2, 2)))
    >>> sm.linalg.expm(A).to_dense()[0].tolist()
    [1.0, 0.0, 1.0, 0.0]
    """
    check_square(A, "expm")
    return apply(EXPM, A) if A.shape[-1] else A


# ---- Cholesky -----------------------------------------------------------------------------------------------------------


@fallback(CHOLESKY)
def cholesky_unknown(a: Operator) -> Any:
    """No closed form."""
    raise unknown("cholesky", a)


@rule(CHOLESKY, Identity)
def cholesky_identity(a: Identity) -> Any:
    """I = I I."""
    return a


@rule(CHOLESKY, Zero)
def cholesky_zero(a: Zero) -> Any:
    """0 is not positive definite."""
    raise np.linalg.LinAlgError(f"cholesky: {a} is not positive definite")


@rule(CHOLESKY, Diagonal)
def cholesky_diagonal(a: Diagonal) -> Any:
    """diag(v) = diag(sqrt(v)) diag(sqrt(v)) for positive v."""
    check_hermitian("cholesky", a, a.values[..., None, None])
    if not bool((a.values.real > 0).all()):
        raise np.linalg.LinAlgError(f"cholesky: {a} has entries that are not positive")
    return Diagonal(arrays.cast(namespace(a).sqrt(a.values.real), a.dtype))


@rule(CHOLESKY, Dense)
def cholesky_dense(a: Dense) -> Any:
    """LAPACK's factorisation."""
    return Dense(_cholesky(a, a.array))


@rule(CHOLESKY, Chain)
def cholesky_block_diagonal(a: Chain) -> Any:
    """Block by block, for square blocks along the diagonal."""
    if not is_block_diagonal(a):
        return NotImplemented
    if not is_square_blocks(a):
        return cholesky(split(a)) if a.padded else NotImplemented
    return a.with_factors((_cholesky(a, a.factors[0]),))


@rule(CHOLESKY, DirectSum)
def cholesky_direct_sum(a: DirectSum) -> Any:
    """Block by block; with rectangular blocks the operator is singular."""
    if not all(b.is_square for b in a.blocks):
        raise np.linalg.LinAlgError(f"cholesky: {a} has rectangular blocks and is not positive definite")
    return DirectSum(*(cholesky(b) for b in a.blocks))


@rule(CHOLESKY, Kronecker)
def cholesky_kronecker(a: Kronecker) -> Any:
    """Factorwise, each factor first turned by the phase of its trace: a definite product has definite factors."""
    if not all(f.is_square for f in a.factors):
        raise np.linalg.LinAlgError(f"cholesky: {a} has rectangular factors and is not positive definite")
    if a.batch_shape:
        return NotImplemented
    traces = [complex(trace(f)) for f in a.factors]
    phases = [t / abs(t) if t else 1.0 + 0j for t in traces]
    if abs(math.prod(phases) - 1) > 100 * epsilon(a.dtype):
        raise np.linalg.LinAlgError(f"cholesky: {a} is not positive definite")
    turned = [f / (s if s.imag else s.real) if s != 1 else f for f, s in zip(a.factors, phases, strict=True)]
    return Kronecker(*(cholesky(f) for f in turned))


@rule(CHOLESKY, Scaled)
def cholesky_scaled(a: Scaled) -> Any:
    """With a factor L of A, c A = (sqrt(c) L) (sqrt(c) L)^H for positive c."""
    c = complex(a.scalar)
    if c == 0 or (c.imag == 0 and c.real < 0 and isinstance(a.operator, Identity)):
        raise np.linalg.LinAlgError(f"cholesky: {a} is not positive definite")
    if c.imag or not c.real > 0:
        return NotImplemented
    return cholesky(a.operator) * math.sqrt(c.real)


def _cholesky(a: Operator, blocks: Array) -> Array:
    check_hermitian("cholesky", a, blocks)
    try:
        return lapack("cholesky", namespace(a).linalg.cholesky, blocks)
    except np.linalg.LinAlgError as error:
        raise np.linalg.LinAlgError(f"cholesky: {a} is not positive definite") from error


# ---- exponential --------------------------------------------------------------------------------------------------------


@fallback(EXPM)
def expm_unknown(a: Operator) -> Any:
    """No closed form."""
    raise NotImplementedError(
        f"expm: no closed form is known for {a}; scipy.linalg.expm(A.to_dense()) computes it from the dense matrix"
    )


@rule(EXPM, Identity)
@rule(EXPM, Zero)
@rule(EXPM, Diagonal)
def expm_diagonal(a: Operator) -> Any:
    """exp(diag(v)) = diag(exp(v))."""
    return Diagonal(namespace(a).exp(like(a, diagonal(a))))


@rule(EXPM, Dense)
def expm_dense(a: Dense) -> Any:
    """Scaling and squaring."""
    return Dense(_expm(a.array))


@rule(EXPM, LowRank)
def expm_low_rank(a: LowRank) -> Any:
    """exp(U V) = I + U phi(V U) V; phi(M) is the upper right block of exp([M, I; 0, 0])."""
    left, right = arrays.cast(a.left, a.dtype), arrays.cast(a.right, a.dtype)
    xp, r = namespace(a), a.rank
    core = right @ left
    eye = xp.broadcast_to(xp.eye(r, dtype=a.dtype, device=a.device), core.shape)
    upper = xp.concat((core, eye), axis=-1)
    phi = _expm(xp.concat((upper, xp.zeros_like(upper)), axis=-2))[..., :r, r:]
    return Identity(a.shape[-1], a.dtype) + LowRank(left @ phi, right)


@rule(EXPM, Chain)
def expm_block_diagonal(a: Chain) -> Any:
    """Block by block, for square blocks along the diagonal."""
    if not is_block_diagonal(a):
        return NotImplemented
    if not is_square_blocks(a):
        return expm(split(a)) if a.padded else NotImplemented
    return a.with_factors((_expm(a.factors[0]),))


@rule(EXPM, DirectSum)
def expm_direct_sum(a: DirectSum) -> Any:
    """exp(diag(A, B)) = diag(exp(A), exp(B)) for square blocks."""
    return DirectSum(*(expm(b) for b in a.blocks)) if all(b.is_square for b in a.blocks) else NotImplemented


@rule(EXPM, Scaled)
def expm_scaled(a: Scaled) -> Any:
    """exp(c I) = e^c I."""
    if not isinstance(a.operator, Identity):
        return NotImplemented
    return Diagonal(namespace(a).exp(constant(a, 1, (a.shape[-1],)) * a.scalar))


@rule(EXPM, Sum)
def expm_kronecker_sum(a: Sum) -> Any:
    """exp(A (x) I + I (x) B) = exp(A) (x) exp(B)."""
    terms = [t for t in a.terms if isinstance(t, Kronecker)]
    shapes = [f.shape[-2:] for f in terms[0].factors] if terms else []
    if len(terms) != len(a.terms) or any([f.shape[-2:] for f in t.factors] != shapes for t in terms):
        return NotImplemented
    slots: list[Operator] = [Zero(s, a.dtype) for s in shapes]
    for t in terms:
        busy = [i for i, f in enumerate(t.factors) if not isinstance(f, Identity)]
        if len(busy) != 1:
            return NotImplemented
        slots[busy[0]] = slots[busy[0]] + t.factors[busy[0]]
    return Kronecker(*(expm(s) for s in slots))


def _expm(blocks: Array) -> Array:
    """The exponentials of blocks ``(..., n, n)``."""
    if arrays.kind(blocks) == "torch":
        return arrays.namespace(blocks).linalg.matrix_exp(blocks)
    if arrays.kind(blocks) != "numpy":
        raise NotImplementedError(f"expm: not available for {arrays.kind(blocks)} arrays; use A.to('numpy')")
    from scipy.linalg import expm as dense_expm

    return dense_expm(blocks)
