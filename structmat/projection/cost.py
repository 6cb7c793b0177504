"""Cost: what applying a structured matrix takes next to the dense one, from counts of flops and bytes alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from structmat.patterns import Pattern
from structmat.structures.kronecker import cheapest_order

BALANCE = 8.0  # flops that a core does while it moves one byte of memory; CPUs of today have 4 to 16


class Stage(NamedTuple):
    """One product on the way through a structured matrix, counts for one column."""

    flops: float
    values: int  # stored numbers that it reads
    width: int  # numbers that it reads and writes of the column


class Cost(NamedTuple):
    """A structured matrix against the dense one: ``flops`` as a ratio (below 1 is less), ``speed`` (above 1 is faster)."""

    flops: float
    speed: float

    @property
    def slower(self) -> bool:
        """Whether it is worse than dense in flops or in predicted time."""
        return self.flops > 1.0 or self.speed < 1.0


def cost(stages: Sequence[Stage], shape: tuple[int, int], batch: int, itemsize: int) -> Cost:
    """Flops and predicted speed for ``batch`` columns, against one dense product.

    The roofline model (Williams, Waterman, Patterson, Commun. ACM 52, 2009): every stage takes the longer of its flops and
    its memory traffic, with 8 flops a byte. Stages of small blocks run below the peak and every call has an overhead: both
    are left out, so that the speed is what can be hoped for, not a promise.
    """
    m, n = shape
    dense = Stage(2.0 * m * n, m * n, m + n)
    work = sum(stage.flops for stage in stages)
    return Cost(work / dense.flops, _seconds([dense], batch, itemsize) / _seconds(stages, batch, itemsize))


def _seconds(stages: Iterable[Stage], batch: int, itemsize: int) -> float:
    """Time in units of one flop."""
    return sum(max(s.flops * batch, BALANCE * itemsize * (s.values + s.width * batch)) for s in stages)


def chain_stages(patterns: Iterable[Pattern]) -> list[Stage]:
    """One stage for each factor."""
    return [Stage(2.0 * p.nparams, p.nparams, p.rows + p.cols) for p in patterns]


def low_rank_stages(shape: tuple[int, int], rank: int, gauge: int = 0) -> list[Stage]:
    """Two products; in interpolative form (``gauge`` 1) the one of the selected side is ``rank`` shorter."""
    short, long = sorted(shape)
    first, second = rank * long, rank * (short - gauge * rank)
    return [Stage(2.0 * first, first, long + rank), Stage(2.0 * second, second, short + rank)]


def kronecker_stages(shapes: Sequence[tuple[int, int]], terms: int = 1) -> list[Stage]:
    """One stage for each factor of each term."""
    rows, cols = [s[0] for s in shapes], [s[1] for s in shapes]
    stages, sizes = [], list(cols)
    for i in cheapest_order(shapes):
        before = _product(sizes)
        others = before // sizes[i]
        sizes[i] = rows[i]
        stages.append(Stage(2.0 * others * rows[i] * cols[i], rows[i] * cols[i], before + _product(sizes)))
    return stages * terms


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
