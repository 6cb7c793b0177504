"""Networks of 2 x 2 products: some levels of a butterfly or Walsh-Hadamard transform per visit to memory.

A kernel loads ``2^count`` vectors, applies ``count`` levels in registers and stores them; every level has a stride of its
own on either side, so that any order of the bits of the index is a matter of planning (``network.py``). Two
interpreters run small integer tables: :func:`run_tiles`, where lanes are samples and a weight is broadcast to all, and
:func:`run_rows`, where lanes are neighbouring indices of one sample and weights are vectors.

Kernels specialise on argument types alone: ``weights`` is an array, or ``None`` for sums and differences (Hadamard);
``backward`` is ``None`` for levels of ascending stride and a boolean for descending ones.

Sources: Cooley and Tukey, Math. Comp. 19, 1965 (levels and radices); Bailey, J. Supercomputing 4, 1990 (blocks that stay
in cache).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from structmat.backends.numba.simd import ADDRESS, REGISTERS, Emitter, intrinsic, itemsize, lanes, prefetch
from structmat.backends.numba.transpose import transpose

MAX_LEVELS = 4 if REGISTERS == 32 else 3
X, WORK, Y = range(3)
HEAD, FIELDS = 3, 17  # integers of a table before its runs, and per run
STRIP = 4  # tiles of columns done together where a segment has several runs
AHEAD = 1  # repetitions by which a source is asked for
INNER = 0  # as the number of levels of a run: those inside ``2^MAX_LEVELS`` consecutive vectors


def _weights(e: Emitter, address: Any, broadcast: bool) -> Callable[[], Any]:
    """A reader of consecutive packed weights: scalars in all lanes, or vectors."""
    offset = 0

    def following() -> Any:
        nonlocal offset
        place = e.at(address, offset)
        offset += e.size * (1 if broadcast else e.lanes)
        return e.broadcast(place) if broadcast else e.load(place)

    return following


def _apply(e: Emitter, rows: list[Any], levels: Iterable[int], weight: Callable[[], Any] | None) -> list[Any]:
    """Level ``t`` maps each pair of rows ``(i, i + 2^t)`` by a 2 x 2 matrix, without weights by ``[[1, 1], [1, -1]]``."""
    builder, rows = e.builder, list(rows)
    for t in levels:
        for i in range(len(rows)):
            if i >> t & 1:
                continue
            j = i + (1 << t)
            u, v = rows[i], rows[j]
            if weight is None:
                rows[i], rows[j] = builder.fadd(u, v), builder.fsub(u, v)
            else:
                a, b, c, d = (weight() for _ in range(4))
                rows[i] = e.fma(b, v, builder.fmul(a, u))
                rows[j] = e.fma(d, v, builder.fmul(c, u))
    return rows


def _exchange(e: Emitter, rows: list[Any], levels: Iterable[int], weight: Callable[[], Any] | None) -> list[Any]:
    """Level ``t`` pairs lanes ``(i, i + 2^t)`` of every row: ``own * row + other * row[i ^ 2^t]``, by two weights a row."""
    for t in levels:
        swapped = [i ^ (1 << t) for i in range(e.lanes)]
        signs = ir.Constant(e.vector, [-1.0 if i >> t & 1 else 1.0 for i in range(e.lanes)])
        for k, row in enumerate(rows):
            other = e.shuffle(row, row, swapped)
            if weight is None:
                rows[k] = e.fma(signs, row, other)
            else:
                own = e.builder.fmul(weight(), row)
                rows[k] = e.fma(weight(), other, own)
    return rows


def _places(e: Emitter, base: Any, strides: list[Any]) -> list[Any]:
    """The addresses ``base + sum_t bit_t(i) strides[t]``."""
    places = [base]
    for stride in strides:
        places += [e.at(place, stride) for place in places]
    return places


def levels(count: int, broadcast: bool):
    """The intrinsic that applies ``count`` levels to ``2^count`` vectors.

    Arguments: ``one, weights, w, source, ahead, s0 .. s3, target, t0 .. t3``; ``w`` is the address of the first weight,
    ``ahead`` a source needed soon (of vectors of weights only); strides are in bytes, those beyond ``count`` are not used.
    """

    @intrinsic
    def kernel(typingctx, one, weights, w, source, ahead, s0, s1, s2, s3, target, t0, t1, t2, t3):  # noqa: ARG001
        def codegen(context, builder, _signature, args):
            _, _, w, source, ahead, *s, target, t0, t1, t2, t3 = args
            e = Emitter(builder, one)
            for place in () if broadcast else _places(e, ahead, s[:count]):
                prefetch(builder, place)  # longer than a kernel is a cache miss
            weight = None if weights == types.none else _weights(e, w, broadcast)
            rows = [e.load(place) for place in _places(e, source, s[:count])]
            rows = _apply(e, rows, range(count), weight)
            for row, place in zip(rows, _places(e, target, [t0, t1, t2, t3][:count]), strict=True):
                e.store(row, place)
            return context.get_dummy_value()

        return types.void(one, weights, *[ADDRESS] * 12), codegen

    return kernel


@intrinsic
def inner(typingctx, one, weights, backward, w, source, ahead, target, scale):  # noqa: ARG001
    """The levels of stride ``1, 2, ..`` (or backward) on ``2^MAX_LEVELS`` consecutive vectors, times ``scale``.

    A stride below the number of lanes is an exchange of lanes. Weights scale by themselves: ``scale`` is for Hadamard.
    """

    def codegen(context, builder, _signature, args):
        _, _, _, w, source, ahead, target, scale = args
        e = Emitter(builder, one)
        weight = None if weights == types.none else _weights(e, w, broadcast=False)
        strides = [e.constant(e.lanes * e.size << t) for t in range(MAX_LEVELS)]
        for place in _places(e, ahead, strides):
            prefetch(builder, place)
        rows = [e.load(place) for place in _places(e, source, strides)]
        within, across = range(e.lanes.bit_length() - 1), range(MAX_LEVELS)
        if backward == types.none:
            rows = _apply(e, _exchange(e, rows, within, weight), across, weight)
        else:
            rows = _exchange(e, _apply(e, rows, across[::-1], weight), within[::-1], weight)
        if weight is None:
            factor = e.splat(scale)
            rows = [builder.fmul(factor, row) for row in rows]
        for row, place in zip(rows, _places(e, target, strides), strict=True):
            e.store(row, place)
        return context.get_dummy_value()

    return types.void(one, weights, backward, *[ADDRESS] * 4, one), codegen


@intrinsic
def _copy(typingctx, one, source, lds, target, ldt, rows, count, scale):  # noqa: ARG001
    """``target[i, :count] = scale * source[i, :count]``, ``count`` at most a vector's lanes; strides in bytes."""

    def codegen(context, builder, _signature, args):
        _, source, lds, target, ldt, rows, count, scale = args
        e = Emitter(builder, one)
        mask, factor = e.mask_below(count), e.splat(scale)
        with cgutils.for_range(builder, rows) as loop:
            value = e.load(e.at(source, builder.mul(loop.index, lds)), mask)
            e.store(builder.fmul(factor, value), e.at(target, builder.mul(loop.index, ldt)), mask)
        return context.get_dummy_value()

    return types.void(one, *[ADDRESS] * 6, one), codegen


_lanes_2 = levels(2, broadcast=True)
_lanes_3 = levels(3, broadcast=True)
_lanes_4 = levels(4, broadcast=True) if MAX_LEVELS == 4 else _lanes_3
_vector_1 = levels(1, broadcast=False)
_vector_2 = levels(2, broadcast=False)
_vector_3 = levels(3, broadcast=False)
_vector_4 = levels(4, broadcast=False) if MAX_LEVELS == 4 else _vector_3


@njit(inline="always")
def _lanes(one, weights, count, w, s, s0, s1, s2, s3, t, t0, t1, t2, t3):
    if count == 4:
        _lanes_4(one, weights, w, s, 0, s0, s1, s2, s3, t, t0, t1, t2, t3)
    elif count == 3:
        _lanes_3(one, weights, w, s, 0, s0, s1, s2, s3, t, t0, t1, t2, t3)
    else:
        _lanes_2(one, weights, w, s, 0, s0, s1, s2, s3, t, t0, t1, t2, t3)


@njit(cache=True, nogil=True)
def _segment(table, start, stop, weights, one, x, ldx, work, ldw, y, ldy, tiles):
    """The runs ``start .. stop`` on one tile of ``lanes`` samples, or on some neighbouring ``tiles``.

    Addresses and leading dimensions are in bytes.
    """
    size = itemsize(one)
    line = lanes(one) * size
    first = 0
    if weights is not None:
        first = weights.ctypes.data
    for i in range(start, stop):
        run = table[HEAD + i * FIELDS : HEAD + (i + 1) * FIELDS]
        count, w, into = run[0], first + run[12] * size, run[14]
        source, lds = (x, ldx) if run[1] == X else (y, ldy) if run[1] == Y else (work, ldw)
        target, ldt = (y, ldy) if run[2] == Y else (work, ldw)
        s0, s1, s2, s3 = run[3] * lds, run[4] * lds, run[5] * lds, run[6] * lds
        t0, t1, t2, t3 = run[7] * ldt, run[8] * ldt, run[9] * ldt, run[10] * ldt
        for place in range(run[13], run[13] + run[11]):
            s, t = source + table[place] * lds, target + table[place + into] * ldt
            if tiles is None:
                _lanes(one, weights, count, w, s, s0, s1, s2, s3, t, t0, t1, t2, t3)
            else:
                for _ in range(tiles):
                    _lanes(one, weights, count, w, s, s0, s1, s2, s3, t, t0, t1, t2, t3)
                    s += line
                    t += line
            w += run[15] * size


@njit(cache=True, nogil=True)
def run_tiles(table, weights, scale, x, y, work, start, stop, by_rows, staged):
    """Samples ``start .. stop`` of the C-contiguous ``x`` and ``y``: columns if ``by_rows`` is ``None``, rows if not.

    Whole tiles of columns are read and written in place. Edges, rows, and a ``scale`` that is not one, go through two more
    tiles in ``work``. ``staged``, for whole tiles of columns: one segment of the table after the other. A segment maps a
    set of rows to itself, so that these and their weights stay in cache while all columns pass, some tiles at a time where
    it has more than one run. Both flags are ``None`` or true.

    ``table``: number of runs, ``n``, rows of the workspace; then per run (1) the number of levels, (2) source and target
    space, (3) four strides each, (4) number of repetitions, (5) first weight, (6) where the places of the repetitions are
    listed, (7) how much further those of the target, (8) weights per repetition, (9) at the first run of a segment, its
    number of runs. Strides and places count rows of a space.
    """
    one = x.dtype.type(1)
    size, width, runs, n = itemsize(one), lanes(one), table[0], table[1]
    line = width * size
    base = (work.ctypes.data + 63) // 64 * 64
    entry = base + table[2] * line
    leave = entry + n * line
    i = 0
    while i < runs:
        after, strip = runs, 1
        if staged is not None:
            after = i + table[HEAD + i * FIELDS + 16]
            strip = STRIP if after > i + 1 else (stop - start) // width
        for c in range(start, stop, strip * width):
            count = min(width, stop - c)
            at_x, ldx, at_y, ldy = entry, line, leave, line
            if by_rows is not None:
                transpose(one, count, n, x.ctypes.data + c * n * size, n, entry, width, 0)
                if scale != 1:
                    _copy(one, entry, line, entry, line, n, count, scale)
            elif count < width or scale != 1:
                _copy(one, x.ctypes.data + c * size, x.shape[1] * size, entry, line, n, count, scale)
            else:
                at_x, ldx = x.ctypes.data + c * size, x.shape[1] * size
                at_y, ldy = y.ctypes.data + c * size, y.shape[1] * size
            if staged is None:
                _segment(table, i, after, weights, one, at_x, ldx, base, line, at_y, ldy, None)
            else:
                tiles = min(strip, (stop - c) // width)
                _segment(table, i, after, weights, one, at_x, ldx, base, strip * line, at_y, ldy, tiles)
            if by_rows is not None:
                transpose(one, n, count, leave, width, y.ctypes.data + c * n * size, n, 0)
            elif at_y == leave:
                _copy(one, leave, line, y.ctypes.data + c * size, y.shape[1] * size, n, count, one)
        i = after


@njit(cache=True, nogil=True)
def run_rows(table, weights, backward, scale, x, y, start, stop):
    """Rows ``start .. stop`` of the C-contiguous ``x`` and ``y``, some samples at a time for each weight.

    The runs of the table are those of :func:`run_tiles` and those inside consecutive vectors; the target space is always
    ``Y``, places and strides count elements. The third integer of ``table`` is the number of samples that share a weight
    while it is in cache.
    """
    one = x.dtype.type(1)
    size, n, together = itemsize(one), table[1], table[2]
    line = n * size
    first = 0
    if weights is not None:
        first = weights.ctypes.data
    for c in range(start, stop, together):
        samples = min(together, stop - c)
        at_x, at_y = x.ctypes.data + c * line, y.ctypes.data + c * line
        for i in range(table[0]):
            run = table[HEAD + i * FIELDS : HEAD + (i + 1) * FIELDS]
            count, w = run[0], first + run[12] * size
            source = at_x if run[1] == X else at_y
            s0, s1, s2, s3 = run[3] * size, run[4] * size, run[5] * size, run[6] * size
            for place in range(run[13], run[13] + run[11]):
                s, t = source + table[place] * size, at_y + table[place] * size
                ahead = source + table[place + AHEAD] * size
                for _ in range(samples):
                    if count == INNER:
                        inner(one, weights, backward, w, s, ahead, t, scale)
                    elif count == 4:
                        _vector_4(one, weights, w, s, ahead, s0, s1, s2, s3, t, s0, s1, s2, s3)
                    elif count == 3:
                        _vector_3(one, weights, w, s, ahead, s0, s1, s2, s3, t, s0, s1, s2, s3)
                    elif count == 2:
                        _vector_2(one, weights, w, s, ahead, s0, s1, s2, s3, t, s0, s1, s2, s3)
                    else:
                        _vector_1(one, weights, w, s, ahead, s0, s1, s2, s3, t, s0, s1, s2, s3)
                    s += line
                    t += line
                    ahead += line
                w += run[15] * size
