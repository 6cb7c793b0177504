"""Products of blocks that interleave: the lanes of a vector belong to different blocks.

A Kronecker-sparse factor with ``d`` large applies ``d`` blocks whose inputs and outputs alternate in memory. For a single
sample, lane ``l`` works on block ``l``: every weight is used once, so there is nothing to broadcast and nothing to
transpose. The weights are stored as vectors in the order of use, one stream: ``(vector, outputs by eight, input, output of
the eight, lane)``, the outputs that eight does not divide one by one.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.core import cgutils

from structmat.backends.numba.memory import copy
from structmat.backends.numba.simd import ADDRESS, VECTOR_BYTES, Emitter, inner, intrinsic, itemsize, lanes


def _outputs(rows: int):
    """The intrinsic for ``rows`` outputs of one vector of lanes."""

    @intrinsic
    def kernel(typingctx, one, x, x_step, weights, y, y_step, depth, add, count):  # noqa: ARG001
        def codegen(context, builder, _signature, args):
            _, x, x_step, weights, y, y_step, depth, add, count = args
            e = Emitter(builder, one)
            mask = e.mask_below(count)
            x_step, y_step = e.bytes(x_step), e.bytes(y_step)
            vector = e.lanes * e.size
            sums = [cgutils.alloca_once(builder, e.vector) for _ in range(rows)]
            for j in range(rows):
                builder.store(e.zero(), sums[j])
            at_x = cgutils.alloca_once_value(builder, x)
            at_w = cgutils.alloca_once_value(builder, weights)
            with cgutils.for_range(builder, depth):
                value = e.load(builder.load(at_x), mask)
                w = builder.load(at_w)
                for j in range(rows):
                    builder.store(e.fma(e.load(e.at(w, j * vector)), value, builder.load(sums[j])), sums[j])
                builder.store(e.at(builder.load(at_x), x_step), at_x)
                builder.store(e.at(w, rows * vector), at_w)
            for j in range(rows):
                place = e.row(y, j, y_step)
                with builder.if_else(builder.icmp_signed("!=", add, e.constant(0))) as (then, otherwise):
                    with then:
                        e.store(builder.fadd(builder.load(sums[j]), e.load(place, mask)), place, mask)
                    with otherwise:
                        e.store(builder.load(sums[j]), place, mask)
            return context.get_dummy_value()

        return types.void(one, *[ADDRESS] * 8), codegen

    return kernel


_outputs_8 = _outputs(8)
_outputs_1 = _outputs(1)


@inner
def lanewise(one, m, n, k, x, x_step, weights, y, y_step, add):
    """``y[j, l] (+)= sum_k K[l, j, k] x[k, l]`` for ``m`` outputs, ``k`` inputs and ``n`` lanes; ``K`` as :func:`packed`."""
    size, width = itemsize(one), lanes(one)
    for start in range(0, n, width):
        count = min(width, n - start)
        w = weights + start * m * k * size
        xs, ys = x + start * size, y + start * size
        j = 0
        while j + 8 <= m:
            _outputs_8(one, xs, x_step, w + j * k * width * size, ys + j * y_step * size, y_step, k, add, count)
            j += 8
        while j < m:
            _outputs_1(one, xs, x_step, w + j * k * width * size, ys + j * y_step * size, y_step, k, add, count)
            j += 1


def packed(blocks: np.ndarray) -> np.ndarray:
    """Blocks ``(a, d, b, c)`` as ``a`` streams of vectors in the order of use, zero in the lanes beyond ``d``."""
    a, d, b, c = blocks.shape
    width = VECTOR_BYTES // blocks.itemsize
    vectors, whole = -(-d // width), b - b % 8
    padded = np.zeros((a, vectors * width, b, c), blocks.dtype)
    padded[:, :d] = blocks
    tiles = padded.reshape(a, vectors, width, b, c)
    eights = tiles[:, :, :, :whole].reshape(a, vectors, width, whole // 8, 8, c).transpose(0, 1, 3, 5, 4, 2)
    ones = tiles[:, :, :, whole:].transpose(0, 1, 3, 4, 2)
    flat = [part.reshape(a, vectors, -1) for part in (eights, ones)]
    return copy(np.concatenate(flat, axis=2))
