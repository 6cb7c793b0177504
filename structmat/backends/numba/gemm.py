"""Small matrix products ``C = A B`` or ``C += A B`` with any strides, the kernel under chains and Kronecker products.

``A`` is read one element at a time and broadcast, so its two strides are free; ``B`` and ``C`` are read and written by
vectors along their rows. A register tile of ``rows x vectors`` accumulators covers the latency of the fused
multiply-add; a panel of ``B`` as wide as the tile stays in L1 while all rows of ``A`` pass over it.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils

from structmat.backends.numba.simd import ADDRESS, Emitter, inner, intrinsic, itemsize, lanes

LATENCY = 4  # independent multiply-adds that keep the unit busy, at least


def tile(rows: int, vectors: int, masked: bool = False) -> Any:
    """The intrinsic for ``C[rows, width] (+)= A[rows, K] B[K, width]``, ``width = vectors * lanes`` or, masked, ``count``.

    Arguments: ``one, a, ars, acs, b, ldb, c, ldc, K, accumulate, count``; addresses in bytes, strides in elements. A tile
    with few accumulators keeps several partial sums, over every second or fourth ``k``.
    """
    tiles = [(i, v) for i in range(rows) for v in range(vectors)]
    partial = max(1, LATENCY // len(tiles))

    @intrinsic
    def kernel(typingctx, one, a, ars, acs, b, ldb, c, ldc, depth, accumulate, count):  # noqa: ARG001
        signature = types.void(one, *[ADDRESS] * 10)

        def codegen(context, builder, _signature, args):
            _, a, ars, acs, b, ldb, c, ldc, depth, accumulate, count = args
            e = Emitter(builder, one)
            mask = e.mask_below(count) if masked else None
            ars, acs, ldb, ldc = (e.bytes(stride) for stride in (ars, acs, ldb, ldc))
            step = e.lanes * e.size
            places = {(i, v): e.at(e.row(c, i, ldc), v * step) for i, v in tiles}
            sums = [{t: cgutils.alloca_once_value(builder, e.zero()) for t in tiles} for _ in range(partial)]
            for part in sums:
                for t in tiles:
                    builder.store(e.zero(), part[t])
            with builder.if_then(builder.icmp_signed("!=", accumulate, e.constant(0))):
                for t in tiles:
                    builder.store(e.load(places[t], mask), sums[0][t])
            row_of_b = cgutils.alloca_once_value(builder, b)
            column_of_a = cgutils.alloca_once_value(builder, a)

            def multiply(part: dict[tuple[int, int], Any]) -> None:
                at_b, at_a = builder.load(row_of_b), builder.load(column_of_a)
                panel = [e.load(e.at(at_b, v * step), mask) for v in range(vectors)]
                for i in range(rows):
                    value = e.broadcast(e.row(at_a, i, ars))
                    for v in range(vectors):
                        builder.store(e.fma(value, panel[v], builder.load(part[i, v])), part[i, v])
                builder.store(e.at(at_b, ldb), row_of_b)
                builder.store(e.at(at_a, acs), column_of_a)

            groups = e.constant(partial)
            if partial > 1:
                with cgutils.for_range(builder, builder.sdiv(depth, groups)):
                    for part in sums:
                        multiply(part)
            with cgutils.for_range(builder, builder.srem(depth, groups) if partial > 1 else depth):
                multiply(sums[0])
            for t in tiles:
                total = builder.load(sums[0][t])
                for part in sums[1:]:
                    total = builder.fadd(total, builder.load(part[t]))
                e.store(total, places[t], mask)
            return context.get_dummy_value()

        return signature, codegen

    return kernel


_1x4 = tile(1, 4)
_8x2 = tile(8, 2)
_4x2 = tile(4, 2)
_2x2 = tile(2, 2)
_1x2 = tile(1, 2)
_8x1 = tile(8, 1, masked=True)
_4x1 = tile(4, 1, masked=True)
_1x1 = tile(1, 1, masked=True)


@inner
def gemm(one, m, n, k, a, ars, acs, b, ldb, c, ldc, accumulate):
    """``C[m, n] (+)= A[m, k] B[k, n]``: panels of two vectors, then single vectors, the last one masked."""
    size, width = itemsize(one), lanes(one)
    j = 0
    while m == 1 and j + 4 * width <= n:  # a vector times a matrix: long rows, for the prefetcher
        _1x4(one, a, ars, acs, b + j * size, ldb, c + j * size, ldc, k, accumulate, 0)
        j += 4 * width
    while j + 2 * width <= n:
        bj, cj = b + j * size, c + j * size
        i = 0
        while i + 8 <= m:
            _8x2(one, a + i * ars * size, ars, acs, bj, ldb, cj + i * ldc * size, ldc, k, accumulate, 0)
            i += 8
        if i + 4 <= m:
            _4x2(one, a + i * ars * size, ars, acs, bj, ldb, cj + i * ldc * size, ldc, k, accumulate, 0)
            i += 4
        if i + 2 <= m:
            _2x2(one, a + i * ars * size, ars, acs, bj, ldb, cj + i * ldc * size, ldc, k, accumulate, 0)
            i += 2
        if i < m:
            _1x2(one, a + i * ars * size, ars, acs, bj, ldb, cj + i * ldc * size, ldc, k, accumulate, 0)
        j += 2 * width
    while j < n:
        count = min(width, n - j)
        bj, cj = b + j * size, c + j * size
        i = 0
        while i + 8 <= m:
            _8x1(one, a + i * ars * size, ars, acs, bj, ldb, cj + i * ldc * size, ldc, k, accumulate, count)
            i += 8
        if i + 4 <= m:
            _4x1(one, a + i * ars * size, ars, acs, bj, ldb, cj + i * ldc * size, ldc, k, accumulate, count)
            i += 4
        while i < m:
            _1x1(one, a + i * ars * size, ars, acs, bj, ldb, cj + i * ldc * size, ldc, k, accumulate, count)
            i += 1
        j += width
