"""Rows and columns of a batch as the blocks of a factor: views wherever the strides allow it.

Inside, the batch is the last axis, so that every product of blocks takes strided views of its operands: ``bmm(K, z)`` with
``K`` of ``(blocks, b, c)`` and ``z`` of ``(blocks, c, B)``. Outside, samples are rows ``(B, n)`` or columns ``(n, B)``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from structmat.backends.torch.layout import End, Layout
from structmat.patterns import AxisOrder


def blocks(z: Tensor, end: End) -> Tensor:
    """Columns ``(size, B)`` as ``(blocks, inner, B)``; a view unless both ``outer`` and ``lane`` are more than 1."""
    batch = z.shape[1]
    z = z.reshape(end.outer, end.inner, end.lane, batch).permute(0, 2, 1, 3)
    return z.reshape(end.blocks, end.inner, batch)


def flat(z: Tensor, end: End) -> Tensor:
    """The inverse of :func:`blocks`; a view where ``lane`` is 1."""
    batch = z.shape[2]
    return z.reshape(end.outer, end.lane, end.inner, batch).permute(0, 2, 1, 3).reshape(end.size, batch)


def blocks_of_rows(x: Tensor, end: End) -> Tensor:
    """Rows ``(B, size)`` as ``(blocks, inner, B)``; a view where ``lane`` is 1."""
    batch = x.shape[0]
    if end.outer == 1 and end.lane > 1:
        # a transposition of two axes, which torch copies several times faster than of three
        x = x.reshape(batch * end.inner, end.lane).t().contiguous()
        return x.reshape(end.lane, batch, end.inner).transpose(1, 2)
    x = x.reshape(batch, end.outer, end.inner, end.lane).permute(1, 3, 2, 0)
    return x.reshape(end.blocks, end.inner, batch)


def rows_of_blocks(y: Tensor, end: End) -> Tensor:
    """``(blocks, B, inner)`` as contiguous rows ``(B, size)``."""
    batch = y.shape[1]
    if end.outer == 1 and end.lane > 1:
        return y.reshape(end.lane, batch * end.inner).t().reshape(batch, end.size)
    y = y.reshape(end.outer, end.lane, batch, end.inner).permute(2, 0, 3, 1)
    return y.reshape(batch, end.size)


def reordered(x: Tensor, order: AxisOrder | None, columns: bool = False) -> Tensor:
    """Rows ``(B, n)`` (or columns ``(n, B)``) with the digits of their index in another order."""
    if order is None:
        return x
    if columns:
        digits = x.reshape(*order.radices, x.shape[1]).permute(*order.axes, len(order.axes))
    else:
        digits = x.reshape(x.shape[0], *order.radices).permute(0, *(1 + i for i in order.axes))
    return digits.reshape(x.shape)


def padded(x: Tensor, size: int, columns: bool = False) -> Tensor:
    """Rows (or columns) extended by zeros to ``size``."""
    if columns:
        return x if x.shape[0] == size else functional.pad(x, (0, 0, 0, size - x.shape[0]))
    return x if x.shape[1] == size else functional.pad(x, (0, size - x.shape[1]))


def entered(x: Tensor, layout: Layout, columns: bool = False) -> Tensor:
    """The operand as blocks of the factor applied first, ``(blocks, c, B)``."""
    return _entered(x, layout.ins[-1], columns)


def entered_gradient(dy: Tensor, layout: Layout, columns: bool = False) -> Tensor:
    """The gradient of the result as that of the blocks of the factor applied last, ``(blocks, b, B)``."""
    return _entered(dy, layout.outs[0], columns)


def _entered(x: Tensor, end: End, columns: bool) -> Tensor:
    x = reordered(padded(x, end.size, columns), end.order.T if end.order else None, columns)
    return blocks(x, end) if columns else blocks_of_rows(x, end)


def packed(z: Tensor) -> Tensor:
    """Blocks as the products of half precision on the CPU want them: whole in memory, either way round; others as they are.

    oneDNN multiplies strided bfloat16 blocks 5 to 12 times slower than contiguous ones; a copy costs a fraction of a product.
    """
    if z.dtype not in (torch.bfloat16, torch.float16) or z.device.type != "cpu":
        return z
    return z.transpose(1, 2).contiguous().transpose(1, 2) if z.stride(1) == 1 else z.contiguous()


def product(factor: Tensor, z: Tensor, end: End) -> Tensor:
    """``bmm(factor, z)`` written to where it belongs in a flat ``(size, B)``; no copy unless ``outer`` and ``lane`` are > 1."""
    y = z.new_empty(end.size, z.shape[2])
    write_columns(factor, z, y, end, end.size)
    return y


def write_columns(factor: Tensor, z: Tensor, y: Tensor, end: End, size: int) -> None:
    """``bmm(factor, z)``, of ``(blocks, inner, B)``, as columns ``y`` in the order of the outside, cut to their size."""
    batch = z.shape[2]
    if end.order is not None or size != end.size:
        y.copy_(reordered(product(factor, z, end._replace(order=None)), end.order, True)[:size])
        return
    target = y.view(end.outer, end.inner, end.lane, batch).permute(0, 2, 1, 3)
    if end.outer == 1 or end.lane == 1:
        torch.bmm(factor, z, out=target.view(end.blocks, end.inner, batch))
    else:
        target.copy_(torch.bmm(factor, z).view(end.outer, end.lane, end.inner, batch))


def write_rows(left: Tensor, right: Tensor, y: Tensor, end: End, size: int) -> None:
    """``bmm(left, right)``, of ``(blocks, B, inner)``, as rows ``y`` in the order of the outside, cut to their size."""
    batch = y.shape[0]
    whole = end.order is None and size == end.size
    if end.lane == 1 and whole:
        torch.bmm(left, right, out=y.view(batch, end.outer, end.inner).transpose(0, 1))
        return
    made = torch.bmm(left, right)
    if whole and end.outer == 1:
        y.view(batch * end.inner, end.lane).copy_(made.view(end.lane, batch * end.inner).t())
    elif whole:
        target = y.view(batch, end.outer, end.inner, end.lane).permute(1, 3, 0, 2)
        target.copy_(made.view(end.outer, end.lane, batch, end.inner))
    else:
        y.copy_(reordered(rows_of_blocks(made, end), end.order)[:, :size])
