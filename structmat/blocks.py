"""Block operators: operators side by side, on top of each other, along the diagonal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from structmat import arrays, rules
from structmat.algebra import Combination, accumulate, operators_of
from structmat.arrays import Array
from structmat.operator import Operator


class HorizontalStack(Combination):
    """Blocks side by side, ``[A_1 A_2 ...]``; the transpose is a vertical stack. Made by :func:`hstack`."""

    __slots__ = ("blocks", "bounds")
    fields = ("blocks",)
    blocks: tuple[Operator, ...]

    def __init__(self, *blocks: Operator) -> None:
        rows = {b.shape[-2] for b in blocks}
        if len(rows) != 1:
            raise ValueError(f"hstack: numbers of rows differ in shapes {', '.join(str(b.shape) for b in blocks)}")
        bounds = _bounds(b.shape[-1] for b in blocks)
        self._init_from(blocks, (rows.pop(), bounds[-1][1]), "hstack", blocks=tuple(blocks), bounds=bounds)

    @classmethod
    def _rebuild(cls, *values: Any) -> HorizontalStack:
        return cls(*values[0])

    def _matmat(self, x: Array) -> Array:
        return accumulate(b._matmat(x[..., i:j, :]) for b, (i, j) in zip(self.blocks, self.bounds, strict=True))

    def _transpose(self) -> Operator:
        return VerticalStack(*(b.T for b in self.blocks))

    def _flops(self) -> int:
        return sum(b._flops() for b in self.blocks) + (len(self.blocks) - 1) * self.shape[-2]

    def _expression(self) -> str:
        return f"hstack({', '.join(b._expression() for b in self.blocks)})"


class VerticalStack(Combination):
    """Blocks on top of each other; the transpose is a horizontal stack. Made by :func:`vstack`."""

    __slots__ = ("blocks",)
    fields = ("blocks",)
    blocks: tuple[Operator, ...]

    def __init__(self, *blocks: Operator) -> None:
        cols = {b.shape[-1] for b in blocks}
        if len(cols) != 1:
            raise ValueError(f"vstack: numbers of columns differ in shapes {', '.join(str(b.shape) for b in blocks)}")
        self._init_from(blocks, (sum(b.shape[-2] for b in blocks), cols.pop()), "vstack", blocks=tuple(blocks))

    @classmethod
    def _rebuild(cls, *values: Any) -> VerticalStack:
        return cls(*values[0])

    def _matmat(self, x: Array) -> Array:
        return _concat([b._matmat(x) for b in self.blocks])

    def _transpose(self) -> Operator:
        return HorizontalStack(*(b.T for b in self.blocks))

    def _flops(self) -> int:
        return sum(b._flops() for b in self.blocks)

    def _expression(self) -> str:
        return f"vstack({', '.join(b._expression() for b in self.blocks)})"


class DirectSum(Combination):
    """Operators along the diagonal, of any shapes; the transpose has the transposed blocks. Made by :func:`block_diag`."""

    __slots__ = ("blocks", "bounds")
    fields = ("blocks",)
    blocks: tuple[Operator, ...]

    def __init__(self, *blocks: Operator) -> None:
        bounds = _bounds(b.shape[-1] for b in blocks)
        size = (sum(b.shape[-2] for b in blocks), bounds[-1][1])
        self._init_from(blocks, size, "block_diag", blocks=tuple(blocks), bounds=bounds)

    @classmethod
    def _rebuild(cls, *values: Any) -> DirectSum:
        return cls(*values[0])

    def _matmat(self, x: Array) -> Array:
        return _concat([b._matmat(x[..., i:j, :]) for b, (i, j) in zip(self.blocks, self.bounds, strict=True)])

    def _transpose(self) -> Operator:
        return DirectSum(*(b.T for b in self.blocks))

    def _flops(self) -> int:
        return sum(b._flops() for b in self.blocks)

    def _expression(self) -> str:
        return f"block_diag({', '.join(b._expression() for b in self.blocks)})"


def hstack(operators: Sequence[Any]) -> Operator:
    """Operators side by side, ``[A B ...]``; arrays are taken as dense operators.

    Raises
    ------
    ValueError
        If numbers of rows differ; the message names the shapes.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.hstack([sm.Identity(2), sm.Zero((2, 3))]).shape
    (2, 5)
    """
    blocks = operators_of(operators, "hstack")
    return blocks[0] if len(blocks) == 1 else HorizontalStack(*blocks)


def vstack(operators: Sequence[Any]) -> Operator:
    """Operators on top of each other; arrays are taken as dense operators.

    Raises
    ------
    ValueError
        If numbers of columns differ; the message names the shapes.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.vstack([sm.Identity(2), sm.Zero((3, 2))]).shape
    (5, 2)
    """
    blocks = operators_of(operators, "vstack")
    return blocks[0] if len(blocks) == 1 else VerticalStack(*blocks)


def block_diag(*operators: Any) -> Operator:
    """Operators along the diagonal, zero elsewhere; arrays are taken as dense operators.

    Dense blocks of one shape become one :class:`BlockDiagonal`.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.block_diag([[1.0, 2.0]], [[3.0, 4.0]]), sm.block_diag(sm.Identity(2), [[1.0]]).shape
    (<BlockDiagonal(2x4, patterns (2,1,2,1)): 2x4 float64>, (3, 3))
    """
    blocks = operators_of(operators, "block_diag")
    if len(blocks) == 1:
        return blocks[0]
    result = rules.find("block_diag", tuple(blocks))
    return DirectSum(*blocks) if result is NotImplemented else result


def _concat(parts: list[Array]) -> Array:
    xp = arrays.namespace(parts[0])
    lead = np.broadcast_shapes(*(tuple(p.shape[:-2]) for p in parts))
    if lead:
        parts = [xp.broadcast_to(p, (*lead, *p.shape[-2:])) for p in parts]
    return xp.concat(parts, axis=-2)


def _bounds(sizes: Iterable[int]) -> tuple[tuple[int, int], ...]:
    bounds, start = [], 0
    for size in sizes:
        bounds.append((start, start + size))
        start += size
    return tuple(bounds)
