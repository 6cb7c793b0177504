"""The planner: for every layout and batch the kernel that its cost model says is fastest, made once and kept.

Candidates are the compiled programs of this backend, the NumPy plan (BLAS on strided blocks) and the dense matrix, made
where it is honestly faster. ``cost.py`` predicts, ``structmat.tune`` measures. What a kernel packs is a copy: an operator is
immutable, and values that its owner changes in place afterwards are seen by some kernels and not by others.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from structmat import arrays
from structmat.backends.base import Candidate, Explanation, Plan
from structmat.backends.numba import memory
from structmat.backends.numba.cost import Sizes, dense_seconds
from structmat.backends.numba.machine import Machine, machine
from structmat.backends.numba.program import Program, run
from structmat.backends.numba.threads import Scratch, split

Apply = Callable[[np.ndarray, np.ndarray, int], None]  # (x, out, add): flat, contiguous arrays; out = or += the product
ALIGNED_BYTES = 1 << 16  # results from this size on begin at a cache line
SMALL_BATCH = 8  # batches up to this have a choice each
HOPELESS = 10.0  # times the best prediction: what tuning need not try (a large dense matrix may not fit into memory)


class Kernel(NamedTuple):
    """A way to apply an operator, not yet made: its name, its predicted seconds, and what makes it."""

    name: str
    seconds: float
    make: Callable[[], Apply | None]


class NumbaPlan:
    """An operator of one dtype, with a kernel for every layout and batch that has been asked for.

    Parameters
    ----------
    reference
        NumPy's plan: what other dtypes, stacks and empty operands take, and a candidate like the others.
    dtype
        float32 or float64, native.
    sizes
        Counts for the cost model.
    """

    def __init__(self, reference: Plan, dtype: np.dtype, sizes: Sizes) -> None:
        self.reference, self.dtype, self.sizes = reference, dtype, sizes
        self._m = sizes.m
        self._kernels: dict[tuple[bool, int], tuple[Apply | None, Explanation]] = {}
        self._made: dict[Any, Apply | None] = {}
        self._one: Apply | None = None
        self._matrix: weakref.ref[np.ndarray] | None = None

    # ---- applying -----------------------------------------------------------------------------------------------

    def vector(self, x: np.ndarray) -> np.ndarray:
        """``A x`` for one vector ``x`` of shape ``(n,)``."""
        one = self._one or self._kernel(1, False)
        if one is None or x.dtype != self.dtype or not x.flags.carray:
            return self.columns(x[:, None])[:, 0]
        self._one = one
        y = np.empty(self._m, self.dtype)
        one(x, y, 0)
        return y

    def columns(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """``A x`` for ``x`` of shape ``(..., n, k)``."""
        if x.dtype != self.dtype or x.ndim != 2 or not x.size:
            castable = x.size and x.dtype != self.dtype and np.result_type(x.dtype, self.dtype) == self.dtype
            return self.columns(x.astype(self.dtype), out) if castable else self.reference.columns(x, out)
        shape = self._m, x.shape[1]
        if out is None and x.flags.f_contiguous and shape[1] > 1 and self._kernel(shape[1], True):
            return self.rows(x.T).T  # columns of Fortran order are rows: no copy on the way in or out
        apply = self._kernel(shape[1], False)
        if apply is None:
            return self.reference.columns(x, out)
        if out is None:
            y = _empty(shape, self.dtype)
            apply(_flat(x), y.reshape(-1), 0)
            return y
        if out.shape == shape and out.dtype == self.dtype and out.flags.carray and not _may_overlap(x, out):
            apply(_flat(x), out.reshape(-1), 0)
            return out
        return arrays.copy_into(self.columns(x), out)

    def rows(self, x: np.ndarray) -> np.ndarray:
        """``x A^T`` for ``x`` of shape ``(..., n)``."""
        if x.dtype != self.dtype or not x.size:
            castable = x.size and np.result_type(x.dtype, self.dtype) == self.dtype
            return self.rows(x.astype(self.dtype)) if castable else self.reference.rows(x)
        apply = self._kernel(x.size // self.sizes.n, True)
        if apply is None:
            return self.reference.rows(x)
        y = _empty((*x.shape[:-1], self._m), self.dtype)
        apply(_flat(x), y.reshape(-1), 0)
        return y

    def once(self, x: np.ndarray) -> np.ndarray:
        """``A x`` by NumPy's plan, which needs no preparation."""
        return self.reference.columns(x)

    def add(self, x: np.ndarray, out: np.ndarray, rows: bool = False) -> bool:
        """``out += A x`` (or ``x A^T``) in one pass; ``False``, and nothing done, where there is no kernel for it."""
        if not (x.dtype == self.dtype == out.dtype and x.size and out.flags.carray and (rows or x.ndim == 2)):
            return False
        if _may_overlap(x, out):
            return False
        apply = self._kernel(x.size // self.sizes.n, rows)
        if apply is None or out.size // self.sizes.m != x.size // self.sizes.n:
            return False
        apply(_flat(x), out.reshape(-1), 1)
        return True

    # ---- choosing -----------------------------------------------------------------------------------------------

    def candidates(self, k: int, rows: bool, rates: Machine) -> list[Kernel]:
        """All kernels for a batch and a layout; the NumPy plan is always the last to be asked for."""
        raise NotImplementedError

    def explain(self, k: int, rows: bool = False) -> Explanation:
        """The kernel for ``k`` samples, and what it was chosen from."""
        self._kernel(k, rows)
        return self._kernels[rows, _class(k)][1]

    def tune(self, k: int, rows: bool = False) -> None:
        """Time every kernel for ``k`` samples and use the fastest from now on."""
        s = self.sizes
        rng = np.random.default_rng(0)
        x = rng.standard_normal((k, s.n) if rows else (s.n, k)).astype(self.dtype)
        out = np.empty((k, s.m) if rows else (s.m, k), self.dtype)
        timed: list[tuple[float, str, Apply | None]] = []
        kernels = self.candidates(k, rows, machine())
        limit = HOPELESS * min(kernel.seconds for kernel in kernels)
        for kernel in kernels:
            if kernel.seconds > limit:
                continue
            apply = kernel.make()
            if apply is not None:
                seconds = _time(lambda apply=apply: apply(x.reshape(-1), out.reshape(-1), 0))
            elif kernel.name == "numpy":
                seconds = _time(lambda: self.reference.rows(x) if rows else self.reference.columns(x, out))
            else:
                continue
            timed.append((seconds, kernel.name, apply))
        timed.sort(key=lambda entry: entry[0])
        found = Explanation(timed[0][1], tuple(Candidate(name, seconds) for seconds, name, _ in timed))
        self._kernels[rows, _class(k)] = timed[0][2], found
        self._one = None
        used = [apply for apply, _ in self._kernels.values()]
        if self._made.get(("dense", rows)) not in used:  # the dense matrix is not kept in vain
            self._made.pop(("dense", rows), None)

    def _kernel(self, k: int, rows: bool) -> Apply | None:
        """The kernel for ``k`` samples; ``None`` for the NumPy plan."""
        kept = self._kernels.get((rows, k if k <= SMALL_BATCH else _class(k)))
        return self._choose(k, rows) if kept is None else kept[0]

    def _choose(self, k: int, rows: bool) -> Apply | None:
        ranked = sorted(self.candidates(k, rows, machine()), key=lambda kernel: kernel.seconds)
        for kernel in ranked:
            apply = kernel.make()
            if apply is not None or kernel.name == "numpy":
                considered = tuple(Candidate(other.name, other.seconds) for other in ranked)
                self._kernels[rows, _class(k)] = apply, Explanation(kernel.name, considered)
                return apply
        return None

    # ---- making -------------------------------------------------------------------------------------------------

    def _kept(self, key: Any, make: Callable[[], Apply | None]) -> Apply | None:
        """What ``make`` returns, made once."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _dense_kernel(self, k: int, rows: bool, rates: Machine) -> Kernel:
        seconds = dense_seconds(self.sizes, rates, k)
        return Kernel("dense", seconds, lambda: self._kept(("dense", rows), lambda: self._dense(rows)))

    def _dense(self, rows: bool) -> Apply:
        m, n = self.sizes.m, self.sizes.n
        matrix = self._dense_matrix()

        def apply(x: np.ndarray, out: np.ndarray, add: int) -> None:
            left, right = (x.reshape(-1, n), matrix.T) if rows else (matrix, x.reshape(n, -1))
            target = out.reshape(-1, m) if rows else out.reshape(m, -1)
            if add:
                target += left @ right
            else:
                np.matmul(left, right, out=target)

        return apply

    def _dense_matrix(self) -> np.ndarray:
        """The dense matrix: one for both layouts, for as long as a kernel uses it."""
        matrix = self._matrix() if self._matrix else None
        if matrix is None:
            m, n = self.sizes.m, self.sizes.n
            if m < n:  # the identity of the longer side may be far larger than the matrix
                matrix = np.ascontiguousarray(self._transposed().columns(np.eye(m, dtype=self.dtype)).T)
            else:
                matrix = self.reference.columns(np.eye(n, dtype=self.dtype))
            self._matrix = weakref.ref(matrix)
        return matrix

    def _transposed(self) -> Plan:
        """NumPy's plan of the transpose of an operator with more columns than rows."""
        raise NotImplementedError

    def _programmed(self, program: Program, seconds: float, m: int | None = None, n: int | None = None) -> Apply:
        """The kernel that runs a program, on several threads where ``seconds`` per sample pay for them."""
        m, n = m or self.sizes.m, n or self.sizes.n
        table, width, size, columns, _ = program
        scratch = Scratch.of(self.dtype)

        def apply(x: np.ndarray, out: np.ndarray, add: int, _alive: object = program.alive) -> None:
            k = x.size // n
            if k == 1:
                work = scratch.kept
                run(table, x, out, work if work.size >= size else scratch.grow(size), 0, 1, width, 1, 1, n, m, add)
                return
            scales = (k, k, 1, 1) if columns else (1, 1, n, m)

            def part(start: int, stop: int) -> None:
                work = scratch.kept
                work = work if work.size >= size else scratch.grow(size)
                run(table, x, out, work, start, stop, width, *scales, add)

            split(part, k, width, seconds * k)

        return apply


def _time(function: Callable[[], object]) -> float:
    """The least of a few times, in seconds; the first call, which may compile, does not count."""
    function()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.02 and len(times) < 200):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def _class(k: int) -> int:
    """Batches that share a kernel: small ones by number, larger ones within a factor of two."""
    return k if k <= SMALL_BATCH else SMALL_BATCH + k.bit_length()


def _flat(x: np.ndarray) -> np.ndarray:
    """The operand as the kernels take it: contiguous, aligned, one-dimensional (a copy where it was not)."""
    return x.reshape(-1) if x.flags.carray else np.array(x, order="C").reshape(-1)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array; a large one begins at a cache line, so that no vector is stored across two."""
    large = math.prod(shape) * dtype.itemsize >= ALIGNED_BYTES
    return memory.empty(shape, dtype) if large else np.empty(shape, dtype)


def _may_overlap(x: np.ndarray, out: np.ndarray) -> bool:
    """Whether two arrays may share memory; arrays that own theirs do so only if they are one."""
    return x is out if x.base is None and out.base is None else np.may_share_memory(x, out)
