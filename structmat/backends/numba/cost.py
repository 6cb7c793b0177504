"""The cost model: predicted seconds of each kernel, from operation counts and the machine's rates.

Arithmetic overlaps with loading weights, so the larger of the two counts; moving operands and results, and the steps of a
program, come on top. Efficiencies are fractions of the peak that the kernels reach on products of common sizes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from structmat.backends.numba.machine import Machine
from structmat.backends.numba.simd import VECTOR_BYTES

SMALL = 1e6  # multiply-adds of a product that BLAS does without a copy
FEW = 32  # samples below which BLAS is bound by its copies
CHUNK_BYTES = 1 << 19  # of activations, in the NumPy chain's rows


class Sizes(NamedTuple):
    """What the model needs to know of an operator."""

    m: int
    n: int
    products: int  # multiply-adds per sample
    weights: int  # stored numbers
    outputs: int  # results of all its factors, per sample
    blocks: int  # small products per tile
    itemsize: int

    @property
    def lanes(self) -> int:
        """Elements of a vector."""
        return VECTOR_BYTES // self.itemsize


def tile_seconds(s: Sizes, rates: Machine, k: int, width: int, rows: bool) -> float:
    """A program on tiles of ``width`` samples; a tile of one vector is bound by loading its broadcast operand."""
    tiles = math.ceil(k / width)
    padded = math.ceil(k / s.lanes) * s.lanes
    depth = s.products / s.outputs
    narrow = 0.7 if k <= s.lanes else 0.5
    efficiency = (narrow if width == s.lanes else 0.85) * depth / (depth + 3)
    arithmetic = 2 * s.products * padded / (efficiency * rates.peak(s.itemsize))
    weights = s.weights * s.itemsize
    loading = tiles * weights / rates.bandwidth(weights)
    traffic = k * (s.m + s.n) * s.itemsize
    moving = traffic / rates.bandwidth(traffic) + (traffic / rates.near if rows else 0.0)
    inside = width * (s.outputs + s.n) * s.itemsize
    again = 2 if inside > rates.shared_cache else 1  # written and read at the speed of memory
    spilling = again * tiles * inside / rates.bandwidth(inside) if inside > rates.cache else 0.0
    return rates.start + max(arithmetic, loading) + moving + spilling + tiles * s.blocks * rates.instruction


def vector_seconds(s: Sizes, rates: Machine, k: int) -> float:
    """One sample after the other, each reading all weights."""
    size = s.weights * s.itemsize
    arithmetic = 2 * s.products / (0.5 * rates.peak(s.itemsize))
    reading = size / rates.bandwidth(size)
    return rates.start + k * (max(arithmetic, reading) + 1.5 * s.blocks * rates.instruction)


def numpy_seconds(s: Sizes, rates: Machine, k: int, rows: bool) -> float:
    """BLAS on every block, between copies of the intermediates."""
    traffic = 2 * k * (s.outputs + s.n) * s.itemsize
    moving = traffic / rates.bandwidth(traffic) * (1.5 if rows and k > 1 else 1.0)
    chunks = max(1, math.ceil(traffic / 2 / CHUNK_BYTES)) if rows else 1
    blas = _blas_seconds(s.products, s.blocks, k, s.itemsize, rates) * (1.2 if rows and k > 1 else 1.0)
    return rates.call + chunks * s.blocks * rates.product + blas + moving


def dense_seconds(s: Sizes, rates: Machine, k: int) -> float:
    """One BLAS product with the dense matrix."""
    return rates.dense + _blas_seconds(s.m * s.n, 1, k, s.itemsize, rates)


def kron_seconds(s: Sizes, rates: Machine, k: int) -> float:
    """A program of a Kronecker product."""
    depth = s.products / s.outputs
    arithmetic = 2 * s.products * k / (0.75 * depth / (depth + 4) * rates.peak(s.itemsize))
    traffic = k * (s.m + s.n) * s.itemsize
    return rates.start + arithmetic + traffic / rates.bandwidth(traffic)


def numpy_kron_seconds(s: Sizes, rates: Machine, k: int) -> float:
    """One batched product per factor, each with a result of its own."""
    depth = s.products / s.outputs
    arithmetic = 2 * s.products * k / (0.6 * depth / (depth + 12) * rates.peak(s.itemsize))
    traffic = 2 * k * s.outputs * s.itemsize
    return rates.call * s.blocks / 2 + arithmetic + traffic / rates.bandwidth(traffic)


def network_seconds(s: Sizes, rates: Machine, k: int) -> float:
    """Levels of 2 x 2 products in registers, bound by passes over the data and over the weights."""
    passes = math.ceil(math.log2(max(s.n, 2)) / 4)
    size = s.n * s.itemsize * (1 if k == 1 else min(k, 16))
    moving = 2 * passes * k * s.n * s.itemsize / rates.bandwidth(size)
    return rates.start + 2 * s.products * k / (0.3 * rates.peak(s.itemsize)) + moving


def _blas_seconds(products: int, blocks: int, k: int, itemsize: int, rates: Machine) -> float:
    """BLAS on ``blocks`` matrices that are used for ``k`` samples.

    It multiplies small ones in place; of others it first makes a copy, which few samples do not pay for.
    """
    size = products * itemsize
    reading = size / rates.bandwidth(size)
    if k == 1:
        return 1.2 * reading  # row by row, not one stream
    small = products * k <= SMALL * blocks
    efficiency = 0.6 if small else 0.85 * min(1.0, k / FEW)
    arithmetic = 2 * products * k / (efficiency * rates.peak(itemsize))
    return max(arithmetic, reading * (2.2 if k < FEW and not small else 1.0))
