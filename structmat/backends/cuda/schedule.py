"""Chains and Kronecker products as lists of strided-batched products, for any layout of the operand and the result.

An activation is an array ``(*lead, n, k)`` with any strides: columns ``A @ X`` have unit stride along the samples ``k``, rows
``X @ A.T`` along the index ``n``. Intermediates are held with the samples last, ``(*lead, size, k)``: it is the only layout
in which one factor can write, and the next one read, matrices of unit stride. A factor ``(a, b, c, d)`` reads the index as
``(a, c, d)`` and writes it as ``(a, b, d)``; the digits ``a`` and ``d``, the leading axes and the samples are the batch, the
columns and, where ``a`` and ``d`` are both larger than one, a loop.

What needs a copy, and is counted in :attr:`Schedule.copies`: an operand given as rows whose first factor has ``d > 1`` (the
transpose of a Monarch or butterfly matrix), axis orders whose digits interleave with those of a factor, and operands without
a unit stride (the CuPy backend also copies many stacked matrices of rows that do not follow each other). A result in rows
that cannot be written in place is written with the samples last and returned as a transposed view; the logical shape of a
padded chain costs no copy at either end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from structmat.backends.base import ChainLayout
from structmat.backends.cuda.products import Digit, Gemm, Matrix, boxes, contraction
from structmat.backends.numpy import aligned_view
from structmat.patterns import AxisOrder, Pattern

ALIGNMENT = 8  # elements: rows of 16-bit intermediates begin at multiples of 16 bytes, for the tensor cores
Pairs = list[tuple[int, int]]  # (size, stride) of digits, slow to fast


class Strided(NamedTuple):
    """An activation ``(*lead, n, k)`` in memory: strides in elements; 0 repeats along a leading axis."""

    row: int  # along n
    col: int  # along k, the samples
    lead: tuple[int, ...] = ()


class Weights(NamedTuple):
    """The blocks ``(*lead, a, d, b, c)`` of a factor in memory: strides in elements."""

    a: int
    d: int
    b: int
    c: int
    lead: tuple[int, ...] = ()


class Sizes(NamedTuple):
    """Leading axes of the result, logical inputs and outputs, samples, and the operand's own leading axes."""

    lead: tuple[int, ...]
    n: int
    m: int
    k: int
    own: tuple[int, ...] = ()


class Step(NamedTuple):
    """One factor: its calls, from buffer to buffer (0 is the operand, -1 the result, others are intermediates)."""

    factor: int
    source: int
    target: int
    calls: tuple[Gemm, ...]
    clear: bool = False  # the target is set to zero first: not everything in it is written


class Schedule(NamedTuple):
    """All products of one application, in order.

    ``copies`` names what is copied before and after: ``"digits"``, rows ``(k, a, c, d)`` of the first factor as
    ``(k, a, d, c)``; ``"operand"``, to samples last; ``"order"``, padded and in the natural
    order of the first factor, samples last; ``"result"``, from the natural order of the last factor.
    """

    steps: tuple[Step, ...]
    scratch: tuple[int, ...]  # elements of the intermediates 1, 2, ...
    result: Strided
    rows: int  # outputs that the result buffer holds, at least the logical ones
    copies: tuple[str, ...] = ()

    @property
    def calls(self) -> int:
        """Number of library calls."""
        return sum(len(step.calls) for step in self.steps)


def packed(lead: tuple[int, ...], rows: int, k: int, by_rows: bool = False) -> Strided:
    """The strides of a contiguous activation, samples last or (``by_rows``) index last."""
    strides = tuple(accumulate((*lead[1:], rows * k)[::-1], lambda x, y: x * y))[::-1] if lead else ()
    return Strided(1, rows, strides) if by_rows else Strided(k, 1, strides)


def chain_schedule(
    layout: ChainLayout,
    weights: Sequence[Weights],
    sizes: Sizes,
    source: Strided,
    rows: bool = False,
    target: Strided | None = None,
) -> Schedule | None:
    """The products of a chain.

    Parameters
    ----------
    layout
        The chain.
    weights
        Strides of its factors, left to right.
    sizes, source
        The operand ``(*lead, n, k)``.
    rows
        Whether a result with the index last is preferred.
    target
        The result's strides where it is given by the caller; then no result may be copied, and ``None`` is returned where it
        cannot be written in place.
    """
    lead, k = sizes.lead, sizes.k
    count, widths = len(weights), [p.rows for p in layout.patterns]
    step = k if k < ALIGNMENT else -(-k // ALIGNMENT) * ALIGNMENT
    inner = {i: packed(lead, widths[i], step) for i in range(1, count)}
    copied, padded = _copied(sizes, sizes.n), _copied(sizes, layout.patterns[-1].cols)
    whole = packed(lead, widths[0], k)
    if target is not None:
        results = [(target, layout.out_order, False)]
    else:
        natural = [(packed(lead, widths[0], k, True), layout.out_order, False)] if rows else []
        results = [*natural, (whole, layout.out_order, False), (whole, None, True)]
    operands = [
        (source, layout.in_order, sizes.n, ()),
        *_exchanged(layout, sizes, source),
        (copied, layout.in_order, sizes.n, ("operand",)),
        (padded, None, layout.patterns[-1].cols, ("order",)),
    ]
    for place, order, n, copy_in in operands:
        steps: list[Step] = []
        for i in range(count - 1, 0, -1):
            first = i == count - 1
            made = _factor(
                layout.patterns[i],
                weights[i],
                lead,
                k,
                (place if first else inner[i + 1], order if first else None, n if first else None),
                (inner[i], None),
            )
            if made is None:
                break
            steps.append(Step(i, 0 if first else 1 + i % 2, 1 + (i - 1) % 2, *made))
        if len(steps) < count - 1:
            continue
        for result, out_order, copy_out in results:
            entering = (place, order, n) if count == 1 else (inner[1], None, None)
            made = _factor(layout.patterns[0], weights[0], lead, k, entering, (result, out_order))
            if made is not None:
                last = Step(0, 0 if count == 1 else 1, -1, *made)
                copies = copy_in + ("result",) * copy_out
                return Schedule((*steps, last), _scratch(lead, widths[1:], step), result, widths[0], copies)
    return None


def kron_schedule(
    shapes: Sequence[tuple[int, int]],
    order: Sequence[int],
    weights: Sequence[Weights],
    sizes: Sizes,
    source: Strided,
    rows: bool = False,
    target: Strided | None = None,
) -> Schedule | None:
    """The products of a Kronecker product of dense factors, one factor at a time: ``I (x) F_i (x) I``.

    Parameters
    ----------
    shapes
        ``(m_i, n_i)`` of the factors, left to right.
    order
        The factors in the order in which they are applied.
    weights
        Strides of the factors; those of ``a`` and ``d`` are not looked at: the blocks are all the same.
    sizes, source, rows, target
        As for :func:`chain_schedule`.
    """
    lead, k = sizes.lead, sizes.k
    patterns, current = [], [n for _, n in shapes]
    for i in order:
        m, n = shapes[i]
        patterns.append(Pattern(math.prod(current[:i]), m, n, math.prod(current[i + 1 :])))
        current[i] = m
    last = len(order) - 1
    for place, copied in ((source, False), (_copied(sizes, sizes.n), True)):
        for by_rows in (rows, not rows):
            steps: list[Step] = []
            between = place
            for j, (i, pattern) in enumerate(zip(order, patterns, strict=True)):
                result = packed(lead, pattern.rows, k, by_rows) if j < last or target is None else target
                tied = weights[i]._replace(a=0, d=0)
                made = _factor(pattern, tied, lead, k, (between, None, None), (result, None))
                if made is None:
                    break
                steps.append(Step(i, 0 if j == 0 else 1 + (j - 1) % 2, -1 if j == last else 1 + j % 2, *made))
                between = result
            else:
                scratch = _scratch(lead, [p.rows for p in patterns[:-1]], k)
                return Schedule(tuple(steps), scratch, between, sizes.m, ("operand",) * copied)
    return None


def _exchanged(
    layout: ChainLayout, sizes: Sizes, source: Strided
) -> list[tuple[Strided, AxisOrder | None, int, tuple[str, ...]]]:
    """Rows with the digits ``c`` and ``d`` of the first factor exchanged, where that is all that is missing."""
    a, _, c, d = layout.patterns[-1]
    if layout.in_order or sizes.lead or sizes.n != a * c * d or source.row != 1 or 1 in (c, d):
        return []
    return [(Strided(1, sizes.n), AxisOrder((a, d, c), (0, 2, 1)), sizes.n, ("digits",))]


def _copied(sizes: Sizes, n: int) -> Strided:
    """The strides of a contiguous copy of the operand, samples last, repeated along leading axes that it lacks."""
    own = (1,) * (len(sizes.lead) - len(sizes.own)) + sizes.own
    place = packed(own, n, sizes.k)
    return place._replace(lead=tuple(0 if size == 1 else s for size, s in zip(own, place.lead, strict=True)))


def _scratch(lead: tuple[int, ...], widths: Sequence[int], step: int) -> tuple[int, ...]:
    """Elements of the two areas that intermediates of these sizes take in turn."""
    return tuple(math.prod(lead) * max(widths[i::2]) * step for i in (0, 1) if widths[i::2])


def _factor(
    pattern: Pattern,
    weights: Weights,
    lead: tuple[int, ...],
    k: int,
    entering: tuple[Strided, AxisOrder | None, int | None],
    leaving: tuple[Strided, AxisOrder | None],
) -> tuple[tuple[Gemm, ...], bool] | None:
    """The calls of one factor, and whether parts of its result are not written; ``None`` where a copy is needed."""
    a, b, c, d = pattern
    source, in_order, stop = entering
    target, out_order = leaving
    reading = _ends(in_order, (a, c, d))
    writing = _ends(out_order.T if out_order else None, (a, b, d))
    if reading is None or writing is None:
        return None
    outer, inner = _refined(reading[0], writing[0]), _refined(reading[2], writing[2])
    if outer is None or inner is None:
        return None
    digits = [*_spread(outer, weights.a), *_spread(inner, weights.d)]  # (size, reading step, writing step, weight)
    around = [Digit(k, 0, source.col, target.col)]
    for size, w, x, y in zip(lead, _aligned(weights.lead, lead), _aligned(source.lead, lead), target.lead, strict=True):
        around.append(Digit(size, w, x, y))
    steps = [(size, step) for size, step, _, _ in digits]
    stop = a * c * d if stop is None else stop
    found: list[Gemm] = []
    clear = False
    for starts, counts, depth in boxes(stop, c, reading[1], steps):
        if depth == 0:
            clear = True
            continue
        inside = [
            Digit(count, weight, x * source.row, y * target.row)
            for count, (_, x, y, weight) in zip(counts, digits, strict=True)
        ]
        offsets = tuple(
            sum(start * digit[place] for start, digit in zip(starts, inside, strict=True)) for place in (1, 2, 3)
        )
        calls = contraction(
            Matrix(b, depth, weights.b, weights.c),
            reading[1] * source.row,
            writing[1] * target.row,
            [*inside, *around],
            (offsets[0], offsets[1], offsets[2]),
        )
        if calls is None:
            return None
        found += calls
    return tuple(found), clear


def _ends(order: AxisOrder | None, sizes: tuple[int, int, int]) -> tuple[Pairs, int, Pairs] | None:
    """Digits of ``a``, the step of the matrix axis, and digits of ``d``, as positions in the stored order."""
    view = aligned_view(order, sizes)
    if view is None:
        return None
    steps = [math.prod(view.shape[i + 1 :]) for i in range(len(view.shape))]
    outer, stride = ([(view.shape[i], steps[i]) for i in group] for group in (view.outer, view.stride))
    return outer, steps[view.inner], stride


def _refined(left: Pairs, right: Pairs) -> list[tuple[int, int, int]] | None:
    """Two ways to write one index, taken apart until their digits agree; ``None`` where they interleave."""
    left, right = list(left), list(right)
    found: list[tuple[int, int, int]] = []
    while left or right:
        size, step = left.pop() if left else (1, 0)
        other, other_step = right.pop() if right else (1, 0)
        common = min(size, other)
        if common == 1 and max(size, other) > 1:  # a digit of one value on one side only
            (left if size > 1 else right).append((size, step) if size > 1 else (other, other_step))
            continue
        if size % common or other % common:
            return None
        found.append((common, step, other_step))
        if size > common:
            left.append((size // common, step * common))
        if other > common:
            right.append((other // common, other_step * common))
    return found[::-1]


def _spread(digits: list[tuple[int, int, int]], stride: int) -> list[tuple[int, int, int, int]]:
    """The digits of one axis with the weights' stride of each."""
    found: list[tuple[int, int, int, int]] = []
    for size, x, y in reversed(digits):
        found.append((size, x, y, stride))
        stride *= size
    return found[::-1]


def _aligned(strides: tuple[int, ...], lead: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of leading axes that an array may lack: it is repeated along those."""
    return (0,) * (len(lead) - len(strides)) + strides
