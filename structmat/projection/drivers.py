"""Drivers: SVD and Hermitian eigenvalues of stacks, by LAPACK, with a second driver where the first does not converge.

A :class:`structmat.projection.device.DeviceArray` goes to the library that it belongs to, on its own device, where there is
no second driver: a failure names the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from structmat.projection import device
from structmat.projection.device import on_device


def svd(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin SVD ``(u, s, vh)`` of a stack ``(..., b, c)``; LAPACK's ``gesvd`` where ``gesdd`` does not converge.

    Raises ``LinAlgError`` that names the block for which neither driver converges.
    """
    try:
        return np.linalg.svd(blocks, full_matrices=False)
    except np.linalg.LinAlgError:
        if on_device(blocks):
            raise
        import scipy.linalg

        return _one_by_one(
            blocks, lambda x: scipy.linalg.svd(x, full_matrices=False, lapack_driver="gesvd"), "SVD", ("gesdd", "gesvd")
        )


def singular_values(blocks: np.ndarray) -> np.ndarray:
    """Singular values ``(..., min(b, c))`` of a stack ``(..., b, c)``, largest first; drivers and errors of :func:`svd`."""
    try:
        return np.linalg.svd(blocks, compute_uv=False)
    except np.linalg.LinAlgError:
        if on_device(blocks):
            raise
        return svd(blocks)[1]


def eigh(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues ``(..., b)``, smallest first, and eigenvectors of Hermitian ``(..., b, b)``, read off their lower halves.

    LAPACK's ``heevr`` where ``heevd`` does not converge. Raises ``LinAlgError`` that names the block for which neither does.
    """
    try:
        values, vectors = np.linalg.eigh(blocks)
    except np.linalg.LinAlgError:
        if on_device(blocks):
            raise
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
        if on_device(blocks):
            raise
        return eigh(blocks)[0]


def triangular_inverse(lower: np.ndarray) -> np.ndarray:
    """The inverse of a lower triangular matrix, a third of the work of a general one."""
    if on_device(lower):
        return device.triangular_inverse(lower)  # type: ignore
    import scipy.linalg

    (invert,) = scipy.linalg.get_lapack_funcs(("trtri",), (lower,))
    inverse, failed = invert(np.asfortranarray(lower), lower=1)
    if failed:
        raise np.linalg.LinAlgError("weight: a factor of it is singular")
    return np.ascontiguousarray(inverse)


def reciprocal_condition(lower: np.ndarray, norm: float) -> float:
    """``1 / (norm ||(L L^H)^-1||)`` in the 1-norm for a triangle ``L``: estimated by LAPACK, from the inverse on a device."""
    if on_device(lower):
        inverse = triangular_inverse(lower)
        return 1.0 / (norm * float(np.abs(inverse.conj().T @ inverse).sum(axis=0).max()))
    import scipy.linalg

    factor = np.asfortranarray(lower)
    (estimate,) = scipy.linalg.get_lapack_funcs(("pocon",), (factor,))
    return float(estimate(factor, norm, uplo="L")[0])


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
