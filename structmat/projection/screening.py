"""Screening: the spectrum of an arrangement, cheaply, so that all ranks are read off without projecting."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from structmat.projection.drivers import eigh, eigvalsh, singular_values, svd
from structmat.projection.members import Member
from structmat.projection.selection import Ladder
from structmat.projection.svd import safe_bound, tails

OVERSAMPLING = 8
SHARE = 8  # a rank below the size by this factor is small
ROUNDING = 4e-15  # relative norm of what is left out where nothing but rounding is
GRAM_FLOOR = 1e-6  # relative errors below this are not told apart by Gram matrices


class Screened(NamedTuple):
    """A member with its ladder of errors, exact or estimated."""

    member: Member
    ladder: Ladder
    exact: bool


def screen(member: Member, target: np.ndarray, most: int, samples: int, rng: Any, exact: bool = False) -> Screened:
    """The errors of a member for ranks up to ``most``.

    ``exact`` takes all singular values of all blocks. Otherwise ``samples`` blocks stand for all, drawn in proportion to
    their energy (systematic sampling: the tail of a block is at most its energy, which bounds the variance), and their
    leading singular values come from one random subspace iteration (Halko, Martinsson, Tropp, SIAM Rev. 53, 2011, algorithm
    4.4), or from Gram matrices where many are asked for.
    """
    blocks = member.arrange(target)
    if exact:
        errors = tails(singular_values(blocks))
        return Screened(member, Ladder(member, member.step, errors, member.gauge), True)
    stack, weights = draw(blocks, samples, rng)
    energies = leading_energies(stack, most, rng)
    totals = np.square(np.abs(stack)).sum(axis=(1, 2))
    captured = np.concatenate([np.zeros((len(stack), 1)), np.cumsum(energies, axis=1)], axis=1)
    squares = weights @ np.maximum(totals[:, None] - captured, 0.0)
    return Screened(member, Ladder(member, member.step, np.sqrt(squares), member.gauge), False)


def draw(blocks: np.ndarray, samples: int, rng: Any) -> tuple[np.ndarray, np.ndarray]:
    """Some blocks ``(c, s, p)`` of ``(k, l, s, p)`` and the weights ``(c,)`` with which their energies stand for all."""
    k, l, s, p = blocks.shape
    if k * l <= samples:
        return np.ascontiguousarray(blocks).reshape(k * l, s, p), np.ones(k * l)
    energy = np.einsum("klsp,klsp->kl", blocks, blocks.conj()).real.ravel()
    total = float(energy.sum())
    if total == 0.0:
        return np.zeros((1, s, p), blocks.dtype), np.ones(1)
    places = (np.arange(samples) + rng.uniform()) * (total / samples)
    hits = np.minimum(np.searchsorted(np.cumsum(energy), places, side="right"), k * l - 1)
    chosen, times = np.unique(hits, return_counts=True)
    weights = times * (total / samples) / np.maximum(energy[chosen], np.finfo(np.float64).tiny)
    return np.ascontiguousarray(blocks[chosen // l, chosen % l]), weights


def leading_energies(stack: np.ndarray, most: int, rng: Any) -> np.ndarray:
    """Squares of at least ``most`` leading singular values (fewer where a block has fewer), descending, ``(c, t)``."""
    b, c = stack.shape[-2:]
    wide = stack if b <= c else stack.swapaxes(-1, -2)
    side, columns = min(b, c), most + OVERSAMPLING
    if side <= 32 or 3 * columns >= side:
        gram = wide @ wide.conj().swapaxes(-1, -2)
        return np.maximum(eigvalsh(gram)[..., ::-1], 0.0)
    omega = rng.standard_normal((wide.shape[-1], columns)).astype(stack.dtype)
    basis = np.linalg.qr(wide.conj().swapaxes(-1, -2) @ (wide @ omega))[0]
    y = wide @ basis
    found = eigvalsh(y.conj().swapaxes(-1, -2) @ y)[..., ::-1]
    return np.maximum(found[..., : most + 1], 0.0)


class Factors(NamedTuple):
    """Singular vectors of blocks ``(k, l, s, p)`` and their singular values ``(k, l, t)``."""

    u: np.ndarray | None  # (k, l, s, t); None where only the other side is known
    s: np.ndarray
    vh: np.ndarray | None  # (k, l, t, p)


def decompose(blocks: np.ndarray, gram: bool, rng: Any = 0) -> Factors:
    """Singular vectors: both sides by an SVD, or the shorter by Gram matrices, in half the time and to half the digits.

    Of large blocks that have a small rank up to rounding the SVD is taken in a random basis.
    """
    s, p = blocks.shape[-2:]
    if not gram:
        return _of_small_rank(blocks, np.random.default_rng(rng)) or Factors(*svd(blocks))
    adjoint = blocks.conj().swapaxes(-1, -2)
    values, vectors = eigh(blocks @ adjoint if s <= p else adjoint @ blocks)
    vectors, sigma = vectors[..., ::-1], np.sqrt(np.maximum(values[..., ::-1], 0.0))
    return Factors(vectors, sigma, None) if s <= p else Factors(None, sigma, vectors.conj().swapaxes(-1, -2))


def _of_small_rank(blocks: np.ndarray, rng: np.random.Generator) -> Factors | None:
    """The SVD of ``Q Q^H B`` for a random range ``Q`` that leaves nothing of the blocks but rounding; ``None`` if none does.

    The singular values are at most those of the blocks, so that their tails bound errors from below.
    """
    s, p = blocks.shape[-2:]
    columns = min(s, p) // SHARE
    if columns < OVERSAMPLING:
        return None
    q = np.linalg.qr(blocks @ rng.standard_normal((p, columns)))[0]
    inside = q.conj().swapaxes(-1, -2) @ blocks
    rest = blocks - q @ inside
    if np.linalg.norm(rest) > ROUNDING * np.linalg.norm(blocks):
        return None
    u, sigma, vh = svd(inside)
    return Factors(q @ u, sigma, vh)


def split(blocks: np.ndarray, factors: Factors, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors ``(k, l, s, rank)`` and ``(k, l, rank, p)`` nearest to the blocks.

    One step of subspace iteration gives vectors from Gram matrices the digits back that squaring took.
    """
    u, s, vh = factors
    if u is not None and vh is not None:
        return u[..., :rank], s[..., :rank, None] * vh[..., :rank, :]
    adjoint = blocks.conj().swapaxes(-1, -2)
    if u is not None:
        u = np.linalg.qr(blocks @ (adjoint @ u[..., :rank]))[0]
        return u, u.conj().swapaxes(-1, -2) @ blocks
    v = np.linalg.qr(adjoint @ (blocks @ _adjoint(vh)[..., :rank]))[0]
    return blocks @ v, v.conj().swapaxes(-1, -2)


def _adjoint(x: np.ndarray | None) -> np.ndarray:
    return np.empty(0) if x is None else x.conj().swapaxes(-1, -2)


def lower_bound(factors: Factors, rank: int, size: int, norm: float) -> float:
    """Lower bound of the error of any factors of this rank: the tail, without what rounding can have added to it."""
    if factors.u is not None and factors.vh is not None:
        return safe_bound(float(tails(factors.s)[rank]), norm, size)
    energy = np.square(factors.s)
    allowance = float(np.finfo(np.float64).eps) * size * float(energy.sum())
    return math.sqrt(max(0.0, float(energy[..., rank:].sum()) - allowance))
