"""Lower bounds of weighted errors: what no member of a family can go below, whatever the algorithm."""

from __future__ import annotations

import math

import numpy as np

from structmat.projection.device import straight
from structmat.projection.drivers import eigvalsh, triangular_inverse
from structmat.projection.weighted_classes import Classes, Side

AFFORDABLE = 1024  # inputs up to which the least eigenvalue of the weight is worth its cost


def two_factor_bound(classes: Classes, rank: int, shared: int = 0) -> float:
    """A lower bound of the weighted error of every matrix of ``l x k`` blocks of a rank; 0 where none is known.

    With ``shared``, of every such matrix plus one of that rank: a row class has rank ``k r + shared``, a block ``r + shared``.

    The largest of three, for ``E = W - A`` and ``C`` the weight of the columns:

    - rows: row class ``j`` of ``A`` has rank at most ``k r``, so that its part of the error is at least the tail of the
      singular values of ``W_j S`` beyond ``k r`` (Eckart-Young);
    - one class of columns: ``C >= e_k (C / C_rest) e_k^H`` with the Schur complement of all others (the least over free ``E``
      elsewhere), so that the error is at least the tails of ``W_jk (C / C_rest)^(1/2)`` beyond ``r``;
    - all classes: ``C >= t diag(C_11, ..., C_kk)`` with ``t`` the least eigenvalue of ``C`` with whitened diagonal blocks, so
      that the error is at least ``sqrt(t)`` times the tails of ``W_jk C_kk^(1/2)``.

    The last two are left out (0) for a nearly singular weight, whose least eigenvalue is rounding, the last one for more than
    1024 inputs too. A weight of the rows alone
    is that of the columns of the transpose; with both only the last one is known, with ``t`` the product of both sides'. Cost
    ``m^2 n / l`` and ``n^3``.
    """
    if classes.columns is None and classes.rows is not None:
        return two_factor_bound(classes.transposed(), rank, shared)
    sides = [side for side in (classes.columns, classes.rows) if side is not None]
    found = [0.0]
    if not any(side.ridge for side in sides):
        share = math.prod(least_eigenvalue(side) for side in sides)
        found.append(math.sqrt(share) * float(classes.errors[min(rank + shared, len(classes.errors) - 1)]))
        if classes.rows is None and classes.columns is not None:
            found.append(_one_class(classes, classes.columns, rank + shared))
    if classes.rows is None and classes.columns is not None:
        found.append(_row_classes(classes, classes.columns, classes.at.k * rank + shared))
    return max(found)


def least_eigenvalue(side: Side) -> float:
    """The least eigenvalue of a weight with whitened diagonal blocks, lowered by rounding; 0 for sizes where it is dear."""
    if side.decoupled:
        return 1.0
    if len(side.coupling) > AFFORDABLE:
        return 0.0
    lowest = float(eigvalsh(side.coupling)[0])
    return max(0.0, lowest - 4.0 * np.finfo(np.float64).eps * len(side.coupling))


def _one_class(classes: Classes, side: Side, rank: int) -> float:
    k, p = classes.at.k, classes.at.p
    inverse = triangular_inverse(side.triangle)
    best = 0.0
    for i in range(k):
        # the inverse of C is inverse^H inverse; its diagonal block is the inverse of the Schur complement
        part = inverse[i * p :, i * p : (i + 1) * p]
        half = triangular_inverse(np.linalg.cholesky(part.conj().T @ part)).conj().T
        best = max(best, _tail(classes.blocks[i] @ half, rank))
    return best


def _row_classes(classes: Classes, side: Side, rank: int) -> float:
    l, k, s, p = classes.at[:4]
    if rank >= s:
        return 0.0
    rows = straight(classes.blocks.transpose(1, 2, 0, 3)).reshape(l * s, k * p)
    weighted = (rows @ side.whole).reshape(l, s, k * p)
    gram = weighted @ rows.reshape(l, s, k * p).conj().swapaxes(-1, -2)
    values = eigvalsh((gram + gram.conj().swapaxes(-1, -2)) / 2)
    return math.sqrt(max(0.0, float(np.maximum(values, 0.0)[:, : s - rank].sum())))


def _tail(blocks: np.ndarray, rank: int) -> float:
    """Norm of what the best rank-r blocks leave, from Gram matrices of the smaller side."""
    s, p = blocks.shape[-2:]
    if rank >= min(s, p):
        return 0.0
    blocks = blocks if s <= p else blocks.swapaxes(-1, -2)
    values = eigvalsh(blocks @ blocks.conj().swapaxes(-1, -2))
    return math.sqrt(max(0.0, float(np.maximum(values, 0.0)[..., : min(s, p) - rank].sum())))
