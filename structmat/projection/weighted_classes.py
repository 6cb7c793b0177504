"""Row and column classes of a weighted two-factor projection: what all ranks of one layout share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from structmat.projection.certificate import frobenius
from structmat.projection.device import straight
from structmat.projection.drivers import eigh, svd, triangular_inverse
from structmat.projection.permutation import View
from structmat.projection.svd import tails
from structmat.projection.two_factor import Layout, Place, blocks_of
from structmat.projection.weight import Metric, Weight

_EPS = float(np.finfo(np.float64).eps)


def safe(error: float, target: np.ndarray, weight: Weight) -> float:
    """A weighted error from a factorisation, lowered by what rounding of ``W C W^H`` can have added to it."""
    size = 1.0
    for side in (weight.columns, weight.rows):
        size *= 1.0 if side is None else frobenius(side.matrix)
    allowance = _EPS * max(target.shape) * size * frobenius(target) ** 2
    return float(np.sqrt(max(0.0, error**2 - allowance)))


def truncated(
    target: np.ndarray,  # (..., m, n)
    rows: np.ndarray | None,  # T (..., m, m)
    columns: np.ndarray | None,  # S (..., n, n)
    parts: tuple[np.ndarray, np.ndarray, np.ndarray],  # thin SVD of T^H W S
    rank: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Factors ``(..., m, r)`` and ``(..., r, n)`` of the matrix of a rank with the least ``||T^H (W - A) S||``.

    ``U (U^H W)`` without ``T``, else ``(W S V / s) (U^H T^H W)``: no inverse, so that both weights may be singular.
    """
    u, s, vh = (parts[0][..., :rank], parts[1][..., :rank], parts[2][..., :rank, :])
    uh = u.conj().swapaxes(-1, -2)
    if rows is None:
        return u, uh @ target
    largest = np.max(s, axis=-1, keepdims=True, initial=0.0)
    inverse = np.divide(1.0, s, out=np.zeros_like(s), where=s > _EPS * max(target.shape[-2:]) * largest)
    wide = target if columns is None else target @ columns
    return wide @ (vh.conj().swapaxes(-1, -2) * inverse[..., None, :]), uh @ (rows.conj().swapaxes(-1, -2) @ target)


class Pair(NamedTuple):
    """Both factors of every block, ``left (k, l, s, r)`` and ``right (k, l, r, p)``, and their weighted error."""

    left: np.ndarray
    right: np.ndarray
    error: float
    closed: bool  # whether a closed form, which is optimal
    history: tuple[float, ...] = ()  # weighted error after every sweep, in the damped norm


class Classes:
    """A target and its weight seen by row and column classes: what all ranks of one layout share."""

    def __init__(self, target: np.ndarray, place: Place, weight: Weight) -> None:
        self.target, self.place, self.weight = target, place, weight
        self.at = at = place.layout
        self.blocks = straight(blocks_of(target, *place))  # (k, l, s, p)
        columns = class_order(at.k, at.p, not place.strided)
        self.columns = None if weight.columns is None else Side(weight.columns, columns, at.k)
        rows = class_order(at.l, at.s, at.contiguous)
        self.rows = None if weight.rows is None else Side(weight.rows, rows, at.l)
        s, t = self.columns, self.rows
        self.white = self.blocks if s is None else self.blocks @ s.factors[:, None]
        self.white = self.white if t is None else t.factors.conj().swapaxes(-1, -2) @ self.white
        self.parts = svd(self.white)
        self.errors = tails(self.parts[1])  # of the weight's diagonal blocks alone: exact where there are no others

    @property
    def decoupled(self) -> bool:
        """Whether the weight has no entries between classes, so that the blocks are independent."""
        return all(side is None or side.decoupled for side in (self.columns, self.rows))

    def transposed(self) -> Classes:
        """The transposed target with the sides of the weight exchanged: ``tr(D E C E^H) = tr(C^T E^T D^T conj(E))``."""
        l, k, s, p, contiguous = self.at
        place = Place(Layout(k, l, p, s, not self.place.strided), not contiguous)
        return Classes(self.target.T, place, self.weight.seen(View(transposed=True)))

    def assemble(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """The matrix ``(m, n)`` of the blocks ``left @ right``."""
        l, k, s, p, contiguous = self.at
        result = np.empty((l * s, k * p), np.result_type(left, right), like=left)
        rows, columns = class_order(l, s, contiguous), class_order(k, p, not self.place.strided)
        result[np.ix_(rows, columns)] = (left @ right).transpose(1, 2, 0, 3).reshape(l * s, k * p)
        m, n = self.target.shape
        return result[:m, :n]

    @property
    def ridge(self) -> float:
        """The relative ridge of the weight as the descent sees it."""
        return max((side.ridge for side in (self.columns, self.rows) if side is not None), default=0.0)

    def pair(
        self,
        left: np.ndarray,
        right: np.ndarray,
        history: Sequence[float] = (),
        closed: bool = False,
        error: float | None = None,
    ) -> Pair:
        """Factors with their weighted error, recomputed unless it is known."""
        if error is None:
            error = self.weight.norm(self.target - self.assemble(left, right))
        return Pair(left, right, error, closed, tuple(history))


def class_order(count: int, size: int, contiguous: bool) -> np.ndarray:
    """The indices sorted by class: runs, or those of equal residue modulo ``count``."""
    order = np.arange(count * size)
    return order if contiguous else order.reshape(size, count).T.ravel()


class Side:
    """One side's weight by classes: its diagonal blocks are whitened, what is left couples the classes."""

    def __init__(self, metric: Metric, order: np.ndarray, count: int) -> None:
        size, n = len(order), len(metric.matrix)

        def blocks(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """The matrix in the order of the classes, the identity in the padding, and its diagonal blocks."""
            whole, padding = np.zeros((size, size), matrix.dtype, like=matrix), np.arange(n, size)
            whole[:n, :n] = matrix
            whole[padding, padding] = 1.0
            whole = straight(whole[np.ix_(order, order)])
            four = whole.reshape(count, size // count, count, size // count)
            return whole, np.einsum("kikj->kij", four).copy()

        self.count = count
        self.ridge = metric.ridge
        self.whole, diagonal = blocks(metric.matrix)
        self.damped = self.whole
        self._known = metric.triangle if size == n and np.array_equal(order, np.arange(n)) else None
        q = size // count
        self.decoupled = not any(
            self.whole[i * q : (i + 1) * q, : i * q].any() for i in range(1, count)
        )  # Hermitian: the other half is its adjoint
        if metric.ridge:
            values, vectors = eigh(diagonal)
            self.factors = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]  # S S^H = C_kk, singular or not
            self.damped, diagonal = blocks(metric.solid)
            self.solid = np.linalg.cholesky(diagonal)
        else:
            self.factors = self.solid = np.linalg.cholesky(diagonal)
        self.inverse = np.stack([triangular_inverse(s) for s in self.solid])  # (count, q, q)

    @property
    def triangle(self) -> np.ndarray:
        """The Cholesky factor of the weight in the order of the classes."""
        return np.linalg.cholesky(self.whole) if self._known is None else self._known

    @cached_property
    def coupling(self) -> np.ndarray:
        """``S^-1 C S^-H`` with ``S`` block-diagonal: the identity in every diagonal block."""
        count, q = self.inverse.shape[:2]
        half = (self.inverse @ self.damped.reshape(count, q, -1)).reshape(count * q, count, q).transpose(1, 0, 2)
        full = half @ self.inverse.conj().swapaxes(-1, -2)
        return straight(full.transpose(1, 0, 2).reshape(count * q, count * q))
