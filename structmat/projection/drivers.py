"""Drivers: LAPACK's SVD and Hermitian eigenvalues of stacks, each with a second driver where the first does not converge."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def svd(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin SVD ``(u, s, vh)`` of a stack ``(..., b, c)``; LAPACK's ``gesvd`` where ``gesdd`` does not converge.

    Raises ``LinAlgError`` that names the block for which neither driver converges.
    """
    try:
        return np.linalg.svd(blocks, full_matrices=False)
    except np.linalg.LinAlgError:
        import scipy.linalg

        return _one_by_one(
            blocks, lambda x: scipy.linalg.svd(x, full_matrices=False, lapack_driver="gesvd"), "SVD", ("gesdd", "gesvd")
        )


def singular_values(blocks: np.ndarray) -> np.ndarray:
    """Singular values ``(..., min(b, c))`` of a stack ``(..., b, c)``, largest first; drivers and errors of :func:`svd`."""
    try:
        return np.linalg.svd(blocks, compute_uv=False)
    except np.linalg.LinAlgError:
        return svd(blocks)[1]


def eigh(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues ``(..., b)``, smallest first, and eigenvectors of Hermitian ``(..., b, b)``, read off their lower halves.

    LAPACK's ``heevr`` where ``heevd`` does not converge. Raises ``LinAlgError`` that names the block for which neither does.
    """
    try:
        values, vectors = np.linalg.eigh(blocks)
    except np.linalg.LinAlgError:
        import scipy.linalg

        values, vectors = _one_by_one(
            blocks, lambda x: scipy.linalg.eigh(x, driver="evr"), "eigendecomposition", ("heevd", "heevr")
        )
    return values, vectors


def eigvalsh(blocks: np.ndarray) -> np.ndarray:
    """Eigenvalues ``(..., b)`` of Hermitian matrices ``(..., b, b)``, smallest first; drivers and errors of :func:`eigh`."""
    try:
        return np.linalg.eigvalsh(blocks)
    except np.linalg.LinAlgError:
        return eigh(blocks)[0]


def _one_by_one(
    blocks: np.ndarray, solve: Callable[[np.ndarray], Any], what: str, drivers: tuple[str, str]
) -> tuple[Any, ...]:
    """What the second driver makes of every block, stacked; the first has failed for one of them, which is not known."""
    *batch, b, c = blocks.shape
    flat, parts = blocks.reshape(math.prod(batch), b, c), []
    for i, block in enumerate(flat):
        if not np.isfinite(block).all():
            raise np.linalg.LinAlgError(
                f"project: block {i} of {len(flat)} ({b}x{c}) is not finite; expected no overflow"
            )
        try:
            parts.append(solve(block))
        except np.linalg.LinAlgError as error:
            first, second = drivers
            raise np.linalg.LinAlgError(
                f"project: the {what} of block {i} of {len(flat)} ({b}x{c}) converged neither with {first} nor with {second}"
            ) from error
    stacked = (np.stack(part) for part in zip(*parts, strict=True))
    return tuple(part.reshape(*batch, *part.shape[1:]) for part in stacked)
