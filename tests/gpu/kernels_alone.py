"""Every kernel of our own once, on odd numbers of rows, against NumPy; a program of its own, to be run by compute-sanitizer."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np

from structmat.backends.cuda import sources
from structmat.backends.cupy.launch import launch

try:
    import cupy
except ImportError:  # only collected, not run
    cupy: Any = None

ROWS = (1, 5, 37)


def check(name: str, got: cupy.ndarray, expected: np.ndarray, bound: float) -> None:
    """One line for each result; the program fails at the first one that is wrong."""
    error = float(np.linalg.norm(got.get().astype(np.float64) - expected) / np.linalg.norm(expected))
    print(f"{name}: {error:.1e}")
    if not error < bound:
        sys.exit(f"{name}: expected an error below {bound}, got {error}")


def normal(shape: tuple[int, ...], scale: float, dtype: str) -> cupy.ndarray:
    return cupy.asarray(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) * scale).astype(
        dtype
    )


def wide(x: cupy.ndarray) -> np.ndarray:
    return x.get().astype(np.float64)


def monarch(k: int, p: int, q: int, s: int, r: int, lanes: bool) -> None:
    for rows in ROWS:
        kernel = sources.monarch_kernel("float16", k, p, q, s, r, lanes=lanes, rows=rows)
        if kernel is None:
            sys.exit(f"no kernel for {(k, p, q, s, r, lanes)}")
        x, bias = normal((rows, k * p), 1, "float16"), normal((q * s,), 1, "float16")
        w1, w2 = normal((k, r, q, p), p**-0.5, "float16"), normal((q, s, k, r), (k * r) ** -0.5, "float16")
        y = cupy.full((rows, q * s), cupy.nan, "float16")
        pointers = [a.data.ptr for a in (x, w1, w2, bias, y)]
        launch(sources.monarch_launch(kernel, *pointers, rows, k * p, q * s))
        z = np.einsum("krqp,bkp->bkrq", wide(w1), wide(x).reshape(rows, k, p))
        expected = np.einsum("qskr,bkrq->" + ("bsq" if lanes else "bqs"), wide(w2), z).reshape(rows, q * s) + wide(bias)
        check(kernel.name, y, expected, 2e-3)


def kron(r: int, p: int, s: int, q: int) -> None:
    kernel = sources.kron_kernel("float16", r, p, s, q)
    if kernel is None:
        sys.exit(f"no kernel for {(r, p, s, q)}")
    a, c, bias = normal((r, p), p**-0.5, "float16"), normal((s, q), q**-0.5, "float16"), normal((r * s,), 1, "float16")
    for rows in ROWS:
        x, y = normal((rows, p * q), 1, "float16"), cupy.full((rows, r * s), cupy.nan, "float16")
        pointers = [v.data.ptr for v in (x, a, c, bias, y)]
        launch(sources.kron_launch(kernel, *pointers, rows, p * q, r * s))
        check(kernel.name, y, wide(x) @ np.kron(wide(a), wide(c)).T + wide(bias), 2e-3)


def hadamard(dtype: str, n: int) -> None:
    kernel = sources.hadamard_kernel(dtype, n)
    if kernel is None:
        sys.exit(f"no kernel for {(dtype, n)}")
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    for rows in ROWS:
        x, y = normal((rows, n), 1, dtype), cupy.full((rows, n), cupy.nan, dtype)
        launch(sources.hadamard_launch(kernel, x.data.ptr, y.data.ptr, n**-0.5, rows, n, n))
        check(kernel.name, y, wide(x) @ matrix.T * n**-0.5, 1e-5 if dtype == "float32" else 2e-3)


def transpose(dtype: str, heads: int, outer: int, lanes: int) -> None:
    kernel = sources.transpose_kernel(np.dtype(dtype).itemsize)
    if kernel is None:
        sys.exit(f"no kernel for {dtype}")
    size = heads * outer * lanes
    for rows in ROWS:
        x, y = normal((rows, size), 1, dtype), cupy.full((rows, size), cupy.nan, dtype)
        launch(sources.transpose_launch(kernel, x.data.ptr, y.data.ptr, rows, heads, outer, lanes, size, size))
        check(kernel.name, y, wide(x).reshape(rows, heads, outer, lanes).swapaxes(2, 3).reshape(rows, size), 1e-12)


CALLS = {
    "monarch": lambda: [
        monarch(*s, o) for s, o in itertools.product([(16,) * 4 + (1,), (32, 16, 16, 32, 2)], (False, True))
    ],
    "kron": lambda: [kron(*sizes) for sizes in ((16,) * 4, (64, 64, 64, 64), (32, 48, 16, 128))],
    "hadamard": lambda: [hadamard(*case) for case in itertools.product(("float16", "float32"), (64, 1024, 16384))],
    "transpose": lambda: [
        transpose(*case) for case in (("float32", 3, 33, 65), ("float16", 1, 7, 5), ("float64", 2, 32, 32))
    ],
}

if __name__ == "__main__":
    CALLS[sys.argv[1]]()
