"""Programs for chains: which block is applied when, and where its inputs and outputs lie.

An intermediate is kept in *block order*: the inputs of each block of the next factor are consecutive rows of the
workspace, so that every product reads a contiguous panel, and the permutation between two factors is only the place to
which results are written. Tiles of samples are small enough for all of it to stay in the second-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from structmat.backends.base import ChainLayout
from structmat.backends.numba.program import (
    FIELDS,
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
    merged,
)
from structmat.backends.numba.workspace import Workspace
from structmat.patterns import Pattern

MIN_RUN = 4  # rows of a product for which block order pays
CONFLICT_BYTES = 2048  # blocks at a multiple of this distance collide in L1


class Storage(NamedTuple):
    """Where the values of an index lie: in rows of ``X`` or ``Y``, or in elements of the workspace; -1 where nowhere."""

    space: int
    places: np.ndarray
    start: int = 0


class Tiles(Workspace):
    """A workspace of rows of ``width`` samples."""

    def __init__(self, itemsize: int, width: int) -> None:
        super().__init__(itemsize, CONFLICT_BYTES)
        self.width = width

    def natural(self, size: int) -> Storage:
        """Rows one after the other."""
        return Storage(WORK, np.arange(size) * self.width, self.take(size * self.width))

    def by_blocks(self, pattern: Pattern) -> Storage:
        """The inputs of a factor, those of one block after the other."""
        a, _, c, d = pattern
        i, k, l = np.ogrid[:a, :c, :d]
        pitch = self.pitch(c * self.width)
        return Storage(WORK, ((i * d + l) * pitch + k * self.width).ravel(), self.take(a * d * pitch))

    def between(self, consumer: Pattern, producer: Pattern) -> Storage:
        """The index between two factors, in the block order of its consumer where a producer's block has long runs."""
        run = min(consumer.d, producer.b) if producer.d == 1 else producer.b
        return self.natural(consumer.cols) if run < min(MIN_RUN, producer.b) else self.by_blocks(consumer)


class Products(NamedTuple):
    """The products of one factor: the instructions of block ``i`` are ``table[starts[i]:starts[i + 1]]``."""

    table: np.ndarray
    starts: np.ndarray

    def of(self, first: int, stop: int) -> np.ndarray:
        """Those of the blocks ``first .. stop``, in the order ``(a, d)``."""
        return self.table[self.starts[first] : self.starts[stop]]


def column_program(layout: ChainLayout, blocks: Sequence[np.ndarray], width: int) -> Program | None:
    """The program for ``X (n, k)`` and ``Y (m, k)`` on tiles of ``width`` columns.

    ``None`` where an axis order scatters the inputs of one block: then the order needs a copy first.
    """
    store = Tiles(blocks[0].itemsize, width)
    source = Storage(X, operand_places(layout))
    parts = []
    for i in range(len(blocks) - 1, -1, -1):
        pattern = layout.patterns[i]
        target = store.between(layout.patterns[i - 1], pattern) if i else Storage(Y, result_places(layout))
        products = _products(pattern, blocks[i], source, target)
        if products is None:
            return None
        parts.append(merged(products.table))
        source = target
    return assemble(parts, width, store.total, True, tuple(blocks))


def row_program(layout: ChainLayout, blocks: Sequence[np.ndarray], width: int) -> Program | None:
    """The program for ``X (k, n)`` and ``Y (k, m)`` on tiles of ``width`` rows.

    Rows are transposed into lanes on the way in, block by block where a block reads neighbouring features, and back on
    the way out, a vector of neighbouring results at a time: both permutations of a Monarch matrix cost nothing more.
    ``None`` where an axis order brings padding in front of the operand within one block.
    """
    a, _, c, d = layout.patterns[-1]
    present = operand_places(layout).reshape(a, c, d) >= 0
    if (present[:, 1:] > present[:, :-1]).any():
        return None
    store = Tiles(blocks[0].itemsize, width)
    source, packing = _packing(layout, store)
    parts: list[np.ndarray] = []
    for i in range(len(blocks) - 1, 0, -1):
        pattern = layout.patterns[i]
        target = store.between(layout.patterns[i - 1], pattern)
        products = _require(_products(pattern, blocks[i], source, target))
        parts += _interleaved(products, packing)
        source, packing = target, {}
    parts += _emission(layout, blocks[0], source, packing, store)
    return assemble(parts, width, store.total, False, tuple(blocks))


def operand_places(layout: ChainLayout) -> np.ndarray:
    """For every input index of the last factor, its place in the operand; -1 in the padding, which counts as zeros."""
    places = layout.in_order.permutation() if layout.in_order else np.arange(layout.patterns[-1].cols)
    return np.where(places < layout.cols, places, -1)


def result_places(layout: ChainLayout) -> np.ndarray:
    """For every output index of the first factor, its place in the result; -1 where it is cut off."""
    rows = layout.patterns[0].rows
    places = np.argsort(layout.out_order.permutation()) if layout.out_order else np.arange(rows)
    return np.where(places < layout.rows, places, -1)


def _products(pattern: Pattern, blocks: np.ndarray, source: Storage, target: Storage) -> Products | None:
    """All products of a factor, one per run of evenly spaced results; ``None`` if some inputs are not evenly spaced."""
    a, b, c, d = pattern
    read = source.places.reshape(a, c, d).swapaxes(1, 2).reshape(a * d, c)
    write = target.places.reshape(a, b, d).swapaxes(1, 2).reshape(a * d, b)
    present = read >= 0
    depth = present.sum(axis=1)
    step = read[:, 1] - read[:, 0] if c > 1 else np.zeros(a * d, dtype=np.int64)
    step[depth < 2] = 0
    uneven = (np.diff(read, axis=1) != step[:, None]) & present[:, 1:]
    if uneven.any() or (present[:, 1:] > present[:, :-1]).any():
        return None
    size = blocks.itemsize
    s_a, s_d, rs, cs = (stride // size for stride in blocks.strides)
    address = blocks.ctypes.data // size + (np.arange(a)[:, None] * s_a + np.arange(d) * s_d).ravel()
    start = source.start + np.where(depth > 0, read[:, 0], 0)

    def rows(which: np.ndarray, found: list[tuple[int, int]]) -> np.ndarray:
        """The instructions of some blocks that share their runs ``(first index, length)``."""
        first, length = (np.array(values, dtype=np.int64) for values in zip(*found, strict=True))
        places = write[which][:, first]
        following = write[which][:, np.minimum(first + 1, b - 1)]
        return instructions(
            GEMM,
            m=length,
            n=SAMPLES,
            k=depth[which, None],
            a=(MEMORY, address[which, None] + first * rs),
            a_rs=rs,
            a_cs=cs,
            b=(source.space, start[which, None]),
            b_ld=step[which, None],
            c=(target.space, target.start + places),
            c_ld=np.where(length > 1, following - places, 0),
            last=target.space == Y,
        )

    template = [(j, length) for j, length, _, _ in runs(write[0])]
    alike = np.logical_and.reduce(write >= 0, axis=1)
    if sum(length for _, length in template) != b:
        alike[:] = False
    for j, length in template:
        spacing = np.diff(write[:, j : j + length], axis=1)
        alike &= (spacing == spacing[:, :1]).all(axis=1)
    everyone = np.arange(a * d)
    if alike.all():
        table = rows(everyone, template)
        count = table.shape[1]
        return Products(table.reshape(-1, table.shape[-1]), np.arange(a * d + 1) * count)
    parts = []
    for block in everyone:
        found = template if alike[block] else [(j, length) for j, length, _, _ in runs(write[block])]
        parts.append(
            rows(everyone[block : block + 1], found)[0] if found else np.empty((0, len(FIELDS)), dtype=np.int64)
        )
    return Products(np.concatenate(parts), np.cumsum([0, *(len(part) for part in parts)]))


def _require(products: Products | None) -> Products:
    if products is None:
        raise ValueError("a chain's intermediate is not evenly spaced")
    return products


def _interleaved(products: Products, packing: dict[int, np.ndarray]) -> list[np.ndarray]:
    """A factor's products, each group of blocks after the copies that are due before its first."""
    if not packing:
        return [merged(products.table)]
    bounds = [*packing, len(products.starts) - 1]
    parts = []
    for first, stop in pairwise(bounds):
        parts += [packing[first], merged(products.of(first, stop))]
    return parts


def _packing(layout: ChainLayout, store: Tiles) -> tuple[Storage, dict[int, np.ndarray]]:
    """Where the operand's features are kept as lanes, and what copies them there, by the block before which it is due."""
    pattern = layout.patterns[-1]
    a, _, c, d = pattern
    places = operand_places(layout)
    if d == 1 and layout.in_order is None:  # each block reads neighbours: pack only those, into a small place
        group = max(1, -(-store.lanes // max(c, 1)))
        start = store.take(group * c * store.width)
        kept = np.where(places >= 0, np.arange(a * c) % (group * c) * store.width, -1)
        packs = {}
        for i in range(0, a, group):
            count = max(0, min((i + group) * c, layout.cols) - i * c)
            packs[i] = _pack(layout, np.array([i * c]), count, start, store.width)
        return Storage(WORK, kept, start), packs
    storage = store.by_blocks(pattern) if d >= store.lanes // 2 else store.natural(pattern.cols)
    storage = storage._replace(places=np.where(places >= 0, storage.places, -1))
    by_feature = np.full(layout.cols, -1)
    by_feature[places[places >= 0]] = storage.places[places >= 0]
    found = np.array(runs(by_feature), dtype=np.int64).reshape(-1, 4).T
    return storage, {0: _pack(layout, found[0], found[1], storage.start + found[2], found[3])}


def _pack(layout: ChainLayout, feature: np.ndarray, count: object, place: object, spacing: object) -> np.ndarray:
    table = instructions(PACK, m=SAMPLES, n=count, a=(X, feature), a_rs=layout.cols, c=(WORK, place), c_ld=spacing)
    return merged(table)


def _emission(
    layout: ChainLayout, blocks: np.ndarray, source: Storage, packing: dict[int, np.ndarray], store: Tiles
) -> list[np.ndarray]:
    """The first factor, its results transposed back into rows as soon as a vector of neighbours is complete."""
    a, b, _, d = pattern = layout.patterns[0]
    results = result_places(layout).reshape(a, b, d)
    width, lanes = store.width, store.lanes
    parts: list[np.ndarray] = []

    def products(places: np.ndarray, start: int) -> Products:
        target = Storage(WORK, np.where(results >= 0, places, -1).ravel(), start)
        return _require(_products(pattern, blocks, source, target))

    def apply(made: Products, first: int, stop: int) -> None:
        due = [i for i in packing if first <= i < stop]
        bounds = sorted({first, *due, stop})
        for low, high in pairwise(bounds):
            parts.extend([packing[low]] if low in packing else [])
            parts.append(merged(made.of(low, high)))

    def unpack(place: object, spacing: int, result: object, count: object) -> None:
        table = instructions(
            UNPACK, m=count, n=SAMPLES, a=(WORK, place), a_rs=spacing, c=(Y, result), c_ld=layout.rows, last=True
        )
        parts.append(merged(table))

    inside = results[:, :, 1:] >= 0
    if d >= lanes // 2 and (np.diff(results, axis=2)[inside] == 1).all():
        pitch = store.pitch(b * width)  # results of neighbouring blocks are neighbours: a vector of blocks at a time
        start = store.take(lanes * pitch)
        made = products(np.arange(b)[:, None] * width + np.arange(d) % lanes * pitch + np.zeros((a, 1, 1), int), start)
        for i, l in np.ndindex(a, -(-d // lanes)):
            stop = min((l + 1) * lanes, d)
            apply(made, i * d + l * lanes, i * d + stop)
            counts = (results[i, :, l * lanes : stop] >= 0).sum(axis=1)
            j = np.nonzero(counts)[0]
            unpack(start + j * width, pitch, results[i, j, l * lanes], counts[j])
        return parts
    if d > 1 and (np.diff(results, axis=1)[results[:, 1:] >= 0] != 1).any():
        start = store.take(layout.rows * width)  # any other order: all results, then all rows
        apply(products(results * width, start), 0, a * d)
        unpack(np.array([start]), width, 0, layout.rows)
        return parts
    group = max(1, -(-lanes // max(b, 1)))  # the results of one block are neighbours: small blocks in groups
    start = store.take(group * b * width)
    order = np.arange(a)[:, None, None] * d + np.arange(d)
    made = products((order % group * b + np.arange(b)[:, None]) * width, start)
    by_block = results.swapaxes(1, 2).reshape(a * d, b)
    for first in range(0, a * d, group):
        stop = min(first + group, a * d)
        apply(made, first, stop)
        for j, length, result, spacing in runs(by_block[first:stop].ravel()):
            if spacing == 1 or length == 1:
                unpack(np.array([start + j * width]), width, result, length)
            else:
                index = np.arange(length)
                unpack(start + (j + index) * width, width, result + index * spacing, 1)
    return parts


def runs(places: np.ndarray) -> list[tuple[int, int, int, int]]:
    """``(first index, length, first place, spacing)`` of the longest evenly spaced runs; places below 0 are left out."""
    found = []
    n = len(places)
    change = np.flatnonzero(np.diff(places, 2)) + 2 if n > 2 else np.empty(0, dtype=np.int64)
    absent = places < 0
    j = 0
    while j < n:
        if absent[j]:
            j += 1
            continue
        after = change[np.searchsorted(change, j + 2) :]
        stop = int(after[0]) if len(after) else n
        gone = np.flatnonzero(absent[j:stop])
        stop = j + int(gone[0]) if len(gone) else stop
        spacing = int(places[j + 1] - places[j]) if stop - j > 1 else 0
        found.append((j, stop - j, int(places[j]), spacing))
        j = stop
    return found
