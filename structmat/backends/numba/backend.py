"""The Numba backend: which operators have kernels of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from structmat.backends.base import ChainLayout, Plan
from structmat.backends.numba import butterfly, hadamard
from structmat.backends.numba.chain_plan import NumbaChainPlan
from structmat.backends.numba.kron_plan import NumbaKronPlan
from structmat.backends.numba.network_plan import NetworkPlan
from structmat.backends.numpy import NumpyBackend


class NumbaBackend(NumpyBackend):
    """SIMD kernels for float32 and float64; complex values, stacks and empty operators go NumPy's way."""

    name = "numba"

    def chain(self, layout: ChainLayout, blocks: Sequence[np.ndarray]) -> Plan:
        """The plan of a chain."""
        reference = super().chain(layout, blocks)
        if not _has_kernel(blocks, 4) or layout.rows == 0 or layout.cols == 0:
            return reference
        if butterfly.applies(layout, blocks):
            weights = sum(b.size for b in blocks)
            return NetworkPlan(
                reference, butterfly.ButterflyPlan(layout, blocks), layout.rows, weights, blocks[0].dtype
            )
        return NumbaChainPlan(reference, layout, blocks)

    def kron(self, factors: Sequence[np.ndarray]) -> Plan:
        """The plan of a Kronecker product of dense factors."""
        reference = super().kron(factors)
        if not _has_kernel(factors, 2):
            return reference
        scale = hadamard.scale_of(factors)
        if scale is not None:
            n, dtype = 1 << len(factors), factors[0].dtype
            return NetworkPlan(reference, hadamard.HadamardPlan(n, scale[0], dtype), n, 0, dtype)
        return NumbaKronPlan(reference, factors)


def _has_kernel(values: Sequence[np.ndarray], ndim: int) -> bool:
    """Whether arrays are of one kernel dtype, without a batch, not empty, and readable in place."""
    dtype = values[0].dtype
    return (
        dtype.char in "fd"
        and dtype.isnative
        and all(
            v.dtype == dtype
            and v.ndim == ndim
            and v.size > 0
            and v.flags.aligned
            and all(stride % v.itemsize == 0 for stride in v.strides)
            for v in values
        )
    )
