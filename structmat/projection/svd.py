"""Batched SVD: what every projection rests on, with a second driver and bounds that survive rounding."""

from __future__ import annotations

import math

import numpy as np

GRAM_SIDE = 64  # larger Gram matrices cost more than the projection that they certify
_EPS = float(np.finfo(np.float64).eps)


def svd(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin SVD ``(u, s, vh)`` of a stack ``(..., b, c)``; LAPACK's ``gesvd`` where ``gesdd`` does not converge.

    Raises ``LinAlgError`` that names the block for which neither driver converges.
    """
    try:
        return np.linalg.svd(blocks, full_matrices=False)
    except np.linalg.LinAlgError:
        return _svd_one_by_one(blocks)


def _svd_one_by_one(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import scipy.linalg

    *batch, b, c = blocks.shape
    flat = blocks.reshape(-1, b, c)
    parts = []
    for i, block in enumerate(flat):
        try:
            parts.append(scipy.linalg.svd(block, full_matrices=False, lapack_driver="gesvd"))
        except np.linalg.LinAlgError as error:
            raise np.linalg.LinAlgError(
                f"project: the SVD of block {i} of {len(flat)} ({b}x{c}) converged neither with gesdd nor with gesvd"
            ) from error
    u, s, vh = (np.stack(part) for part in zip(*parts, strict=True))
    return u.reshape(*batch, *u.shape[1:]), s.reshape(*batch, *s.shape[1:]), vh.reshape(*batch, *vh.shape[1:])


def singular_values(blocks: np.ndarray) -> np.ndarray:
    """Singular values ``(..., min(b, c))`` of a stack ``(..., b, c)``, largest first."""
    try:
        return np.linalg.svd(blocks, compute_uv=False)
    except np.linalg.LinAlgError:
        return _svd_one_by_one(blocks)[1]


def left_svd(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors ``(..., b, t)`` and singular values ``(..., t)``; wide blocks shrink to triangles first."""
    b, c = blocks.shape[-2:]
    if c > b:
        triangles = np.asarray(np.linalg.qr(blocks.swapaxes(-1, -2).conj(), mode="r"))
        blocks = triangles.swapaxes(-1, -2).conj()
    return svd(blocks)[:2]


def truncate(
    u: np.ndarray,  # (..., b, t)
    s: np.ndarray,  # (..., t)
    vh: np.ndarray,  # (..., t, c)
    rank: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Factors ``u sqrt(s)`` of shape ``(..., b, rank)`` and ``sqrt(s) vh``, ``(..., rank, c)``, of the truncated SVD.

    Filled with zeros where the rank exceeds ``t``.
    """
    kept = min(rank, s.shape[-1])
    weight = np.sqrt(s[..., :kept])
    return fill(u[..., :kept] * weight[..., None, :], weight[..., None] * vh[..., :kept, :], rank)


def fill(left: np.ndarray, right: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors ``(..., b, t)`` and ``(..., t, c)`` with zeros after the ``t`` columns and rows, up to ``rank``."""
    missing = rank - left.shape[-1]
    if missing == 0:
        return left, right
    batch = [(0, 0)] * (left.ndim - 2)
    return np.pad(left, [*batch, (0, 0), (0, missing)]), np.pad(right, [*batch, (0, missing), (0, 0)])


def tails(s: np.ndarray) -> np.ndarray:
    """Error ``(t + 1,)`` of the best approximation of every block by rank 0, 1, ... ``t``, over all blocks.

    ``tails[r]**2`` is the sum of the squares of all but the ``r`` largest singular values of each block (Eckart-Young).
    """
    energy = np.square(s).reshape(-1, s.shape[-1]).sum(axis=0)
    return np.sqrt(np.append(np.cumsum(energy[::-1])[::-1], 0.0))


def safe_bound(tail: float, norm: float, size: int) -> float:
    """A computed tail of singular values, lowered by what rounding can have added to it."""
    return max(0.0, tail - _EPS * size * norm)


def gram_tail(blocks: np.ndarray, rank: int) -> float:
    """Lower bound of the error of the best rank-``rank`` blocks, from small Gram matrices; 0 where none is affordable.

    Costs the entries times the shorter side. Exact to ``1e-8`` of the norm, from below.
    """
    b, c = blocks.shape[-2:]
    side = min(b, c)
    if rank >= side or side > GRAM_SIDE:
        return 0.0
    wide = blocks if b <= c else blocks.swapaxes(-1, -2)
    eigenvalues = np.linalg.eigvalsh(wide @ wide.conj().swapaxes(-1, -2))
    allowance = _EPS * max(b, c) * float(eigenvalues.sum())
    return math.sqrt(max(0.0, float(eigenvalues[..., : side - rank].sum()) - allowance))
