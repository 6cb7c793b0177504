"""What a product costs on a GPU: the larger of its arithmetic and its traffic, plus the launches.

The rates of :data:`H200` that are marked were measured on such a card; the others are assumed. No time that follows from
them has been compared with a GPU: they rank kernels, they do not promise seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from structmat.patterns import Pattern

FLOPS = {"bfloat16": 790e12, "float16": 790e12, "tf32": 395e12, "float32": 50e12, "float64": 50e12}


class Rates(NamedTuple):
    """A device, as the cost model sees it."""

    name: str
    copy: float  # bytes read and written per second
    flops: dict[str, float]  # multiplications and additions per second, by dtype or "tf32"
    cache: float  # bytes per second from the second-level cache
    cache_bytes: int
    shared_bytes: int  # of one block
    processors: int
    call: float  # seconds of one library call made from Python
    capability: tuple[int, int] = (9, 0)

    def flops_for(self, dtype: str, precision: str = "exact") -> float:
        """Arithmetic rate for real operations of a dtype (complex ones count four-fold in the model)."""
        real = {"complex64": "float32", "complex128": "float64"}.get(dtype, dtype)
        return self.flops["tf32" if real == "float32" and precision == "tf32" else real]


H200 = Rates(
    name="NVIDIA H200",
    copy=4.3e12,  # measured
    flops=FLOPS,  # 16 bit: measured; the others from the data sheet
    cache=5.5e12,  # assumed
    cache_bytes=60 << 20,
    shared_bytes=227 << 10,
    processors=132,
    call=6e-6,  # assumed: several times a launch (2.5e-6), for the interpreter
)


class Work(NamedTuple):
    """What one application costs: counted, not timed."""

    operations: float  # real multiplications and additions
    traffic: float  # bytes read from and written to memory
    cached: float = 0.0  # bytes through the second-level cache, where they are more than those
    calls: int = 1


def seconds(work: Work, rates: Rates, dtype: str, precision: str = "exact") -> float:
    """Predicted time: arithmetic, memory, cache and launches overlap, so that the slowest of them counts.

    Examples
    --------
    >>> dense = Work(2 * 65536 * 4096**2, 2 * (2 * 65536 * 4096 + 4096**2))
    >>> f"{seconds(dense, H200, 'bfloat16') * 1e3:.2f} ms"
    '2.79 ms'
    """
    arithmetic = work.operations / rates.flops_for(dtype, precision)
    memory = max(work.traffic / rates.copy, work.cached / rates.cache)
    return max(arithmetic, memory, (work.calls - 1) * rates.call) + rates.call


def dense_work(m: int, n: int, k: int, itemsize: int, complex_too: bool = False) -> Work:
    """One product with the dense matrix."""
    return Work(2.0 * (4 if complex_too else 1) * m * n * k, float(itemsize * (k * (m + n) + m * n)))


def chain_work(
    patterns: Sequence[Pattern], k: int, itemsize: int, copies: int = 0, calls: int = 0, complex_too: bool = False
) -> Work:
    """One batched product per factor, each reading its operand from and writing its result to memory."""
    products = sum(p.nparams for p in patterns)
    moved = k * sum(p.rows + p.cols for p in patterns) + products
    moved += 2 * copies * k * max(patterns[0].rows, patterns[-1].cols)
    operations = 2.0 * (4 if complex_too else 1) * products * k
    return Work(operations, float(itemsize * moved), 0.0, calls or len(patterns) + copies)


def chunked_work(patterns: Sequence[Pattern], k: int, itemsize: int, width: int, complex_too: bool = False) -> Work:
    """The same over chunks of ``width`` samples whose intermediates stay in the second-level cache."""
    whole = chain_work(patterns, k, itemsize, complex_too=complex_too)
    inside = 2.0 * itemsize * k * sum(p.rows for p in patterns[1:])
    chunks = math.ceil(k / width)
    return Work(whole.operations, whole.traffic - inside, whole.traffic, chunks * len(patterns))


def fused_work(
    m: int, n: int, k: int, itemsize: int, products: int, weights: int, tile: float, tiles: int, rates: Rates
) -> Work:
    """One kernel for the whole operator: activations pass once through memory, and once for each tile through the cache.

    ``tile`` is what one block of threads reads and writes, in bytes; each processor has its share of the cache's rate, so
    that the busiest one counts.
    """
    busiest = math.ceil(tiles / rates.processors)
    through = tile * busiest * rates.processors
    return Work(2.0 * products * k, float(itemsize * (k * (m + n) + weights)), through, 1)


def best_grouping(
    count: int, cost: Callable[[int, int], float | None], most: int | None = None
) -> tuple[tuple[int, int], ...]:
    """Consecutive groups ``[start, stop)`` of ``count`` factors with the least total cost.

    ``cost(start, stop)`` is that of a group taken as one factor, ``None`` where it cannot be.

    Examples
    --------
    >>> best_grouping(6, lambda start, stop: 10 + 2.0 ** (stop - start))
    ((0, 3), (3, 6))
    """
    best: list[tuple[float, tuple[tuple[int, int], ...]]] = [(0.0, ())]
    for stop in range(1, count + 1):
        options: list[tuple[float, tuple[tuple[int, int], ...]]] = []
        for start in range(max(0, stop - (most or count)), stop):
            extra = cost(start, stop)
            if extra is not None:
                before, groups = best[start]
                options.append((before + extra, (*groups, (start, stop))))
        best.append(min(options, key=lambda option: option[0]))
    return best[count][1]


def factor_seconds(
    outputs: int, inputs: int, products: int, weights: int, rates: Rates, dtype: str, itemsize: int
) -> float:
    """Seconds per sample of a factor on a large batch; a little arithmetic breaks ties between factors bound by memory."""
    factor = 4 if dtype.startswith("complex") else 1
    arithmetic = 2.0 * factor * products / rates.flops_for(dtype)
    memory = itemsize * (outputs + inputs + weights / 4096) / rates.copy
    return max(arithmetic, memory) + 0.1 * arithmetic
