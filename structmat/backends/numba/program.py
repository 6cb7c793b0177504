"""One compiled interpreter for all chains and Kronecker products: a program is a small table of integers.

Every instruction repeats one of four kernels with constant increments. Planning (``chain.py``, ``kron.py``) is Python
and NumPy, runs once per operator and layout, and decides everything: which blocks, in which order, where intermediates
lie. What is compiled stays small and is compiled once per dtype, whatever the structure.

An operand of an instruction is a place ``(space, offset)`` with strides, in elements. The spaces are the tile of the
operand ``X``, the tile of the result ``Y``, the thread's workspace, and memory itself (offset = address / itemsize) for
weights. In column layout, offsets and strides in ``X`` and ``Y`` count rows; in row layout they count elements.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from structmat.backends.numba.gemm import gemm
from structmat.backends.numba.lanewise import lanewise
from structmat.backends.numba.simd import fetch, itemsize
from structmat.backends.numba.transpose import transpose

GEMM, PACK, UNPACK, LANEWISE = range(4)
X, Y, WORK, MEMORY = range(4)
SAMPLES = -1  # as a size or a count: the number of samples of the tile; -c means c times as many


FIELDS = (
    *("op", "m", "n", "k"),
    *("a_space", "a", "a_rs", "a_cs"),
    *("b_space", "b", "b_ld"),
    *("c_space", "c", "c_ld"),
    *("last", "a_by", "b_by", "c_by", "count"),
)
"""The columns of a program.

``GEMM``: ``C[m, n] = A[m, k] B[k, n]``; ``A`` has strides ``a_rs`` and ``a_cs``, the rows of ``B`` and ``C`` are ``b_ld`` and
``c_ld`` apart.
``PACK`` and ``UNPACK``: ``C[j, i] = A[i, j]`` for ``m`` rows and ``n`` columns of ``A``, rows ``a_rs`` and ``c_ld`` apart.
``LANEWISE``: ``C[j, l] = sum_k B[j, k, l] A[k, l]`` for ``m`` outputs, ``k`` inputs, ``n`` lanes (``lanewise.py``).
``last``: writes the result, hence adds to it where the call accumulates. ``count`` times, the operands moved by ``*_by``
each time.
"""
_COLUMN = {name: i for i, name in enumerate(FIELDS)}


class Program(NamedTuple):
    """What the interpreter runs, and what must stay alive while it does."""

    table: np.ndarray  # int64 (instructions, len(FIELDS))
    width: int  # samples of a tile
    workspace: int  # elements
    columns: bool
    alive: tuple[Any, ...]


def instructions(op: int, **fields: Any) -> np.ndarray:
    """Instructions ``(*shape, len(FIELDS))`` from numbers and arrays that broadcast; a place is ``(space, offsets)``."""
    for operand in ("a", "b", "c"):
        if isinstance(fields.get(operand), tuple):
            fields[f"{operand}_space"], fields[operand] = fields[operand]
    shape = np.broadcast_shapes(*(np.shape(value) for value in fields.values()))
    table = np.zeros((*shape, len(FIELDS)), dtype=np.int64)
    table[..., 0] = op
    table[..., _COLUMN["count"]] = 1
    for name, value in fields.items():
        table[..., _COLUMN[name]] = value
    return table


def merged(table: np.ndarray) -> np.ndarray:
    """Instructions that differ by constant steps of their operands as one that repeats; others as they are."""
    if len(table) < 2 or (table[:, _COLUMN["count"]] != 1).any():
        return table
    moving = [_COLUMN[operand] for operand in ("a", "b", "c")]
    fixed = np.delete(table, moving, axis=1)
    steps = np.diff(table[:, moving], axis=0)
    if (fixed != fixed[0]).any() or (steps != steps[0]).any():
        return table
    one = table[:1].copy()
    for operand, step in zip(("a", "b", "c"), steps[0], strict=True):
        one[0, _COLUMN[f"{operand}_by"]] = step
    one[0, _COLUMN["count"]] = len(table)
    return one


def assemble(parts: Iterable[np.ndarray], width: int, workspace: int, columns: bool, alive: tuple[Any, ...]) -> Program:
    """The program of parts ``(instructions, len(FIELDS))``; its workspace is never empty: the dtype is read from it."""
    return Program(np.concatenate([*parts]), width, max(workspace, 1), columns, alive)


@njit(cache=True, nogil=True)
def fetch_rows(one, rows, columns, address, ld):
    """Ask for the lines of a panel, so that they are in cache when it is used."""
    size = itemsize(one)
    for i in range(rows):
        for j in range(0, columns * size, 64):
            fetch(address + i * ld * size + j)


@njit(cache=True, nogil=True)
def run(table, x, y, work, start, stop, width, scale_x, scale_y, step_x, step_y, add):
    """Run a program on samples ``start .. stop`` of the flat ``x`` and ``y``, ``width`` at a time.

    ``scale_x``: elements per unit of a place in ``X`` (the number of columns in column layout, else 1); ``step_x``:
    elements from one sample to the next (1 in column layout, else the row length). Likewise for ``Y``.
    """
    one = work[0]
    size = itemsize(one)
    for tile in range(start, stop, width):
        samples = min(width, stop - tile)
        base_x = x.ctypes.data + tile * step_x * size
        base_y = y.ctypes.data + tile * step_y * size
        base_w = work.ctypes.data
        for i in range(table.shape[0]):
            row = table[i]
            m = -row[1] * samples if row[1] < 0 else row[1]
            n = -row[2] * samples if row[2] < 0 else row[2]
            count = -row[18] * samples if row[18] < 0 else row[18]
            k = row[3]
            a_space, b_space, c_space = row[4], row[8], row[11]
            base_a = base_x if a_space == X else base_y if a_space == Y else base_w if a_space == WORK else 0
            base_b = base_x if b_space == X else base_y if b_space == Y else base_w if b_space == WORK else 0
            base_c = base_x if c_space == X else base_y if c_space == Y else base_w
            scale_a = scale_x if a_space == X else scale_y if a_space == Y else 1
            scale_b = scale_x if b_space == X else scale_y if b_space == Y else 1
            scale_c = scale_x if c_space == X else scale_y if c_space == Y else 1
            a = base_a + row[5] * scale_a * size
            b = base_b + row[9] * scale_b * size
            c = base_c + row[12] * scale_c * size
            a_rs, a_cs, b_ld, c_ld = row[6] * scale_a, row[7], row[10] * scale_b, row[13] * scale_c
            a_by, b_by, c_by = row[15] * scale_a * size, row[16] * scale_b * size, row[17] * scale_c * size
            plus = add if row[14] else 0
            ahead_b = a_space != X and b_space == X and scale_x > 1
            ahead_c = c_space == Y and scale_y > 1
            for _ in range(count):
                if row[0] == GEMM:
                    if ahead_b and m >= 8:
                        fetch_rows(one, k, n, b + b_by, b_ld)
                    if ahead_c and k >= 8:
                        fetch_rows(one, m, n, c + c_by, c_ld)
                    gemm(one, m, n, k, a, a_rs, a_cs, b, b_ld, c, c_ld, plus)
                elif row[0] == LANEWISE:
                    lanewise(one, m, n, k, a, a_rs, b, c, c_ld, plus)
                else:
                    transpose(one, m, n, a, a_rs, c, c_ld, plus)
                a += a_by
                b += b_by
                c += c_by
