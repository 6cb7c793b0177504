"""The plan of a Kronecker product of dense factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from structmat.backends.base import KronPlan, Plan, cheapest_order
from structmat.backends.numba.cost import Sizes, kron_seconds, numpy_kron_seconds
from structmat.backends.numba.kron import best_columns, best_rows
from structmat.backends.numba.machine import Machine
from structmat.backends.numba.plan import Apply, Kernel, NumbaPlan

KEPT = 32  # programs for different numbers of columns that a plan keeps


class NumbaKronPlan(NumbaPlan):
    """A Kronecker product, factor by factor, small neighbours merged."""

    def __init__(self, reference: Plan, factors: Sequence[np.ndarray]) -> None:
        self.factors = tuple(factors)
        shapes = [f.shape for f in factors]
        m, n = (math.prod(shape[axis] for shape in shapes) for axis in (0, 1))
        size, work, outputs = n, 0, 0
        for i in cheapest_order(shapes):
            size = size // shapes[i][1] * shapes[i][0]
            work += size * shapes[i][1]
            outputs += size
        weights = sum(f.size for f in factors)
        super().__init__(
            reference, factors[0].dtype, Sizes(m, n, work, weights, outputs, len(shapes), factors[0].itemsize)
        )

    def candidates(self, k: int, rows: bool, rates: Machine) -> list[Kernel]:
        """Programs made for the batch, NumPy's chain, and dense."""
        s = self.sizes
        seconds = kron_seconds(s, rates, k)
        return [
            self._dense_kernel(k, rows, rates),
            Kernel("numpy", numpy_kron_seconds(s, rates, k), lambda: None),
            Kernel("program", seconds, lambda: self._rows(k, seconds / k) if rows else self._columns(seconds / k)),
        ]

    def _rows(self, k: int, seconds: float) -> Apply | None:
        return self._kept((True, k), lambda: self._programmed(best_rows(self.factors, k), seconds))

    def _columns(self, seconds: float) -> Apply:
        """A kernel that makes a program for every number of columns it meets: some are for exactly one."""
        n = self.sizes.n

        made_for: dict[int, Apply] = {}

        def made(k: int) -> Apply:
            program = best_columns(self.factors, k)
            if program.columns:
                return self._programmed(program, seconds)
            return self._programmed(program, seconds, self.sizes.m * k, n * k)

        def apply(x: np.ndarray, out: np.ndarray, add: int) -> None:
            k = x.size // n
            kernel = made_for.get(k)
            if kernel is None:
                if len(made_for) >= KEPT:
                    made_for.clear()
                kernel = made_for.setdefault(k, made(k))
            kernel(x, out, add)

        return apply

    def _transposed(self) -> Plan:
        return KronPlan([f.T for f in self.factors])
