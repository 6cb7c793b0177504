"""Linear systems and inverses, by the stored blocks wherever they allow it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from structmat import arrays
from structmat.algebra import Inverse, Product, Scaled, Sum
from structmat.arrays import Array
from structmat.blocks import DirectSum
from structmat.linalg.base import (
    check_square,
    lapack,
    namespace,
    right_hand_side,
)
from structmat.linalg.chains import is_square_blocks, split, waist
from structmat.linalg.update import bordered
from structmat.operator import Operator
from structmat.rules import apply, fallback, rule
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.kronecker import Kronecker
from structmat.structures.padding import is_block_diagonal

SOLVE = "solve"


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
    b = right_hand_side(A, b, "solve")
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
