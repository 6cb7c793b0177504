"""A chain without its values, as torch code walks through it: integers, and where an axis order becomes a stride."""

from __future__ import annotations

import functools
from typing import NamedTuple

from structmat.backends.base import ChainLayout
from structmat.patterns import AxisOrder, Pattern


class End(NamedTuple):
    """How a flat axis of features is seen by a factor: as ``(outer, inner, lane)``, its blocks being ``(outer, lane)``."""

    outer: int
    inner: int
    lane: int
    order: AxisOrder | None = None  # what is still to be transposed outside of this

    @property
    def size(self) -> int:
        """Length of the flat axis."""
        return self.outer * self.inner * self.lane

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.outer * self.lane


class Layout(NamedTuple):
    """A chain without its values, ready to be walked: factors left to right, the last applied first."""

    patterns: tuple[Pattern, ...]
    rows: int  # logical sizes
    cols: int
    ins: tuple[End, ...]  # of every factor
    outs: tuple[End, ...]
    code: tuple[int, ...]  # the same chain as the custom operator takes it

    @property
    def plain(self) -> bool:
        """Whether every factor is one block, as large as the operator: a product of dense matrices."""
        first, last = self.outs[0], self.ins[-1]
        whole = (first.size, last.size) == (self.rows, self.cols) and not (first.order or last.order)
        return whole and all(p.a * p.d == 1 for p in self.patterns)

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes ``(blocks, b, c)`` of the factors."""
        return tuple((p.a * p.d, p.b, p.c) for p in self.patterns)


def layout_of(chain: ChainLayout) -> Layout:
    """The layout of a chain; an axis order that exchanges two digits of a factor's own becomes a stride."""
    patterns, rows, cols, out_order, in_order = chain
    ins, outs = [End(p.a, p.c, p.d) for p in patterns], [End(p.a, p.b, p.d) for p in patterns]
    ins[-1] = _absorbed(ins[-1], in_order.T if in_order else None)
    outs[0] = _absorbed(outs[0], out_order)
    return Layout(tuple(patterns), rows, cols, tuple(ins), tuple(outs), encoded(chain))


def _absorbed(end: End, order: AxisOrder | None) -> End:
    """The end as it is seen on the other side of ``order``, from the inside to the outside."""
    if order is None:
        return end
    digits = [i for i in order.axes if order.radices[i] > 1]
    radices = tuple(r for r in order.radices if r > 1)
    if len(digits) == 2 and digits[0] > digits[1]:
        if end.outer == 1 and radices == (end.inner, end.lane):
            return End(end.lane, end.inner, 1)
        if end.lane == 1 and radices == (end.outer, end.inner):
            return End(1, end.inner, end.outer)
    return end._replace(order=order)


def encoded(chain: ChainLayout) -> tuple[int, ...]:
    """The chain as integers: sizes, count and patterns, then length, radices and axes of each order (0: none)."""
    code = [chain.rows, chain.cols, len(chain.patterns), *(n for p in chain.patterns for n in p)]
    for order in (chain.out_order, chain.in_order):
        code += [0] if order is None else [len(order.radices), *order.radices, *order.axes]
    return tuple(code)


@functools.lru_cache(maxsize=1024)
def chain_of(code: tuple[int, ...]) -> ChainLayout:
    """The chain of :func:`encoded` integers; ``ValueError`` where they are none."""
    numbers = iter(code)
    try:
        rows, cols, count = (next(numbers) for _ in range(3))
        patterns = tuple(Pattern(*(next(numbers) for _ in range(4))) for _ in range(count))
        orders = []
        for _ in range(2):
            digits = next(numbers)
            radices, axes = (tuple(next(numbers) for _ in range(digits)) for _ in range(2))
            orders.append(AxisOrder(radices, axes) if digits else None)
    except (RuntimeError, StopIteration, TypeError) as error:
        raise ValueError(f"layout: expected the integers of a chain, got {list(code)}") from error
    if next(numbers, None) is not None or not patterns:
        raise ValueError(f"layout: expected the integers of a chain, got {list(code)}")
    return ChainLayout(patterns, rows, cols, *orders)


@functools.lru_cache(maxsize=1024)
def decoded(code: tuple[int, ...]) -> Layout:
    """The layout of :func:`encoded` integers; ``ValueError`` where they are none."""
    return layout_of(chain_of(code))


def stacked(chain: ChainLayout, count: int) -> ChainLayout:
    """The block-diagonal chain of ``count`` chains of one layout: their number is the slowest digit of every index.

    The chain must not be padded.
    """
    patterns = tuple(p._replace(a=count * p.a) for p in chain.patterns)
    orders = (
        order and AxisOrder((count, *order.radices), (0, *(1 + i for i in order.axes)))
        for order in (chain.out_order, chain.in_order)
    )
    return ChainLayout(patterns, count * chain.rows, count * chain.cols, *orders)


@functools.lru_cache(maxsize=1024)
def fitted(code: tuple[int, ...], shapes: tuple[tuple[int, int, int], ...]) -> Layout:
    """The layout of :func:`encoded` integers for factors of these shapes: whole, or one process's share of two factors.

    A share has some of the left factor's blocks, which make some of the outputs (``column``), or some of the right factor's
    blocks, which take some of the inputs (``row``). ``ValueError`` for factors that are neither.
    """
    layout = decoded(code)
    if shapes == layout.shapes:
        return layout
    if len(shapes) == len(layout.patterns) == 2 and all(len(s) == 3 for s in shapes):
        (_, b, c, d), (a, e, f, _) = layout.patterns
        outputs, inputs = shapes[0][0], shapes[1][0]
        depth, middle = c * inputs // max(a, 1), e * outputs // max(d, 1)
        allowed = (outputs == d or splits_outputs(layout)) and (inputs == a or splits_inputs(layout))
        if shapes == ((outputs, b, depth), (inputs, middle, f)) and allowed:
            patterns = (Pattern(1, b, depth, outputs), Pattern(inputs, middle, f, 1))
            ins = (End(1, depth, outputs), layout.ins[1] if inputs == a else End(inputs, f, 1))
            outs = (layout.outs[0] if outputs == d else End(outputs, b, 1), End(inputs, middle, 1))
            rows = layout.rows if outputs == d else outputs * b
            return Layout(patterns, rows, layout.cols if inputs == a else inputs * f, ins, outs, code)
    raise ValueError(f"chain: expected factors of shapes {layout.shapes}, got {shapes}")


def splits_outputs(layout: Layout) -> bool:
    """Whether the blocks of the left of two factors make neighbouring outputs each, from as many rows of the right one."""
    (a1, b, _, d), (_, e, _, d2) = layout.patterns
    return (a1, d2) == (1, 1) and e == d and layout.outs[0] == End(d, b, 1) and layout.rows == b * d


def splits_inputs(layout: Layout) -> bool:
    """Whether the blocks of the right of two factors take neighbouring inputs each, for neighbouring columns of the left."""
    (a1, _, c, _), (a, _, f, d2) = layout.patterns
    return (a1, d2) == (1, 1) and c % max(a, 1) == 0 and layout.ins[1] == End(a, f, 1) and layout.cols == a * f
