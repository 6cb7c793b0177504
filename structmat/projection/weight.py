"""Weight: the norm of an activation-aware projection, and the factors of it that the solvers need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from structmat.projection.certificate import frobenius
from structmat.projection.device import straight
from structmat.projection.drivers import eigh, reciprocal_condition
from structmat.projection.permutation import View

RIDGE = 1e-6  # relative ridge of solvers that divide by a weight which is singular or nearly so
CONDITION = 1e-9  # reciprocal condition (equilibrated, 1-norm) below which a weight counts as singular


@dataclass(frozen=True)
class Metric:
    """One side's weight: a positive semidefinite matrix, scaled to a largest diagonal entry in [1, 4)."""

    matrix: np.ndarray  # (n, n), float64 or complex128
    scale: float  # a norm in the caller's weight is this times the norm in `matrix`
    notes: tuple[str, ...] = ()

    @cached_property
    def triangle(self) -> np.ndarray | None:
        """The Cholesky factor of the matrix; None where it is singular."""
        try:
            return np.linalg.cholesky(self.matrix)
        except np.linalg.LinAlgError:
            return None

    @cached_property
    def factor(self) -> np.ndarray:
        """``S (n, n)`` with ``S S^H = matrix``: Cholesky, the eigenvectors where the matrix is singular."""
        if self.triangle is not None:
            return self.triangle
        values, vectors = eigh(self.matrix)
        return vectors * np.sqrt(np.maximum(values, 0.0))

    @cached_property
    def ridge(self) -> float:
        """Relative ridge for solvers that divide by the weight: 0 unless it is singular or nearly so."""
        if self.triangle is None:
            return RIDGE
        diagonal = np.sqrt(np.real(np.diagonal(self.matrix)))
        norm = float(((np.abs(self.matrix) @ (1.0 / diagonal)) / diagonal).max())
        factor = self.triangle / diagonal[:, None]  # that of the correlations
        return 0.0 if reciprocal_condition(factor, norm) > CONDITION else RIDGE

    @cached_property
    def solid(self) -> np.ndarray:
        """The matrix with the ridge on its diagonal, relative to each entry of it: badly scaled inputs stay as they are."""
        if self.ridge == 0.0:
            return self.matrix
        diagonal = np.maximum(np.real(np.diagonal(self.matrix)), 0.0)
        damped, i = self.matrix.copy(), np.arange(len(diagonal))
        # inputs that never fire get a little of the mean, so that the factor exists
        damped[i, i] += self.ridge * (diagonal + RIDGE * max(float(diagonal.mean()), 1e-300))
        return damped


@dataclass(frozen=True)
class Weight:
    """The norm ``sqrt(tr(D E C E^H))`` of an error ``E (m, n)``; ``None`` stands for the identity."""

    columns: Metric | None  # C (n, n): second moment of the inputs
    rows: Metric | None = None  # D (m, m): of the outputs' importance

    @property
    def scale(self) -> float:
        """A norm in the caller's weight is this times :meth:`norm`."""
        return (self.columns.scale if self.columns else 1.0) * (self.rows.scale if self.rows else 1.0)

    @property
    def ridge(self) -> float:
        """The larger relative ridge of both sides."""
        return max((side.ridge for side in (self.columns, self.rows) if side), default=0.0)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found out about the weight."""
        return sum((side.notes for side in (self.columns, self.rows) if side), ())

    def norm(self, error: np.ndarray) -> float:
        """``sqrt(tr(D E C E^H))`` by direct summation, free of any factorisation. Cost ``m n (m + n)``."""
        largest = float(np.max(np.abs(error), initial=0.0))
        if largest == 0.0:
            return 0.0
        if self.columns is None and self.rows is None:
            return frobenius(error)
        unit = error / largest
        y = unit if self.columns is None else unit @ self.columns.matrix
        y = y if self.rows is None else self.rows.matrix @ y
        return largest * math.sqrt(max(0.0, float(np.vdot(unit, y).real)))

    def seen(self, view: View) -> Weight:
        """The weight of the matrix that the family sees: permuted, and with the sides exchanged for a transpose."""
        columns, rows = _reordered(self.columns, view.cols), _reordered(self.rows, view.rows)
        if not view.transposed:
            return Weight(columns, rows)
        flipped = [side and Metric(straight(side.matrix.T), side.scale, side.notes) for side in (rows, columns)]
        return Weight(*flipped)

    def from_right(self, x: np.ndarray) -> np.ndarray:
        """``x S`` with ``S S^H = C``."""
        return x if self.columns is None else x @ self.columns.factor

    def from_left(self, x: np.ndarray) -> np.ndarray:
        """``T^H x`` with ``T T^H = D``."""
        return x if self.rows is None else self.rows.factor.conj().T @ x


def _reordered(side: Metric | None, order: np.ndarray | None) -> Metric | None:
    if side is None or order is None:
        return side
    return Metric(straight(side.matrix[np.ix_(order, order)]), side.scale, side.notes)


def columns_of(weight: Weight) -> Metric:
    """The weight of the inputs; ``ValueError`` where there is none."""
    if weight.columns is None:
        raise ValueError("weight: expected a weight of the inputs (or activations), got none")
    return weight.columns
