"""Canonical decomposition: a tensor near a sum of outer products, by alternating least squares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from structmat.projection.certificate import frobenius
from structmat.projection.drivers import svd
from structmat.projection.progress import Advance, quiet

_SWEEPS = 500
_TRIAL = 10  # sweeps after which the starts are compared
_STALLED = 1e-9  # relative decrease of the error at which the sweeps end
_EPS = float(np.finfo(np.float64).eps)


def canonical(tensor: np.ndarray, rank: int, rng: np.random.Generator, advance: Advance = quiet) -> list[np.ndarray]:
    """Factors ``(size_i, rank)`` with ``tensor ~ sum_t F_1[:, t] o F_2[:, t] o ...``: a local optimum.

    Alternating least squares (Carroll and Chang; Harshman, 1970): every factor is the best for the others, so that the error
    never grows. Three starts are compared after ten sweeps: the simultaneous diagonalisation of two random slices, which
    finds a tensor of this rank exactly where its first two factors have independent columns (Leurgans, Ross and Abel, SIAM
    J. Matrix Anal. Appl. 14, 1993); the leading singular vectors of the unfoldings; and a random one. Tensors have no best
    approximation of rank 2 and more in general (de Silva and Lim, same journal 30, 2008), so that factors may grow large
    while they cancel: singular normal equations are cut off at rounding.

    Parameters
    ----------
    tensor
        Three or more axes, float64 or complex128.
    rank
        Number of outer products.
    rng
        For the random slices and the random start.
    advance
        Moves a progress bar by one for every sweep.

    Returns
    -------
    factors
        One ``(size_i, rank)`` for each axis, columns of equal norm over the axes.

    Notes
    -----
    ``axes * size * rank`` multiply-adds for each sweep, at most 500.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> a, b, c = (rng.standard_normal((n, 2)) for n in (3, 4, 5))
    >>> f = canonical(np.einsum("it,jt,kt->ijk", a, b, c), 2, rng)
    >>> bool(np.allclose(np.einsum("it,jt,kt->ijk", *f), np.einsum("it,jt,kt->ijk", a, b, c)))
    True
    """
    norm = frobenius(tensor)
    if norm == 0.0:
        return [np.zeros((size, rank), tensor.dtype) for size in tensor.shape]
    trials = [_sweeps(tensor, start, _TRIAL, norm, advance) for start in _starts(tensor, rank, rng)]
    factors, error = min(trials, key=lambda trial: trial[1])
    if error > 4 * _EPS * norm:
        factors, error = _sweeps(tensor, factors, _SWEEPS, norm, advance)
    return _balance(factors)


def _sweeps(
    tensor: np.ndarray, factors: list[np.ndarray], count: int, norm: float, advance: Advance
) -> tuple[list[np.ndarray], float]:
    """Factors after the last sweep that gained, and their error."""
    best, error = factors, math.inf
    factors = list(factors)
    for _ in range(count):
        advance(1, 1)
        for axis in range(tensor.ndim):
            others = [f for i, f in enumerate(factors) if i != axis]
            gram = np.ones((factors[0].shape[1],) * 2, tensor.dtype)
            for f in others:
                gram = gram * (f.conj().T @ f)
            inverse = np.linalg.pinv(gram, rcond=4 * _EPS * len(gram), hermitian=True)
            factors[axis] = _contract(tensor, others, axis) @ inverse.T
            scale = np.linalg.norm(factors[axis], axis=0)
            if axis < tensor.ndim - 1:  # the last factor holds the size of every term
                factors[axis] = factors[axis] / np.where(scale > 0, scale, 1.0)
        now = frobenius(tensor - _outer_sum(factors))
        if now >= error:
            break
        gained, best, error = error - now, list(factors), now
        if gained <= _STALLED * now or now <= 4 * _EPS * norm:
            break
    return best, error


def _contract(tensor: np.ndarray, others: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """``(size, rank)``: the tensor against the outer products of all other (conjugated) factors."""
    moved = np.moveaxis(tensor, axis, 0)
    result = moved.reshape(-1, moved.shape[-1]) @ others[-1].conj()
    for f in reversed(others[:-1]):
        result = np.einsum("...jt,jt->...t", result.reshape(-1, *f.shape), f.conj())
    return result


def _outer_sum(factors: Sequence[np.ndarray]) -> np.ndarray:
    """The tensor ``sum_t F_1[:, t] o F_2[:, t] o ...``."""
    head = factors[0]
    for f in factors[1:-1]:
        head = (head[:, None, :] * f[None, :, :]).reshape(-1, f.shape[1])
    return (head @ factors[-1].T).reshape([len(f) for f in factors])


def _starts(tensor: np.ndarray, rank: int, rng: np.random.Generator) -> Iterator[list[np.ndarray]]:
    """Factors to start from."""
    algebraic = _two_slices(tensor, rank, rng)
    if algebraic is not None:
        yield algebraic
    leading = []
    for axis, size in enumerate(tensor.shape):
        u = svd(_gram(tensor, axis))[0][:, :rank]
        leading.append(np.hstack((u, _normal((size, rank - u.shape[1]), tensor.dtype, rng))))
    yield leading
    yield [_normal((size, rank), tensor.dtype, rng) for size in tensor.shape]


def _two_slices(tensor: np.ndarray, rank: int, rng: np.random.Generator) -> list[np.ndarray] | None:
    """Factors from the eigenvectors of one random slice over another; ``None`` where they are not real or do not exist."""
    i, j = sorted(np.argsort(tensor.shape)[::-1][:2].tolist())  # the two longest axes
    if min(tensor.shape[i], tensor.shape[j]) < rank:
        return None
    p, q = (svd(_gram(tensor, axis))[0][:, :rank] for axis in (i, j))
    core = np.moveaxis(tensor, (i, j), (0, 1))
    rest = core.shape[2:]
    core = core.reshape(*core.shape[:2], -1)
    slices = core @ _normal((core.shape[2], 2), tensor.dtype, rng)
    first, second = (p.conj().T @ slices[:, :, t] @ q.conj() for t in range(2))
    if np.linalg.cond(second) > 1e12:
        return None
    values, vectors = np.linalg.eig(first @ np.linalg.inv(second))
    if tensor.dtype.kind != "c" and np.iscomplexobj(values):
        return None
    a = p @ vectors
    b = q @ np.linalg.lstsq(vectors, second, rcond=None)[0].T
    pairs = (a[:, None, :] * b[None, :, :]).reshape(-1, rank)
    others = np.linalg.lstsq(pairs, core.reshape(len(pairs), -1), rcond=None)[0].reshape(rank, *rest)
    columns = [_rank_one(others[t]) for t in range(rank)]
    factors = [np.stack(vectors, axis=1) for vectors in zip(*columns, strict=True)]
    factors.insert(i, a)
    factors.insert(j, b)
    return factors


def _rank_one(tensor: np.ndarray) -> list[np.ndarray]:
    """Vectors whose outer product is near a tensor, by successive SVDs."""
    vectors = []
    for size in tensor.shape[:-1]:
        u, s, vh = svd(tensor.reshape(size, -1))
        vectors.append(u[:, 0])
        tensor = s[0] * vh[0]
    return [*vectors, tensor.ravel()]


def _gram(tensor: np.ndarray, axis: int) -> np.ndarray:
    """``(size, size)``: Gram matrix of the slices along an axis."""
    flat = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
    return flat @ flat.conj().T


def _balance(factors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The same outer products with columns of equal norm over the axes."""
    norms = np.stack([np.linalg.norm(f, axis=0) for f in factors])
    alive = (norms > 0).all(axis=0)
    safe = np.where(alive, norms, 1.0)
    mean = np.exp(np.log(safe).mean(axis=0)) * alive
    return [f * (mean / s) for f, s in zip(factors, safe, strict=True)]


def _normal(shape: tuple[int, int], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(shape)
    return x + 1j * rng.standard_normal(shape) if dtype.kind == "c" else x
