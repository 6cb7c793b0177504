"""Truncated SVDs of stacks of blocks: what every projection rests on, with bounds that survive rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from structmat.projection.device import host, on_device, straight
from structmat.projection.drivers import eigh, eigvalsh, svd

GRAM_SIDE = 64  # larger Gram matrices cost more than the projection that they certify
_EPS = float(np.finfo(np.float64).eps)
_PIECE = 1 << 18  # entries of a stack worked on at a time
_DEVICE_PIECE = 1 << 24  # of one on a device, which has no cache to stay in but launches to pay for
_LONG = 16  # columns from which BLAS is faster than a ufunc
_CANCELLED = 1e-3  # share of the squared norm below which an error is not taken as a difference of squares
_TRUSTED = 1e9  # the rounding of a Gram matrix must be this much smaller than the error that is read off it


class Truncation(NamedTuple):
    """The best rank-``r`` blocks ``u @ y`` of a stack, ``u`` with orthonormal columns and ``y = u^H blocks``."""

    u: np.ndarray  # (..., b, r)
    y: np.ndarray  # (..., r, c)
    discarded: float  # squared error over all blocks
    bound: float  # squared error that no blocks of this rank can have less than, up to rounding


def truncated(blocks: np.ndarray, rank: int) -> Truncation:
    """Nearest blocks of a rank to a stack ``(..., b, c)``, on the cheapest road that is as accurate as the SVD.

    Two rows: eigenvector of the 2x2 Hermitian Gram matrix in closed form. One side at least twice the other: ``eigh`` of the
    Gram matrix; it squares the condition number, so that where the error is small against the blocks one power step with QR
    restores full accuracy (Rutishauser's subspace iteration), and the SVD takes over where the bound below cannot vouch for
    the result. Else the batched SVD. On a device stacks of all shapes go by their Gram matrices: its SVD takes the blocks one
    after another. The rank may exceed the sides: zeros follow.
    """
    b, c = blocks.shape[-2:]
    if rank >= min(b, c):
        return _whole(blocks, rank)
    many = on_device(blocks) and math.prod(blocks.shape[:-2]) > 1
    if (b == 2 and rank == 1) or 2 * min(b, c) <= max(b, c) or many:
        road = _two_rows if b == 2 and rank == 1 else _gram
        batch = blocks.shape[:-2]
        u = np.empty((*batch, b, rank), blocks.dtype, like=blocks)
        y = np.empty((*batch, rank, c), blocks.dtype, like=blocks)
        discarded = bound = 0.0
        for part in pieces(blocks.shape, on_device(blocks)):
            error, below = road(blocks[part], u[part], y[part])
            discarded, bound = discarded + error, bound + below
        return Truncation(u, y, discarded, bound)
    return _by_svd(blocks, rank)


def pieces(shape: tuple[int, ...], wide: bool = False) -> Iterator[tuple[Any, ...]]:
    """Indices of the leading axes that cut a stack ``(..., b, c)`` into pieces that stay in a cache; ``wide`` for a device."""
    batch, size, limit = shape[:-2], math.prod(shape[-2:]), _DEVICE_PIECE if wide else _PIECE
    axis = len(batch)
    while axis and size * batch[axis - 1] <= limit:
        axis -= 1
        size *= batch[axis]
    if not axis:
        yield (...,)
        return
    step = max(1, limit // size)
    for outer in np.ndindex(*batch[: axis - 1]):
        for start in range(0, batch[axis - 1], step):
            yield (*outer, slice(start, start + step))


def _whole(blocks: np.ndarray, rank: int) -> Truncation:
    b, c = blocks.shape[-2:]
    if b <= c:
        u = np.broadcast_to(np.eye(b, dtype=blocks.dtype, like=blocks), (*blocks.shape[:-1], b))
        return Truncation(*fill(u, blocks, rank), 0.0, 0.0)
    u, y = np.linalg.qr(blocks)
    return Truncation(*fill(u, y, rank), 0.0, 0.0)


def _two_rows(blocks: np.ndarray, u: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Rank 1 of ``(..., 2, c)``: ``u = (cos t e^{i phi}, sin t)``, ``tan 2t = 2 |h| / (a - d)``, ``G = [[a, h], [h*, d]]``.

    Like :func:`_gram` it fills ``u`` and ``y`` and returns the squared error and its bound.
    """
    if not on_device(blocks) and blocks.strides[-1] != blocks.itemsize:
        blocks = np.ascontiguousarray(blocks)
    t0, t1 = blocks[..., 0, :], blocks[..., 1, :]
    a, d, h = _energy(t0), _energy(t1), _dot(t1, t0)
    size, difference = np.abs(h), a - d
    gap = np.hypot(difference, 2.0 * size)
    tied = gap <= _EPS * blocks.shape[-1] * (a + d)
    if tied.any():  # every u is as good: one and the same in all such blocks leaves more for the splits that follow
        h, size, difference = np.where(tied, 1.0, h), np.where(tied, 1.0, size), np.where(tied, 0.0, difference)
    angle = 0.5 * np.arctan2(2.0 * size, difference)
    phase = np.divide(h, size, out=np.ones_like(h), where=size > 0)
    u0, u1 = np.cos(angle) * phase, np.sin(angle)
    u[..., 0, 0], u[..., 1, 0] = u0, u1
    _combine(u0.conj(), u1, blocks, y)
    total = float((a + d).sum())
    discarded = float((0.5 * (a + d - gap)).sum())
    if discarded < _CANCELLED * total:  # the difference has lost its digits: take the residual itself
        rest = np.empty_like(y)
        _combine(-u1, u0, blocks, rest)
        discarded = float(_energy(rest).sum())
    return discarded, discarded


def _energy(x: np.ndarray) -> np.ndarray:
    """``sum abs(x)**2`` along the last axis."""
    if x.dtype.kind == "c" and not on_device(x):
        x = x.view(np.float64)  # half the multiplications
    return np.real(_dot(x, x))


def _dot(x: np.ndarray, y: np.ndarray) -> Any:
    """``sum conj(x) y`` along the last axis."""
    return np.vecdot(x, y) if x.shape[-1] >= _LONG or on_device(x) else np.einsum("...c,...c->...", x.conj(), y)


def _combine(x0: np.ndarray, x1: np.ndarray, blocks: np.ndarray, out: np.ndarray) -> None:
    """``x0 row_0 + x1 row_1`` of every block ``(..., 2, c)`` into ``(..., 1, c)``."""
    if blocks.shape[-1] >= _LONG:
        np.matmul(np.stack([x0, x1], -1)[..., None, :], blocks, out=out)
    else:
        np.multiply(x0[..., None], blocks[..., 0, :], out=out[..., 0, :])
        out[..., 0, :] += x1[..., None] * blocks[..., 1, :]


def _gram(blocks: np.ndarray, u: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    found = _by_gram(blocks, u.shape[-1])
    u[...], y[...] = found.u, found.y
    return found.discarded, found.bound


def _by_gram(blocks: np.ndarray, rank: int) -> Truncation:
    b, c = blocks.shape[-2:]
    blocks = straight(blocks)
    adjoint = blocks.conj().swapaxes(-1, -2)
    try:
        values, vectors = eigh(blocks @ adjoint if b <= c else adjoint @ blocks)
    except np.linalg.LinAlgError:
        return _by_svd(blocks, rank)
    vectors = vectors[..., ::-1][..., :rank]
    small, total = float(values[..., :-rank].sum()), float(values.sum())
    allowance = _EPS * max(b, c) * total
    u = vectors if b <= c else np.linalg.qr(blocks @ vectors)[0]
    if small > _TRUSTED * allowance:
        return Truncation(u, u.conj().swapaxes(-1, -2) @ blocks, small, small - allowance)
    if b <= c:
        u = np.linalg.qr(blocks @ (adjoint @ u))[0]
    y = u.conj().swapaxes(-1, -2) @ blocks
    rest = blocks - u @ y
    error = float(np.vdot(rest, rest).real)
    if error <= (_EPS * max(b, c)) ** 2 * total:  # exact: rounding is all that is left
        return Truncation(u, y, error, 0.0)
    bound = error - _coupling(y, rest)
    return Truncation(u, y, error, bound) if bound >= (1.0 - 1e-9) * error else _by_svd(blocks, rank)


def _coupling(y: np.ndarray, rest: np.ndarray) -> float:
    """How much of the squared error a better subspace could still take away, at most; infinite where no gap bounds it.

    In the basis ``(u, u_perp)`` the Gram matrix is ``[[A, E], [E^H, B]]`` with ``A = y y^H``, ``E = y rest^H``. For any
    subspace with sines of norm ``s`` to ``u`` the trace is at least ``tr B + gap s^2 - 2 ||E|| s >= tr B - ||E||^2 / gap``,
    where ``gap = min eig A - max eig B``.
    """
    links = np.square(np.abs(y @ rest.conj().swapaxes(-1, -2))).sum(axis=(-1, -2))
    kept = eigvalsh(y @ y.conj().swapaxes(-1, -2))[..., 0]
    gap = kept - np.square(np.abs(rest)).sum(axis=(-1, -2))
    blind = (gap <= 0.0) & (links > 0.0)
    return math.inf if blind.any() else float(np.divide(links, gap, out=np.zeros_like(gap), where=gap > 0.0).sum())


def _by_svd(blocks: np.ndarray, rank: int) -> Truncation:
    u, s, vh = svd(blocks)
    tail = float(tails(s)[rank]) ** 2
    return Truncation(u[..., :rank], s[..., :rank, None] * vh[..., :rank, :], tail, tail)


def left_svd(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors ``(..., b, t)`` and singular values ``(..., t)``; wide blocks shrink to triangles first."""
    b, c = blocks.shape[-2:]
    if c > b:
        triangles: Any = np.linalg.qr(blocks.swapaxes(-1, -2).conj(), mode="r")
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
    energy = host(np.square(s).reshape(-1, s.shape[-1]).sum(axis=0))
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
    small = total = 0.0
    for part in pieces(wide.shape, on_device(wide)):
        piece = straight(wide[part])
        eigenvalues = eigvalsh(piece @ piece.conj().swapaxes(-1, -2))
        small, total = small + float(eigenvalues[..., : side - rank].sum()), total + float(eigenvalues.sum())
    return math.sqrt(max(0.0, small - _EPS * max(b, c) * total))


def gram_error(grams: np.ndarray, rank: int, length: int, floor: float) -> float:
    """:func:`gram_tail` of blocks with these Gram matrices ``(..., side, side)``, summed over ``length`` entries.

    0 where it cannot be larger than ``floor``, as powers of the matrices tell without their eigenvalues: the largest one is at
    least ``(tr G^16 / tr G^8)**(1/8)``.
    """
    traces = np.trace(grams, axis1=-2, axis2=-1).real[..., None, None]
    total = float(traces.sum())
    if rank == 1 and floor > 0.0:
        power = np.divide(grams, traces, out=np.zeros_like(grams), where=traces > 0.0)
        for _ in range(2):
            power = power @ power
        eighth, last = (np.square(np.abs(x)).sum(axis=(-2, -1)) for x in (power, power @ power))
        least = np.divide(last, eighth, out=np.zeros_like(eighth), where=eighth > 0.0) ** 0.125
        if total - float((least * traces[..., 0, 0]).sum()) <= floor**2:
            return 0.0
    small = float(eigvalsh(grams)[..., :-rank].sum())
    return math.sqrt(max(0.0, small - _EPS * length * total))
