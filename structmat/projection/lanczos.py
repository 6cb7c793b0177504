"""A few singular triplets of a large matrix by block Lanczos, and how much the largest of them can have missed."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from structmat.projection.device import beside, host
from structmat.projection.drivers import eigvalsh, svd
from structmat.projection.matrix_free import Explicit, distance
from structmat.projection.progress import Advance, quiet
from structmat.projection.randomized import normal

ACCURACY = 1e-10  # of the squared error: its root is optimal to 5e-11
FAILURE = 1e-14  # probability over the random start that the bound does not hold, at each step
MIN_CHECKS, MAX_CHECKS = 24, 64  # Lanczos steps for the bound: from 17 on it says anything at all
LOSS = 1e-4  # of the squared error: what the bound may lose before more steps are spent on it
_EPS = float(np.finfo(np.float64).eps)


class Leading(NamedTuple):
    """The leading singular triplets, and a lower bound of the error of every approximation of their rank."""

    u: np.ndarray  # (m, t)
    s: np.ndarray  # (t,)
    vh: np.ndarray  # (t, n)
    lower_bound: float


def leading_triplets(
    matrix: np.ndarray,  # (m, n)
    count: int,
    norm: float,  # Frobenius norm of the matrix
    rng: np.random.Generator,
    advance: Advance = quiet,
) -> Leading | None:
    """The ``count`` largest singular triplets ``u, s, vh``; ``None`` where Lanczos vectors for a quarter of the size fail.

    Block Golub-Kahan-Lanczos with full reorthogonalisation and blocks of ``count`` vectors, so that multiple singular values
    are all found (Golub, Luk and Overton, ACM Trans. Math. Software 7, 1981). It stops when ``sum min(r_i, r_i^2 / gap_i)``
    with ``r_i = ||A^H A v_i - s_i^2 v_i||``, an estimate of the energy still to be gained, is below ``1e-10`` of the squared
    error.

    **The bound.** The ``s_i`` come from below, so that ``||A||^2 - sum s_i^2 = ||A - A V V^H||^2`` is an *upper* bound of the
    squared error of the best approximation. For the lower one let ``V`` hold the orthonormal ``v_i`` with ``V^H A^H A V =
    S^2``, let ``E = A^H A V - V S^2``, and let ``mu`` bound the largest eigenvalue of ``B = P A^H A P``, ``P = I - V V^H``. In
    the basis ``[V, V']`` the matrix ``A^H A`` is ``[[S^2, E'^H], [E', B']]`` with ``||E'|| <= ||E||_F``. The eigenvalues of its
    block-diagonal part are the ``s_i^2`` and numbers of at most ``mu``, so that the ``t`` largest of them add up to at most
    ``sum max(s_i^2, mu)``. Each eigenvalue of the whole differs from that of the part by at most ``d = 2 ||E||^2 / (eta +
    sqrt(eta^2 + 4 ||E||^2))``, ``eta = max(0, s_t^2 - mu)``: Weyl's ``||E||`` without a gap and about ``||E||^2 / eta`` with
    one (Li and Li, Linear Algebra Appl. 395, 2005, theorem 2). Hence::

        best^2 = ||A||^2 - sum_{i<=t} sigma_i^2  >=  ||A - A V V^H||^2 - sum_i max(0, mu - s_i^2) - t d

    No residual can tell ``mu``: it is asked of ``k`` Lanczos steps on ``B`` from a *fresh* random vector. Their largest Ritz
    value ``theta`` satisfies ``mu <= theta / (1 - eps)`` with probability at least ``1 - 1.648 sqrt(n) exp(-sqrt(eps) (2k -
    1))`` for every matrix (Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992, theorem 4.2; a complex matrix is
    a real one of twice the size), and ``eps`` is set for ``1 - 1e-14``, so that the bound holds with ``1 - 1e-12`` although
    it is looked at after every step, 24 to 64 times. Behind a gap that is enough for a tight bound; without any gap it loses
    at most ``eps / (1 - eps) t s_t^2`` of ``||A||^2``. Where the deterministic ``mu <= ||A - A V V^H||^2`` says more, it is
    taken.

    Cost: two products with the matrix for each of the steps, those for the bound included; ``O((m + n) c^2)`` for ``c``
    Lanczos vectors, which are kept.
    """
    products = Explicit(matrix, advance)
    v = _right_vectors(products, count, norm, rng)
    if v is None:
        return None
    q, triangle = np.linalg.qr(products.apply(v))
    p, s, w = svd(triangle)
    u, v = q @ p, v @ w.conj().T
    rest = distance(products, u * s, v.conj().T) ** 2
    defect = float(np.linalg.norm(products.adjoint(u * s) - v * s**2))
    values = host(s)
    mu = min(_largest_elsewhere(products, v, values, rest, rng), rest)
    gap = max(0.0, float(values[-1]) ** 2 - mu)
    change = 2 * defect**2 / (gap + math.sqrt(gap**2 + 4 * defect**2)) if defect else 0.0
    missed = float(np.maximum(0.0, mu - values**2).sum())
    allowance = _EPS * max(matrix.shape) * math.sqrt(rest) * norm
    squared = rest - missed - count * change - allowance
    return Leading(u, s, v.conj().T, math.sqrt(max(0.0, squared)))


def _right_vectors(matrix: Explicit, count: int, norm: float, rng: np.random.Generator) -> np.ndarray | None:
    """Orthonormal approximations ``(n, count)`` of the leading right singular vectors.

    ``A V = U B`` holds exactly in every step, and ``A^H U = V B^H`` but for the last block, whose remainder ``V' L`` gives
    the residuals of ``A^H u_i = s_i v_i``.
    """
    m, n = matrix.shape
    most = max(6 * count, min(m, n) // 4)
    v = np.empty((n, most + count), matrix.dtype, order="F", like=matrix.home)
    u = np.empty((m, most + count), matrix.dtype, order="F", like=matrix.home)
    b = np.zeros((most + count, most + count), matrix.dtype)
    block = np.linalg.qr(beside(normal((n, count), matrix.dtype, rng), v))[0]
    left = right = 0  # columns of u and v in use
    checked = 0
    while right + block.shape[1] <= most:
        v[:, right : right + block.shape[1]] = block
        image = matrix.apply(block)
        new, head = _orthonormal(image, u[:, :left], norm)
        b[: left + new.shape[1], right : right + block.shape[1]] = head
        u[:, left : left + new.shape[1]] = new
        right += block.shape[1]
        old, left = left, left + new.shape[1]
        block, tail = _orthonormal(matrix.adjoint(new), v[:, :right], norm)
        tail = tail[right:]  # L, (new right, new left)
        last = block.shape[1] == 0
        if not last and right < checked + max(count, checked // 10):  # a small SVD for every tenth more of the basis
            continue
        checked = right
        p, s, qh = svd(b[:left, :right])
        residuals = s[:count] * np.linalg.norm(tail @ p[old:left, :count], axis=0) if not last else np.zeros(1)
        squares = np.append(s[: count + 1] ** 2, 0.0)
        if last or _converged(residuals, squares, norm):
            found = v[:, :right] @ beside(qh[:count].conj().T, v)
            if found.shape[1] < count:  # a matrix of lower rank: any other orthonormal columns
                extra = _orthonormal(beside(normal((n, count - found.shape[1]), matrix.dtype, rng), v), found, 1.0)[0]
                found = np.hstack((found, extra))
            return found
    return None


def _converged(residuals: np.ndarray, squares: np.ndarray, norm: float) -> bool:
    count = len(residuals)
    if len(squares) < count + 2:  # no Ritz value beyond those wanted: nothing is known of the gap
        return False
    gaps = np.maximum(squares[:count] - squares[count], np.finfo(np.float64).tiny)
    missing = float(np.minimum(residuals, residuals**2 / gaps).sum())
    error = max(0.0, norm**2 - float(squares[:count].sum()))
    return missing <= ACCURACY * error + (2 * _EPS * norm) ** 2


def _largest_elsewhere(matrix: Explicit, v: np.ndarray, s: np.ndarray, rest: float, rng: np.random.Generator) -> float:
    """Upper bound of the largest eigenvalue of ``P A^H A P``, ``P = I - V V^H``; steps are taken until it is good enough."""
    n, count = v.shape
    steps = min(MAX_CHECKS, n - count)
    if steps == 0:
        return 0.0
    norm = math.hypot(float(np.linalg.norm(s)), math.sqrt(rest))
    rounding = 4 * _EPS * norm**2
    basis = np.empty((n, count + steps + 1), matrix.dtype, order="F", like=v)
    basis[:, :count] = v
    size = n if matrix.dtype.kind != "c" else 2 * n
    digits = math.log(1.648 * math.sqrt(size) / FAILURE)
    block = _orthonormal(beside(normal((n, 1), matrix.dtype, rng), v), v, 1.0)[0]
    tridiagonal = np.zeros((steps + 1, steps + 1))
    mu = math.inf
    for k in range(steps):
        basis[:, count + k] = block[:, 0]
        image = matrix.apply(block)
        tridiagonal[k, k] = float(np.linalg.norm(image)) ** 2
        block, head = _orthonormal(
            matrix.adjoint(image), basis[:, : count + k + 1], norm * float(np.linalg.norm(image))
        )
        theta = float(eigvalsh(tridiagonal[: k + 1, : k + 1])[-1]) + rounding
        if (
            block.shape[1] == 0 or k + 1 == n - count
        ):  # invariant: it holds the largest eigenvalue but with probability 0
            return theta
        tridiagonal[k, k + 1] = tridiagonal[k + 1, k] = abs(complex(head[-1, 0]))
        eps = (digits / (2 * k + 1)) ** 2
        mu = theta / (1.0 - eps) if eps < 1.0 else math.inf
        if k + 1 >= MIN_CHECKS and float(np.maximum(0.0, mu - s**2).sum()) <= LOSS * rest:
            break
    return mu


def _orthonormal(y: np.ndarray, basis: np.ndarray, norm: float) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal columns ``z`` orthogonal to those of ``basis`` and coefficients with ``y = [basis, z] coefficients``.

    The coefficients are on the host. Directions of ``y`` that are rounding of ``norm`` are left out.
    """
    head = basis.conj().T @ y
    y = y - basis @ head
    again = basis.conj().T @ y
    y = y - basis @ again
    q, triangle = np.linalg.qr(y)
    p, s, wh = svd(triangle)
    kept = int((s > 8 * _EPS * norm).sum())
    q = q @ p[:, :kept]
    if kept and s[kept - 1] < 1e-8 * norm:  # nearly rounding: it has come back towards the basis
        q = q - basis @ (basis.conj().T @ q)
        q, turn = np.linalg.qr(q)
        return q, host(np.vstack((head + again, turn @ (s[:kept, None] * wh[:kept]))))
    return q, host(np.vstack((head + again, s[:kept, None] * wh[:kept])))
