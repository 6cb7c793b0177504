"""Programs: how the rows of a batch go through an operator of every family, on tensors that live elsewhere.

A program is made once from a spec and holds integers only. ``rows(x, bias, values, places)`` takes rows ``(B, n)`` and the
values by slot, and is made of torch operations that can be compiled, exported and differentiated.
"""

# ruff: noqa: ARG002 (every program takes the same arguments)
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from structmat.backends.base import ChainLayout, cheapest_order
from structmat.nn import functions
from structmat.nn.inference import Inference
from structmat.nn.spec import Spec, build, family_of, slots_of
from structmat.patterns import AxisOrder, Pattern
from structmat.structures.block_sparse import BlockSparse
from structmat.structures.chain import Chain, ceil_div
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal, Identity, Zero
from structmat.structures.interpolative import Interpolative
from structmat.structures.interpolative_blocks import InterpolativeBlocks
from structmat.structures.kronecker import Kronecker
from structmat.structures.permutation import Permutation


class Factor(NamedTuple):
    """What the initialisation and the learning rate of one array of values follow from."""

    slot: int
    fan_in: float  # contraction size of the factor as it is applied
    fan_out: float
    terms: int = 1  # of the sum that it is in
    last: bool = False  # applied last in its product: zero there makes the term zero


class Program:
    """One node: its flops per row, its factors, and the rows that it makes."""

    shape: tuple[int, int]  # logical (m, n)
    flops: int
    factors: tuple[Factor, ...]

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """``x A^T + bias`` for ``x`` of shape ``(B, n)``; returns contiguous ``(B, m)``."""
        raise NotImplementedError


class ChainProgram(Program):
    """A product of Kronecker-sparse factors."""

    def __init__(self, slots: Sequence[int], chain: ChainLayout) -> None:
        self.slots, self.shape = tuple(slots), (chain.rows, chain.cols)
        self.layout = layout = functions.layout_of(chain)
        self.blocks = tuple((p.a * p.d, p.b, p.c) for p in layout.patterns)
        self.inference = Inference(chain)
        self.flops = 2 * sum(p.nparams for p in layout.patterns)
        self.factors = tuple(
            Factor(slot, p.c, p.b, last=i == 0) for i, (slot, p) in enumerate(zip(slots, layout.patterns, strict=True))
        )

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Through the training path where the tensors are plain, else composed."""
        factors = [values[slot].reshape(blocks) for slot, blocks in zip(self.slots, self.blocks, strict=True)]
        if functions.eager(x, bias, *(values[slot] for slot in self.slots)):
            y = self.inference.rows(x, bias, factors)
            return functions.chain(x, bias, self.layout, factors) if y is None else y
        return functions.composed_chain(x, bias, self.layout, factors)


class KroneckerProgram(Program):
    """A Kronecker product of programs: the digit of one factor at a time becomes the feature axis."""

    def __init__(self, parts: Sequence[Program]) -> None:
        self.parts = tuple(parts)
        self.shape = (math.prod(p.shape[0] for p in parts), math.prod(p.shape[1] for p in parts))
        self.order = cheapest_order([p.shape for p in parts])
        self.factors = tuple(f._replace(last=False) for p in parts for f in p.factors)
        if len(self.factors):
            last = self.order[-1]
            start = sum(len(p.factors) for p in parts[:last])
            marked = [f.last for f in parts[last].factors]
            self.factors = tuple(
                f._replace(last=start <= i < start + len(marked) and marked[i - start])
                for i, f in enumerate(self.factors)
            )
        sizes, flops = [p.shape[1] for p in parts], 0
        for i in self.order:
            flops += math.prod(sizes[:i]) * math.prod(sizes[i + 1 :]) * parts[i].flops
            sizes[i] = parts[i].shape[0]
        self.flops = flops

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """One product per factor, in the order of least work."""
        batch, sizes = x.shape[0], [p.shape[1] for p in self.parts]
        for i in self.order:
            part = self.parts[i]
            before, after = math.prod(sizes[:i]), math.prod(sizes[i + 1 :])
            x = x.reshape(batch * before, sizes[i], after).transpose(1, 2)
            x = part.rows(x.reshape(batch * before * after, sizes[i]), None, values, places)
            sizes[i] = part.shape[0]
            x = x.reshape(batch * before, after, sizes[i]).transpose(1, 2)
        x = x.reshape(batch, self.shape[0])
        return x if bias is None else x + bias


class DenseProgram(Program):
    """A dense matrix."""

    def __init__(self, slot: int, shape: tuple[int, int]) -> None:
        self.slot, self.shape, self.flops = slot, shape, 2 * shape[0] * shape[1]
        self.factors = (Factor(slot, shape[1], shape[0], last=True),)

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """As ``nn.Linear``."""
        return functional.linear(x, values[self.slot], bias)


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
            self.factors = (Factor(t, rank, m - rank, last=True), Factor(basis, n, rank, last=True))
        else:
            self.factors = (Factor(t, n - rank, rank), Factor(basis, rank, m, last=True))

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Two products and one gather."""
        t, basis = (values[slot] for slot in self.slots)
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


class SumProgram(Program):
    """A sum of programs."""

    def __init__(self, terms: Sequence[Program]) -> None:
        self.terms, self.shape = tuple(terms), terms[0].shape
        self.flops = sum(t.flops for t in terms) + (len(terms) - 1) * self.shape[0]
        self.factors = tuple(f._replace(terms=f.terms * len(terms)) for t in terms for f in t.factors)

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Term by term; the first brings the bias."""
        total = self.terms[0].rows(x, bias, values, places)
        for term in self.terms[1:]:
            total = total + term.rows(x, None, values, places)
        return total


class ProductProgram(Program):
    """A product of programs, applied from the right."""

    def __init__(self, parts: Sequence[Program]) -> None:
        self.parts, self.shape = tuple(parts), (parts[0].shape[0], parts[-1].shape[1])
        self.flops = sum(p.flops for p in parts)
        first = next((i for i, p in enumerate(parts) if p.factors), 0)
        self.factors = tuple(f._replace(last=f.last and i == first) for i, p in enumerate(parts) for f in p.factors)

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Part by part; the part applied last brings the bias."""
        for part in reversed(self.parts[1:]):
            x = part.rows(x, None, values, places)
        return self.parts[0].rows(x, bias, values, places)


class ScaledProgram(Program):
    """A multiple, by a number or by a stored scalar."""

    def __init__(self, scalar: Any, slot: int | None, part: Program) -> None:
        self.scalar, self.slot, self.part, self.shape = scalar, slot, part, part.shape
        self.flops = part.flops + part.shape[0]
        self.factors = part.factors if slot is None else (*part.factors, Factor(slot, 1, 1))

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Rows, then the multiple."""
        y = self.part.rows(x, None, values, places)
        y = y * (self.scalar if self.slot is None else values[self.slot])
        return y if bias is None else y + bias


class OperatorProgram(Program):
    """An operator of a family without a program of its own: rebuilt around the tensors and asked for its rows."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.shapes, places = slots_of(spec)
        meta = [torch.empty(0, device="meta")] * (1 + max(self.shapes, default=-1))
        index = [torch.empty(p, dtype=torch.long, device="meta") for p in places.values()]
        operator = build(spec, self._shaped(meta, empty=True), index)
        self.shape, self.flops = (operator.shape[0], operator.shape[1]), operator.flops()
        self.factors = tuple(Factor(s, self.shape[1], self.shape[0], last=i == 0) for i, s in enumerate(self.shapes))

    def _shaped(self, values: Sequence[Tensor], empty: bool = False) -> list[Tensor]:
        shaped = list(values)
        for slot, shape in self.shapes.items():
            shaped[slot] = torch.empty(shape, device="meta") if empty else shaped[slot].reshape(shape)
        return shaped

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """As the operator does them on tensors."""
        y = build(self.spec, self._shaped(values), places)._rows(x).contiguous()
        return y if bias is None else y + bias


# ---- from a spec ----------------------------------------------------------------------------------------------------


def program_of(spec: Spec) -> Program:
    """The program of an operator's spec."""
    name, fields = spec["family"], spec["fields"]
    if name in ("Sum", "Product"):
        parts = [program_of(s) for s in fields[0]["tuple"]]
        return SumProgram(parts) if name == "Sum" else ProductProgram(parts)
    if name == "Scaled":
        scalar, part = fields
        stored = isinstance(scalar, dict) and "slot" in scalar
        value = complex(*scalar["complex"]) if isinstance(scalar, dict) and "complex" in scalar else scalar
        return ScaledProgram(value, scalar["slot"] if stored else None, program_of(part))
    family = family_of(name)
    make = next((_PROGRAMS[cls] for cls in family.__mro__ if cls in _PROGRAMS), None)
    return OperatorProgram(spec) if make is None else make(fields)


def _chain(fields: list[Any]) -> Program:
    factors, shape, out_order, in_order = fields
    blocks = [f["values"] for f in factors["tuple"]]
    patterns = [Pattern(a, b, c, d) for a, d, b, c in blocks]
    m, n = (patterns[0].rows, patterns[-1].cols) if shape is None else shape["tuple"][-2:]
    layout = ChainLayout(tuple(patterns), m, n, _order(out_order), _order(in_order))
    return ChainProgram([f["slot"] for f in factors["tuple"]], layout)


def _kronecker(fields: list[Any]) -> Program:
    return KroneckerProgram([program_of(s) for s in fields[0]["tuple"]])


def _dense(fields: list[Any]) -> Program:
    return DenseProgram(fields[0]["slot"], tuple(fields[0]["values"]))


def _diagonal(fields: list[Any]) -> Program:
    return DiagonalProgram(fields[0]["slot"], fields[0]["values"][0])


def _block_sparse(fields: list[Any]) -> Program:
    blocks, rows, cols, shape = fields
    return BlockSparseProgram(blocks["slot"], blocks["values"], rows["indices"], cols["indices"], shape["tuple"])


def _interpolative(fields: list[Any]) -> Program:
    index, t, basis, side = fields
    (size,), (high, wide) = index["places"], basis["values"]
    shape, rank = ((size, wide), high) if side == "rows" else ((high, size), wide)
    return InterpolativeProgram(index["slot"], (t["slot"], basis["slot"]), shape, rank, side)


def _interpolative_blocks(fields: list[Any]) -> Program:
    index, t, left, shape, out_order, in_order, side = fields
    orders = (_order(out_order), _order(in_order))
    m, n = shape["tuple"][-2:]
    slots, rank, s = (t["slot"], left["slot"]), t["values"][-2], left["values"][-2]
    return InterpolativeBlocksProgram(index["slot"], index["places"], slots, rank, s, (m, n), orders, side)


def _permutation(fields: list[Any]) -> Program:
    index = fields[0]["indices"]
    return PermutationProgram(len(index), index)


def _order(field: Any) -> AxisOrder | None:
    return None if field is None else AxisOrder(tuple(field["order"][0]), tuple(field["order"][1]))


_PROGRAMS: dict[type, Any] = {
    Chain: _chain,
    Kronecker: _kronecker,
    Dense: _dense,
    Diagonal: _diagonal,
    Identity: lambda fields: PermutationProgram(fields[0]),
    Zero: lambda fields: ZeroProgram(tuple(fields[0]["tuple"][-2:])),
    BlockSparse: _block_sparse,
    Interpolative: _interpolative,
    InterpolativeBlocks: _interpolative_blocks,
    Permutation: _permutation,
}
