"""The plan of a chain: tiles of several widths, one vector after the other, BLAS block by block, or dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from structmat.backends.base import ChainLayout, Plan
from structmat.backends.numba.chain import column_program, row_program
from structmat.backends.numba.cost import Sizes, numpy_seconds, tile_seconds, vector_seconds
from structmat.backends.numba.machine import Machine
from structmat.backends.numba.merge import merged_chain
from structmat.backends.numba.plan import Apply, Kernel, NumbaPlan
from structmat.backends.numba.vector import vector_program
from structmat.backends.numpy import NumpyBackend

WIDTHS = {True: (1, 2, 4), False: (1, 2, 4, 8)}  # vectors of a tile, in rows and in columns


class NumbaChainPlan(NumbaPlan):
    """A chain of Kronecker-sparse factors, small neighbours merged."""

    def __init__(self, reference: Plan, layout: ChainLayout, blocks: Sequence[np.ndarray]) -> None:
        self.layout, self.blocks = layout, blocks = merged_chain(layout, blocks)
        patterns = layout.patterns
        work = sum(p.nparams for p in patterns)
        outputs, small = sum(p.rows for p in patterns), sum(p.a * p.d for p in patterns)
        super().__init__(
            reference,
            blocks[0].dtype,
            Sizes(layout.rows, layout.cols, work, work, outputs, small, blocks[0].itemsize),
        )

    def candidates(self, k: int, rows: bool, rates: Machine) -> list[Kernel]:
        """All kernels for a batch and a layout, with predicted seconds."""
        s = self.sizes
        kernels = [
            self._dense_kernel(k, rows, rates),
            Kernel("numpy", numpy_seconds(s, rates, k, rows), lambda: None),
        ]
        if rows or k == 1:
            kernels.append(
                Kernel("vector", vector_seconds(s, rates, k), lambda: self._kept("vector", lambda: self._vector(rates)))
            )
        for vectors in WIDTHS[rows]:
            width = vectors * s.lanes
            if vectors == 1 or width < 2 * k:
                seconds = tile_seconds(s, rates, k, width, rows)
                kernels.append(Kernel(f"tile {width}", seconds, self._tile(rows, width, rates)))
        return kernels

    def _tile(self, rows: bool, width: int, rates: Machine) -> Callable[[], Apply | None]:
        def make() -> Apply | None:
            program = (row_program if rows else column_program)(self.layout, self.blocks, width)
            seconds = (tile_seconds(self.sizes, rates, width, width, rows) - rates.start) / width  # for any batch
            return None if program is None else self._programmed(program, seconds)

        return lambda: self._kept((rows, width), make)

    def _vector(self, rates: Machine) -> Apply | None:
        """One sample after the other; a padded chain works on padded copies."""
        layout, s = self.layout, self.sizes
        whole = layout._replace(rows=layout.patterns[0].rows, cols=layout.patterns[-1].cols)
        program = vector_program(whole, self.blocks)
        if program is None:
            return None
        seconds = vector_seconds(s, rates, 1) - rates.start
        inside = self._programmed(program, seconds, whole.rows, whole.cols)
        if whole == layout:
            return inside

        def apply(x: np.ndarray, out: np.ndarray, add: int) -> None:
            padded = np.zeros((x.size // s.n, whole.cols), self.dtype)
            padded[:, : s.n] = x.reshape(-1, s.n)
            result = np.empty((len(padded), whole.rows), self.dtype)
            inside(padded.reshape(-1), result.reshape(-1), 0)
            target = out.reshape(-1, s.m)
            target[...] = target + result[:, : s.m] if add else result[:, : s.m]

        return apply

    def _transposed(self) -> Plan:
        return NumpyBackend().chain(self.layout.T, [block.swapaxes(-1, -2) for block in reversed(self.blocks)])
