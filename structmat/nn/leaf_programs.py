"""Programs of single matrices: dense, diagonal, block-sparse, interpolative, permutations, zero."""

# ruff: noqa: ARG002 (every program takes the same arguments)
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from structmat.nn import functions
from structmat.nn.program import Factor, Program
from structmat.patterns import AxisOrder
from structmat.structures.chain import ceil_div


class DenseProgram(Program):
    """A dense matrix."""

    def __init__(self, slot: int, shape: tuple[int, int]) -> None:
        self.slot, self.shape, self.flops = slot, shape, 2 * shape[0] * shape[1]
        self.factors = (Factor(slot, shape[1], shape[0], last=True),)

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """As ``nn.Linear``."""
        return functional.linear(x, values[self.slot].reshape(self.shape), bias)  # a single row is stored as a column


class DiagonalProgram(Program):
    """A diagonal matrix."""

    def __init__(self, slot: int, size: int) -> None:
        self.slot, self.shape, self.flops = slot, (size, size), size
        self.factors = (Factor(slot, 1, 1, last=True),)

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Entry by entry."""
        y = x * values[self.slot]
        return y if bias is None else y + bias


class BlockSparseProgram(Program):
    """Dense blocks at places of a grid; one larger product per block row where every row has as many blocks."""

    def __init__(
        self, slot: int, blocks: Sequence[int], rows: list[int], cols: list[int], shape: Sequence[int]
    ) -> None:
        self.slot, self.shape = slot, (shape[-2], shape[-1])
        self.count, self.p, self.q = blocks
        self.grid = (ceil_div(self.shape[0], self.p), ceil_div(self.shape[1], self.q))
        self.block_rows, self.block_cols = rows, cols
        per_row = self.count // max(1, self.grid[0])
        regular = rows == sorted(rows) and all(rows.count(i) == per_row for i in range(self.grid[0]))
        self.per_row = per_row if regular and per_row else 0
        self.flops = 2 * self.count * self.p * self.q
        fan_in, fan_out = self.q * self.count / self.grid[0], self.p * self.count / self.grid[1]
        self.factors = (Factor(slot, fan_in, fan_out, last=True),)

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Gather block columns, multiply, add up block rows; the batch is last inside."""
        batch, (high, wide), p, q = x.shape[0], self.grid, self.p, self.q
        if wide * q != self.shape[1]:
            x = functional.pad(x, (0, wide * q - self.shape[1]))
        blocks = values[self.slot].reshape(self.count, p, q)
        cols = torch.tensor(self.block_cols, device=x.device)
        gathered = x.reshape(batch, wide, q).permute(1, 2, 0).index_select(0, cols)  # (count, q, B)
        if self.per_row:
            joined = blocks.reshape(high, self.per_row, p, q).transpose(1, 2).reshape(high, p, self.per_row * q)
            y = torch.bmm(joined, gathered.reshape(high, self.per_row * q, batch))
        else:
            rows = torch.tensor(self.block_rows, device=x.device)
            product = torch.bmm(blocks, gathered)
            y = torch.zeros(high, p, batch, dtype=product.dtype, device=x.device).index_add(0, rows, product)
        y = y.permute(2, 0, 1).reshape(batch, high * p)
        y = y if high * p == self.shape[0] else y[:, : self.shape[0]].contiguous()
        return y if bias is None else y + bias


class InterpolativeProgram(Program):
    """Low rank in interpolative form; its place array is the gather that its side needs."""

    def __init__(self, place: int, slots: tuple[int, int], shape: tuple[int, int], rank: int, side: str) -> None:
        self.place, self.slots, self.shape, self.rank, self.side = place, slots, shape, rank, side
        m, n = shape
        self.flops = 2 * rank * (m + n - rank)
        t, basis = slots
        if side == "rows":
            self.shapes = (m - rank, rank), (rank, n)
            self.factors = (Factor(t, rank, m - rank, last=True), Factor(basis, n, rank, last=True))
        else:
            self.shapes = (rank, n - rank), (m, rank)
            self.factors = (Factor(t, n - rank, rank), Factor(basis, rank, m, last=True))

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Two products and one gather."""
        t, basis = (values[slot].reshape(shape) for slot, shape in zip(self.slots, self.shapes, strict=True))
        gather, r = places[self.place], self.rank
        if self.side == "columns":
            x = x.index_select(1, gather)
            return functional.linear(x[:, :r] + functional.linear(x[:, r:], t), basis, bias)
        z = functional.linear(x, basis)
        y = torch.cat((z, functional.linear(z, t)), 1).index_select(1, gather)
        return y if bias is None else y + bias


class InterpolativeBlocksProgram(Program):
    """Monarch and Block Tensor-Train in interpolative form, columns of the blocks or rows."""

    def __init__(
        self,
        place: int,
        sizes: Sequence[int],  # k, l, p
        slots: tuple[int, int],
        rank: int,
        s: int,
        shape: tuple[int, int],
        orders: tuple[AxisOrder | None, AxisOrder | None],
        side: str,
    ) -> None:
        self.place, self.slots, self.rank, self.s, self.shape, self.side = place, slots, rank, s, shape, side
        self.k, self.l, self.p = sizes
        self.out_order, self.in_order = orders
        self.flops = 2 * self.k * self.l * rank * (s + self.p - rank)
        t, left = slots
        if side == "columns":
            self.factors = (Factor(t, self.p - rank, rank), Factor(left, self.k * rank, s, last=True))
        else:
            self.factors = (Factor(t, rank, self.p - rank, last=True), Factor(left, s, self.k * rank, last=True))

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Every block's stored columns, and what the others add to them."""
        k, l, p, r, s, batch = self.k, self.l, self.p, self.rank, self.s, x.shape[0]
        t = values[self.slots[0]].reshape(k * l, r, p - r)
        left = values[self.slots[1]].reshape(l, s, k * r)
        gather = places[self.place].reshape(k * l, p)
        if self.side == "columns":
            x = functions.padded(x, k * p)
            x = functions.reordered(x, self.in_order)
            start = p * torch.arange(k, device=x.device).repeat_interleave(l)
            x = x.t().index_select(0, (gather + start[:, None]).reshape(-1)).reshape(k * l, p, batch)
            z = x[:, :r] + torch.bmm(t, x[:, r:])
            z = z.reshape(k, l, r, batch).transpose(0, 1).reshape(l, k * r, batch)
            y = torch.bmm(left, z).permute(2, 1, 0).reshape(batch, s * l)  # the row class is fast
            y = functions.reordered(y, self.out_order)
        else:
            x = functions.padded(x, l * s)
            x = functions.reordered(x, self.out_order.T if self.out_order else None)
            z = torch.bmm(left.transpose(1, 2), x.reshape(batch, s, l).permute(2, 1, 0))
            z = z.reshape(l, k, r, batch).transpose(0, 1).reshape(k * l, r, batch)
            z = torch.cat((z, torch.bmm(t.transpose(1, 2), z)), 1).reshape(k * l * p, batch)
            start = p * torch.arange(k * l, device=x.device)
            z = z.index_select(0, (gather + start[:, None]).reshape(-1))
            y = z.reshape(k, l, p, batch).sum(1).reshape(k * p, batch).t()
            y = functions.reordered(y, self.in_order.T if self.in_order else None)
        y = y[:, : self.shape[0]].contiguous()
        return y if bias is None else y + bias


class PermutationProgram(Program):
    """``y = x[index]``, and the identity without an index."""

    def __init__(self, size: int, index: list[int] | None = None) -> None:
        self.shape, self.flops, self.factors, self.index = (size, size), 0, (), index

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """One gather."""
        y = x if self.index is None else x.index_select(1, torch.tensor(self.index, device=x.device))
        return y if bias is None else y + bias


class ZeroProgram(Program):
    """The zero matrix."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape, self.flops, self.factors = shape, 0, ()

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Zeros, and the bias."""
        y = x.new_zeros(x.shape[0], self.shape[0])
        return y if bias is None else y + bias
