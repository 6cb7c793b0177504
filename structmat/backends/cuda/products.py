"""Strided matrices as arguments of ``gemmStridedBatchedEx``: which products need no copy, and how they are called.

cuBLAS is column-major: a matrix is passed as it is ("N") where the stride down its columns is one, and transposed ("T")
where the stride along its rows is one; the other stride is the leading dimension. A row-major result is obtained as
``C^T = B^T A^T``. A matrix with neither stride equal to one needs a copy. The stride of an axis of length one says
nothing (it is 0 after a broadcast) and is never used. Source: cuBLAS documentation, ``cublasGemmStridedBatchedEx``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import NamedTuple

LIMIT = (1 << 31) - 1  # sizes, leading dimensions and the count of a batch are 32-bit integers
BATCH = 65_535  # products of one call: the limit of a grid's third dimension


class Matrix(NamedTuple):
    """A strided matrix: element ``(i, j)`` lies ``i*row + j*col`` elements after the first."""

    rows: int
    cols: int
    row: int
    col: int


class Digit(NamedTuple):
    """An index that runs over products: its size and its strides in weights, operand and result."""

    size: int
    weight: int
    source: int
    target: int


class Gemm(NamedTuple):
    """One call: ``batch`` products in column-major terms, strides and offsets in elements.

    The first matrix of the call is the left one, or the right one where ``swap`` says so; ``left`` and ``right`` flags are
    0 ("N") and 1 ("T").
    """

    swap: bool
    first_flag: int
    second_flag: int
    m: int
    n: int
    k: int
    first_ld: int
    first_stride: int
    second_ld: int
    second_stride: int
    out_ld: int
    out_stride: int
    batch: int
    left_offset: int = 0
    right_offset: int = 0
    out_offset: int = 0


def orientation(matrix: Matrix) -> tuple[int, int] | None:
    """``(flag, leading dimension)`` of a matrix in column-major terms; ``None`` where a copy is needed."""
    rows, cols, row, col = matrix
    for flag, length, count, unit, ld in ((0, rows, cols, row, col), (1, cols, rows, col, row)):
        if unit == 1 or length == 1:
            ld = ld if count > 1 else max(1, length)
            if length <= ld <= LIMIT:
                return flag, ld
    return None


def gemm(
    left: Matrix, right: Matrix, out: Matrix, batch: int = 1, strides: tuple[int, int, int] = (0, 0, 0)
) -> Gemm | None:
    """``out[i] = left[i] @ right[i]`` as one call; ``None`` where one of the three needs a copy.

    Parameters
    ----------
    left, right, out
        Matrices ``(m, k)``, ``(k, n)``, ``(m, n)``.
    batch, strides
        Number of products, and the distances of their matrices in elements.

    Raises
    ------
    ValueError
        If the sizes do not match.

    Examples
    --------
    >>> call = gemm(Matrix(2, 3, 3, 1), Matrix(3, 4, 4, 1), Matrix(2, 4, 4, 1))  # all row-major: operands exchanged
    >>> call.swap, call.first_flag, call.second_flag, call.m, call.n, call.k
    (True, 0, 0, 4, 2, 3)
    >>> gemm(Matrix(2, 3, 6, 2), Matrix(3, 4, 4, 1), Matrix(2, 4, 4, 1)) is None
    True
    """
    if (left.rows, left.cols, right.cols) != (out.rows, right.rows, out.cols):
        raise ValueError(f"gemm: {left[:2]} @ {right[:2]} does not make {out[:2]}")
    of_left, of_right, of_out = orientation(left), orientation(right), orientation(out)
    if of_left is None or of_right is None or of_out is None:
        return None
    if max(left.rows, left.cols, out.cols, batch) > LIMIT:
        return None
    sizes = left.rows, out.cols, left.cols
    if of_out[0] == 0:
        (flag, ld), (other_flag, other_ld) = of_left, of_right
        operands = (ld, strides[0], other_ld, strides[1])
        return Gemm(False, flag, other_flag, *sizes, *operands, of_out[1], strides[2], batch)
    (flag, ld), (other_flag, other_ld) = of_right, of_left
    operands = (ld, strides[1], other_ld, strides[0])
    return Gemm(True, 1 - flag, 1 - other_flag, sizes[1], sizes[0], sizes[2], *operands, of_out[1], strides[2], batch)


def contraction(
    weights: Matrix, source: int, target: int, digits: Sequence[Digit], offsets: tuple[int, int, int] = (0, 0, 0)
) -> tuple[Gemm, ...] | None:
    """The calls of ``y[j, i] = sum_k W[j, k, i] x[k, i]`` for all values of the digits ``i``; ``None``: a copy is needed.

    One digit that the weights do not depend on becomes the columns of a matrix product, another one its batch, and what
    remains a loop over calls; digits that follow each other in all three arrays are taken as one.

    Parameters
    ----------
    weights
        The matrix ``W`` of one value of the digits.
    source, target
        Strides of ``k`` in ``x`` and of ``j`` in ``y``.
    digits
        All other indices.
    offsets
        First elements of weights, operand and result.

    Examples
    --------
    >>> samples, blocks = Digit(5, 0, 12, 1), Digit(3, 8, 4, 10)  # x (5, 3*4), W (3, 2, 4), y (3, 2, 5)
    >>> [(call.m, call.n, call.k, call.batch) for call in contraction(Matrix(2, 4, 4, 1), 1, 5, [samples, blocks])]
    [(5, 2, 4, 3)]
    """
    rest = fused([digit for digit in digits if digit.size != 1])
    found: tuple[Gemm, ...] | None = None
    for digit in [d for d in rest if d.weight == 0] or [Digit(1, 0, 0, 0)]:
        others = [d for d in rest if d is not digit]
        calls = _calls(weights, source, target, digit, others, offsets)
        if calls is not None and (found is None or _cost(calls) < _cost(found)):
            found = calls
    return found


def _cost(calls: tuple[Gemm, ...]) -> tuple[int, int]:
    """Few calls are good, and of as many the larger products."""
    return len(calls), calls[0].batch


def _calls(
    weights: Matrix,
    source: int,
    target: int,
    columns: Digit,
    others: Sequence[Digit],
    offsets: tuple[int, int, int],
) -> tuple[Gemm, ...] | None:
    """The calls with a digit as the columns of the products."""
    b, c = weights.rows, weights.cols
    right = Matrix(c, columns.size, source, columns.source)
    out = Matrix(b, columns.size, target, columns.target)
    batch = max(others, key=lambda d: d.size, default=Digit(1, 0, 0, 0))
    loops = [d for d in others if d is not batch]
    calls: list[Gemm] = []
    for start in range(0, batch.size, BATCH):
        count = min(BATCH, batch.size - start)
        call = gemm(weights, right, out, count, batch[1:])
        if call is None:
            return None
        for values in product(*(range(d.size) for d in loops)):
            left_offset, right_offset, out_offset = (
                offsets[i] + start * batch[i + 1] + sum(v * d[i + 1] for v, d in zip(values, loops, strict=True))
                for i in range(3)
            )
            calls.append(call._replace(left_offset=left_offset, right_offset=right_offset, out_offset=out_offset))
    return tuple(calls)


def fused(digits: Sequence[Digit]) -> list[Digit]:
    """Digits of which one steps over the whole of another, in all three arrays, taken as one."""
    done = list(digits)
    merged = True
    while merged:
        merged = False
        for slow, fast in product(done, done):
            if slow is not fast and all(slow[i] == fast.size * fast[i] for i in (1, 2, 3)):
                place = done.index(fast)
                done[place] = fast._replace(size=slow.size * fast.size)
                done.remove(slow)
                merged = True
                break
    return done


class Box(NamedTuple):
    """Values of digits for which equally many entries of a padded operand exist."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    depth: int


def boxes(stop: int, depth: int, step: int, digits: Sequence[tuple[int, int]]) -> tuple[Box, ...]:
    """Values of the digits grouped by how many of the positions ``offset + k*step``, ``k < depth``, lie below ``stop``.

    Padding without a copy: entries of an operand from ``stop`` on do not exist and must not be read.

    Parameters
    ----------
    stop
        Logical length of the operand.
    depth, step
        Size of the contracted index and its step.
    digits
        ``(size, step)`` of the others, whose sum of steps is ``offset``.

    Examples
    --------
    >>> boxes(7, 4, 1, [(3, 4)])  # blocks of four in seven entries: one whole, three of the second, none of the third
    (Box(starts=(0,), sizes=(1,), depth=4), Box(starts=(1,), sizes=(1,), depth=3), Box(starts=(2,), sizes=(1,), depth=0))
    """
    order = sorted(range(len(digits)), key=lambda i: -digits[i][1])
    found: list[Box] = []

    def count(offset: int) -> int:
        return max(0, min(depth, -((offset - stop) // step)))

    def split(place: int, offset: int, starts: list[int], sizes: list[int]) -> None:
        last = offset + sum((digits[i][0] - 1) * digits[i][1] for i in order[place:])
        if count(offset) == count(last):
            found.append(Box(tuple(starts), tuple(sizes), count(offset)))
            return
        i = order[place]
        size, weight = digits[i]
        below = sum((digits[j][0] - 1) * digits[j][1] for j in order[place + 1 :])
        value = 0
        while value < size:  # runs of values with equally many entries, whatever the faster digits
            here = count(offset + value * weight)
            end = value + 1
            if here == count(offset + value * weight + below):
                while end < size and here == count(offset + end * weight + below):
                    end += 1
                starts[i], sizes[i] = value, end - value
                found.append(Box(tuple(starts), tuple(sizes), here))
            else:
                starts[i], sizes[i] = value, 1
                split(place + 1, offset + value * weight, starts, sizes)
            starts[i], sizes[i] = 0, size
            value = end

    if prod(size for size, _ in digits):
        split(0, 0, [0] * len(digits), [size for size, _ in digits])
    return tuple(found)
