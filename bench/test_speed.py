"""Regressions of speed: ``pytest bench --benchmark-autosave``, later ``pytest bench --benchmark-compare``.

One case for each kernel: family, layout, and a single vector or 256. The result is checked, its time is not.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from timing import relative_error

import structmat as sm


def hadamard(dtype, rng):  # noqa: ARG001 (it has nothing random)
    return sm.hadamard(1024, dtype)


FAMILIES = {
    "monarch": partial(sm.Monarch.random, (1024, 1024), blocks=32),
    "monarch, 4 blocks": partial(sm.Monarch.random, (1024, 1024), blocks=4, rank=64),
    "btt": partial(sm.BlockTensorTrain.random, (1024, 1024), blocks=32, rank=4),
    "low rank": partial(sm.LowRank.random, (1024, 1024), rank=64),
    "butterfly": partial(sm.Butterfly.random, (1024, 1024), radix=2),
    "kronecker": partial(sm.Kronecker.random, (1024, 1024)),
    "hadamard": hadamard,
}


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("layout", ["columns", "rows"])
@pytest.mark.parametrize("family", FAMILIES)
def test_product(benchmark, family, layout, batch, dtype):
    a = FAMILIES[family](dtype=np.dtype(dtype), rng=0)
    x = np.random.default_rng(0).standard_normal((1024, batch)).astype(dtype)
    expected = a.to_dense() @ x
    at, rows = a.T, np.ascontiguousarray(x.T)
    benchmark.group = f"{family}, {layout}, {batch}, {dtype}"
    result = benchmark(a.__matmul__, x) if layout == "columns" else benchmark(at.__rmatmul__, rows)
    assert relative_error(result if layout == "columns" else result.T, expected) < (1e-4 if dtype == "f4" else 1e-12)
