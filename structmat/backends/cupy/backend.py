"""The CuPy backend: which operators are applied by what on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from structmat import arrays
from structmat.arrays import Array
from structmat.backends import base, merge
from structmat.backends.base import ChainLayout, Plan
from structmat.backends.cuda import roofline
from structmat.backends.cuda.roofline import Rates
from structmat.backends.cupy import device, memory
from structmat.backends.cupy.fused import CAPABILITY, FusedChain, FusedHadamard, FusedKernel, FusedKron
from structmat.backends.cupy.plan import CupyPlan
from structmat.backends.cupy.products import ChainProducts, KronProducts

KERNELS = ("products", "dense", "fused")
LARGEST = 256  # size of a block beyond which merging factors is not considered


class CupyBackend(base.Backend):
    """CuPy arrays: strided-batched cuBLAS products without copies of activations, fused kernels, or the dense matrix.

    Work is launched on CuPy's current stream; memory comes from CuPy's pool. Nothing is synchronised but where a plan makes
    arrays that it keeps (merged or cast factors, the dense matrix, Hadamard factors read): once for an operator and dtype, on
    the first application, since later ones may be on other streams. Under torch, share its stream (``docs/gpu.md``). The
    precision of float32 products is chosen with :class:`structmat.backends.use_precision`.

    What is captured into a CUDA graph is launched once before, so that kernels are compiled and plans made, and
    ``structmat.backends.cupy.capture.prepare()`` makes a cuBLAS handle for captures. A plan keeps operands, intermediates and
    results of everything that was captured: that list grows with every capture, and goes with the operator. Graphs captured
    on one stream share a workspace of cuBLAS and are launched one after another.

    Parameters
    ----------
    rates
        The device for the cost model; default: that of the current device (:func:`structmat.backends.cupy.device.rates`).
    kernels
        What may be chosen: ``"products"`` is always there, ``"dense"`` and ``"fused"`` can be left out.

    Raises
    ------
    ValueError
        For other names of kernels.

    Examples
    --------
    >>> CupyBackend(kernels=("products",)).name
    'cupy'
    """

    name = "cupy"

    def __init__(self, rates: Rates | None = None, kernels: Sequence[str] = KERNELS) -> None:
        if not set(kernels) <= set(KERNELS):
            raise ValueError(f"CupyBackend: expected kernels of {', '.join(KERNELS)}; got {', '.join(kernels)}")
        self._rates, self.kernels = rates, frozenset(kernels) | {"products"}

    def chain(self, layout: ChainLayout, blocks: Sequence[Array]) -> Plan:
        """The plan of a chain, its small neighbouring factors merged where that saves passes."""
        with memory.device_of(blocks[0]):
            return self._chain(layout, blocks)

    def _chain(self, layout: ChainLayout, blocks: Sequence[Array]) -> Plan:
        rates = self._rates or device.rates(blocks[0].device.id)
        layout, blocks = merged_chain(layout, blocks, rates)
        swapped = [block.swapaxes(-1, -2) for block in reversed(blocks)]
        products = ChainProducts(layout, blocks, rates)
        fused = FusedChain.of(layout, blocks, rates) if self._fuses(rates) else None
        return CupyPlan(products, lambda: ChainProducts(layout.T, swapped, rates), fused, self.kernels)

    def kron(self, factors: Sequence[Array]) -> Plan:
        """The plan of a Kronecker product of dense factors, small neighbours merged."""
        with memory.device_of(factors[0]):
            return self._kron(factors)

    def _fuses(self, rates: Rates) -> bool:
        return "fused" in self.kernels and rates.capability >= CAPABILITY

    def _kron(self, factors: Sequence[Array]) -> Plan:
        rates = self._rates or device.rates(factors[0].device.id)
        fused: FusedKernel | None = None
        if self._fuses(rates):
            fused = FusedHadamard.of(factors, rates)
        factors = merged_factors(factors, rates)
        if self._fuses(rates) and fused is None:
            fused = FusedKron.of(factors, rates)
        swapped = [factor.swapaxes(-1, -2) for factor in factors]
        return CupyPlan(KronProducts(factors, rates), lambda: KronProducts(swapped, rates), fused, self.kernels)


def merged_chain(layout: ChainLayout, blocks: Sequence[Array], rates: Rates) -> tuple[ChainLayout, tuple[Array, ...]]:
    """The same chain with neighbours multiplied out where fewer passes over the activations pay for the arithmetic.

    Twelve butterfly levels of 2 x 2 blocks become two factors of 64 x 64 blocks. Only pairs of rank one are merged: others
    would add sums.
    """
    patterns = layout.patterns
    dtype = arrays.promote(*(b.dtype for b in blocks))

    def cost(start: int, stop: int) -> float | None:
        whole = patterns[start]
        for left, right in itertools.pairwise(patterns[start:stop]):
            if not merge.is_rank_one(left, right):
                return None
        for pattern in patterns[start + 1 : stop]:
            whole = whole.product(pattern)
        if stop - start > 1 and (stop - start == len(patterns) or max(whole.b, whole.c) > LARGEST):
            return None  # the whole of it is the dense matrix, which the plan knows by itself
        work, weights = whole.nparams, whole.nparams
        return roofline.factor_seconds(whole.rows, whole.cols, work, weights, rates, dtype.name, dtype.itemsize)

    values, merged = [], []
    for start, stop in roofline.best_grouping(len(patterns), cost):
        value, pattern = blocks[start], patterns[start]
        if stop - start > 1:
            value = _wide(value)
        for i in range(start + 1, stop):
            value, pattern = merge.product(value, _wide(blocks[i])), pattern.product(patterns[i])
        values.append(arrays.cast(value, dtype) if stop - start > 1 else value)
        merged.append(pattern)
    return layout._replace(patterns=tuple(merged)), memory.ready(values, blocks)


def merged_factors(factors: Sequence[Array], rates: Rates) -> tuple[Array, ...]:
    """The same Kronecker product with small neighbours multiplied out: twelve 2 x 2 factors become two of 64 x 64."""
    dtype = arrays.promote(*(f.dtype for f in factors))
    shapes = [(int(f.shape[-2]), int(f.shape[-1])) for f in factors]
    outside = [1]  # inputs of the other factors, about what a pass is as wide as
    for _, n in shapes:
        outside.append(outside[-1] * max(n, 1))

    def cost(start: int, stop: int) -> float | None:
        m = n = 1
        for rows, cols in shapes[start:stop]:
            m, n = m * rows, n * cols
        if stop - start > 1 and (stop - start == len(shapes) or max(m, n) > LARGEST or 0 in (m, n)):
            return None
        if 0 in (m, n):
            return 0.0
        others = outside[-1] // n
        return roofline.factor_seconds(m * others, n * others, m * n * others, m * n, rates, dtype.name, dtype.itemsize)

    found = []
    for start, stop in roofline.best_grouping(len(factors), cost):
        value = _wide(factors[start]) if stop - start > 1 else factors[start]
        for other in map(_wide, factors[start + 1 : stop]):
            (m1, n1), (m2, n2) = value.shape[-2:], other.shape[-2:]
            value = value[..., :, None, :, None] * other[..., None, :, None, :]
            value = value.reshape(*value.shape[:-4], m1 * m2, n1 * n2)
        found.append(arrays.cast(value, dtype) if stop - start > 1 else value)
    return memory.ready(found, factors)


def _wide(values: Array) -> Array:
    """Values in the precision in which they are multiplied out: 16-bit ones in float32, to be rounded once."""
    return arrays.cast(values, np.dtype(np.float32)) if values.dtype.itemsize == 2 else values
