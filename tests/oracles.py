"""What the comparisons with other libraries share: representatives of the market, batched operators, tolerances."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import numpy as np
from market import Pair, dense_btt, entries, market

import structmat as sm


@cache
def representatives(*dtypes: str) -> tuple[Pair, ...]:
    """One pair of the market per class of operator and dtype, rectangular where the class can be."""
    chosen: dict[tuple[type, str], Pair] = {}
    for pair in (p for p in market() if p.dense.ndim == 2):
        key = (type(pair.operator), pair.dense.dtype.name)
        best = chosen.get(key)
        if key[1] in dtypes and (best is None or rectangularity(pair) > rectangularity(best)):
            chosen[key] = pair
    return tuple(chosen.values())


def rectangularity(pair: Pair) -> tuple[bool, int]:
    """Rectangular before square, larger before smaller."""
    m, n = pair.dense.shape
    return m != n, min(m, n)


def at_random(shape: tuple[int, ...], dtype, seed: int = 99) -> np.ndarray:
    """Test data of a shape."""
    return entries(shape, dtype, seed)


@cache
def batched(*dtypes: str) -> tuple[Pair, ...]:
    """Operators with batch dimensions beside their stacked dense twins: those of the market and some more shapes."""
    pairs = [p for p in market() if p.dense.ndim > 2 and p.dense.dtype.name in dtypes]
    for dtype in dtypes:
        pairs += [Pair(f"batched-{name}-{dtype}", *pair) for name, pair in more_batched(dtype).items()]
    return tuple(pairs)


def more_batched(dtype: str) -> dict[str, tuple[sm.Operator, np.ndarray]]:
    left, right = entries((2, 2, 3, 4), dtype, 1), entries((2, 2, 4, 3), dtype, 2)
    values, blocks = entries((2, 1, 4), dtype, 3), entries((2, 3, 2, 2), dtype, 4)
    u, v = entries((3, 4, 2), dtype, 5), entries((2, 1, 2, 5), dtype, 6)
    rows, cols = [0, 1, 1], [1, 0, 2]
    placed = np.zeros((2, 4, 6), dtype)
    for t, (i, j) in enumerate(zip(rows, cols, strict=True)):
        placed[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] += blocks[:, t]
    train = sm.BlockTensorTrain([left[:, None], right[:, :, None]])
    return {
        "train": (train, np.stack([dense_btt(*p) for p in zip(left, right, strict=True)])),
        "diagonal-2x1": (sm.Diagonal(values), values[..., None] * np.eye(4, dtype=dtype)),
        "low_rank-broadcast": (sm.LowRank(u, v), u @ v),
        "block_sparse": (sm.BlockSparse(blocks, rows, cols, (4, 6)), placed),
        "zero": (sm.Zero((2, 3, 4), dtype), np.zeros((2, 3, 4), dtype)),
    }


def tolerance(dtype) -> float:
    """Relative tolerance for a handful of rounding errors in a dtype."""
    return 2e-5 if np.finfo(dtype).eps > 1e-10 else 1e-11


def assert_close(actual, expected, dtype=None) -> None:
    """Equal shapes, and values equal up to rounding relative to the largest entry."""
    expected = np.asarray(expected)
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    scale = np.abs(expected).max(initial=1e-30)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=float(tolerance(dtype or expected.dtype) * scale))


def run_python(program: str) -> str:
    """What a program prints in an interpreter of its own; fails the test if that interpreter fails."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout
