"""The plans of butterflies of radix 2 and of Hadamard's matrix."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from structmat.backends.base import Plan
from structmat.backends.numba.cost import Sizes, network_seconds, numpy_seconds
from structmat.backends.numba.machine import Machine
from structmat.backends.numba.plan import Apply, Kernel, NumbaPlan
from structmat.backends.numba.threads import split

GRAIN = 32  # samples that share a weight while it is in cache, and whole vectors of columns


class Transform(Protocol):
    """A square operator with kernels of its own, over any part of the batch."""

    def columns(self, x: np.ndarray, out: np.ndarray, start: int = 0, stop: int | None = None) -> None:
        """Write ``A x`` for the columns ``start .. stop``."""
        ...

    def rows(self, x: np.ndarray, out: np.ndarray, start: int = 0, stop: int | None = None) -> None:
        """Write ``x A^T`` for the rows ``start .. stop``."""
        ...


class NetworkPlan(NumbaPlan):
    """A transform of size ``n = 2^J`` in ``J`` levels of 2 x 2 products."""

    def __init__(self, reference: Plan, transform: Transform, n: int, weights: int, dtype: np.dtype) -> None:
        self.transform = transform
        levels = n.bit_length() - 1
        super().__init__(
            reference, dtype, Sizes(n, n, 2 * n * levels, weights, n * levels, n * levels // 2, dtype.itemsize)
        )

    def candidates(self, k: int, rows: bool, rates: Machine) -> list[Kernel]:
        """The transform's kernels, NumPy's chain, and dense."""
        s = self.sizes
        seconds = network_seconds(s, rates, k)
        return [
            self._dense_kernel(k, rows, rates),
            Kernel("numpy", numpy_seconds(s, rates, k, rows), lambda: None),
            Kernel("levels", seconds, lambda: self._kept(("levels", rows), lambda: self._levels(rows, rates))),
        ]

    def _levels(self, rows: bool, rates: Machine) -> Apply:
        n = self.sizes.n
        seconds = (network_seconds(self.sizes, rates, GRAIN) - rates.start) / GRAIN  # for any batch
        function, one = self.transform.rows if rows else self.transform.columns, self.transform.rows

        def apply(x: np.ndarray, out: np.ndarray, add: int) -> None:
            if x.size == n and not add:
                one(x[None], out[None], 0, 1)
                return
            shape = (-1, n) if rows else (n, -1)
            x, target = x.reshape(shape), out.reshape(shape)
            result = np.empty_like(target) if add else target
            split(lambda start, stop: function(x, result, start, stop), x.size // n, GRAIN, seconds * (x.size // n))
            if add:
                target += result

        return apply
