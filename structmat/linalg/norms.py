"""Norms of operators: products over factors, maxima over blocks, and for the rest unit columns or Lanczos."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from structmat import arrays
from structmat.algebra import Product, Scaled
from structmat.arrays import Array
from structmat.blocks import DirectSum, HorizontalStack, VerticalStack
from structmat.linalg.base import CHUNK, check, columns, finish, join, library_of, like, namespace, parts, unknown
from structmat.linalg.chains import blocks_of, frobenius
from structmat.operator import Operator
from structmat.rules import apply, fallback, rule
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal, Identity, Zero
from structmat.structures.kronecker import Kronecker
from structmat.structures.permutation import Permutation

NORM = "norm"
ORDERS = ("fro", 1, 2, np.inf, "nuc")


def norm(A: Operator, ord: Any = "fro") -> Any:
    """A matrix norm.

    Parameters
    ----------
    A
        An operator ``(*batch, m, n)``.
    ord
        ``"fro"`` or ``None`` (Frobenius), 1 (largest column sum), ``inf`` (largest row sum), 2 (largest singular value) or
        ``"nuc"`` (sum of the singular values), as ``numpy.linalg.norm``.

    Returns
    -------
    scalar or array
        ``(*batch,)``, real; 0 for an empty operator.

    Raises
    ------
    ValueError
        For any other ``ord``.
    NotImplementedError
        For the nuclear norm if the singular values have no closed form; for the 2-norm if they have none and the operator
        is batched or does not hold NumPy arrays.
    numpy.linalg.LinAlgError
        If the Lanczos iteration of the 2-norm does not converge.

    Notes
    -----
    All five are products over Kronecker factors. Chains: Frobenius norm from their parameters, by QR factorisations of the
    blocks. Without a rule the Frobenius, 1- and infinity norm are exact, from ``n`` applications, 64 columns at once; the
    2-norm comes from the singular values where they have a closed form, and else from ARPACK's Lanczos iteration on
    ``A^H A`` (Lehoucq, Sorensen and Yang 1998), to a relative error of 1e-10 (float64) or 1e-4 (float32).

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> A = sm.Kronecker(np.ones((2, 3)), sm.Diagonal([1.0, -2.0]))
    >>> [float(sm.linalg.norm(A, p)) for p in (1, np.inf)]
    [4.0, 6.0]
    """
    check(A, "norm")
    known = [o for o in ORDERS if ("fro" if ord is None else ord) == o]
    if not known:
        raise ValueError(f"norm: expected ord 'fro', 1, 2, inf or 'nuc', got {ord!r}")
    return finish(A, 0 if 0 in A.shape[-2:] else apply(NORM, A, known[0]), real=True)


# ---- without a rule -----------------------------------------------------------------------------------------------------


@fallback(NORM)
def norm_by_applying(a: Operator, ord: Any) -> Any:
    """Sums over blocks of columns; singular values in closed form; else Lanczos iteration for the largest."""
    xp = namespace(a)
    if ord == "fro":
        a = a if a.shape[-1] <= a.shape[-2] else a.T
        return _length(xp.stack([xp.linalg.matrix_norm(block) for _, block in columns(a)], axis=-1))
    if ord == 1:
        return _largest(xp.stack([xp.linalg.matrix_norm(block, ord=1) for _, block in columns(a)], axis=-1))
    if ord == np.inf:
        return _largest(sum(xp.sum(abs(block), axis=-1) for _, block in columns(a)))
    try:
        values = like(a, apply("svdvals", a))
    except NotImplementedError:
        if ord == "nuc":
            raise unknown("norm", a) from None
        return _spectral(a)
    return values[..., 0] if ord == 2 else xp.sum(values, axis=-1)


def _spectral(a: Operator) -> Any:
    """The largest singular value: dense for narrow operators, else by Lanczos iteration."""
    if min(a.shape[-2:]) <= CHUNK:
        ((_, block),) = columns(a if a.shape[-1] <= a.shape[-2] else a.T)
        return namespace(a).linalg.matrix_norm(block, ord=2)
    if library_of(a) != "numpy" or a.batch_shape:
        raise NotImplementedError(
            f"norm: the 2-norm of {a} has no closed form and SciPy's Lanczos iteration takes single NumPy operators only; "
            f"use A.to('numpy'), or {library_of(a)}.linalg.norm(A.to_dense(), ord=2)"
        )
    from scipy.sparse.linalg import ArpackNoConvergence, svds

    start = np.random.default_rng(0).standard_normal(min(a.shape)).astype(a.dtype)
    if not (a.matvec(start) if a.shape[-1] <= a.shape[-2] else a.rmatvec(start)).any():
        return 0.0  # ARPACK refuses a start that the operator maps to zero
    try:
        return svds(a.to_scipy(), k=1, v0=start, return_singular_vectors=False)[0]
    except ArpackNoConvergence as error:
        raise np.linalg.LinAlgError(f"norm: the Lanczos iteration for {a} did not converge") from error


# ---- rules --------------------------------------------------------------------------------------------------------------


@rule(NORM, Zero)
def norm_zero(_a: Zero, _ord: Any) -> Any:
    """0."""
    return 0


@rule(NORM, Identity)
@rule(NORM, Permutation)
def norm_unitary(a: Operator, ord: Any) -> Any:
    """|P|_F = sqrt(n), |P|_* = n, else 1."""
    return {"fro": math.sqrt(a.shape[-1]), "nuc": a.shape[-1]}.get(ord, 1)


@rule(NORM, Diagonal)
def norm_diagonal(a: Diagonal, ord: Any) -> Any:
    """|v|_2, |v|_1 or max |v|."""
    if ord == "fro":
        return _length(a.values)
    return namespace(a).sum(abs(a.values), axis=-1) if ord == "nuc" else _largest(abs(a.values))


@rule(NORM, Dense)
def norm_dense(a: Dense, ord: Any) -> Any:
    """The library's own."""
    return namespace(a).linalg.matrix_norm(a.array, ord=ord)


@rule(NORM, Chain)
def norm_chain(a: Chain, ord: Any) -> Any:
    """Frobenius: from the triangular factors of the blocks; 1 and inf: the largest sum in the blocks of one factor."""
    if ord == "fro":
        value = frobenius(a)
        return NotImplemented if value is None else value
    if ord in (1, np.inf) and len(a.factors) == 1:
        return _largest(namespace(a).linalg.matrix_norm(blocks_of(a), ord=ord))
    return NotImplemented


@rule(NORM, Kronecker)
def norm_kronecker(a: Kronecker, ord: Any) -> Any:
    """|A (x) B| = |A| |B| in all five norms."""
    return math.prod(like(a, norm(f, ord)) for f in parts(a, a.factors))


@rule(NORM, DirectSum)
def norm_direct_sum(a: DirectSum, ord: Any) -> Any:
    """Root of the sum of squares, sum, or maximum of the norms of the blocks."""
    values = _each(a, a.blocks, ord)
    if ord == "fro":
        return _length(values)
    return namespace(a).sum(values, axis=-1) if ord == "nuc" else _largest(values)


@rule(NORM, HorizontalStack)
@rule(NORM, VerticalStack)
def norm_stack(a: HorizontalStack | VerticalStack, ord: Any) -> Any:
    """|[A B]|_F from both; |[A B]|_1 and |[A; B]|_inf are the larger one."""
    if ord == "fro":
        return _length(_each(a, a.blocks, ord))
    if ord == (1 if isinstance(a, HorizontalStack) else np.inf):
        return _largest(_each(a, a.blocks, ord))
    return NotImplemented


@rule(NORM, Scaled)
def norm_scaled(a: Scaled, ord: Any) -> Any:
    """|c A| = |c| |A|."""
    return abs(a.scalar) * like(a, norm(a.operator, ord))


@rule(NORM, Product)
def norm_between_permutations(a: Product, ord: Any) -> Any:
    """|P A Q| = |A| for permutations P, Q, in all five norms."""
    rest = [f for f in a.factors if not isinstance(f, Permutation)]
    return norm(rest[0], ord) if len(rest) == 1 else NotImplemented


# ---- small steps --------------------------------------------------------------------------------------------------------


def _length(values: Array) -> Array:
    return arrays.namespace(values).linalg.vector_norm(values, axis=-1)


def _largest(values: Array) -> Array:
    return arrays.namespace(values).max(values, axis=-1)


def _each(a: Operator, operators: tuple[Operator, ...], ord: Any) -> Array:
    """The norms of the parts along a last axis."""
    return join(a, [like(a, norm(p, ord))[..., None] for p in parts(a, operators)])
