"""Programs of operators made of operators, and the program of a spec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structmat.backends.base import ChainLayout, cheapest_order
from structmat.nn.chain_program import ChainProgram
from structmat.nn.fft_programs import CirculantProgram, FourierProgram, ToeplitzProgram
from structmat.nn.leaf_programs import (
    BlockSparseProgram,
    DenseProgram,
    DiagonalProgram,
    InterpolativeBlocksProgram,
    InterpolativeProgram,
    PermutationProgram,
    ZeroProgram,
)
from structmat.nn.program import Factor, Program
from structmat.nn.spec import Spec, build, family_of, slots_of
from structmat.patterns import AxisOrder, Pattern
from structmat.structures.block_sparse import BlockSparse
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal, Identity, Zero
from structmat.structures.interpolative import Interpolative
from structmat.structures.interpolative_blocks import InterpolativeBlocks
from structmat.structures.kronecker import Kronecker
from structmat.structures.permutation import Permutation
from structmat.structures.toeplitz import Circulant, Toeplitz
from structmat.structures.transforms import Fourier


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


class StackProgram(Program):
    """Operators side by side, on top of each other, or along the diagonal."""

    def __init__(self, parts: Sequence[Program], down: bool, across: bool) -> None:
        self.parts, self.down, self.across = tuple(parts), down, across
        heights, widths = [p.shape[0] for p in parts], [p.shape[1] for p in parts]
        self.widths = widths
        self.shape = (sum(heights) if down else heights[0], sum(widths) if across else widths[0])
        self.flops = sum(p.flops for p in parts) + (0 if down else (len(parts) - 1) * heights[0])
        terms = 1 if down else len(parts)
        self.factors = tuple(f._replace(terms=f.terms * terms) for p in parts for f in p.factors)

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Every operator on its part of the features, results joined or added up."""
        inputs = x.split(self.widths, 1) if self.across else [x] * len(self.parts)
        results = [p.rows(part.contiguous(), None, values, places) for p, part in zip(self.parts, inputs, strict=True)]
        y = torch.cat(results, 1) if self.down else sum(results[1:], results[0])
        return y if bias is None else y + bias


class SliceProgram(Program):
    """Rows and columns of an operator; a column that is taken twice adds up."""

    def __init__(self, part: Program, rows: list[int], cols: list[int]) -> None:
        self.part, self.row_places, self.col_places = part, rows, cols
        self.shape, self.flops, self.factors = (len(rows), len(cols)), part.flops, part.factors

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Features to their places in the whole, the whole operator, and the rows that are asked for."""
        full = x.new_zeros(x.shape[0], self.part.shape[1])
        full = full.index_add(1, torch.tensor(self.col_places, device=x.device), x)
        y = self.part.rows(full, None, values, places)
        y = y.index_select(1, torch.tensor(self.row_places, device=x.device))
        return y if bias is None else y + bias


class OperatorProgram(Program):
    """An operator of somebody else's family: rebuilt around the tensors and asked for its rows.

    Raises ``TypeError`` for one that is not applied to tensors, such as an inverse without a closed form. ``torch.compile`` may
    break its graph there, and ``torch.export`` needs ``strict=False``.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.shapes, places = slots_of(spec)
        meta = [torch.empty(0, device="meta")] * (1 + max(self.shapes, default=-1))
        index = [torch.empty(p, dtype=torch.long, device="meta") for p in places.values()]
        operator = build(spec, self._shaped(meta, empty=True), index)
        self.shape, self.flops = (operator.shape[0], operator.shape[1]), operator.flops()
        self.factors = tuple(Factor(s, self.shape[1], self.shape[0], last=i == 0) for i, s in enumerate(self.shapes))
        values = [torch.zeros(self.shapes.get(slot, ())) for slot in range(len(meta))]
        try:
            self.rows(torch.zeros(1, self.shape[1]), None, values, [torch.zeros_like(i, device="cpu") for i in index])
        except NotImplementedError as error:
            raise TypeError(f"{operator} is not applied to torch tensors and cannot be a layer: {error}") from error

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
    if name in _COMBINATIONS:
        return _COMBINATIONS[name]([program_of(s) for s in fields[0]["tuple"]])
    if name == "Scaled":
        scalar, part = fields
        stored = isinstance(scalar, dict) and "slot" in scalar
        value = complex(*scalar["complex"]) if isinstance(scalar, dict) and "complex" in scalar else scalar
        return ScaledProgram(value, scalar["slot"] if stored else None, program_of(part))
    if name == "Slice":
        part, rows, cols = fields
        return SliceProgram(program_of(part), rows["indices"], cols["indices"])
    family = family_of(name)
    known = next((cls for cls in family.__mro__ if cls in _PROGRAMS), None)
    if known is None or (family.fields, family._matmat) != (known.fields, known._matmat):  # somebody's own product
        return OperatorProgram(spec)
    return _PROGRAMS[known](fields)


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


def _toeplitz(fields: list[Any]) -> Program:
    column, row = fields
    return ToeplitzProgram(column["slot"], row["slot"], (column["values"][0], row["values"][0]))


def _circulant(fields: list[Any]) -> Program:
    return CirculantProgram(fields[0]["slot"], fields[0]["values"][0])


def _fourier(fields: list[Any]) -> Program:
    size, _, conjugate = fields
    return FourierProgram(size, conjugate, Fourier(size).flops())


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
    Toeplitz: _toeplitz,
    Circulant: _circulant,
    Fourier: _fourier,
}
_COMBINATIONS: dict[str, Any] = {
    "Sum": SumProgram,
    "Product": ProductProgram,
    "HorizontalStack": lambda parts: StackProgram(parts, down=False, across=True),
    "VerticalStack": lambda parts: StackProgram(parts, down=True, across=False),
    "DirectSum": lambda parts: StackProgram(parts, down=True, across=True),
}
