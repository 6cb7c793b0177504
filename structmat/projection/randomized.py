"""Randomised low-rank bases: block Krylov for a rank, blocked growth for a tolerance, and what is certain of the optimum.

Everything here sees a matrix through products with it and with its adjoint, in blocks (:class:`.matrix_free.Matrix`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from structmat.projection.device import beside, on_device
from structmat.projection.drivers import eigvalsh, svd
from structmat.projection.matrix_free import CHUNK, Explicit, Matrix, chunks, distance

OVERSAMPLING = 10
MAX_BLOCKS = 6  # of a Krylov space
GAIN = 5e-3  # a Krylov block that lowers the error by less is the last
INDICATOR_FLOOR = 1e-12  # ||W||^2 - ||Q^H W||^2 below this times ||W||^2 has lost its digits and is computed anew
_EPS = float(np.finfo(np.float64).eps)
_EPS32 = float(np.finfo(np.float32).eps)


class Basis(NamedTuple):
    """Orthonormal columns ``q`` and ``b = q^H W``, so that ``q b`` is the part of ``W`` that they capture."""

    q: np.ndarray  # (m, c)
    b: np.ndarray  # (c, n)


def block_krylov(matrix: Matrix, rank: int, norm: float, rng: Any) -> Basis:
    """A basis of ``[W X, (W W^H) W X, (W W^H)^2 W X, ...]`` for a random ``X`` of ``rank + 10`` columns.

    Its best rank-``rank`` approximation is within ``1 + eps`` of the optimum after ``O(log n / sqrt(eps))`` blocks, whatever
    the gaps between singular values (Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate
    singular value decomposition", NeurIPS 2015, theorem 1). Every block is orthogonalised against all before it, so that no
    product is taken twice. Blocks are added until one lowers the error by less than 0.5 %, at most 6 of them.
    Cost for ``k`` blocks: ``k (rank + 10)`` products with ``W`` and with ``W^H``, memory ``k (rank + 10) (m + n)``.
    """
    m, n = matrix.shape
    x = beside(normal((n, min(rank + OVERSAMPLING, m, n)), matrix.dtype, rng), matrix.home)
    q, b = (np.empty(size, matrix.dtype, like=matrix.home) for size in ((m, 0), (0, n)))
    before = math.inf
    for _ in range(MAX_BLOCKS):
        y = matrix.apply(x)
        block = _complement(y, q, norm)
        if block.shape[1] == 0:
            break
        rows = matrix.adjoint(block).conj().T
        q, b = np.hstack((q, block)), np.vstack((b, rows))
        top = eigvalsh(b @ b.conj().T)[-rank:].sum()
        error = math.sqrt(max(0.0, norm**2 - float(top)))
        if before - error <= GAIN * error:
            break
        before = error
        x = np.linalg.qr(rows.conj().T)[0]
    return _not_empty(matrix, Basis(q, b))


def grow(matrix: Matrix, allowed: float, norm: float, most: int, rng: Any) -> Basis | None:
    """A basis that captures ``W`` up to an error ``allowed``, in blocks; ``None`` where that takes more than ``most`` columns.

    Blocks of ``W X`` with one power step, orthogonalised twice (randQB_EI: Yu, Gu and Li, SIAM J. Matrix Anal. Appl. 39,
    2018). Their indicator ``||W||^2 - ||q^H W||^2`` has no digits left below ``1e-8 ||W||``: there the residual itself is
    computed. A last subspace iteration of the whole basis lets more of it be truncated.
    """
    m, n = matrix.shape
    width = max(16, min(128, min(m, n) // 32))
    q, b = (np.empty(size, matrix.dtype, like=matrix.home) for size in ((m, 0), (0, n)))
    remaining = norm**2
    while remaining > allowed**2:
        if q.shape[1] + width > most:
            return None
        x = beside(normal((n, width), matrix.dtype, rng), matrix.home)
        block = _complement(matrix.apply(x), q, norm)
        if block.shape[1]:
            z = matrix.adjoint(block)
            block = _complement(matrix.apply(np.linalg.qr(z)[0]), q, norm)
        if block.shape[1] == 0:  # nothing left but rounding
            break
        rows = matrix.adjoint(block).conj().T
        q, b = np.hstack((q, block)), np.vstack((b, rows))
        remaining -= float(np.linalg.norm(rows)) ** 2
        if remaining < INDICATOR_FLOOR * norm**2:
            remaining = distance(matrix, q, b) ** 2
    if q.shape[1]:
        q = _complement(matrix.apply(np.linalg.qr(b.conj().T)[0]), q[:, :0], norm)
        b = matrix.adjoint(q).conj().T
    return _not_empty(matrix, Basis(q, b))


def basis_svd(basis: Basis) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin SVD ``(u, s, vh)`` of ``q b``."""
    q2, triangle = np.linalg.qr(basis.b.conj().T)
    u, s, vh = svd(triangle.conj().T)
    return basis.q @ u, s, vh @ q2.conj().T


def best_possible(matrix: Matrix, basis: Basis, s: np.ndarray, rest: float, rank: int) -> float:
    """A lower bound of ``||W - A||_F`` over all ``A`` of a rank, certain whatever was drawn at random.

    With ``P = q q^H``, ``W^H W = (P W)^H (P W) + R^H R`` for ``R = W - P W``, and ``s`` the singular values of ``P W``:
    the sum of the ``r`` largest eigenvalues is subadditive (Ky Fan 1949), and by Cauchy-Schwarz that of ``R^H R`` is at
    most ``sqrt(r) ||R^H R||_F`` (and at most ``||R||_F^2``). Hence::

        best^2 = ||W||_F^2 - sum_{i<=r} sigma_i^2  >=  sum_{i>r} s_i^2 + ||R||_F^2 - min(||R||_F^2, sqrt(r) ||R^H R||_F)

    The second term of the minimum costs one product of ``R`` with itself, ``m n min(m, n)`` flops (``n`` more products with
    ``W^H`` where there is no dense matrix), and is asked for only where the first leaves the bound below 0.9 of the error.
    """
    tail = float(np.square(s[rank:]).sum())
    if tail >= 0.81 * (tail + rest**2):
        squared = tail
    else:
        squared = tail + max(0.0, rest**2 - math.sqrt(rank) * _spread(matrix, basis, rest))
    return math.sqrt(squared)


def _spread(matrix: Matrix, basis: Basis, rest: float) -> float:
    """``||R^H R||_F`` or a little more: rounding is added."""
    m, n = matrix.shape
    if isinstance(matrix, Explicit):
        # in single precision, for speed: entries of R are rounded once and sums of m products wrong by m units at most
        # not on a device, where a library may have been told to multiply with fewer digits than that
        single = np.complex64 if matrix.dtype.kind == "c" else np.float32
        short = np.empty((m, n), matrix.dtype if on_device(matrix.array) else single, like=matrix.array)
        for start, columns in chunks(matrix):
            stop = start + columns.shape[1]
            short[:, start:stop] = (columns - basis.q @ basis.b[:, start:stop]) / rest
        gram = short @ short.conj().T if m < n else short.conj().T @ short
        rows = (np.abs(gram[i : i + CHUNK]) for i in range(0, len(gram), CHUNK))
        squares = sum(float(np.square(some, dtype=np.float64).sum()) for some in rows)
        return rest**2 * (math.sqrt(squares) + 2 * (max(m, n) + 4) * _EPS32)
    total = 0.0
    for start, columns in chunks(matrix):
        rows = columns - basis.q @ basis.b[:, start : start + columns.shape[1]]
        product = matrix.adjoint(rows)  # R^H R = W^H R: the basis is orthogonal to R
        product -= basis.b.conj().T @ (basis.q.conj().T @ rows)
        total = math.hypot(total, float(np.linalg.norm(product)))
    return total + 2 * max(m, n) * _EPS * rest**2


def _not_empty(matrix: Matrix, basis: Basis) -> Basis:
    """The basis, or one unit vector where the matrix is zero."""
    if basis.q.shape[1]:
        return basis
    q = np.eye(matrix.shape[0], 1, dtype=matrix.dtype, like=matrix.home)
    return Basis(q, matrix.adjoint(q).conj().T)


def _complement(y: np.ndarray, q: np.ndarray, norm: float) -> np.ndarray:
    """Orthonormal columns that with ``q`` span what ``y`` and ``q`` span, without those that are rounding of ``norm``."""
    for _ in range(2):
        y = y - q @ (q.conj().T @ y)
    y, triangle = np.linalg.qr(y)
    u, s, _ = svd(triangle)
    y = y @ u[:, s > 4 * _EPS * norm]
    y = y[:, : y.shape[0] - q.shape[1]]
    if q.shape[1] == 0:
        return y
    y = y - q @ (q.conj().T @ y)  # directions that were nearly rounding have come back towards q
    y = y[:, np.linalg.norm(y, axis=0) > 0.5]
    y = np.linalg.qr(y)[0]
    y = y - q @ (q.conj().T @ y)
    return np.linalg.qr(y)[0]


def normal(shape: tuple[int, ...], dtype: Any, rng: Any) -> np.ndarray:
    """Independent standard normal entries, real and imaginary ones of a complex dtype."""
    x = rng.standard_normal(shape)
    return x + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else x
