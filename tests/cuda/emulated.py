"""Runs schedules on NumPy arrays through the byte-accurate emulation of cuBLAS: no stand-in for CuPy is needed."""

from __future__ import annotations

import ctypes

import fakecublas
import numpy as np

from structmat.backends.cuda.precision import compute_for
from structmat.backends.cuda.schedule import Schedule, Strided, Weights

GUARD = 11  # elements around every array, which nobody may write


class Memory:
    """Arrays inside guarded allocations; ``check`` finds what was written around them."""

    def __init__(self):
        self.held = []

    def place(self, shape, strides, dtype, values=None):
        """An array with these strides in elements, NaN where nothing is put."""
        extent = 1 + sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True))
        room = np.full(extent + 2 * GUARD, np.nan, dtype)
        fakecublas.allocations.add(room)
        size = room.itemsize
        array = np.ndarray(shape, dtype, room, GUARD * size, [s * size for s in strides])
        if values is not None:
            array[...] = values
        self.held.append((room, array))
        return array

    def check(self):
        """AssertionError if an element outside the arrays is no longer NaN."""
        for room, array in self.held:
            outside = np.ones(room.size, bool)
            start = array.__array_interface__["data"][0] - room.__array_interface__["data"][0]
            index = np.zeros(array.shape, int) + start // room.itemsize
            for axis, (n, s) in enumerate(zip(array.shape, array.strides, strict=True)):
                index = index + (np.arange(n) * s // room.itemsize).reshape(-1, *[1] * (array.ndim - axis - 1))
            outside[index.ravel()] = False
            assert np.isnan(room[outside]).all(), "written outside the array"


def multiply(calls, dtype, left, right, out, add=False):
    """The calls on addresses."""
    kind, computed, code = compute_for(dtype)
    one, beta = np.array(1, code), np.array(1 if add else 0, code)
    size = np.dtype(dtype).itemsize
    for g in calls:
        first, second = left + size * g.left_offset, right + size * g.right_offset
        if g.swap:
            first, second = second, first
        fakecublas.gemmStridedBatchedEx(
            1, g.first_flag, g.second_flag, g.m, g.n, g.k, one.ctypes.data, first, kind, g.first_ld, g.first_stride,
            second, kind, g.second_ld, g.second_stride, beta.ctypes.data, out + size * g.out_offset, kind, g.out_ld,
            g.out_stride, g.batch, computed, -1,
        )  # fmt: skip


def run(schedule: Schedule, memory: Memory, values, source, result, add=False):
    """A schedule, on arrays; ``result`` has the strides of the schedule's."""
    address = lambda array: array.__array_interface__["data"][0]  # noqa: E731
    dtype = source.dtype
    buffers = {0: address(source), -1: address(result)}
    for i, size in enumerate(schedule.scratch):
        buffers[i + 1] = address(memory.place((size,), (1,), dtype))
    for step in schedule.steps:
        if step.clear and not (add and step.target == -1):
            if step.target == -1:
                result[...] = 0
            else:
                extent = schedule.scratch[step.target - 1] * dtype.itemsize
                ctypes.memset(buffers[step.target], 0, extent)
        multiply(
            step.calls, dtype, address(values[step.factor]), buffers[step.source], buffers[step.target],
            add and step.target == -1,
        )  # fmt: skip


def weights_of(blocks) -> Weights:
    """Strides of blocks ``(a, d, b, c)``."""
    return Weights(*(s // blocks.itemsize for s in blocks.strides))


def result_array(memory: Memory, place: Strided, rows: int, k: int, dtype):
    """An array ``(rows, k)`` with the strides of a schedule's result."""
    return memory.place((rows, k), (place.row, place.col), dtype)
