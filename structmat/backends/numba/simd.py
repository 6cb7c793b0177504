"""Vectors of explicit width for Numba, as LLVM IR: no C compiler, and strides wherever an address is computed.

An ``@intrinsic`` is a Python function that emits LLVM IR at the place where jitted code calls it. All arguments are
integers: addresses in bytes and strides in elements, so that any layout is one kernel. The element type comes from
``one``, a scalar of the wanted dtype that is never read. Loops over a tile's rows and vectors run in Python while the
IR is emitted, so the code is unrolled; accumulators are stack slots, which LLVM turns into registers.

The vector width is that of the target for which Numba compiles, hence ``NUMBA_CPU_NAME`` and ``NUMBA_CPU_FEATURES``
choose it, and Numba's cache on disk keeps the widths apart (both are part of its key).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic as _intrinsic

ADDRESS = types.intp
intrinsic: Any = _intrinsic  # typed: the emitted function takes the arguments without the typing context


_target: Any = cpu_target.target_context


def _vector_bytes() -> int:
    """Width of the widest vectors of Numba's target: 64 (AVX-512), 32 (AVX) or 16 bytes (SSE, NEON)."""
    features = set(_target.codegen()._tm_features.split(","))
    if "+avx512f" in features:
        return 64
    return 32 if "+avx" in features else 16


VECTOR_BYTES = _vector_bytes()
REGISTERS = 32 if VECTOR_BYTES == 64 else 16


def inner(function: Callable[..., Any]) -> Any:
    """Compile a function that only compiled functions call: without an entry from Python, which costs as much again."""
    options: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return njit(cache=True, nogil=True, **options)(function)


class Emitter:
    """Emits vector instructions for one element type into one function."""

    def __init__(self, builder: ir.IRBuilder, one: types.Type, lanes: int | None = None) -> None:
        self.builder = builder
        self.double = one == types.float64
        self.size = 8 if self.double else 4
        self.lanes = lanes or VECTOR_BYTES // self.size
        self.element = ir.DoubleType() if self.double else ir.FloatType()
        self.vector = ir.VectorType(self.element, self.lanes)
        self.int = ir.IntType(64)
        self.mask = ir.VectorType(ir.IntType(1), self.lanes)
        self.suffix = f"v{self.lanes}f{8 * self.size}"

    def constant(self, value: int) -> ir.Constant:
        """An address-sized integer."""
        return ir.Constant(self.int, value)

    def bytes(self, elements: Any) -> Any:
        """A number of elements as a number of bytes."""
        return self.builder.mul(elements, self.constant(self.size))

    def at(self, base: Any, *terms: Any) -> Any:
        """The sum of an address and byte offsets."""
        for term in terms:
            base = self.builder.add(base, self.constant(term) if isinstance(term, int) else term)
        return base

    def row(self, base: Any, index: int, stride: Any) -> Any:
        """``base + index * stride`` with the stride in bytes."""
        return self.at(base, self.builder.mul(self.constant(index), stride)) if index else base

    def load(self, address: Any, mask: Any = None) -> Any:
        """A vector from an address of any alignment; masked lanes are zero and not read."""
        pointer: Any = self.builder.inttoptr(address, self.vector.as_pointer())
        if mask is None:
            value: Any = self.builder.load(pointer)
            value.align = self.size
            return value
        kind = ir.FunctionType(self.vector, [pointer.type, ir.IntType(32), self.mask, self.vector])
        fn = self._declare(f"llvm.masked.load.{self.suffix}.p0", kind)
        return self.builder.call(fn, [pointer, ir.Constant(ir.IntType(32), self.size), mask, self.zero()])

    def store(self, value: Any, address: Any, mask: Any = None) -> None:
        """A vector to an address of any alignment; masked lanes are not written."""
        pointer: Any = self.builder.inttoptr(address, self.vector.as_pointer())
        if mask is None:
            instruction: Any = self.builder.store(value, pointer)
            instruction.align = self.size
            return
        kind = ir.FunctionType(ir.VoidType(), [self.vector, pointer.type, ir.IntType(32), self.mask])
        fn = self._declare(f"llvm.masked.store.{self.suffix}.p0", kind)
        self.builder.call(fn, [value, pointer, ir.Constant(ir.IntType(32), self.size), mask])

    def mask_below(self, count: Any) -> Any:
        """The mask of the lanes with an index below ``count``."""
        lanes = ir.Constant(ir.VectorType(self.int, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", lanes, self._splat(count, ir.VectorType(self.int, self.lanes)))

    def broadcast(self, address: Any) -> Any:
        """One element in all lanes (the operand of a multiply-add with an embedded broadcast)."""
        pointer = self.builder.inttoptr(address, self.element.as_pointer())
        return self.splat(self.builder.load(pointer))

    def splat(self, scalar: Any) -> Any:
        """A number in all lanes."""
        return self._splat(scalar, self.vector)

    def zero(self) -> ir.Constant:
        """A vector of zeros."""
        return ir.Constant(self.vector, None)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """``a * b + c``, with one rounding where the target has an instruction for it."""
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        return self.builder.call(self._declare(f"llvm.fmuladd.{self.suffix}", kind), [a, b, c])

    def shuffle(self, x: Any, y: Any, indices: Iterable[int]) -> Any:
        """Lanes of the concatenation of two vectors."""
        indices = list(indices)
        return self.builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), indices))

    def transposed(self, rows: list[Any]) -> list[Any]:
        """As many vectors as lanes, transposed in ``log2(lanes)`` stages of pairwise shuffles.

        The stage with ``step`` exchanges the off-diagonal ``step x step`` blocks of every ``2 step x 2 step`` block.
        """
        lanes = self.lanes
        step = 1
        while step < lanes:
            low = [j if (j // step) % 2 == 0 else lanes + j - step for j in range(lanes)]
            high = [j + step if (j // step) % 2 == 0 else lanes + j for j in range(lanes)]
            new = list(rows)
            for i in range(lanes):
                if (i // step) % 2 == 0:
                    new[i] = self.shuffle(rows[i], rows[i + step], low)
                    new[i + step] = self.shuffle(rows[i], rows[i + step], high)
            rows = new
            step *= 2
        return rows

    def _splat(self, scalar: Any, vector: ir.VectorType) -> Any:
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)
        return self.builder.shuffle_vector(first, undefined, zeros)

    def _declare(self, name: str, kind: ir.FunctionType) -> Any:
        return cgutils.get_or_insert_function(self.builder.module, kind, name)


@intrinsic
def lanes(typingctx, one):  # noqa: ARG001
    """Number of elements of a vector, a compile-time constant."""

    def codegen(context, builder, signature, args):  # noqa: ARG001
        return ir.Constant(ir.IntType(64), VECTOR_BYTES // (8 if one == types.float64 else 4))

    return types.intp(one), codegen


@intrinsic
def itemsize(typingctx, one):  # noqa: ARG001
    """Bytes of an element, a compile-time constant."""

    def codegen(context, builder, signature, args):  # noqa: ARG001
        return ir.Constant(ir.IntType(64), 8 if one == types.float64 else 4)

    return types.intp(one), codegen


def prefetch(builder: ir.IRBuilder, address: Any) -> None:
    """Emit a request for the cache line of an address, which may be any number."""
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
    fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fn, [builder.inttoptr(address, byte), *(ir.Constant(flag, value) for value in (0, 3, 1))])


@intrinsic
def fetch(typingctx, address):  # noqa: ARG001
    """Ask for the cache line of an address, which may be any number."""

    def codegen(context, builder, signature, args):  # noqa: ARG001
        prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(ADDRESS), codegen
