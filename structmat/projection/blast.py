"""BLAST and MM*: three factors with a shared middle, no SVD solves them; alternating least squares does block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from structmat.patterns import Pattern
from structmat.projection.certificate import frobenius
from structmat.projection.drivers import svd
from structmat.projection.progress import Advance, quiet
from structmat.projection.randomized import normal
from structmat.projection.selection import Request, Solution
from structmat.projection.svd import safe_bound, truncated
from structmat.structures.chain import Chain, ceil_div, check_size, split_counts

SWEEPS = 500
RANDOM_STARTS = 1
_DRAWS = 8  # references for the diagonalisation: some are far better conditioned than others
_TRIAL = 10  # sweeps after which the starts are compared
_STALLED = 1e-6  # relative decrease of the error at which the sweeps end
_RIDGE = 1e-14  # of the mean diagonal: weight of staying where the normal equations are singular
_EPS = float(np.finfo(np.float64).eps)
_TINY = float(np.finfo(np.float64).tiny)


class Parts(NamedTuple):
    """``W[i, j] ~ left[i] diag(middle[i, j]) right[j]`` for every block of the matrix."""

    left: np.ndarray  # (b1, p, r)
    middle: np.ndarray  # (b1, b2, r)
    right: np.ndarray  # (b2, r, q)


def blast_patterns(shape: tuple[int, int], blocks: int | tuple[int, int], rank: int) -> list[tuple[int, int, int, int]]:
    """Patterns ``(b1, p, r, 1) (1, b1, b2, r) (b2, r, q, 1)`` of a BLAST matrix, for :class:`structmat.Chain`.

    Block ``(i, j)`` of a BLAST matrix is ``B_i diag(d_ij) C_j``: all blocks of a row share ``B_i`` and all of a column
    ``C_j``. Source: Lee et al., "BLAST: Block-level adaptive structured matrices for efficient deep neural network inference",
    NeurIPS 2024 (arXiv 2410.21262).

    Parameters
    ----------
    shape
        ``(m, n)``; sizes that the blocks do not divide are padded.
    blocks
        Number of blocks, or ``(b1, b2)`` for rows and columns.
    rank
        Size ``r`` of the diagonals, ``r (m + n + b1 b2)`` numbers in all.

    Returns
    -------
    patterns
        Three tuples ``(a, b, c, d)``.

    Raises
    ------
    ValueError
        For counts that do not fit the shape or a rank below 1.

    Examples
    --------
    >>> import structmat as sm
    >>> patterns = sm.blast_patterns((12, 8), blocks=(3, 2), rank=4)
    >>> patterns
    [(3, 4, 4, 1), (1, 3, 2, 4), (2, 4, 4, 1)]
    >>> W = sm.Chain.random((12, 8), patterns, rng=0).to_dense()
    >>> bool(sm.project(W, sm.Chain, patterns=patterns).relative_error < 1e-12)
    True
    """
    m, n = check_size(shape)
    b1, b2 = split_counts(blocks, (m, n))
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    return [(b1, ceil_div(m, b1), rank, 1), (1, b1, b2, rank), (b2, rank, ceil_div(n, b2), 1)]


def is_blast(patterns: Sequence[Pattern]) -> bool:
    """Whether three patterns are those of :func:`blast_patterns`."""
    if len(patterns) != 3:
        return False
    (b1, _, r, d1), (a2, rows, cols, d2), (b2, r3, _, d3) = patterns
    return d1 == a2 == d3 == 1 and r == d2 == r3 and b1 == rows and b2 == cols


def mirrored(patterns: Sequence[Pattern]) -> tuple[Pattern, ...]:
    """``(a, b, c, d) -> (d, b, c, a)``: the same chain with the digits of both indices reversed.

    The mirrored BLAST chain of square blocks, ``(1, b, b, b) (b, b, b, 1) (1, b, b, b)``, is MM*, the product of a Monarch
    matrix and the adjoint of another with the two inner factors multiplied out (Dao et al., ICML 2022, section 3).
    """
    return tuple(Pattern(p.d, p.b, p.c, p.a) for p in patterns)


def project_blast(target: np.ndarray, request: Request) -> Solution:
    """The chain of BLAST patterns, or of mirrored ones (MM*), by alternating least squares; a local optimum.

    A row of blocks ``B_i [diag(d_i1) C_1, diag(d_i2) C_2, ...]`` has rank ``r``, and so has a column of blocks: the error of
    their best approximations of that rank is the lower bound.
    """
    patterns = tuple(request.patterns or ())
    mirror = not is_blast(patterns)
    first, _, last = mirrored(patterns) if mirror else patterns
    (b1, p, r, _), (b2, _, q, _) = first, last
    m, n = target.shape
    padded = np.pad(target, [(0, b1 * p - m), (0, b2 * q - n)])
    if mirror:
        blocks = padded.reshape(p, b1, q, b2).transpose(1, 3, 0, 2)
    else:
        blocks = padded.reshape(b1, p, b2, q).transpose(0, 2, 1, 3)
    blocks = np.ascontiguousarray(blocks)
    rng = np.random.default_rng(0 if request.rng is None else request.rng)
    parts = blast(blocks, r, rng, request.advance)
    axis = 0 if mirror else 1
    factors = (
        np.expand_dims(parts.left, axis),
        np.ascontiguousarray(
            parts.middle.transpose(2, 0, 1)[:, None] if mirror else parts.middle.transpose(2, 0, 1)[None]
        ),
        np.expand_dims(parts.right, axis),
    )
    rows = blocks.transpose(0, 2, 1, 3).reshape(b1, p, b2 * q)
    cols = blocks.transpose(1, 3, 0, 2).reshape(b2, q, b1 * p)
    tail = max(truncated(rows, r).bound, truncated(cols, r).bound)
    bound = safe_bound(math.sqrt(max(0.0, tail)), request.norm, max(m, n))
    return Solution(Chain(factors, (m, n)), bound, "alternating least squares, block by block")


def blast(blocks: np.ndarray, rank: int, rng: np.random.Generator, advance: Advance = quiet) -> Parts:
    """``left[i] diag(middle[i, j]) right[j]`` near the blocks ``(b1, b2, p, q)``: a local optimum.

    Each of the three is the solution of small linear least-squares problems when the others are held (one of ``r`` unknowns
    for every row of ``left[i]``, every column of ``right[j]`` and every block), so that the error never grows. Starts that
    are compared after ten sweeps: the truncated SVD of the whole matrix, which is a BLAST matrix itself (so that the result
    is never worse than low rank); the singular vectors of the rows and columns of blocks; a random one; and where the rank is
    at most the block size the simultaneous diagonalisation that recovers members exactly
    (:func:`diagonalised`). Zero padding is exact: the rows of ``left`` that belong to it are zero.

    Cost: ``6 m n r`` multiply-adds for each sweep and ``b1 b2 r^3 / 3`` for the small systems.
    """
    norm = frobenius(blocks)
    if norm == 0.0:
        b1, b2, p, q = blocks.shape
        kinds = ((b1, p, rank), (b1, b2, rank), (b2, rank, q))
        return Parts(*(np.zeros(size, blocks.dtype) for size in kinds))
    trials = []
    for start in starts(blocks, rank, rng):
        trials.append(sweeps(blocks, start, _TRIAL, norm, advance))
        if trials[-1][1] <= 1e-12 * norm:
            break
    parts, error = min(trials, key=lambda trial: trial[1])
    return sweeps(blocks, parts, SWEEPS, norm, advance)[0] if error > 8 * _EPS * norm else parts


def sweeps(blocks: np.ndarray, parts: Parts, count: int, norm: float, advance: Advance = quiet) -> tuple[Parts, float]:
    """Parts after the last sweep that gained, and their error."""
    best, error = parts, residual(blocks, parts)
    for _ in range(count):
        advance(1, 1)
        parts = normalised(sweep(blocks, parts))
        now = residual(blocks, parts)
        if not now < error:
            break
        gained, best, error = error - now, parts, now
        if gained <= _STALLED * error or error <= 8 * _EPS * norm:
            break
    return best, error


def sweep(blocks: np.ndarray, parts: Parts) -> Parts:
    """One update of the left, the middle and the right factors, each exact for the others."""
    left, middle, right = parts
    b1, b2, p, q = blocks.shape
    r = middle.shape[-1]
    # rows of blocks: W_i ~ left_i K_i with K_i = [diag(d_ij) C_j]_j
    rows = blocks.transpose(0, 2, 1, 3).reshape(b1, p, b2 * q)
    k = (middle[..., None] * right).transpose(0, 2, 1, 3).reshape(b1, r, b2 * q)
    gram_right = right @ _adjoint(right)  # (b2, r, r)
    normal = np.einsum("jab,ija,ijb->iab", gram_right, middle, middle.conj(), optimize=True)
    left = _adjoint(_solve(normal, k @ _adjoint(rows), _adjoint(left)))
    # columns of blocks, by the adjoint problem: W^j ~ H_j right_j with H_j = [left_i diag(d_ij)]_i
    gram_left = _adjoint(left) @ left  # (b1, r, r)
    columns = blocks.transpose(1, 0, 2, 3).reshape(b2, b1 * p, q)
    h = (left[:, None] * middle[:, :, None, :]).transpose(1, 0, 2, 3).reshape(b2, b1 * p, r)
    normal = np.einsum("iab,ija,ijb->jab", gram_left, middle.conj(), middle, optimize=True)
    right = _solve(normal, _adjoint(h) @ columns, right)
    # every diagonal: W_ij ~ sum_a d_ija left_ia right_ja
    gram_right = right @ _adjoint(right)
    normal = gram_left[:, None] * gram_right.swapaxes(-1, -2)[None]  # (b1, b2, r, r)
    seen = np.einsum("ijaq,jaq->ija", _adjoint(left)[:, None] @ blocks, right.conj(), optimize=True)
    middle = _solve(normal, seen[..., None], middle[..., None])[..., 0]
    return Parts(left, middle, right)


def _solve(normal: np.ndarray, right_side: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Solution of ``normal x = right_side``, stepping from ``old`` with a tiny proximal term: monotone where it is singular."""
    r = normal.shape[-1]
    trace = np.trace(normal, axis1=-2, axis2=-1).real / r
    ridge = np.maximum(_RIDGE * trace, _TINY)[..., None, None] * np.eye(r)
    return old + np.linalg.solve(normal + ridge, right_side - normal @ old)


def residual(blocks: np.ndarray, parts: Parts) -> float:
    """Frobenius norm of the blocks minus the parts multiplied out."""
    left, middle, right = parts
    return frobenius(blocks - (left[:, None] * middle[:, :, None, :]) @ right[None])


def normalised(parts: Parts) -> Parts:
    """The same blocks with columns of ``left`` and rows of ``right`` of norm 1, zero ones aside."""
    left, middle, right = parts
    columns = np.linalg.norm(left, axis=1)  # (b1, r)
    rows = np.linalg.norm(right, axis=2)  # (b2, r)
    columns, rows = np.where(columns > 0, columns, 1.0), np.where(rows > 0, rows, 1.0)
    return Parts(left / columns[:, None, :], middle * columns[:, None, :] * rows[None], right / rows[:, :, None])


def starts(blocks: np.ndarray, rank: int, rng: np.random.Generator) -> Iterator[Parts]:
    """Parts to start from, the most promising first."""
    b1, b2, p, q = blocks.shape
    if rank <= min(p, q):
        drawn = [found for found in (diagonalised(blocks, rank, rng) for _ in range(_DRAWS)) if found is not None]
        if drawn:
            yield min(drawn, key=lambda parts: residual(blocks, parts))
    whole = truncated(blocks.transpose(0, 2, 1, 3).reshape(b1 * p, b2 * q), rank)
    ones = np.ones((b1, b2, rank), blocks.dtype)
    scale = 1e-3  # components that the SVD left at zero, or all alike, would never move apart
    spread = scale * frobenius(whole.y) / math.sqrt(whole.y.size)
    left = whole.u.reshape(b1, p, rank) + scale / math.sqrt(b1 * p) * normal((b1, p, rank), blocks.dtype, rng)
    right = whole.y.reshape(rank, b2, q).transpose(1, 0, 2) + spread * normal((b2, rank, q), blocks.dtype, rng)
    yield Parts(whole.u.reshape(b1, p, rank), ones, whole.y.reshape(rank, b2, q).transpose(1, 0, 2))
    yield Parts(left, ones + scale * normal(ones.shape, blocks.dtype, rng), right)
    yield _with_middle(blocks, *_bases(blocks, rank, rng))
    for _ in range(RANDOM_STARTS):
        left, right = normal((b1, p, rank), blocks.dtype, rng), normal((b2, rank, q), blocks.dtype, rng)
        yield _with_middle(blocks, left, right)


def _bases(blocks: np.ndarray, rank: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Leading singular vectors of the rows and of the columns of blocks, random ones where there are too few."""
    b1, b2, p, q = blocks.shape
    left = svd(blocks.transpose(0, 2, 1, 3).reshape(b1, p, b2 * q))[0][..., :rank]
    right = svd(blocks.transpose(1, 0, 2, 3).reshape(b2, b1 * p, q))[2][..., :rank, :]
    more = normal((b1, p, rank - left.shape[-1]), blocks.dtype, rng) / math.sqrt(p)
    below = normal((b2, rank - right.shape[-2], q), blocks.dtype, rng) / math.sqrt(q)
    return np.concatenate((left, more), -1), np.concatenate((right, below), -2)


def _with_middle(blocks: np.ndarray, left: np.ndarray, right: np.ndarray) -> Parts:
    """The best diagonals between given left and right factors."""
    normal = (_adjoint(left) @ left)[:, None] * (right @ _adjoint(right)).swapaxes(-1, -2)[None]
    seen = np.einsum("ijaq,jaq->ija", _adjoint(left)[:, None] @ blocks, right.conj(), optimize=True)
    return Parts(left, _solve(normal, seen[..., None], np.zeros_like(seen)[..., None])[..., 0], right)


def diagonalised(blocks: np.ndarray, rank: int, rng: np.random.Generator) -> Parts | None:
    """Exact parts of generic members with ``rank <= min(p, q)``; of others a start, or ``None`` where there is none.

    In the bases of the rows and columns of blocks every block is a square ``M_ij = A_i D_ij C_j``. For a reference block
    ``(s, t)`` the matrices ``M_it^-1 M_ij M_sj^-1 M_st = C_t^-1 (diagonal) C_t`` commute, so that the eigenvectors of a
    random combination of them are ``C_t^-1``; then ``A_i = M_it C_t^-1`` and ``C_j = A_s^-1 M_sj``. Source: the recovery of
    MM* of Dao et al., ICML 2022, theorem 2, with a random reference and for rectangular blocks. It inverts blocks: on other
    matrices it amplifies what does not fit.
    """
    u, v = _bases(blocks, rank, rng)
    core = _adjoint(u)[:, None] @ blocks @ _adjoint(v)[None]  # (b1, b2, r, r)
    b1, b2 = core.shape[:2]
    s, t = int(rng.integers(b1)), int(rng.integers(b2))
    if not max(np.linalg.cond(core[:, t]).max(), np.linalg.cond(core[s]).max()) < 1e12:
        return None
    inner = np.linalg.solve(core[:, t][:, None], core) @ np.linalg.inv(core[s])[None] @ core[s, t]
    sizes = np.linalg.norm(inner, axis=(-2, -1))
    family = np.einsum("ij,ijab->ab", rng.standard_normal((b1, b2)) / sizes, inner)
    values, vectors = np.linalg.eig(family)
    if (blocks.dtype.kind != "c" and np.iscomplexobj(values)) or np.linalg.cond(vectors) > 1e12:
        return None
    a = core[:, t] @ vectors
    c = np.linalg.solve(a[s], core[s])
    return _with_middle(blocks, u @ a, c @ v)


def _adjoint(x: np.ndarray) -> np.ndarray:
    return x.conj().swapaxes(-1, -2)
