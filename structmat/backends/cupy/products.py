"""Plans made of strided-batched matrix products: chains and Kronecker products on the GPU without copies of activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from structmat import arrays
from structmat.arrays import Array
from structmat.backends import base
from structmat.backends.base import ChainLayout, cheapest_order
from structmat.backends.cuda import roofline
from structmat.backends.cuda.precision import Compute, compute_for, precision
from structmat.backends.cuda.products import Matrix, orientation
from structmat.backends.cuda.roofline import Rates, Work
from structmat.backends.cuda.schedule import (
    Schedule,
    Sizes,
    Strided,
    Weights,
    chain_schedule,
    kron_schedule,
    packed,
)
from structmat.backends.cupy import cublas, library, memory
from structmat.backends.cupy.launch import exchanged
from structmat.patterns import Pattern

KEPT = 64  # schedules of different shapes that a plan keeps
UNKNOWN: Any = object()  # None says that there is no schedule
CHUNK_STEP = 256  # samples of a chunk come in multiples


class Part(NamedTuple):
    """A schedule for samples ``[start, start + k)``."""

    start: int
    schedule: Schedule


class Prepared(NamedTuple):
    """What one application does: a schedule for all samples, or one for each chunk of them, in the same scratch memory."""

    parts: tuple[Part, ...]
    whole: Schedule

    @property
    def scratch(self) -> list[int]:
        """Elements of each intermediate: of the first part, which is the largest."""
        return list(self.parts[0].schedule.scratch)


class Products:
    """An operator applied by library calls: what chains and Kronecker products have in common.

    Parameters
    ----------
    m, n
        Logical shape.
    values
        The factors' values, arrays on one device.
    patterns
        What the factors are for the cost model, left to right in the order of a chain.
    rates
        The device for the cost model.

    Attributes
    ----------
    lead
        Leading axes of the operator.
    captured
        Memory that CUDA graphs read and write when they are launched: operands, intermediates, results and workspaces. It grows
        with every capture and is given back with the plan, which does not know when a graph is gone.
    """

    def __init__(self, m: int, n: int, values: Sequence[Array], patterns: Sequence[Pattern], rates: Rates) -> None:
        self.m, self.n, self.rates = m, n, rates
        self.patterns = tuple(patterns)
        self.dtype = arrays.promote(*(v.dtype for v in values))
        self._values = {self.dtype: _kept(values, self.dtype)}
        self._prepared: dict[object, Prepared | None] = {}
        self.lead = np.broadcast_shapes(*(tuple(v.shape[: -self.core]) for v in values))
        self.captured: list[Array] = []
        self._empty = not n or any(0 in p for p in self.patterns)

    @property
    def home(self) -> Array:
        """An array on the device of the operator."""
        return self._values[self.dtype][0]

    # ---- what subclasses say ------------------------------------------------------------------------------------

    core = 4  # dimensions of a factor's values

    def schedule(
        self, weights: Sequence[Weights], sizes: Sizes, source: Strided, rows: bool, target: Strided | None
    ) -> Schedule | None:
        """The products for an operand in memory."""
        raise NotImplementedError

    def ordered_in(self, x: Array) -> Sequence[Array]:
        """Copies of ``x (..., n, k)``; the last is contiguous, in the order of the first factor, padded."""
        return (_contiguous(x),)

    def ordered_out(self, y: Array) -> Array:
        """A result ``(..., rows, k)`` in the natural order of the last factor, in the operator's own."""
        return y

    # ---- applying -----------------------------------------------------------------------------------------------

    def apply(self, x: Array, rows: bool, out: Array | None = None, add: bool = False) -> Array | None:
        """``A x`` for ``x (..., n, k)``; the result may be preferred in rows.

        Parameters
        ----------
        x
            Any strides, the dtype of the result.
        rows
            Whether a result ``(..., m, k)`` with unit stride along ``m`` is preferred.
        out
            Where to write; ``None`` is returned, and nothing done, where that takes a copy.
        add
            Whether the product is added to ``out``.
        """
        try:
            with memory.device_of(x):
                return self._applied(x, rows, out, add)
        except MemoryError as error:
            raise memory.explained(f"product of {self.m} x {self.n} with {x.shape}", error) from error

    def _applied(self, x: Array, rows: bool, out: Array | None, add: bool) -> Array | None:
        lead, k = self.leading(x), x.shape[-1]
        shape = (*lead, self.m, k)
        if self._empty or 0 in shape:
            return self._nothing(shape, x, out, add)
        compute = compute_for(x.dtype)
        if compute is None:
            raise TypeError(f"matmul: cuBLAS does not multiply {x.dtype} arrays; use A.astype(...) and x.astype(...)")
        values = self._cast(x.dtype)
        made = [x]  # and what is copied from it
        prepared = self._prepare(values, x, lead, rows, out)
        if prepared is None and out is not None:
            return None
        if prepared is None:
            x = _contiguous(x)
            made.append(x)
            prepared = self._prepare(values, x, lead, rows, None)
        if prepared is None:
            raise ValueError(
                f"matmul: {k} columns at a time are more than the 32-bit leading dimensions of cuBLAS allow for this "
                f"operator of {self.m} x {self.n}; apply it to fewer"
            )
        whole = prepared.whole
        if whole.copies:
            made += self._copied(x, whole.copies[0])
        scratch = [memory.fresh((size,), x.dtype) for size in prepared.scratch]
        result = _result(lead, whole, k, x.dtype) if out is None else out
        workspace = self._run(prepared, compute, values, made[-1], result, scratch, add)
        y = self.ordered_out(result) if out is None and "result" in whole.copies else result
        if workspace is not None:
            self.captured += [*made, *scratch, result, y, workspace]
        if out is not None:
            return out
        return y if whole.rows == self.m else y[..., : self.m, :]

    def _copied(self, x: Array, what: str) -> Sequence[Array]:
        """What is made of the operand, last what a schedule with a copy expects."""
        if what == "digits":
            return (exchanged(x, self.patterns[-1]),)
        return self.ordered_in(x) if what == "order" else (_contiguous(x),) if what == "operand" else ()

    def leading(self, x: Array) -> tuple[int, ...]:
        """Leading axes of ``A x``."""
        if x.ndim == 2:
            return self.lead
        return np.broadcast_shapes(self.lead, x.shape[:-2]) if self.lead else x.shape[:-2]

    def _nothing(self, shape: tuple[int, ...], x: Array, out: Array | None, add: bool) -> Array:
        """The result of an operator or operand without entries: zeros."""
        if out is None:
            return library.cupy().zeros(shape, x.dtype)
        if not add:
            out[...] = 0
        return out

    def _cast(self, dtype: np.dtype) -> tuple[Array, ...]:
        """The values in the dtype of the result, converted once."""
        if dtype not in self._values:
            self._values[dtype] = _kept(self._values[self.dtype], dtype)
        return self._values[dtype]

    def _prepare(
        self, values: tuple[Array, ...], x: Array, lead: tuple[int, ...], rows: bool, out: Array | None
    ) -> Prepared | None:
        key = (x.shape, x.strides, x.dtype, lead, rows, out if out is None else out.strides, precision())
        found = self._prepared.get(key, UNKNOWN)
        if found is UNKNOWN:
            found = self._made(values, x, lead, rows, out)
            if len(self._prepared) >= KEPT:
                self._prepared.clear()
            self._prepared[key] = found  # which another thread may clear at once
        return found

    def _made(
        self, values: tuple[Array, ...], x: Array, lead: tuple[int, ...], rows: bool, out: Array | None
    ) -> Prepared | None:
        weights = [self._strides_of(v) for v in values]
        source, target = _strided(x, lead), None if out is None else _strided(out, lead)
        if source is None or (out is not None and target is None):
            return None
        sizes = Sizes(lead, self.n, self.m, x.shape[-1], x.shape[:-2])
        whole = self.schedule(weights, sizes, source, rows, target)
        if whole is None or (out is not None and (whole.rows != self.m or "result" in whole.copies)):
            return None
        width = self.chunk(x.shape[-1], x.dtype) if not math.prod(lead) > 1 else None
        if width is None or whole.copies or any(step.clear for step in whole.steps):
            return Prepared((Part(0, whole),), whole)
        parts: dict[int, Schedule | None] = {}
        starts = range(0, sizes.k, width)
        for start in starts:
            k = min(width, sizes.k - start)
            parts[k] = parts.get(k) or self.schedule(weights, sizes._replace(k=k), source, rows, whole.result)
        if None in parts.values():
            return Prepared((Part(0, whole),), whole)
        made = (Part(start, parts[min(width, sizes.k - start)]) for start in starts)  # pyright: ignore[reportArgumentType]
        return Prepared(tuple(made), whole)

    def _strides_of(self, values: Array) -> Weights:
        raise NotImplementedError

    def _run(
        self,
        prepared: Prepared,
        compute: Compute,
        values: tuple[Array, ...],
        source: Array,
        result: Array,
        scratch: Sequence[Array],
        add: bool,
    ) -> Array | None:
        """Launch everything; nothing is allocated from here on. The workspace, if it was captured into a CUDA graph."""
        workspace = None
        size = source.dtype.itemsize
        pointers = [
            source.data.ptr,
            *(s.data.ptr for s in scratch),
            result.data.ptr,
        ]  # the result's is also the one at -1
        for start, schedule in prepared.parts:
            if start:
                pointers[0] = source.data.ptr + start * source.strides[-1]
                pointers[-1] = result.data.ptr + start * result.strides[-1]
            for step in schedule.steps:
                last = step.target == -1
                if step.clear and not (last and add):
                    (result if last else scratch[step.target - 1]).fill(0)
                left, right, out = values[step.factor].data.ptr, pointers[step.source], pointers[step.target]
                used = cublas.multiply(step.calls, compute, size, left, right, out, add and last)
                workspace = workspace if used is None else used
        return workspace

    # ---- costs --------------------------------------------------------------------------------------------------

    def chunk(self, k: int, dtype: np.dtype) -> int | None:
        """Samples of a chunk whose intermediates stay in the second-level cache, where that is predicted to be faster."""
        widest = max((p.rows for p in self.patterns[1:]), default=0)
        if not widest:
            return None
        areas = min(2, len(self.patterns) - 1)
        width = self.rates.cache_bytes // 3 // (areas * widest * dtype.itemsize) // CHUNK_STEP * CHUNK_STEP
        if width < CHUNK_STEP or 2 * width > k:
            return None
        name, too = dtype.name, dtype.kind == "c"
        plain = roofline.chain_work(self.patterns, k, dtype.itemsize, complex_too=too)
        chunked = roofline.chunked_work(self.patterns, k, dtype.itemsize, width, too)
        faster = roofline.seconds(chunked, self.rates, name, precision())
        return width if faster < roofline.seconds(plain, self.rates, name, precision()) else None

    def described(self, k: int, rows: bool) -> tuple[str, Work]:
        """A name with the numbers of calls and copies, and the work, for a contiguous operand of ``k`` samples."""
        size, too = self.dtype.itemsize, self.dtype.kind == "c"
        weights = [self._strides_of(v) for v in self._values[self.dtype]]
        schedule = None
        if self.m and not self._empty:
            source = packed(self.lead, self.n, k, by_rows=rows)
            schedule = self.schedule(weights, Sizes(self.lead, self.n, self.m, k, self.lead), source, rows, None)
        if schedule is None:
            return "nothing", Work(0.0, 0.0)
        copies, calls = len(schedule.copies), schedule.calls
        width = None if self.lead or copies else self.chunk(k, self.dtype)
        name = f"{calls} products" if calls > 1 else "1 product"
        name += f" + {copies} copies" if copies > 1 else " + 1 copy" if copies else ""
        if width:
            work = roofline.chunked_work(self.patterns, k, size, width, too)
            return f"{name}, {width} rows at a time", work
        return name, roofline.chain_work(self.patterns, k * math.prod(self.lead), size, copies, calls + copies, too)


class ChainProducts(Products):
    """A chain of Kronecker-sparse factors with axis orders at its ends."""

    def __init__(self, layout: ChainLayout, blocks: Sequence[Array], rates: Rates) -> None:
        super().__init__(layout.rows, layout.cols, blocks, layout.patterns, rates)
        self.layout = layout

    def _strides_of(self, values: Array) -> Weights:
        *lead, a, d, b, c = (s // values.dtype.itemsize for s in values.strides)
        lead = tuple(0 if n == 1 else s for n, s in zip(values.shape[:-4], lead, strict=True))
        return Weights(a, d, b, c, lead)

    def schedule(
        self, weights: Sequence[Weights], sizes: Sizes, source: Strided, rows: bool, target: Strided | None
    ) -> Schedule | None:
        """The products for an operand in memory."""
        return chain_schedule(self.layout, weights, sizes, source, rows, target)

    def ordered_in(self, x: Array) -> Sequence[Array]:
        """The operand padded, and a contiguous copy with the samples last, in the order of the first factor."""
        n, size = x.shape[-2], self.layout.patterns[-1].cols
        padded = x
        if n != size:
            padded = library.cupy().zeros((*x.shape[:-2], size, x.shape[-1]), x.dtype)
            padded[..., :n, :] = x
        return padded, _contiguous(base.reorder(padded, self.layout.in_order))

    def ordered_out(self, y: Array) -> Array:
        """The result in the order of the chain."""
        return base.reorder(y, self.layout.out_order)


class KronProducts(Products):
    """A Kronecker product of dense factors."""

    core = 2

    def __init__(self, factors: Sequence[Array], rates: Rates) -> None:
        self.shapes = tuple((int(f.shape[-2]), int(f.shape[-1])) for f in factors)
        self.order = cheapest_order(self.shapes)
        current, patterns = [n for _, n in self.shapes], []
        for i in self.order:
            m, n = self.shapes[i]
            patterns.append(Pattern(math.prod(current[:i]), m, n, math.prod(current[i + 1 :])))
            current[i] = m
        m, n = (math.prod(shape[axis] for shape in self.shapes) for axis in (0, 1))
        super().__init__(m, n, factors, patterns[::-1], rates)

    def _strides_of(self, values: Array) -> Weights:
        *lead, b, c = (s // values.dtype.itemsize for s in values.strides)
        lead = tuple(0 if n == 1 else s for n, s in zip(values.shape[:-2], lead, strict=True))
        return Weights(0, 0, b, c, lead)

    def schedule(
        self, weights: Sequence[Weights], sizes: Sizes, source: Strided, rows: bool, target: Strided | None
    ) -> Schedule | None:
        """The products for an operand in memory."""
        return kron_schedule(self.shapes, self.order, weights, sizes, source, rows, target)


def _kept(values: Sequence[Array], dtype: np.dtype) -> tuple[Array, ...]:
    """Values of a dtype that cuBLAS can read, to be kept."""
    return memory.ready([_usable(arrays.cast(v, dtype)) for v in values], values)


def _usable(values: Array) -> Array:
    """Values whose matrices cuBLAS can read: themselves, or a contiguous copy, made once."""
    strides = memory.strides(values)
    if strides is not None and (values.size == 0 or orientation(Matrix(*values.shape[-2:], *strides[-2:]))):
        return values
    return _contiguous(values)


def _strided(x: Array, lead: tuple[int, ...]) -> Strided | None:
    """How ``x (..., n, k)`` lies in memory, repeated along leading axes that it lacks; ``None`` for strides of no use."""
    found = memory.strides(x)
    if found is None:
        return None
    return Strided(found[-2], found[-1], (0,) * (len(lead) - len(found) + 2) + found[:-2])


def _result(lead: tuple[int, ...], schedule: Schedule, k: int, dtype: np.dtype) -> Array:
    """A new array ``(*lead, rows, k)`` with the strides of the schedule's result."""
    if schedule.result.row == 1 and (k > 1 or schedule.rows == 1):
        return memory.fresh((*lead, k, schedule.rows), dtype).swapaxes(-1, -2)
    return memory.fresh((*lead, schedule.rows, k), dtype)


def _contiguous(x: Array) -> Array:
    return library.cupy().ascontiguousarray(x)
