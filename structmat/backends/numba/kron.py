"""Programs for Kronecker products: one factor at a time and, in all forms but one, without a transposition.

Factors are dense, of one dtype, and not empty.

With the other digits gathered into ``before`` and ``after``, factor ``i`` is ``before`` products
``F_i @ panel (n_i, after)``. The vectors of the machine run along ``after`` (in column layout: along the samples too).
Where ``after`` is 1, the operand is the broadcast one instead and the transposed factor the vector operand:
``(before, n_i) @ F_i^T``. Neighbouring factors that are too small for that are merged, ``kron`` of their values, when a
simple model of the kernel says that the fuller vectors are worth the additional work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from structmat.backends.base import cheapest_order
from structmat.backends.numba.memory import empty
from structmat.backends.numba.program import (
    GEMM,
    MEMORY,
    PACK,
    SAMPLES,
    UNPACK,
    WORK,
    Program,
    X,
    Y,
    assemble,
    instructions,
)
from structmat.backends.numba.simd import VECTOR_BYTES
from structmat.backends.numba.workspace import Workspace

ROWS_BYTES = 1 << 16  # of an intermediate of a tile of rows
FLAT_BYTES = 1 << 25  # of a flat intermediate, which is not tiled
BLOCK_BYTES = 1 << 17  # intermediates beyond this are made and used one block at a time
CONFLICT_BYTES = 256  # rows of a panel at a multiple of this share few sets of L1
LARGEST = 128  # rows or columns of merged factors
STORE, TILE, CALL = 1.0, 12.0, 20.0  # of a vector, a register tile, a product; in multiply-adds of a vector
UNALIGNED = 1.2  # for rows that do not begin with a vector
TRANSPOSE = 0.45  # of an element, on the way in or out
Shape = tuple[int, int]  # (m, n) of a factor


class Step(NamedTuple):
    """One factor applied to all of its panels: ``before`` times ``(m, n) @ (n, after)``."""

    factor: int
    m: int
    n: int
    before: int
    after: int


class Storage(NamedTuple):
    """Where value ``v`` of an index lies: ``start + v // group * pitch + v % group * unit`` in its space."""

    space: int
    start: np.ndarray  # (blocks, 1), for every repetition of the step
    unit: int
    group: int = 1
    pitch: int = 0

    def stride(self, values: int) -> int:
        """The distance of two values that are ``values`` apart."""
        return values // self.group * self.pitch if self.pitch and values >= self.group else values * self.unit


class Form(NamedTuple):
    """What the vectors of the machine run along besides the index."""

    columns: bool  # X and Y are addressed by rows, each of as many elements as the tile has samples
    lanes: int  # elements of one value in the workspace: the samples that every step treats together
    times: int = 1  # samples of a tile for which every step is repeated

    @property
    def repeats(self) -> int:
        """As a size: the tile at the end has fewer samples."""
        return SAMPLES if self.times > 1 else 1


def row_program(factors: Sequence[np.ndarray], width: int = 1) -> Program:
    """The program for ``X (k, n)`` and ``Y (k, m)`` on tiles of ``width`` rows.

    A sample is one run of memory, and so are ``width`` of them: they only make ``before`` larger.
    """
    return _program(factors, Form(False, 1, width), width)


def flat_program(factors: Sequence[np.ndarray], columns: int) -> Program:
    """The program for ``columns`` columns as one sample: ``X.reshape(1, n k)`` and ``Y.reshape(1, m k)``, as rows.

    ``A X`` is ``kron(A, I_k)`` applied to the flat ``X``. Best where all of ``X`` fits the cache.
    """
    return _program(factors, Form(False, columns), 1)


def transposed_program(factors: Sequence[np.ndarray], width: int) -> Program:
    """The program for ``X (k, n)`` and ``Y (k, m)`` that transposes tiles of ``width`` rows into columns and back.

    Best where the factors are odd or narrower than a vector, so that the samples fill the vectors instead.
    """
    return _program(factors, Form(False, width), width, pack=True)


def column_program(factors: Sequence[np.ndarray], width: int) -> Program:
    """The program for ``X (n, k)`` and ``Y (m, k)`` on tiles of ``width`` columns.

    ``X`` is read and ``Y`` is written in place; intermediates are ``(size, width)`` in the workspace.
    """
    return _program(factors, Form(True, width), width)


def best_rows(factors: Sequence[np.ndarray], samples: int) -> Program:
    """The program for ``samples`` rows, of the forms above the one with the least modelled time."""
    itemsize = factors[0].itemsize
    lanes = VECTOR_BYTES // itemsize
    n, m = (math.prod(f.shape[axis] for f in factors) for axis in (1, 0))
    largest = max(m, n) * itemsize
    width = 2 * lanes if samples > lanes and 2 * lanes * largest <= BLOCK_BYTES else lanes
    by_row = _total(plan(factors, 1, lanes)[1], 1, lanes)
    transposed = _total(plan(factors, width, lanes)[1], width, lanes) / width + TRANSPOSE * (n + m)
    if transposed * width * -(-samples // width) < by_row * samples:
        return transposed_program(factors, width)
    return row_program(factors, min(samples, max(1, ROWS_BYTES // largest)))


def best_columns(factors: Sequence[np.ndarray], columns: int, flat: bool = True) -> Program:
    """The program for so many columns; ``program.columns`` is false if it is :func:`flat_program` (where ``flat`` allows).

    A flat program is for exactly this number of columns. Tiles otherwise have up to eight vectors: as many contiguous
    bytes of each row of ``X``, against a page of addresses for each.
    """
    itemsize = factors[0].itemsize
    lanes = VECTOR_BYTES // itemsize
    n, m = (math.prod(f.shape[axis] for f in factors) for axis in (1, 0))
    many = len(plan(factors, columns, lanes)[1]) > 3 and max(m, n) * columns * itemsize <= FLAT_BYTES
    if flat and (many or columns <= 8 * lanes):
        return flat_program(factors, columns)
    vectors = -(-columns // lanes)
    tiles = -(-vectors // 8)
    return column_program(factors, -(-vectors // tiles) * lanes)


def _program(factors: Sequence[np.ndarray], form: Form, width: int, pack: bool = False) -> Program:
    """The program of one form on tiles of ``width`` samples."""
    merged, steps = plan(factors, form.lanes, VECTOR_BYTES // factors[0].itemsize)
    n, m = (math.prod(f.shape[axis] for f in factors) for axis in (1, 0))
    store = Workspace(factors[0].itemsize, CONFLICT_BYTES)
    zero = np.zeros((1, 1), np.int64)
    outside = 1 if form.columns else form.lanes
    alive: list[np.ndarray] = []
    if not pack:
        parts = _steps_through(steps, merged, form, Storage(X, zero, outside), Storage(Y, zero, outside), store, alive)
        return assemble(parts, width, store.total, form.columns, tuple(alive))
    source, target = (Storage(WORK, zero + store.take(size * width), width) for size in (n, m))
    parts = [
        instructions(PACK, m=SAMPLES, n=n, a=(X, 0), a_rs=n, c=(WORK, source.start[0]), c_ld=width),
        *_steps_through(steps, merged, form, source, target, store, alive),
        instructions(UNPACK, m=m, n=SAMPLES, a=(WORK, target.start[0]), a_rs=width, c=(Y, 0), c_ld=m, last=True),
    ]
    return assemble(parts, width, store.total, False, tuple(alive))


def _steps_through(
    steps: Sequence[Step],
    weights: Sequence[np.ndarray],
    form: Form,
    source: Storage,
    target: Storage,
    store: Workspace,
    alive: list[np.ndarray],
) -> list[np.ndarray]:
    """The instructions of all steps.

    Where intermediates are large and the first factor comes last, its inputs are made one block after the other, and
    the intermediates before them are only as large as a block.
    """

    def chain(steps: Sequence[Step], source: Storage, target: Storage) -> list[np.ndarray]:
        kept = [_between(step, following, form.lanes, store) for step, following in pairwise(steps)]
        sizes = [storage.stride(s.before * s.m * s.after) for storage, s in zip(kept, steps, strict=False)]
        areas = [store.take(max(sizes[i::2]) * form.times) for i in range(min(2, len(sizes)))]
        kept = [storage._replace(start=storage.start + areas[i % 2]) for i, storage in enumerate(kept)]
        ends = [source, *kept, target]
        return [
            _table(step, weights[step.factor], form, before, after, alive)
            for step, (before, after) in zip(steps, pairwise(ends), strict=True)
        ]

    *others, last = steps
    size = max((s.before * s.m * s.after for s in others), default=0) * form.lanes * store.itemsize
    rightmost_first = all(s.factor == t.factor + 1 for s, t in pairwise(steps))
    if len(steps) < 3 or size <= BLOCK_BYTES or form.times > 1 or not rightmost_first:
        return [table.reshape(-1, table.shape[-1]) for table in chain(steps, source, target)]
    entry = _between(others[-1], last, form.lanes, store)
    entry = entry._replace(start=entry.start + store.take(entry.stride(last.n * last.after)))
    block = np.arange(last.n)[:, None]
    inputs = others[0].before * others[0].n * others[0].after // last.n
    tables = chain(
        [s._replace(before=s.before // last.n) for s in others],
        source._replace(start=source.start + block * source.stride(inputs)),
        entry._replace(start=entry.start + block * entry.stride(last.after)),
    )
    wide = [np.broadcast_to(table, (last.n, *table.shape[1:])) for table in tables]
    blocks = np.concatenate(wide, axis=1)
    final = _table(last, weights[last.factor], form, entry, target, alive)
    return [blocks.reshape(-1, blocks.shape[-1]), final.reshape(-1, final.shape[-1])]


def _between(step: Step, following: Step, lanes: int, store: Workspace) -> Storage:
    """The intermediate after a step; the rows of the following step's panels are spread over the sets of L1."""
    group, zero = following.after, np.zeros((1, 1), np.int64)
    if following.factor != step.factor - 1 or group == 1:
        return Storage(WORK, zero, lanes)
    return Storage(WORK, zero, lanes, group, store.pitch(group * lanes))


def _table(
    step: Step, weight: np.ndarray, form: Form, source: Storage, target: Storage, alive: list[np.ndarray]
) -> np.ndarray:
    """The instructions of one step ``(blocks, some, fields)``."""
    m, n, before, after = step.m, step.n, step.before, step.after
    last = target.space == Y
    outer_in, outer_out = source.stride(n * after), target.stride(m * after)
    into, out = (source.space, source.start), (target.space, target.start)
    if after * form.lanes == 1:
        values = _rows("b", weight.T, alive)
        places = {"a": into, "a_rs": outer_in, "a_cs": 1, "c": out, "c_ld": outer_out}
        return instructions(GEMM, m=form.repeats * before, n=m, k=n, **values, **places, last=last)
    values = _elements("a", weight, alive)
    product = {"m": m, "k": n, **values, "b_ld": source.stride(after), "c_ld": target.stride(after), "last": last}
    if not form.columns or (source.space != X and target.space != Y):  # the samples are part of ``after``
        places = {"b": into, "b_by": outer_in, "c": out, "c_by": outer_out, "count": before * form.repeats}
        return instructions(GEMM, n=after * form.lanes, **product, **places)
    outer, inner = (before, outer_in, outer_out), (after, source.unit, target.unit)
    if after < before:
        outer, inner = inner, outer
    i = np.arange(outer[0])
    return instructions(
        GEMM,
        n=SAMPLES,
        **product,
        b=(source.space, source.start + i * outer[1]),
        b_by=inner[1],
        c=(target.space, target.start + i * outer[2]),
        c_by=inner[2],
        count=inner[0],
    )


def _elements(operand: str, values: np.ndarray, alive: list[np.ndarray]) -> dict[str, Any]:
    """Place and strides of a broadcast operand, in place where its strides are whole elements."""
    size = values.itemsize
    if not values.flags.aligned or any(stride % size for stride in values.strides):
        values = np.ascontiguousarray(values)
    alive.append(values)
    rs, cs = (stride // size for stride in values.strides)
    return {operand: (MEMORY, values.ctypes.data // size), f"{operand}_rs": rs, f"{operand}_cs": cs}


def _rows(operand: str, values: np.ndarray, alive: list[np.ndarray]) -> dict[str, Any]:
    """Place and row stride of a vector operand: a copy whose rows begin with a vector and do not collide in L1."""
    rows, columns = values.shape
    pitch = Workspace(values.itemsize, CONFLICT_BYTES).pitch(columns)
    packed = empty((rows, pitch), values.dtype)
    packed[:, :columns] = values
    alive.append(packed)
    return {operand: (MEMORY, packed.ctypes.data // packed.itemsize), f"{operand}_ld": pitch}


def plan(factors: Sequence[np.ndarray], trailing: int, lanes: int) -> tuple[list[np.ndarray], list[Step]]:
    """Merged factors and the steps in which they are applied, ``trailing`` samples being part of every ``after``."""
    shapes: list[Shape] = [(f.shape[0], f.shape[1]) for f in factors]
    alone = [(i, i + 1) for i in range(len(shapes))]
    best: tuple[float, list[Shape], list[Step]] | None = None
    for groups in (_grouping(shapes, trailing, lanes), alone):
        sizes = [(math.prod(m for m, _ in shapes[i:j]), math.prod(n for _, n in shapes[i:j])) for i, j in groups]
        for order in (tuple(reversed(range(len(sizes)))), cheapest_order(sizes)):
            steps = _steps(sizes, order)
            total = _total(steps, trailing, lanes)
            if best is None or total < best[0]:
                best = total, groups, steps
    if best is None:
        raise ValueError("a Kronecker product needs at least one factor, got none")
    return [reduce(np.kron, factors[i:j]) for i, j in best[1]], best[2]


def _total(steps: Sequence[Step], trailing: int, lanes: int) -> float:
    """The modelled time of all steps."""
    return sum(_cycles(s.m, s.n, s.before, s.after, trailing, lanes) for s in steps)


def _steps(sizes: Sequence[Shape], order: Sequence[int]) -> list[Step]:
    """The steps of factors of these shapes in this order."""
    current = [n for _, n in sizes]
    steps = []
    for i in order:
        m, n = sizes[i]
        steps.append(Step(i, m, n, math.prod(current[:i]), math.prod(current[i + 1 :])))
        current[i] = m
    return steps


def _grouping(shapes: Sequence[Shape], trailing: int, lanes: int) -> list[tuple[int, int]]:
    """The neighbours ``i .. j`` to merge, of least modelled cost when applied from the right (dynamic programming)."""
    count = len(shapes)
    cost = [math.inf] * count + [0.0]
    end = [count] * (count + 1)
    for i in range(count - 1, -1, -1):
        before = math.prod(n for _, n in shapes[:i])
        m = n = 1
        for j in range(i + 1, count + 1):
            m, n = m * shapes[j - 1][0], n * shapes[j - 1][1]
            if j > i + 1 and max(m, n) > LARGEST:
                break
            after = math.prod(rows for rows, _ in shapes[j:])
            total = _cycles(m, n, before, after, trailing, lanes) + cost[j]
            if total < cost[i]:
                cost[i], end[i] = total, j
    groups, i = [], 0
    while i < count:
        groups.append((i, end[i]))
        i = end[i]
    return groups


def _cycles(m: int, n: int, before: int, after: int, trailing: int, lanes: int) -> float:
    """A model of the time of one step: multiply-adds of whole vectors, and the starts of register tiles."""
    after *= trailing
    if after == 1:
        rows, vectors, repeats = before, -(-m // lanes), 1
    else:
        rows, vectors, repeats = m, -(-after // lanes), before
    tiles = -(-rows // 8) * -(-vectors // 2)
    aligned = UNALIGNED if (m if after == 1 else after) % lanes else 1.0
    return aligned * repeats * (rows * vectors * (n + STORE) + tiles * TILE + CALL)
