"""Gradients of a chain: of its operand, its bias and its factors, with the intermediates computed again.

For ``y = K_1 ... K_L x`` and the gradient ``g`` of ``y``: ``dK_i = g_i z_i^T`` and ``g_{i+1} = K_i^T g_i`` with ``z_i`` what
factor ``i`` was applied to. Two factors: one product again and four more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structmat.backends.torch import forward, views
from structmat.backends.torch.layout import Layout


def gradients(
    x: Tensor, dy: Tensor, layout: Layout, factors: Sequence[Tensor], needs: Sequence[bool], columns: bool = False
) -> list[Tensor | None]:
    """Gradients of the operand, the bias and the factors where ``needs`` says so, chunk by chunk; not differentiable."""
    x, factors = conjugated(x, factors)
    parts = forward.chunks(layout, x, columns)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    dbias = dy.sum(1 if columns else 0) if needs[1] else None
    if len(parts) == 1 and x.numel() and dy.numel():
        return [dx, dbias, *_walk(x, dy, layout, factors, needs[2:], columns, dx)]
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    totals = [
        torch.zeros_like(f, dtype=wide, memory_format=torch.contiguous_format) if need else None
        for f, need in zip(factors, needs[2:], strict=True)
    ]
    for part in parts:
        rows = None if dx is None else dx[part]
        _walk(x[part], dy[part], layout, factors, needs[2:], columns, rows, totals)
    return [dx, dbias, *(t if t is None else t.to(x.dtype) for t in totals)]


def _walk(
    x: Tensor,
    dy: Tensor,
    layout: Layout,
    factors: Sequence[Tensor],
    needs: Sequence[bool],
    columns: bool,
    dx: Tensor | None,
    totals: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """One chunk: write ``dx``, and return the gradients of the factors or add them to ``totals``."""
    last = len(factors) - 1
    deepest = last if dx is not None else max((i for i, need in enumerate(needs) if need), default=-1)
    inputs = _inputs_for(x, layout, factors, needs, columns)
    g = views.packed(views.entered_gradient(_strided(dy), layout, columns))
    found: list[Tensor | None] = []
    for i, (factor, z) in enumerate(zip(factors, inputs, strict=True)):
        found.append(_outer(g, z, totals[i] if totals else None) if needs[i] and z is not None else None)
        if i < min(last, deepest):
            g = views.packed(views.blocks(views.product(factor.transpose(1, 2), g, layout.ins[i]), layout.outs[i + 1]))
        elif i == last and dx is not None and columns:
            views.write_columns(factor.transpose(1, 2), g, dx, layout.ins[-1], layout.cols)
        elif i == last and dx is not None:
            views.write_rows(g.transpose(1, 2), factor, dx, layout.ins[-1], layout.cols)
    return found


def _outer(g: Tensor, z: Tensor, total: Tensor | None) -> Tensor:
    """``g z^T`` of every block, added to ``total`` where there is one."""
    if total is None:
        return torch.bmm(g, z.transpose(1, 2))
    if total.dtype == g.dtype:
        return total.baddbmm_(g, z.transpose(1, 2))
    total += torch.bmm(g, z.transpose(1, 2))
    return total


def _inputs_for(
    x: Tensor, layout: Layout, factors: Sequence[Tensor], needs: Sequence[bool], columns: bool
) -> list[Tensor | None]:
    """What the factors are applied to, as far up the chain as a factor wants its gradient."""
    first = min((i for i, need in enumerate(needs) if need), default=len(factors))
    found: list[Tensor | None] = [None] * len(factors)
    if first == len(factors):
        return found
    z = views.packed(views.entered(x, layout, columns))
    found[-1] = z
    for i in range(len(factors) - 1, first, -1):
        z = views.packed(views.blocks(views.product(factors[i], z, layout.outs[i]), layout.ins[i - 1]))
        found[i - 1] = z
    return found


def differentiable_gradients(
    x: Tensor, dy: Tensor, layout: Layout, factors: Sequence[Tensor], columns: bool = False
) -> list[Tensor]:
    """Gradients of the operand, the bias and the factors by operations that can be differentiated again."""
    x, factors = conjugated(x, factors)
    inputs = forward.composed_inputs(x, layout, factors, columns)
    g = views.entered_gradient(dy, layout, columns)
    found = []
    for i, factor in enumerate(factors):
        found.append(torch.bmm(g, inputs[i].transpose(1, 2)))
        g = torch.bmm(factor.transpose(1, 2), g)  # (blocks, c, B)
        if i + 1 < len(factors):
            g = views.blocks(views.flat(g, layout.ins[i]), layout.outs[i + 1])
    end = layout.ins[-1]
    if columns:
        dx = views.reordered(views.flat(g, end), end.order, True)[: layout.cols]
    else:
        dx = views.reordered(views.rows_of_blocks(g.transpose(1, 2), end), end.order)[:, : layout.cols]
    return [dx.contiguous(), dy.sum(1 if columns else 0), *found]


def conjugated(x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """What the gradients are taken with: torch's are those of the conjugated map."""
    if not x.is_complex():
        return x, factors
    return x.conj().resolve_conj(), [f.conj().resolve_conj() for f in factors]


def _strided(dy: Tensor) -> Tensor:
    """The gradient with a stride 1, as products take it without a copy: an expanded one is written out."""
    return dy if 1 in dy.stride() and 0 not in dy.stride() else dy.contiguous()
