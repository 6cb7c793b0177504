"""Calls of the CUDA kernels with float64 references, rigorous error bounds and guard zones, for the tests that run them."""

from __future__ import annotations

from collections.abc import Callable
from math import erf
from typing import Any, NamedTuple

import numpy as np
import pytest
import shim

from structmat.backends.cuda import sources
from structmat.backends.cuda.sources import Kernel, Launch

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: no bfloat16 on the host")
TYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}  # of one rounding to nearest, at most
GUARD = 128 << 10  # bytes before and after an output: more than the rows of a tile take
ACTIVATIONS: dict[str | None, Callable[[np.ndarray], np.ndarray]] = {
    None: lambda v: v,
    "relu": lambda v: np.maximum(v, 0),
    "gelu": lambda v: v / 2 * (1 + np.vectorize(erf)(v / np.sqrt(2))),
    "gelu_tanh": lambda v: v / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
    "silu": lambda v: v / (1 + np.exp(-v)),
}


class Problem(NamedTuple):
    """A launch, what it reads and writes, and what must come out."""

    launch: Launch
    pointers: dict[int, np.ndarray | None]  # by position: exactly what may be touched
    memory: np.ndarray  # bytes of the output and its guard zones
    output: np.ndarray  # view of it: rows with their padding
    expected: np.ndarray
    bound: np.ndarray  # on the absolute error of every entry
    tolerance: float  # of the relative error in the Frobenius norm

    @property
    def kernel(self) -> Kernel:
        return self.launch.kernel

    def with_kernel(self, **changes: Any) -> Problem:
        """The same call of a changed kernel."""
        return self._replace(launch=self.launch._replace(kernel=self.kernel._replace(**changes)))

    def with_grid(self, blocks: int) -> Problem:
        return self._replace(launch=self.launch._replace(grid=(blocks, 1, 1)))

    def run(self, seed: int = 0, sanitize: str | None = None) -> bytes:
        """Launch on an output full of NaN, and check everything; the output's bytes.

        Raises
        ------
        AssertionError
            If the result is wrong or anything else was written.
        """
        self.memory[...] = 0xFF
        arguments: list[Any] = list(self.launch.arguments)
        if sanitize:
            for i, array in self.pointers.items():
                arguments[i] = array
        shim.build(self.kernel, seed, sanitize)(self.launch.grid, arguments)
        n = self.expected.shape[1]
        got = self.output[:, :n]
        wide = got if got.dtype.kind == "u" else got.astype(float)
        error = np.abs(np.subtract(wide, self.expected, dtype=float))
        wrong = ~(error <= self.bound)
        assert not wrong.any(), (
            f"{wrong.sum()} of {wrong.size} entries are wrong or NaN, the first at {np.argwhere(wrong)[0]}"
        )
        assert np.linalg.norm(error) <= self.tolerance * np.linalg.norm(self.expected)
        rest = self.memory.copy()
        inside = rest[GUARD : len(rest) - GUARD].view(self.output.dtype)
        np.lib.stride_tricks.as_strided(inside, self.output.shape, self.output.strides)[:, :n].view(np.uint8)[...] = (
            0xFF
        )
        assert (rest == 0xFF).all(), "written outside of the output"
        return got.tobytes()


def aligned_bytes(count: int) -> np.ndarray:
    """Bytes that start at a multiple of 64."""
    raw = np.empty(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count]


def placed(values: np.ndarray, stride: int = 0) -> np.ndarray:
    """A flat copy at a multiple of 64 bytes; rows ``stride`` apart with NaN between them, none behind the last one."""
    rows, n = (values.shape[0], values[0].size) if stride else (1, values.size)
    flat = aligned_bytes(((rows - 1) * stride + n) * values.itemsize).view(values.dtype)
    flat.view(np.uint8)[...] = 0xFF
    as_rows = np.lib.stride_tricks.as_strided(flat, (rows, n), (stride * values.itemsize, values.itemsize))
    as_rows[...] = values.reshape(rows, n)
    return flat


def output(rows: int, n: int, stride: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Memory, rows in it with their padding, and the part that a launch may touch."""
    touched = ((rows - 1) * stride + n) * dtype.itemsize
    memory = aligned_bytes(2 * GUARD + touched)
    exact = memory[GUARD : GUARD + touched].view(dtype)
    return memory, np.lib.stride_tricks.as_strided(exact, (rows, n), (stride * dtype.itemsize, dtype.itemsize)), exact


def address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(TYPES[dtype])


def made(kernel: Kernel | None) -> Kernel:
    assert kernel is not None
    return kernel


def finished(
    exact: np.ndarray, absolute: np.ndarray, bias: np.ndarray | None, activation: str | None, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Result and error bound: roundings of the intermediate and of the result, a slope of activations below 1.2."""
    if bias is not None:
        exact, absolute = exact + bias.astype(float).ravel(), absolute + np.abs(bias.astype(float)).ravel()
    expected = ACTIVATIONS[activation](exact)
    return expected, 1.2 * ROUNDOFF[dtype] * (absolute + np.abs(expected)) + 1e-7


def monarch(
    dtype: str,
    sizes: tuple[int, int, int, int, int],
    rows: int,
    activation: str | None = None,
    bias: bool = False,
    lanes: bool = False,
    tile: tuple[int, int] | None = None,
    padding: int = 8,
) -> Problem:
    """``sizes``: K, P, Q, S, R."""
    K, P, Q, S, R = sizes
    rng = np.random.default_rng(rows)
    kernel = made(sources.monarch_kernel(dtype, *sizes, activation, lanes=lanes, rows=rows, tile=tile))
    x = normal(rng, (rows, K, P), dtype)
    w1 = normal(rng, (K, R, Q, P), dtype, P**-0.5)
    w2 = normal(rng, (Q, S, K, R), dtype, (K * R) ** -0.5)
    b = placed(normal(rng, (S, Q) if lanes else (Q, S), dtype)) if bias else None

    def product(f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        t = np.einsum("bkp,krqp->bkrq", f(x.astype(float)), f(w1.astype(float)))
        y = np.einsum("bkrq,qskr->bqs", t, f(w2.astype(float)))
        return (y.swapaxes(1, 2) if lanes else y).reshape(rows, -1)

    expected, bound = finished(product(np.array), product(np.abs), b, activation, dtype)
    xs, ys = K * P + padding, Q * S + padding
    memory, y, exact = output(rows, Q * S, ys, TYPES[dtype])
    arrays = [placed(x, xs), placed(w1), placed(w2), b, exact]
    launch = sources.monarch_launch(kernel, *map(address, arrays), rows, xs, ys)
    return Problem(launch, dict(enumerate(arrays)), memory, y, expected, bound, 1.5 * ROUNDOFF[dtype])


def kron(
    dtype: str,
    sizes: tuple[int, int, int, int],
    rows: int,
    activation: str | None = None,
    bias: bool = False,
    processors: int = 1,
    padding: int = 8,
) -> Problem:
    """``sizes``: R, P, S, Q."""
    R, P, S, Q = sizes
    rng = np.random.default_rng(rows)
    kernel = made(sources.kron_kernel(dtype, *sizes, activation, shared=40 << 10))
    x, a, c = normal(rng, (rows, P, Q), dtype), normal(rng, (R, P), dtype, P**-0.5), normal(rng, (S, Q), dtype, Q**-0.5)
    b = placed(normal(rng, (R, S), dtype)) if bias else None

    def product(f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return np.einsum("bpq,rp,sq->brs", *(f(v.astype(float)) for v in (x, a, c)), optimize=True).reshape(rows, -1)

    expected, bound = finished(product(np.array), product(np.abs), b, activation, dtype)
    xs, ys = P * Q + padding, R * S + padding
    memory, y, exact = output(rows, R * S, ys, TYPES[dtype])
    arrays = [placed(x, xs), placed(a), placed(c), b, exact]
    launch = sources.kron_launch(kernel, *map(address, arrays), rows, xs, ys, processors)
    return Problem(launch, dict(enumerate(arrays)), memory, y, expected, bound, 1.5 * ROUNDOFF[dtype])


def hadamard(dtype: str, n: int, rows: int, padding: int = 8) -> Problem:
    scale = np.float32(n**-0.5)
    kernel = made(sources.hadamard_kernel(dtype, n))
    x = normal(np.random.default_rng(n + rows), (rows, n), dtype)
    exact = x.astype(float).reshape(rows, *[2] * (n.bit_length() - 1))
    for axis in range(1, exact.ndim):
        a, b = exact.take(0, axis), exact.take(1, axis)
        exact = np.stack([a + b, a - b], axis)
    expected = exact.reshape(rows, n) * float(scale)
    sums = n.bit_length() * 2.0**-24 * float(scale) * np.abs(x.astype(float)).sum(axis=1, keepdims=True)
    memory, y, touched = output(rows, n, n + padding, TYPES[dtype])
    arrays = [placed(x, n + padding), touched]
    launch = sources.hadamard_launch(kernel, *map(address, arrays), scale, rows, n + padding, n + padding)
    bound, tolerance = ROUNDOFF[dtype] * np.abs(expected) + sums, (4 if dtype == "float32" else 1) * ROUNDOFF[dtype]
    return Problem(launch, dict(enumerate(arrays)), memory, y, expected, bound, tolerance)


def transpose(itemsize: int, rows: int, heads: int, outer: int, lanes: int, padding: int = 3) -> Problem:
    """Bytes in place of elements: exact."""
    kernel = made(sources.transpose_kernel(itemsize))
    x = np.random.default_rng(itemsize).integers(0, 255, (rows, heads, outer, lanes, itemsize), np.uint8)
    n, stride = heads * outer * lanes, heads * outer * lanes + padding
    expected = x.swapaxes(2, 3).reshape(rows, n * itemsize).astype(float)
    memory, y, touched = output(rows, n * itemsize, stride * itemsize, np.dtype(np.uint8))
    arrays = [placed(x, stride * itemsize), touched]
    launch = sources.transpose_launch(kernel, *map(address, arrays), rows, heads, outer, lanes, stride, stride)
    return Problem(launch, dict(enumerate(arrays)), memory, y, expected, np.full(expected.shape, 1e-9), 0.0)
