"""Programs of networks of 2 x 2 products: which levels form a pass, in which order passes visit which part of the index.

Level ``l`` of a butterfly is the factor ``(n / 2^{l+1}, 2, 2, 2^l)``: 2 x 2 products of the indices that differ in bit
``l``. Neighbouring levels form passes, passes over the same block of the index are done while it is in cache, weights are
packed in the order in which the kernels (``radix.py``) read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from structmat.backends.numba.memory import empty
from structmat.backends.numba.radix import (
    AHEAD,
    FIELDS,
    HEAD,
    INNER,
    MAX_LEVELS,
    STRIP,
    WORK,
    X,
    Y,
    run_rows,
    run_tiles,
)
from structmat.backends.numba.simd import VECTOR_BYTES
from structmat.backends.numba.threads import workspace

BLOCK_BYTES = 1 << 18  # of an index block whose passes are done together, over all samples that share a weight
TOGETHER = 4, 32  # bounds for the number of those samples
ROW_BYTES = 1 << 15  # of the samples that pass together where there are no weights: in the first-level cache
TILE_BYTES = 1 << 19  # of a tile of samples that fits into the second-level cache
ROWS_BYTES = 1 << 14  # of a row up to which a batch is served row by row
PAGE = 1 << 12  # bytes between neighbours in a column from which each has a page of its own


class Level(NamedTuple):
    """The factor that pairs indices differing in one bit; blocks ``(a, d, 2, 2)``, ``None`` for Hadamard's."""

    bit: int
    blocks: np.ndarray | None


class Pass(NamedTuple):
    """Levels done in one visit to memory."""

    levels: tuple[Level, ...]
    inner: bool = False  # all levels inside ``2^MAX_LEVELS`` consecutive vectors

    @property
    def span(self) -> int:
        """Every aligned block of this many indices is mapped to itself."""
        return 2 << max(level.bit for level in self.levels)

    def offsets(self) -> np.ndarray:
        """The ``2^count`` sums of the strides of the levels, the first level in the lowest bit."""
        offsets = np.zeros(1, np.int64)
        for level in self.levels:
            offsets = np.concatenate((offsets, offsets + (1 << level.bit)))
        return offsets

    def places(self, n: int, lanes: int) -> np.ndarray:
        """The smallest index of each repetition, ascending; ``lanes`` neighbouring indices belong to one."""
        index = np.arange(n)
        taken = lanes - 1
        for level in self.levels:
            taken |= 1 << level.bit
        return index[index & taken == 0]


Program = tuple[np.ndarray, np.ndarray | None]  # a table and its weights


class Network:
    """Levels in their order of application, each bit once, and the two programs made of them when first needed.

    ``entry[i]``: which operand index is index ``i`` of the network. ``leave[i]``: which result index it becomes.
    Both permutations must move bits (an :class:`AxisOrder` of powers of two).
    """

    def __init__(
        self,
        n: int,
        dtype: np.dtype,
        levels: Sequence[Level],
        entry: np.ndarray | None = None,
        leave: np.ndarray | None = None,
        scale: float = 1.0,
    ) -> None:
        self.n, self.dtype, self.levels = n, np.dtype(dtype), tuple(levels)
        self.entry, self.leave, self.scale = entry, leave, self.dtype.type(scale)
        self.lanes = VECTOR_BYTES // self.dtype.itemsize
        bits = [level.bit for level in levels]
        ascending = bits == sorted(bits)
        self.staged = len(levels) > 2 * MAX_LEVELS and self.scale == 1
        self.backward = None if ascending else True
        whole = n >= self.lanes << MAX_LEVELS and entry is None and leave is None
        self.by_rows = whole and (ascending or bits == sorted(bits)[::-1])
        self.large = n * VECTOR_BYTES > TILE_BYTES
        self.plain = levels[0].blocks is None
        self._programs: dict[str, Program] = {}

    def columns(self, x: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
        """Columns of ``x (n, k)``; few of them are transposed into rows, where no lane is empty.

        The size of the whole batch chooses, here and in rows: no bit of a result depends on how the batch is split.
        """
        k = stop - start
        if self.by_rows and x.shape[1] == 1:
            table, weights = self.program("rows")
            run_rows(table, weights, self.backward, self.scale, x, out, start, stop)
        elif self.by_rows and x.shape[1] < self.lanes // 2:
            work = workspace(self.dtype, k * self.n)[: k * self.n].reshape(k, self.n)
            np.copyto(work, x[:, start:stop].T)
            table, weights = self.program("rows")
            run_rows(table, weights, self.backward, self.scale, work, work, 0, k)
            np.copyto(out[:, start:stop], work.T)
        else:
            whole = k // self.lanes * self.lanes
            if self.staged and (self.large or x.shape[1] * self.dtype.itemsize >= PAGE) and whole:
                self._tiles(x, out, start, start + whole, None, True)
                start += whole
            if start < stop:
                self._tiles(x, out, start, stop, None, None)

    def rows(self, x: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
        """Rows of ``x (k, n)``."""
        if self.by_rows and (self.plain or self.n * self.dtype.itemsize <= ROWS_BYTES or x.shape[0] < self.lanes // 2):
            table, weights = self.program("rows")
            run_rows(table, weights, self.backward, self.scale, x, out, start, stop)
        else:
            self._tiles(x, out, start, stop, True, None)

    def _tiles(
        self, x: np.ndarray, out: np.ndarray, start: int, stop: int, by_rows: bool | None, staged: bool | None
    ) -> None:
        table, weights = self.program("staged" if staged else "tiles")
        rows = int(table[2] * STRIP if staged else table[2] + 2 * self.n)
        work = workspace(self.dtype, rows * self.lanes + 16)
        run_tiles(table, weights, self.scale, x, out, work, start, stop, by_rows, staged)

    def program(self, kind: str) -> Program:
        """The table and the weights of one of the interpreters, made when first asked for."""
        made = self._programs.get(kind)
        if made is None:
            if kind == "rows":
                made = row_program(self.n, self.levels, self.lanes, self.dtype.itemsize, self.backward is not None)
            else:
                made = tile_program(self.n, self.levels, self.entry, self.leave, kind == "staged")
                twin = self._programs.get("tiles" if kind == "staged" else "staged")
                made = (made[0], twin[1]) if twin else made  # both read the same weights
            self._programs[kind] = made
        return made


def row_program(n: int, levels: Sequence[Level], lanes: int, itemsize: int, backward: bool) -> Program:
    """The table and the weights of :func:`radix.run_rows`."""
    inside = lanes.bit_length() - 1 + MAX_LEVELS
    if backward:
        rest, low = levels[: len(levels) - inside], levels[len(levels) - inside :]
        passes = [*_split(rest), Pass(tuple(low), inner=True)]
    else:
        passes = [Pass(tuple(levels[:inside]), inner=True), *_split(levels[inside:])]
    room, least = (ROW_BYTES, 1) if levels[0].blocks is None else (BLOCK_BYTES, TOGETHER[0])
    together = min(max(room // (n * itemsize), least), TOGETHER[1])
    table = Table()
    block = BLOCK_BYTES // (itemsize * together)
    for i, p in enumerate(passes):
        places = p.places(n, lanes)
        strides = [] if p.inner else [1 << level.bit for level in p.levels]
        table.add(p, X if i == 0 else Y, Y, strides, strides, places, places, _vector_weights(p, places, lanes))
        if i + 1 == len(passes) or (p.span <= block) != (passes[i + 1].span <= block):
            table.close(max(1, n // block) if p.span <= block else 1)
    return table.assemble(n, together)


def tile_program(
    n: int,
    levels: Sequence[Level],
    entry: np.ndarray | None,
    leave: np.ndarray | None,
    staged: bool,
) -> Program:
    """The table and the weights of :func:`radix.run_tiles`, ``staged`` or not.

    A stage is one pass or two, and returns to the result. It maps every set of indices that differ in its bits alone to
    itself, by way of a workspace small enough for the first-level cache if it has two passes; each set is a segment.
    Not staged, all passes but the last lead to the workspace, whose rows are spread so that rows at large powers of two do
    not meet in the same set of a cache.
    """
    index = np.arange(n)
    entry = index if entry is None else entry
    leave = index if leave is None else leave
    spread = index + (index >> 6) + (index >> 12)
    passes = _split(levels)
    table, rows = Table(), 0
    for i, p in enumerate(passes):
        stage = passes[i // 2 * 2 : i // 2 * 2 + 2]
        mask = sum(1 << level.bit for q in stage for level in q.levels)
        inside = _gather_bits(index, mask) if staged else spread
        rows = max(rows, int(inside[-1]) + 1)
        source, place = (X, entry) if i == 0 else (Y, leave) if staged and p is stage[0] else (WORK, inside)
        target, into = (Y, leave) if p is (stage if staged else passes)[-1] else (WORK, inside)
        places = p.places(n, 1)
        places = places[np.argsort(places & ~mask, kind="stable")]
        bits = [1 << level.bit for level in p.levels]
        table.add(p, source, target, place[bits], into[bits], place[places], into[places], _lane_weights(p, places))
        if p is stage[-1]:
            table.close(n >> mask.bit_count() if len(stage) > 1 else 1)
    return table.assemble(n, rows)


def _gather_bits(index: np.ndarray, mask: int) -> np.ndarray:
    """The bits of ``index`` that are set in ``mask``, moved together at the low end."""
    gathered, seen = np.zeros_like(index), 0
    for bit in range(mask.bit_length()):
        if mask >> bit & 1:
            gathered |= (index >> bit & 1) << seen
            seen += 1
    return gathered


class Table:
    """Collects passes, and lays them out as runs over blocks of the index."""

    def __init__(self) -> None:
        self.open: list[list[int]] = []
        self.runs: list[list[int]] = []
        self.places: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []

    def add(
        self,
        p: Pass,
        source: int,
        target: int,
        strides: Sequence[int] | np.ndarray,
        strides_into: Sequence[int] | np.ndarray,
        places: np.ndarray,
        places_into: np.ndarray,
        weights: np.ndarray | None,
    ) -> None:
        """One pass; ``weights`` of shape ``(len(places), ...)`` in the order in which they are read."""
        four = [[*(int(s) for s in side), 0, 0, 0, 0][:4] for side in (strides, strides_into)]
        first = sum(w.size for w in self.weights)
        place = sum(q.size for q in self.places)
        each = 0 if weights is None else weights[0].size
        count = INNER if p.inner else len(p.levels)
        run = [count, source, target, *four[0], *four[1], len(places), first, place, len(places), each]
        self.open.append(run)
        self.places += [places, places_into]
        if weights is not None:
            self.weights.append(weights.ravel())

    def close(self, blocks: int) -> None:
        """The passes since the last call are done block by block; the runs over one block are a segment."""
        for i in range(blocks):
            for j, run in enumerate(self.open):
                count, new = run[11] // blocks, list(run)
                new[11], new[12], new[13] = count, run[12] + i * count * run[15], run[13] + i * count
                self.runs.append([*new, len(self.open) if j == 0 else 0])
        self.open = []

    def assemble(self, n: int, head: int) -> Program:
        """The table and all weights."""
        start = HEAD + FIELDS * len(self.runs)
        for run in self.runs:
            run[13] += start
        flat = [np.array([len(self.runs), n, head], np.int64), np.array(self.runs, np.int64).ravel(), *self.places]
        flat.append(np.zeros(AHEAD, np.int64))  # looked at by the last prefetch
        return np.concatenate(flat), _aligned(self.weights) if self.weights else None


def _aligned(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The concatenation of ``parts`` at an address that no vector's load crosses a line of the cache."""
    return np.concatenate(parts, out=empty((sum(part.size for part in parts),), parts[0].dtype))


def _split(levels: Sequence[Level]) -> list[Pass]:
    """As few passes as possible, of nearly equal size."""
    parts = -(-len(levels) // MAX_LEVELS)
    return [Pass(tuple(levels[i * len(levels) // parts : (i + 1) * len(levels) // parts])) for i in range(parts)]


def _lane_weights(p: Pass, places: np.ndarray) -> np.ndarray | None:
    """Scalars for :func:`run_tiles`, ``(len(places), pairs of all levels, 4)``."""
    offsets = p.offsets()
    read = [
        _at(level, places + offset)
        for t, level in enumerate(p.levels)
        for i, offset in enumerate(offsets)
        if not i >> t & 1 and level.blocks is not None
    ]
    return np.stack(read, axis=1) if read else None


def _vector_weights(p: Pass, places: np.ndarray, lanes: int) -> np.ndarray | None:
    """Vectors for :func:`run_rows`, ``(len(places), vectors of all levels, lanes)``."""
    lane = np.arange(lanes)
    across = (
        sorted((level for level in p.levels if 1 << level.bit >= lanes), key=lambda level: level.bit)
        if p.inner
        else p.levels
    )
    offsets = Pass(tuple(across)).offsets()
    read = []
    for level in p.levels:
        if level.blocks is None:
            return None
        if 1 << level.bit < lanes:  # the weight of the lane itself, that of its partner
            upper = lane >> level.bit & 1
            for offset in offsets:
                four = _at(level, (places + offset)[:, None] + (lane & ~(1 << level.bit)))
                read.append(np.stack([four[:, lane, 3 * upper], four[:, lane, 1 + upper]], axis=1))
        else:
            t = across.index(level)
            read += [
                _at(level, (places + offset)[:, None] + lane).swapaxes(1, 2)
                for i, offset in enumerate(offsets)
                if not i >> t & 1
            ]
    return np.concatenate(read, axis=1)


def _at(level: Level, index: np.ndarray) -> np.ndarray:
    """The 2 x 2 blocks of the pairs whose lower index is given, ``(*index.shape, 4)``."""
    blocks = level.blocks
    if blocks is None:
        raise ValueError("a level of a Hadamard transform has no weights")
    return blocks.reshape(*blocks.shape[:2], 4)[index >> (level.bit + 1), index & ((1 << level.bit) - 1)]
