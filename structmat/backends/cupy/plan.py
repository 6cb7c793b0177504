"""The plan of an operator on CuPy arrays: for every layout and batch the kernel that the roofline says is fastest."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from structmat import arrays
from structmat.arrays import Array
from structmat.backends.base import Candidate, ChainLayout, Explanation, LibraryPlan
from structmat.backends.cuda import roofline
from structmat.backends.cuda.precision import precision
from structmat.backends.cupy import library, memory
from structmat.backends.cupy.fused import FusedKernel
from structmat.backends.cupy.products import ChainProducts, Products
from structmat.patterns import Pattern

SMALL_BATCH = 8  # batches up to this have a choice each
FEW = 8  # stacked matrices of rows that do not follow each other: up to so many are taken by calls of their own
DENSE_MARGIN = 1.1  # times by which the dense matrix must be faster to be made
ROUNDS = 20  # timed applications of a kernel that is tuned


class Choice(NamedTuple):
    """The kernels for one layout and batch: their predicted or measured seconds, fastest first."""

    kernel: str
    explanation: Explanation


class CupyPlan(LibraryPlan):
    """An operator of one dtype on one device.

    Parameters
    ----------
    products
        The operator as matrix products: always there, for every dtype, stack and stride.
    transposed
        Makes the products of the transpose, for a dense matrix of an operator with more columns than rows.
    fused
        A kernel for the whole operator.
    kernels
        Names of what may be chosen: ``"products"``, ``"dense"``, ``"fused"``.
    """

    def __init__(
        self,
        products: Products,
        transposed: Callable[[], Products],
        fused: FusedKernel | None = None,
        kernels: frozenset[str] = frozenset(("products", "dense", "fused")),
    ) -> None:
        self.products, self.transposed, self.fused, self.kernels = products, transposed, fused, kernels
        self._choices: dict[tuple[bool, int, str], Choice] = {}
        self._matrix: Products | None = None

    # ---- applying -----------------------------------------------------------------------------------------------

    def columns(self, x: Array, out: Array | None = None) -> Array:
        """``A x`` for ``x`` of shape ``(..., n, k)``."""
        with memory.device_of(x):
            return self._columns(x, out)

    def _columns(self, x: Array, out: Array | None) -> Array:
        x = self._promoted(x)
        if out is None:
            y = self._one(x, rows=False)
            return self._result(x, rows=False) if y is None else y
        shape = (*self.products.leading(x), self.products.m, x.shape[-1])
        arrays.check_out(out, shape, x.dtype)
        if out.device != x.device:
            raise TypeError(f"out: on {out.device}, the operand on {x.device}")
        if out.dtype == x.dtype and not memory.may_overlap(x, out):
            written = self.products.apply(x, False, out)
            if written is not None:
                return written
        return arrays.copy_into(self._columns(x, None), out)

    def rows(self, x: Array) -> Array:
        """``x A^T`` for ``x`` of shape ``(..., k, n)``."""
        with memory.device_of(x):
            return self._rows(x)

    def _rows(self, x: Array) -> Array:
        x = self._promoted(x)
        flat = None if self.products.lead else _flat(x)
        if flat is None and not self.products.lead and math.prod(x.shape[:-2]) > FEW and x.size:
            flat = library.cupy().ascontiguousarray(x).reshape(-1, x.shape[-1])  # one copy instead of many calls
            if memory.capturing():
                self.products.captured.append(x)  # which may itself be a copy in another dtype
        if flat is None:
            return self._result(x.swapaxes(-1, -2), rows=True).swapaxes(-1, -2)
        y = self._one(flat, rows=True)
        y = self._result(flat.T, rows=True).T if y is None else y
        return y if flat is x else y.reshape(*x.shape[:-1], self.products.m)

    def vector(self, x: Array) -> Array:
        """``A x`` for one vector ``x`` of shape ``(n,)``."""
        if self.products.lead:
            return self.columns(x[:, None])[..., 0]
        return self.rows(x[None])[0]

    def once(self, x: Array) -> Array:
        """``A x`` by products, which need no preparation."""
        with memory.device_of(x):
            return self._result(self._promoted(x), rows=False)

    def add(self, x: Array, out: Array, rows: bool = False) -> bool:
        """``out += A x`` (or ``x A^T``) in the last product's own pass; ``False`` where that would take a copy."""
        if arrays.joint_dtype(self.products.dtype, x.dtype, "matmul") != out.dtype:
            return False
        with memory.device_of(x):
            return self._added(self._promoted(x), out, rows)

    def _added(self, x: Array, out: Array, rows: bool) -> bool:
        source, target = (x.swapaxes(-1, -2), out.swapaxes(-1, -2)) if rows else (x, out)
        shape = (*self.products.leading(source), self.products.m, source.shape[-1])
        if target.shape != shape or _repeats(out) or memory.may_overlap(x, out):
            return False
        return self.products.apply(source, rows, target, add=True) is not None

    def _promoted(self, x: Array) -> Array:
        dtype = self.products.dtype
        return x if x.dtype == dtype else arrays.cast(x, arrays.joint_dtype(dtype, x.dtype, "matmul"))

    def _result(self, x: Array, rows: bool) -> Array:
        y = self.products.apply(x, rows)
        if y is None:
            raise RuntimeError("products without a given result always make one")  # cannot be
        return y

    def _one(self, x: Array, rows: bool) -> Array | None:
        """The result by a kernel for the whole operator, ``None`` where products are chosen or the kernel does not fit."""
        if x.ndim != 2 or x.dtype != self.products.dtype or self.products.lead or x.size == 0 or self.products.m == 0:
            return None
        chosen = self._choice(x.shape[0] if rows else x.shape[1], rows).kernel
        if chosen == "dense":
            source = x.T if rows else x
            y = self._dense().apply(source, rows)
            return y if y is None or not rows else y.T
        if chosen == "fused" and self.fused is not None:
            y = self.fused.rows(x if rows else x.T)
            if y is not None and memory.capturing():
                self.products.captured += [x, y]  # either may be an intermediate that nobody else keeps
            return y if y is None or rows else y.T
        return None

    def _dense(self) -> Products:
        """The product with the dense matrix, which is made once and kept."""
        made = self._matrix
        if made is None:
            memory.uncaptured()
            m, n, dtype = self.products.m, self.products.n, self.products.dtype
            if m < n:  # the identity of the longer side may be far larger than the matrix
                matrix = self.transposed().apply(_identity(m, dtype), False).T  # pyright: ignore[reportOptionalMemberAccess]
            else:
                matrix = self.products.apply(_identity(n, dtype), False)
            layout = ChainLayout((Pattern(1, m, n, 1),), m, n)
            (matrix,) = memory.ready((library.cupy().ascontiguousarray(matrix)[None, None],), ())
            made = self._matrix = ChainProducts(layout, (matrix,), self.products.rates)
        return made

    # ---- choosing -----------------------------------------------------------------------------------------------

    def explain(self, k: int, rows: bool = False) -> Explanation:
        """The kernel for ``k`` samples, and what it was chosen from."""
        return self._choice(k, rows).explanation

    def tune(self, k: int, rows: bool = False) -> None:
        """Time every kernel for ``k`` samples on the device and use the fastest from now on."""
        if self.products.lead or 0 in (self.products.n, self.products.m):
            return
        with memory.device_of(self.products.home):
            self._tune(k, rows)

    def _tune(self, k: int, rows: bool) -> None:
        n, dtype = self.products.n, self.products.dtype
        rng = np.random.default_rng(0)
        x = library.cupy().asarray(rng.standard_normal((k, n) if rows else (n, k)).astype(dtype))
        timed: list[tuple[float, str, str]] = []
        for kernel, name, _ in self._candidates(k, rows):
            self._choices[self._key(k, rows)] = Choice(kernel, Explanation(name))
            timed.append((_time(lambda: self.rows(x) if rows else self.columns(x)), kernel, name))
        timed.sort()
        found = Explanation(timed[0][2], tuple(Candidate(name, seconds) for seconds, _, name in timed))
        self._choices[self._key(k, rows)] = Choice(timed[0][1], found)
        used = "dense" in {choice.kernel for choice in self._choices.values()}
        if not used and self._matrix is not None and not self._matrix.captured:
            self._matrix = None  # not kept in vain

    def _choice(self, k: int, rows: bool) -> Choice:
        key = self._key(k, rows)
        if key not in self._choices:
            ranked = sorted(self._candidates(k, rows), key=lambda c: c[2] * (DENSE_MARGIN if c[0] == "dense" else 1.0))
            considered = tuple(Candidate(name, seconds) for _, name, seconds in ranked)
            self._choices[key] = Choice(ranked[0][0], Explanation(ranked[0][1], considered))
        return self._choices[key]

    def _key(self, k: int, rows: bool) -> tuple[bool, int, str]:
        return rows, k if k <= SMALL_BATCH else SMALL_BATCH + k.bit_length(), precision()

    def _candidates(self, k: int, rows: bool) -> list[tuple[str, str, float]]:
        """``(kernel, its name with details, predicted seconds)``."""
        products = self.products
        dtype, size = products.dtype, products.dtype.itemsize
        name, work = products.described(k, rows)
        considered = [("products", name, work)]
        if "dense" in self.kernels and not products.lead:
            dense = roofline.dense_work(products.m, products.n, k, size, dtype.kind == "c")
            considered.append(("dense", "dense", dense))
        fused = self.fused.work(k) if self.fused and (rows or k == 1) else None  # it reads rows
        if fused is not None:
            considered.append(("fused", "fused", fused))
        rates = products.rates
        return [(what, shown, roofline.seconds(w, rates, dtype.name, precision())) for what, shown, w in considered]


def _flat(x: Array) -> Array | None:
    """Rows ``(..., k, n)`` as ``(samples, n)`` without a copy; ``None`` where their strides do not allow it."""
    if x.ndim == 2:
        return x
    strides = [(size, stride) for size, stride in zip(x.shape[:-1], x.strides[:-1], strict=True) if size != 1]
    whole = all(slow[1] == fast[0] * fast[1] for slow, fast in pairwise(strides))
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if whole and x.size else None


def _identity(n: int, dtype: np.dtype) -> Array:
    """The identity; not every function of CuPy makes bfloat16."""
    return arrays.cast(library.cupy().eye(n, dtype=np.float32 if dtype.itemsize == 2 else dtype), dtype)


def _repeats(x: Array) -> bool:
    """Whether several elements of an array are one in memory."""
    return any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.strides, strict=True))


def _time(function: Callable[[], object]) -> float:
    """Seconds on the device of one call, by events around a number of them; the first call does not count."""
    function()
    cupy = library.cupy()
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(ROUNDS):
        function()
    stop.record()
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop) * 1e-3 / ROUNDS
