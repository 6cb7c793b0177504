"""Schemes: how the factors of one layer are spread over processes, and what these exchange to apply them.

With ``P`` processes, a layer of ``l x k`` blocks of rank ``r`` (Block Tensor-Train, Monarch) has the inner core
``(k, r, l, p)``, applied first, and the outer core ``(l, s, k, r)``. Every scheme splits one axis of each. Sources of the
pattern column, then row: Shoeybi et al., "Megatron-LM", 2019 (arXiv 1909.08053), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from structmat.nn.collectives import copied, exchanged, joined, own_part, summed
from structmat.nn.program import Program
from structmat.nn.programs import program_of
from structmat.nn.spec import Spec, describe, stored_shape
from structmat.patterns import AxisOrder
from structmat.structures.chain import Chain


class Held(NamedTuple):
    """How a factor is held: its shape, a view of that in which the layer stores it, and the axis that is split."""

    shape: tuple[int, ...]
    axis: int | None  # None: every process holds all of it


class Scheme:
    """One layer's way: what every process holds and computes.

    Attributes
    ----------
    held
        For every factor, by slot.
    splits_input, splits_output
        Whether a process needs its part of the features alone, and makes its part of them.
    communication
        In words, for ``repr``.
    """

    held: tuple[Held, ...]
    splits_input: bool
    splits_output: bool
    communication: str

    def rows(self, x: Tensor, values: Sequence[Tensor], mesh: DeviceMesh) -> Tensor:
        """Rows ``(B, n)`` (split: ``(B, n/P)``) times this layer's matrix, from the process's own part of the factors."""
        raise NotImplementedError


class Pieces(Scheme):
    """Every process applies a smaller layer of the same kind; the outputs are parts of the features, or terms of a sum."""

    def __init__(
        self, program: Program, held: tuple[Held, ...], splits_input: bool, splits_output: bool, adds: bool
    ) -> None:
        self.program, self.held, self.adds = program, held, adds
        self.splits_input, self.splits_output = splits_input, splits_output
        self.communication = "one all-reduce of the outputs" if adds else "none"

    def rows(self, x: Tensor, values: Sequence[Tensor], mesh: DeviceMesh) -> Tensor:
        """The smaller layer; the sum of the outputs where they are terms."""
        y = self.program.rows(x if self.splits_input else copied(x, mesh), None, values, [])
        return summed(y, mesh) if self.adds else y


class BlockScheme(Scheme):
    """Input blocks, then output blocks: one all-to-all of the intermediate in between."""

    splits_input = splits_output = True
    communication = "one all-to-all of the intermediate"

    def __init__(self, sizes: TwoFactor, processes: int) -> None:
        k, r, l, p, s = sizes
        self.inner, self.outer = (k // processes, r, l, p), (l // processes, s, k * r)
        self.held = _held(sizes, (0, 0))

    def rows(self, x: Tensor, values: Sequence[Tensor], mesh: DeviceMesh) -> Tensor:
        """``z = A_g x_g``, an exchange of input blocks for output blocks, ``y_f = B_f z_f``; the batch is last inside."""
        outer, inner = values
        (k, r, l, p), (mine, s, _), batch = self.inner, self.outer, x.shape[0]
        z = torch.bmm(inner.reshape(k, r * l, p), x.reshape(batch, k, p).permute(1, 2, 0))
        z = exchanged(z.reshape(k, r, l, batch), mesh, split=2, join=0)  # (all k, r, l/P, batch)
        z = z.permute(2, 0, 1, 3).reshape(mine, -1, batch)
        y = torch.bmm(outer.reshape(self.outer), z)
        return y.permute(2, 0, 1).reshape(batch, mine * s)


class Bottleneck(Scheme):
    """Low rank: what is between the factors is small, and exchanged.

    Split input: the inner factor's columns, whose products add up. Full input: its rows, whose products are joined.
    """

    splits_output = True

    def __init__(self, sizes: TwoFactor, splits_input: bool) -> None:
        _, rank, _, n, m = sizes
        self.splits_input, self.sizes = splits_input, (m, rank, n)
        self.held = _held(sizes, (1, 3 if splits_input else 1))
        self.communication = f"one all-{'reduce' if splits_input else 'gather'} of the {rank} intermediate features"

    def rows(self, x: Tensor, values: Sequence[Tensor], mesh: DeviceMesh) -> Tensor:
        """``V x``, made full, and the own rows of ``U`` times that."""
        m, rank, n = self.sizes
        outer, inner = values
        if self.splits_input:
            z = summed(x @ inner.reshape(rank, -1).T, mesh)
        else:
            z = joined(copied(x, mesh) @ inner.reshape(-1, n).T, mesh, 1)
        return copied(z, mesh) @ outer.reshape(m // mesh.size(), rank).T


class KroneckerScheme(Scheme):
    """``Y = A X B^T`` for every row: the axis that is not contracted is split, and exchanged for the other.

    ``row``: ``B``, then the own columns of ``A``, whose products add up. The factors of the other styles are small, and full.
    """

    def __init__(self, shapes: tuple[tuple[int, int], tuple[int, int]], style: str) -> None:
        self.shapes, self.style = shapes, style
        self.splits_input, self.splits_output = style != "column", style != "row"
        first, second = stored_shape(shapes[0]), stored_shape(shapes[1])
        self.held = (held(shapes[0], 1, first) if style == "row" else Held(first, None), Held(second, None))
        self.communication = {
            "row": "one all-reduce of the outputs",
            "column": "one all-to-all of the intermediate",
            "block": "two all-to-alls, of the inputs and of the intermediate",
        }[style]

    def rows(self, x: Tensor, values: Sequence[Tensor], mesh: DeviceMesh) -> Tensor:
        """One factor after the other."""
        (_, n1), (m2, n2) = self.shapes
        batch, size = x.shape[0], mesh.size()
        a, b = values[0], copied(values[1], mesh).reshape(m2, n2)
        if self.style == "row":
            z = x.reshape(batch, n1 // size, n2) @ b.T
            z = z.transpose(1, 2).reshape(batch * m2, n1 // size) @ a.reshape(-1, n1 // size).T
            return summed(z.reshape(batch, m2, -1).transpose(1, 2).reshape(batch, -1), mesh)
        if self.style == "column":
            x = own_part(x.reshape(batch, n1, n2), mesh, 2)
        else:
            x = exchanged(x.reshape(batch, n1 // size, n2), mesh, split=2, join=1)  # (batch, n1, n2/P)
        z = copied(a, mesh).reshape(-1, n1) @ x
        z = exchanged(z, mesh, split=1, join=2)  # (batch, m1/P, n2)
        return (z @ b.T).reshape(batch, -1)


# ---- what a layer has ---------------------------------------------------------------------------------------------------


class TwoFactor(NamedTuple):
    """Sizes of a chain of two factors: inner core ``(k, r, l, p)``, outer core ``(l, s, k, r)``."""

    k: int
    r: int
    l: int
    p: int
    s: int


def two_factor(spec: Spec) -> tuple[TwoFactor, str] | None:
    """The sizes of a two-factor chain, and whether its output blocks are ``"contiguous"`` or ``"strided"``; None if no such."""
    chain = _chain_fields(spec)
    if chain is None or len(chain[0]) != 2:
        return None
    ((one, l, s, c), (k, lane, b, p)), out_order, in_order = chain
    if one != 1 or lane != 1 or in_order is not None or b % l or c != k * (b // l):
        return None
    sizes = TwoFactor(k, b // l, l, p, s)
    if out_order == {"order": [[s, l], [1, 0]]} or (out_order is None and 1 in (l, s)):
        return sizes, "contiguous"
    return (sizes, "strided") if out_order is None else None


def _chain_fields(spec: Spec) -> tuple[list[list[int]], Any, Any] | None:
    """Shapes of the blocks ``(a, d, b, c)`` of a chain, left to right in slots of that order, and its axis orders."""
    fields = spec["fields"]
    if len(fields) != 4 or not isinstance(fields[0], dict) or "tuple" not in fields[0]:
        return None
    factors = fields[0]["tuple"]
    if any("values" not in f or len(f["values"]) != 4 or f["slot"] != i for i, f in enumerate(factors)):
        return None
    return [f["values"] for f in factors], fields[2], fields[3]


def _kronecker(spec: Spec) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The shapes of a Kronecker product of two dense factors."""
    if spec["family"] != "Kronecker":
        return None
    parts = spec["fields"][0]["tuple"]
    if len(parts) != 2 or any(
        part["family"] != "Dense" or part["fields"][0]["slot"] != i for i, part in enumerate(parts)
    ):
        return None
    first, second = (tuple(part["fields"][0]["values"]) for part in parts)
    return first, second


def held(logical: tuple[int, ...], axis: int, stored: tuple[int, ...]) -> Held:
    """A factor of logical axes that is split along one, in the shape ``stored`` where that has an axis for it.

    ``(k, r, l, p)`` is stored as ``(k, r*l, p)``: parts of ``r`` are contiguous there, parts of ``l`` for ``r = 1`` alone.
    What is not is held in the logical shape, a view of the same numbers.
    """
    before = math.prod(logical[:axis])
    for j, size in enumerate(stored):
        if math.prod(stored[:j]) == before and size % logical[axis] == 0:
            return Held(stored, j)
    return Held(logical, axis)


# ---- choosing -----------------------------------------------------------------------------------------------------------


def scheme_of(spec: Spec, shape: tuple[int, int], style: str, processes: int) -> Scheme:
    """The scheme of a layer for a style and a number of processes.

    Raises ``ValueError`` that says, with the numbers, why there is none.
    """
    found = two_factor(spec)
    if found is not None:
        sizes, blocks = found
        if sizes.k == sizes.l == 1:
            return _low_rank(sizes, style, processes)
        return _two_factor(sizes, blocks, shape, style, processes)
    chain = _chain_fields(spec)
    if chain is not None and len(chain[0]) == 1 and chain[0][0][1] == 1 and not (chain[1] or chain[2]):
        return _block_diagonal(chain[0][0], shape, style, processes)
    shapes = _kronecker(spec)
    if shapes is not None:
        return _kronecker_scheme(shapes, style, processes)
    raise ValueError(
        "no scheme for this structure; there are some for btt and monarch of two factors, low_rank, block_diagonal and "
        "kronecker of two factors"
    )


def _two_factor(sizes: TwoFactor, blocks: str, shape: tuple[int, int], style: str, processes: int) -> Scheme:
    k, r, l, p, s = sizes
    needed = {
        "block": {"input blocks": k, "output blocks": l},
        "column": {"output blocks": l},
        "row": {"input blocks": k},
        "rank": {"rank": r},
    }[style]
    _divides(processes, **needed)
    if "input blocks" in needed and k * p != shape[1]:
        raise ValueError(f"{k} input blocks of {p} are padded: {k * p} instead of {shape[1]} features")
    if "output blocks" in needed:
        if blocks == "strided":
            raise ValueError(
                "its output blocks are interleaved (Monarch), so that no process would hold neighbouring features; use "
                "structure='btt', or style='row' or 'rank'"
            )
        if l * s != shape[0]:
            raise ValueError(f"{l} output blocks of {s} are padded: {l * s} instead of {shape[0]} features")
    if style == "block":
        return BlockScheme(sizes, processes)
    axes = {"column": (0, 2), "row": (2, 0), "rank": (3, 1)}[style]
    m, n = shape
    local, small = {
        "column": (sizes._replace(l=l // processes), (m // processes, n)),
        "row": (sizes._replace(k=k // processes), (m, n // processes)),
        "rank": (sizes._replace(r=r // processes), shape),
    }[style]
    program = _program(local, blocks, small)
    return Pieces(program, _held(sizes, axes), style == "row", style == "column", style != "column")


def _low_rank(sizes: TwoFactor, style: str, processes: int) -> Scheme:
    _, r, _, n, m = sizes
    if style in ("row", "rank"):
        _divides(processes, rank=r)
        local = _program(sizes._replace(r=r // processes), "strided", (m, n))
        return Pieces(local, _held(sizes, (3, 1)), False, False, True)
    _divides(processes, **({"inputs": n, "outputs": m} if style == "block" else {"rank": r, "outputs": m}))
    return Bottleneck(sizes, style == "block")


def _block_diagonal(blocks: Sequence[int], shape: tuple[int, int], style: str, processes: int) -> Scheme:
    count, _, b, c = blocks
    if style not in ("block", "column"):
        raise ValueError(f"a block-diagonal layer has nothing to add up: style='block', not {style!r}")
    _divides(processes, blocks=count)
    if (count * b, count * c) != shape:
        raise ValueError(
            f"{count} blocks of {b}x{c} are padded: {count * b}x{count * c} instead of {shape[0]}x{shape[1]}"
        )
    local = Chain([_meta(count // processes, 1, b, c)])
    return Pieces(program_of(describe(local)[0]), (Held(stored_shape((count, b, c)), 0),), True, True, False)


def _kronecker_scheme(shapes: tuple[tuple[int, int], tuple[int, int]], style: str, processes: int) -> Scheme:
    (m1, n1), (_, n2) = shapes
    needed = {
        "block": {
            "columns of the first factor": n1,
            "rows of the first factor": m1,
            "columns of the second factor": n2,
        },
        "column": {"rows of the first factor": m1, "columns of the second factor": n2},
        "row": {"columns of the first factor": n1},
    }
    if style not in needed:
        raise ValueError(f"a Kronecker product has no ranks: style='block', 'column' or 'row', not {style!r}")
    _divides(processes, **needed[style])
    return KroneckerScheme(shapes, style)


def _divides(processes: int, **counts: int) -> None:
    """Raise ``ValueError`` that names the counts which the number of processes does not divide."""
    wrong = [f"the {name} ({count})" for name, count in counts.items() if count % processes]
    if wrong:
        raise ValueError(f"{processes} processes do not divide {' and '.join(wrong)}")


def _held(sizes: TwoFactor, axes: tuple[int, int]) -> tuple[Held, Held]:
    """How the outer core ``(l, s, k, r)`` and the inner one ``(k, r, l, p)`` are held, split along these axes."""
    k, r, l, p, s = sizes
    outer = held((l, s, k, r), axes[0], stored_shape((1, l, s, k * r)))
    return outer, held((k, r, l, p), axes[1], stored_shape((k, 1, r * l, p)))


def _program(sizes: TwoFactor, blocks: str, shape: tuple[int, int]) -> Program:
    """The program of a chain of these sizes."""
    k, r, l, p, s = sizes
    order = AxisOrder((s, l), (1, 0)) if blocks == "contiguous" else None
    chain = Chain([_meta(1, l, s, k * r), _meta(k, 1, r * l, p)], shape, order)
    return program_of(describe(chain)[0])


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
