"""Transposed copies between rows in memory and a tile of lanes: whole squares in registers, edges by masks."""

from __future__ import annotations

from numba import types

from structmat.backends.numba.simd import ADDRESS, Emitter, inner, intrinsic, itemsize, lanes


@intrinsic
def _square(typingctx, one, source, lds, target, ldt):  # noqa: ARG001
    """``target[j*ldt + i] = source[i*lds + j]`` for as many rows and columns as a vector has lanes."""

    def codegen(context, builder, _signature, args):
        _, source, lds, target, ldt = args
        e = Emitter(builder, one)
        lds, ldt = e.bytes(lds), e.bytes(ldt)
        rows = e.transposed([e.load(e.row(source, i, lds)) for i in range(e.lanes)])
        for j, row in enumerate(rows):
            e.store(row, e.row(target, j, ldt))
        return context.get_dummy_value()

    return types.void(one, *[ADDRESS] * 4), codegen


@intrinsic
def _edge(typingctx, one, source, lds, target, ldt, rows, columns, add):  # noqa: ARG001
    """The same for ``rows`` rows and ``columns`` columns, at most a vector's lanes; nothing else is read or written."""

    def codegen(context, builder, _signature, args):
        _, source, lds, target, ldt, rows, columns, add = args
        e = Emitter(builder, one)
        lds, ldt = e.bytes(lds), e.bytes(ldt)
        read, write, nothing = e.mask_below(columns), e.mask_below(rows), e.mask_below(e.constant(0))
        adding = builder.icmp_signed("!=", add, e.constant(0))
        loaded = []
        for i in range(e.lanes):
            mask = builder.select(builder.icmp_signed("<", e.constant(i), rows), read, nothing)
            loaded.append(e.load(e.row(source, i, lds), mask))
        for j, row in enumerate(e.transposed(loaded)):
            place = e.row(target, j, ldt)
            mask = builder.select(builder.icmp_signed("<", e.constant(j), columns), write, nothing)
            there = e.load(place, builder.select(adding, mask, nothing))
            e.store(builder.select(adding, builder.fadd(row, there), row), place, mask)
        return context.get_dummy_value()

    return types.void(one, *[ADDRESS] * 7), codegen


@inner
def transpose(one, rows, columns, source, lds, target, ldt, add):
    """``target[j, i] (+)= source[i, j]`` for ``rows x columns`` elements; addresses in bytes, strides in elements."""
    size, width = itemsize(one), lanes(one)
    for i in range(0, rows, width):
        height = min(width, rows - i)
        for j in range(0, columns, width):
            length = min(width, columns - j)
            s, t = source + (i * lds + j) * size, target + (j * ldt + i) * size
            if height == width and length == width and add == 0:
                _square(one, s, lds, t, ldt)
            else:
                _edge(one, s, lds, t, ldt, height, length, add)
