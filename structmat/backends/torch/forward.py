"""A batch through a chain of block factors: composed of differentiable operations, or in chunks without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from structmat.backends.torch import views
from structmat.backends.torch.layout import Layout

CACHE_BYTES = (
    4 << 20
)  # of all intermediates of a chunk of the batch; measured at d = 512 to 8192: as fast as more, or faster
LEAST_CHUNK = 128  # rows: thinner products than this do not pay for their blocks


def composed(
    x: Tensor, bias: Tensor | None, layout: Layout, factors: Sequence[Tensor], columns: bool = False
) -> Tensor:
    """``x A^T + bias`` for rows ``(B, n)``, or ``A x + bias``, by ``bmm`` and views alone: compiles, exports, transforms."""
    if layout.plain and not columns:
        for factor in reversed(factors[1:]):
            x = functional.linear(x, factor[0])
        return functional.linear(x, factors[0][0], bias)
    z = composed_inputs(x, layout, factors, columns)[0]
    end = layout.outs[0]
    if columns:
        y = views.reordered(views.flat(torch.bmm(factors[0], z), end), end.order, True)
        y = y if layout.rows == end.size else y[: layout.rows].contiguous()
        return y if bias is None else y + bias[:, None]
    y = views.rows_of_blocks(torch.bmm(z.transpose(1, 2), factors[0].transpose(1, 2)), end)
    y = views.reordered(y, end.order)
    y = y if layout.rows == end.size else y[:, : layout.rows].contiguous()
    return y if bias is None else y + bias


def composed_inputs(x: Tensor, layout: Layout, factors: Sequence[Tensor], columns: bool = False) -> list[Tensor]:
    """What every factor is applied to, ``(blocks, c, B)``, left to right, by operations that can be differentiated."""
    z = views.entered(x, layout, columns)
    inputs = [z]
    for i in range(len(factors) - 1, 0, -1):
        z = views.blocks(views.flat(torch.bmm(factors[i], z), layout.outs[i]), layout.ins[i - 1])
        inputs.append(z)
    return inputs[::-1]


def run(x: Tensor, bias: Tensor | None, layout: Layout, factors: Sequence[Tensor], columns: bool = False) -> Tensor:
    """The same in chunks of the batch, intermediates written where the next factor reads them; not differentiable.

    A chain of two factors in the contiguous order is two ``bmm`` and no copy.
    """
    if layout.plain and not columns:
        return composed(x, bias, layout, factors)
    batch = x.shape[1 if columns else 0]
    y = x.new_empty((layout.rows, batch) if columns else (batch, layout.rows))
    for part in chunks(layout, x, columns):
        z = inputs(x[part], layout, factors, columns)[0]
        if columns:
            views.write_columns(factors[0], z, y[part], layout.outs[0], layout.rows)
        else:
            views.write_rows(z.transpose(1, 2), factors[0].transpose(1, 2), y[part], layout.outs[0], layout.rows)
        if bias is not None:
            y[part] += bias[:, None] if columns else bias
    return y


def inputs(x: Tensor, layout: Layout, factors: Sequence[Tensor], columns: bool = False) -> list[Tensor]:
    """What every factor is applied to, ``(blocks, c, B)``, left to right."""
    z = views.packed(views.entered(x, layout, columns))
    found = [z]
    for i in range(len(factors) - 1, 0, -1):
        z = views.packed(views.blocks(views.product(factors[i], z, layout.outs[i]), layout.ins[i - 1]))
        found.append(z)
    return found[::-1]


def chunks(layout: Layout, x: Tensor, columns: bool = False) -> list[tuple[slice, ...]]:
    """Parts of the batch that go through the chain one at a time, as indices; all of it where there is no CPU cache."""
    batch = x.shape[1 if columns else 0]
    step = max(batch, 1)
    if x.device.type == "cpu":
        entries = layout.ins[-1].size + sum(end.size for end in layout.outs)
        step = min(step, max(LEAST_CHUNK, CACHE_BYTES // max(1, entries * x.itemsize)))
        step = -(-batch // -(-batch // step)) if batch else step  # equal parts: no thin one is left at the end
    parts = [slice(start, start + step) for start in range(0, batch, step)]
    if len(parts) == 1:
        parts = [slice(None)]
    return [(slice(None), part) if columns else (part,) for part in parts]
