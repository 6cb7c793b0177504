"""Rows through a chain of block factors: one composed form of it, and a training path that saves no more than its input.

Samples are rows outside, ``(B, n)``; inside, the batch is the last axis, so that every product of blocks takes strided views
of its operands: ``bmm(K, z)`` with ``K`` of ``(blocks, b, c)`` and ``z`` of ``(blocks, c, B)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from structmat.backends.base import ChainLayout
from structmat.patterns import AxisOrder, Pattern

CACHE_BYTES = 8 << 20  # of all intermediates of a chunk of the batch; measured: flat from 6 to 16 MiB, worse beyond
LEAST_CHUNK = 32  # rows: thinner products than this do not pay for their blocks


class End(NamedTuple):
    """How a flat axis of features is seen by a factor: as ``(outer, inner, lane)``, its blocks being ``(outer, lane)``."""

    outer: int
    inner: int
    lane: int
    order: AxisOrder | None = None  # what is still to be transposed outside of this

    @property
    def size(self) -> int:
        """Length of the flat axis."""
        return self.outer * self.inner * self.lane


class Layout(NamedTuple):
    """A chain without its values, ready to be walked: factors left to right, the last applied first."""

    patterns: tuple[Pattern, ...]
    rows: int  # logical sizes
    cols: int
    ins: tuple[End, ...]  # of every factor
    outs: tuple[End, ...]

    @property
    def plain(self) -> bool:
        """Whether every factor is one block, as large as the operator: a product of dense matrices."""
        first, last = self.outs[0], self.ins[-1]
        whole = (first.size, last.size) == (self.rows, self.cols) and not (first.order or last.order)
        return whole and all(p.a * p.d == 1 for p in self.patterns)


def layout_of(chain: ChainLayout) -> Layout:
    """The layout of a chain; an axis order that exchanges two digits of a factor's own becomes a stride."""
    patterns, rows, cols, out_order, in_order = chain
    ins, outs = [End(p.a, p.c, p.d) for p in patterns], [End(p.a, p.b, p.d) for p in patterns]
    ins[-1] = _absorbed(ins[-1], in_order.T if in_order else None)
    outs[0] = _absorbed(outs[0], out_order)
    return Layout(patterns, rows, cols, tuple(ins), tuple(outs))


def _absorbed(end: End, order: AxisOrder | None) -> End:
    """The end as it is seen on the other side of ``order``, from the inside to the outside."""
    if order is None:
        return end
    digits = [i for i in order.axes if order.radices[i] > 1]
    radices = tuple(r for r in order.radices if r > 1)
    if len(digits) == 2 and digits[0] > digits[1]:
        if end.outer == 1 and radices == (end.inner, end.lane):
            return End(end.lane, end.inner, 1)
        if end.lane == 1 and radices == (end.outer, end.inner):
            return End(1, end.inner, end.outer)
    return end._replace(order=order)


# ---- views ----------------------------------------------------------------------------------------------------------


def _blocks(z: Tensor, end: End) -> Tensor:
    """``(size, B)`` as ``(blocks, inner, B)``; a view unless both ``outer`` and ``lane`` are more than 1."""
    batch = z.shape[1]
    z = z.reshape(end.outer, end.inner, end.lane, batch).permute(0, 2, 1, 3)
    return z.reshape(end.outer * end.lane, end.inner, batch)


def _flat(z: Tensor, end: End) -> Tensor:
    """The inverse of :func:`_blocks`; a view where ``lane`` is 1."""
    batch = z.shape[2]
    return z.reshape(end.outer, end.lane, end.inner, batch).permute(0, 2, 1, 3).reshape(end.size, batch)


def _blocks_of_rows(x: Tensor, end: End) -> Tensor:
    """Rows ``(B, size)`` as ``(blocks, inner, B)``; a view where ``lane`` is 1."""
    batch = x.shape[0]
    if (
        end.outer == 1 and end.lane > 1
    ):  # a transposition of two axes, which torch copies several times faster than of three
        x = x.reshape(batch * end.inner, end.lane).t().contiguous()
        return x.reshape(end.lane, batch, end.inner).transpose(1, 2)
    x = x.reshape(batch, end.outer, end.inner, end.lane).permute(1, 3, 2, 0)
    return x.reshape(end.outer * end.lane, end.inner, batch)


def _rows_of_blocks(y: Tensor, end: End) -> Tensor:
    """``(blocks, B, inner)`` as contiguous rows ``(B, size)``."""
    batch = y.shape[1]
    if end.outer == 1 and end.lane > 1:
        return y.reshape(end.lane, batch * end.inner).t().reshape(batch, end.size)
    y = y.reshape(end.outer, end.lane, batch, end.inner).permute(2, 0, 3, 1)
    return y.reshape(batch, end.size)


def reordered(x: Tensor, order: AxisOrder | None) -> Tensor:
    """Rows ``(B, n)`` with the digits of their index in another order."""
    if order is None:
        return x
    digits = x.reshape(x.shape[0], *order.radices).permute(0, *(1 + i for i in order.axes))
    return digits.reshape(x.shape)


def padded(x: Tensor, size: int) -> Tensor:
    """Rows extended by zeros to ``size``."""
    return x if x.shape[1] == size else functional.pad(x, (0, size - x.shape[1]))


def _entered(x: Tensor, layout: Layout) -> Tensor:
    """Rows extended by zeros to the chain's own size, and brought into its order."""
    end = layout.ins[-1]
    x = padded(x, end.size)
    return reordered(x, end.order.T if end.order else None)


def _left(y: Tensor, layout: Layout) -> Tensor:
    """Rows in the order of the outside, and cut to the logical size."""
    y = reordered(y, layout.outs[0].order)
    return y if layout.rows == layout.outs[0].size else y[:, : layout.rows].contiguous()


# ---- composed of differentiable operations ----------------------------------------------------------------------------


def composed_chain(x: Tensor, bias: Tensor | None, layout: Layout, factors: Sequence[Tensor]) -> Tensor:
    """``x A^T + bias`` for rows ``(B, n)`` by ``bmm`` and views alone: can be compiled, exported and transformed."""
    if layout.plain:
        for factor in reversed(factors[1:]):
            x = functional.linear(x, factor[0])
        return functional.linear(x, factors[0][0], bias)
    z = _blocks_of_rows(_entered(x, layout), layout.ins[-1])
    for i in range(len(factors) - 1, 0, -1):
        z = _blocks(_flat(torch.bmm(factors[i], z), layout.outs[i]), layout.ins[i - 1])
    y = _left(_rows_of_blocks(torch.bmm(z.transpose(1, 2), factors[0].transpose(1, 2)), layout.outs[0]), layout)
    return y if bias is None else y + bias


# ---- the training path --------------------------------------------------------------------------------------------------


def chain(x: Tensor, bias: Tensor | None, layout: Layout, factors: Sequence[Tensor]) -> Tensor:
    """``x A^T + bias`` for rows ``(B, n)``: batch through the cache, intermediates computed again in the backward pass.

    Saves ``x`` alone. For tensors without a transform around them; see :func:`eager`. Differentiable twice.
    """
    if layout.plain or x.shape[0] == 0:
        return composed_chain(x, bias, layout, factors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *factors)):
        return _Chain.apply(x, bias, layout, *factors)  # pyright: ignore[reportReturnType]
    return _forward(x, bias, layout, factors)


def eager(*tensors: Tensor | None) -> bool:
    """Whether tensors are plain and nothing traces, transforms or counts: what an autograd Function is safe with."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    transform = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    if transform is not None:  # vmap, grad, jvp, functionalize
        return False
    if (
        torch._C._len_torch_dispatch_stack() or torch._C._is_torch_function_mode_enabled()
    ):  # FLOP counters, fake tensors
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layout: Layout, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.layout, ctx.has_bias = layout, bias is not None
        return _forward(x, bias, layout, factors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *factors = ctx.saved_tensors
        (dy,) = gradients
        if x.is_complex():  # torch's gradients are those of the conjugated map
            x, factors = x.conj().resolve_conj(), [f.conj().resolve_conj() for f in factors]
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], *ctx.needs_input_grad[3:])
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            dx, *dfactors = _differentiable_gradients(x, dy, ctx.layout, factors)
            dbias = dy.sum(0) if needs[1] else None
        else:
            dx, dbias, *dfactors = _gradients(x, dy, ctx.layout, factors, needs)
        return dx, dbias, None, *dfactors


def _chunk(layout: Layout, x: Tensor) -> int:
    """Rows that go through the chain at a time."""
    batch = x.shape[0]
    if x.device.type != "cpu":
        return batch
    entries = layout.ins[-1].size + sum(end.size for end in layout.outs)
    return min(batch, max(LEAST_CHUNK, CACHE_BYTES // (entries * x.itemsize)))


def _forward(x: Tensor, bias: Tensor | None, layout: Layout, factors: Sequence[Tensor]) -> Tensor:
    batch, step = x.shape[0], _chunk(layout, x)
    y = x.new_empty(batch, layout.rows)
    for start in range(0, batch, step):
        rows = x[start : start + step]
        z = _inputs(rows, layout, factors)[0]
        _last(z, y[start : start + step], layout, factors[0])
        if bias is not None:
            y[start : start + step] += bias
    return y


def _inputs(x: Tensor, layout: Layout, factors: Sequence[Tensor]) -> list[Tensor]:
    """What every factor is applied to, ``(blocks, c, B)``, left to right."""
    z = _blocks_of_rows(_entered(x, layout), layout.ins[-1])
    inputs = [z]
    for i in range(len(factors) - 1, 0, -1):
        z = _blocks(_product(factors[i], z, layout.outs[i]), layout.ins[i - 1])
        inputs.append(z)
    return inputs[::-1]


def _product(factor: Tensor, z: Tensor, end: End) -> Tensor:
    """``bmm(factor, z)`` written to where it belongs in a flat ``(size, B)``."""
    batch = z.shape[2]
    flat = z.new_empty(end.size, batch)
    target = flat.view(end.outer, end.inner, end.lane, batch).permute(0, 2, 1, 3)
    if end.outer == 1 or end.lane == 1:
        torch.bmm(factor, z, out=target.view(end.outer * end.lane, end.inner, batch))
    else:
        target.copy_(torch.bmm(factor, z).view(end.outer, end.lane, end.inner, batch))
    return flat


def _last(z: Tensor, y: Tensor, layout: Layout, factor: Tensor) -> None:
    """Write the rows ``y`` that the factor applied last makes of ``z``."""
    _write_rows(z.transpose(1, 2), factor.transpose(1, 2), y, layout.outs[0], layout.rows)


def _write_rows(left: Tensor, right: Tensor, y: Tensor, end: End, size: int) -> None:
    """``bmm(left, right)``, of ``(blocks, B, inner)``, as rows ``y`` in the order of the outside, cut to their size."""
    batch = y.shape[0]
    if end.lane == 1 and end.order is None and size == end.size:
        torch.bmm(left, right, out=y.view(batch, end.outer, end.inner).transpose(0, 1))
        return
    product = torch.bmm(left, right)
    if end.order is None and size == end.size and end.outer == 1:
        y.view(batch * end.inner, end.lane).copy_(product.view(end.lane, batch * end.inner).t())
        return
    if end.order is None and size == end.size:
        target = y.view(batch, end.outer, end.inner, end.lane).permute(1, 3, 0, 2)
        target.copy_(product.view(end.outer, end.lane, batch, end.inner))
        return
    y.copy_(reordered(_rows_of_blocks(product, end), end.order)[:, :size])


def _outside(dy: Tensor, layout: Layout) -> Tensor:
    """The gradient of the rows as that of the blocks of the factor applied last, ``(blocks, b, B)``."""
    end = layout.outs[0]
    dy = padded(dy, end.size)
    return _blocks_of_rows(reordered(dy, end.order.T if end.order else None), end)


def _gradients(
    x: Tensor, dy: Tensor, layout: Layout, factors: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the rows, the bias and the factors, chunk by chunk."""
    batch, step = x.shape[0], _chunk(layout, x)
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) and step < batch else None
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    dbias = dy.sum(0) if needs[1] else None
    totals = [
        torch.zeros_like(f, dtype=wide, memory_format=torch.contiguous_format) if need else None
        for f, need in zip(factors, needs[2:], strict=True)
    ]
    for start in range(0, batch, step):
        stop = start + step
        inputs = _inputs(x[start:stop], layout, factors)
        g = _outside(dy[start:stop].contiguous(), layout)
        for i, (factor, total) in enumerate(zip(factors, totals, strict=True)):
            if total is not None and wide is not None:
                total += torch.bmm(g, inputs[i].transpose(1, 2))
            elif total is not None:
                total.baddbmm_(g, inputs[i].transpose(1, 2))
            if i + 1 < len(factors):
                g = _blocks(_product(factor.transpose(1, 2), g, layout.ins[i]), layout.outs[i + 1])
            elif dx is not None:
                _write_rows(g.transpose(1, 2), factor, dx[start:stop], layout.ins[-1], layout.cols)
    return [dx, dbias, *(t if t is None else t.to(x.dtype) for t in totals)]


def _differentiable_gradients(x: Tensor, dy: Tensor, layout: Layout, factors: Sequence[Tensor]) -> list[Tensor]:
    """The same gradients by operations that can be differentiated again."""
    inputs = [_blocks_of_rows(_entered(x, layout), layout.ins[-1])]
    for i in range(len(factors) - 1, 0, -1):
        inputs.append(_blocks(_flat(torch.bmm(factors[i], inputs[-1]), layout.outs[i]), layout.ins[i - 1]))
    inputs.reverse()
    g = _outside(dy, layout)
    gradients = []
    for i, factor in enumerate(factors):
        gradients.append(torch.bmm(g, inputs[i].transpose(1, 2)))
        g = torch.bmm(factor.transpose(1, 2), g)  # (blocks, c, B)
        if i + 1 < len(factors):
            g = _blocks(_flat(g, layout.ins[i]), layout.outs[i + 1])
    end = layout.ins[-1]
    dx = reordered(_rows_of_blocks(g.transpose(1, 2), end), end.order)[:, : layout.cols]
    return [dx, *gradients]
