"""Programs for one vector: every weight is used once, so the vectors of the machine run along the outputs.

A factor with ``d = 1`` applies blocks to neighbouring inputs: ``y_i = x_i K_i^T`` with the transposed block as the vector
operand. With ``d`` large the blocks interleave and the lanes run over them (``lanewise.py``). In between, each block
writes its outputs side by side and one transposed copy interleaves them. The weights are packed copies: an operator whose
arrays are changed in place afterwards (operators are immutable) would keep the old ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from structmat.backends.base import ChainLayout
from structmat.backends.numba.lanewise import packed
from structmat.backends.numba.memory import copy
from structmat.backends.numba.program import (
    GEMM,
    LANEWISE,
    MEMORY,
    UNPACK,
    WORK,
    Program,
    X,
    Y,
    assemble,
    instructions,
    merged,
)
from structmat.backends.numba.simd import VECTOR_BYTES

PANEL = 4  # vectors of outputs that are read side by side
GAP = 64  # elements between areas of the workspace, a vector or more


def vector_program(layout: ChainLayout, blocks: Sequence[np.ndarray]) -> Program | None:
    """The program for ``X (k, n)`` and ``Y (k, m)``, one row at a time, for a chain without padding.

    ``None`` where an axis order scatters the inputs or the outputs of a block.
    """
    first, last = layout.patterns[0], layout.patterns[-1]
    if (first.rows, last.cols) != (layout.rows, layout.cols):
        return None
    inputs = layout.in_order.permutation() if layout.in_order else np.arange(last.cols)
    source = X, 0
    total = 0
    parts: list[np.ndarray] = []
    alive: list[np.ndarray] = []
    for i in range(len(blocks) - 1, -1, -1):
        rows = layout.patterns[i].rows
        outputs = np.argsort(layout.out_order.permutation()) if i == 0 and layout.out_order else np.arange(rows)
        target = (WORK, total) if i else (Y, 0)
        total += rows + GAP if i else 0
        made = _factor(blocks[i], inputs, outputs, source, target, total, alive)
        if made is None:
            return None
        parts += made
        total += blocks[i].shape[1] * blocks[i].shape[2] + GAP
        source, inputs = target, np.arange(rows)
    return assemble(parts, 1, total, False, tuple(alive))


def _factor(
    blocks: np.ndarray,
    inputs: np.ndarray,
    outputs: np.ndarray,
    source: tuple[int, int],
    target: tuple[int, int],
    free: int,
    alive: list[np.ndarray],
) -> list[np.ndarray] | None:
    """One factor's instructions; blocks between the two regimes use the workspace from ``free`` on."""
    a, d, b, c = blocks.shape
    lanes = VECTOR_BYTES // blocks.itemsize
    read, write = inputs.reshape(a, c, d), outputs.reshape(a, b, d)
    last = target[0] == Y
    i = np.arange(a)
    if d >= lanes // 2 and _is_natural(inputs) and _is_natural(outputs):
        weights = packed(blocks)
        alive.append(weights)
        address = weights.ctypes.data // weights.itemsize + i * weights[0].size
        x, y = (source[0], source[1] + i * c * d), (target[0], target[1] + i * b * d)
        return [merged(instructions(LANEWISE, m=b, n=d, k=c, a=x, a_rs=d, b=(MEMORY, address), c=y, c_ld=d, last=last))]
    step = int(read[0, 1, 0] - read[0, 0, 0]) if c > 1 else 0
    if c > 1 and (np.diff(read, axis=1) != step).any():
        return None
    together = b == 1 or (np.diff(write, axis=1) == 1).all()
    if not together and not _is_natural(outputs):
        return None
    panels = _panels(blocks, PANEL * lanes)
    place = (target[0], target[1] + write[:, 0, :]) if together else (WORK, free + np.arange(d) * b + 0 * i[:, None])
    x = (source[0], source[1] + read[:, 0, :])
    tables = []
    for j, weights in panels:
        alive.append(weights)
        width = weights.shape[-1]
        address = weights.ctypes.data // weights.itemsize + (i[:, None] * d + np.arange(d)) * c * width
        at = (place[0], place[1] + j)
        tables.append(
            instructions(
                GEMM, m=1, n=width, k=c, a=x, a_cs=step, b=(MEMORY, address), b_ld=width, c=at, last=last and together
            )
        )
    if together:
        return [merged(table.reshape(-1, table.shape[-1])) for table in tables]
    y = (target[0], target[1] + i * b * d)
    mix = instructions(UNPACK, m=d, n=b, a=(WORK, free), a_rs=b, c=y, c_ld=d, last=last)
    return [part for block in i for part in (*(merged(t[block]) for t in tables), mix[block : block + 1])]


def _panels(blocks: np.ndarray, width: int) -> list[tuple[int, np.ndarray]]:
    """Transposed blocks ``(a, d, c, width)`` for each group of outputs, with its first: each is read as one stream."""
    b = blocks.shape[2]
    firsts = range(0, b, width)
    return [(j, copy(blocks[:, :, j : j + width].swapaxes(-1, -2))) for j in firsts]


def _is_natural(places: np.ndarray) -> bool:
    return bool((places == np.arange(len(places))).all())
