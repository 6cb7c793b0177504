"""Rows and columns that stand for a matrix: strong pivoting, the interpolative form, and CUR."""

from __future__ import annotations

from typing import Any

import numpy as np

from structmat.structures.chain import Chain
from structmat.structures.interpolative import Interpolative
from structmat.structures.interpolative_blocks import InterpolativeBlocks

SWAP = 2.0  # coefficients larger than this are swapped away


def select(basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of an ``(m, r)`` matrix of full rank that span all of them, with small coefficients.

    Parameters
    ----------
    basis
        Orthonormal columns, ``(m, r)``, float64 or complex128.

    Returns
    -------
    index
        A permutation of the rows ``(m,)``, the ``r`` selected ones first.
    coefficients
        ``T``, ``(m - r, r)`` with ``basis[index[r:]] = T basis[index[:r]]`` and every entry at most 2 in absolute value.

    Notes
    -----
    QR with column pivoting of the transpose, then swaps of a selected and another row as long as a coefficient exceeds 2.
    Each multiplies the volume of the selected block by that coefficient, so that they end (strong rank-revealing QR: Gu and
    Eisenstat, SIAM J. Sci. Comput. 17, 1996, there with the bound ``sqrt(r (m - r))`` of the norm for constant 1). The
    selected block is then no worse conditioned than ``sqrt(1 + 4 r (m - r))``. Cost ``O(m r^2)``, ``O(m r)`` for each swap;
    a few swaps, if any.

    Examples
    --------
    >>> import numpy as np
    >>> from structmat.projection.interpolative import select
    >>> q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((9, 3)))
    >>> index, t = select(q)
    >>> bool(np.allclose(q[index[3:]], t @ q[index[:3]])), bool(np.abs(t).max() <= 2)
    (True, True)
    """
    import scipy.linalg

    r = basis.shape[1]
    if basis.shape[0] == r:
        return np.arange(r), np.empty((0, r), basis.dtype)
    pivoted: Any = scipy.linalg.qr(basis.T, mode="r", pivoting=True)
    triangle, index = pivoted
    coefficients = scipy.linalg.solve_triangular(triangle[:, :r], triangle[:, r:]).T
    swapped = False
    for _ in range(20 * r + 20):  # the volume bounds their number; this only guards against rounding
        i, j = np.unravel_index(np.argmax(np.abs(coefficients)), coefficients.shape)
        pivot = coefficients[i, j]
        if abs(pivot) <= SWAP:
            break
        swapped = True
        column, row = coefficients[:, j].copy(), coefficients[i] / pivot
        row[j] -= 1.0 / pivot
        coefficients -= np.outer(column, row)
        coefficients[i] = -row
        coefficients[i, j] += 1.0
        index[[j, r + i]] = index[[r + i, j]]
    if swapped:  # without the rounding of the updates
        coefficients = np.linalg.solve(basis[index[:r]].T, basis[index[r:]].T).T
    return index, coefficients


def interpolate(u: np.ndarray, s: np.ndarray, vh: np.ndarray, side: str | None = None) -> Interpolative:
    """The matrix ``u diag(s) vh`` in interpolative form.

    Parameters
    ----------
    u, s, vh
        Orthonormal columns ``(m, r)``, weights ``(r,)``, orthonormal rows ``(r, n)``: a truncated SVD. Only the factor of
        the side that is selected has to be orthonormal.
    side
        ``"rows"`` (selected from ``u``) or ``"columns"`` (from ``vh``). Default: the shorter side, so that the gather is
        short.

    Examples
    --------
    >>> import numpy as np
    >>> from structmat.projection.interpolative import interpolate
    >>> u, s, vh = np.linalg.svd(np.arange(12.0).reshape(3, 4), full_matrices=False)
    >>> A = interpolate(u[:, :2], s[:2], vh[:2])
    >>> A.nparams, bool(np.allclose(A.to_dense(), np.arange(12.0).reshape(3, 4)))
    (10, True)
    """
    r = len(s)
    if (side or ("rows" if u.shape[0] <= vh.shape[1] else "columns")) == "rows":
        index, coefficients = select(u)
        return Interpolative(index, coefficients, (u[index[:r]] * s) @ vh)
    index, coefficients = select(vh.T)
    return Interpolative(index, coefficients.T, (u * s) @ vh[:, index[:r]], "columns")


def cur(
    target: np.ndarray,  # (m, n)
    u: np.ndarray,  # (m, r), leading left singular vectors
    vh: np.ndarray,  # (r, n), leading right singular vectors
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Factors ``C (m, r)`` and ``U R (r, n)`` of a CUR decomposition, and the indices of its rows and columns.

    ``C`` are columns and ``R`` rows of the matrix, selected by pivoted QR of the leading singular vectors (Q-DEIM: Drmac
    and Gugercin, SIAM J. Sci. Comput. 38, 2016; CUR with it: Sorensen and Embree, same volume) with the swaps of
    :func:`select`; ``U = C^+ W R^+`` is the best core for them (Stewart, Numer. Math. 83, 1999). With ``T`` the coefficients
    of the two selections, the error is at most ``(sqrt(1 + ||T_1||^2) + sqrt(1 + ||T_2||^2))`` times the best of rank ``r``.
    """
    r = u.shape[1]
    rows, columns = np.sort(select(u)[0][:r]), np.sort(select(vh.T)[0][:r])
    c = target[:, columns]
    q, _ = np.linalg.qr(target[rows].conj().T)
    middle = np.linalg.lstsq(c, target @ q, rcond=None)[0]  # C^+ W R^+ R = (C^+ W Q) Q^H
    return c, middle @ q.conj().T, (rows, columns)


def interpolate_blocks(operator: Chain) -> InterpolativeBlocks:
    """A chain of two factors with one link rank, ``(1, s, k r, l) (k, r l, p, 1)``, with an identity in every block.

    Parameters
    ----------
    operator
        A Monarch or two-core BlockTensorTrain of NumPy arrays, with any axis orders. A rank beyond the size of the blocks is
        cut to it.

    Notes
    -----
    Block ``(j, kappa)`` is ``B [I T] P`` with ``B`` its columns that :func:`select` takes from an orthonormal basis of its
    row space. Cost ``O(r^2)`` for each of the ``k l p`` columns.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> from structmat.projection.interpolative import interpolate_blocks
    >>> A = sm.Monarch.random((12, 10), blocks=2, rank=3, rng=0)
    >>> B = interpolate_blocks(A)
    >>> A.nparams - B.nparams, sm.testing.allclose(A, B)
    (36, True)
    """
    left, right = operator.factors[0][0], operator.factors[1][:, 0]  # (l, s, k r), (k, r l, p)
    (l, s, _), (k, _, p) = left.shape, right.shape
    rank = right.shape[1] // l
    r = min(rank, s, p)
    index = np.empty((k, l, p), np.intp)
    coefficients = np.empty((k, l, r, p - r), right.dtype)
    columns = np.empty((l, s, k, r), left.dtype)
    for i in range(k):
        for j in range(l):
            u, v = left[j, :, i * rank : (i + 1) * rank], right[i].reshape(rank, l, p)[:, j]
            q = np.linalg.qr((v if rank == r else u @ v).conj().T)[0][:, :r]
            index[i, j], t = select(q.conj())
            coefficients[i, j] = t.T
            columns[j, :, i] = u @ v[:, index[i, j, :r]]
    shape = (operator.shape[0], operator.shape[1])
    return InterpolativeBlocks(
        index, coefficients, columns.reshape(l, s, k * r), shape, operator.out_order, operator.in_order
    )
