"""What the tests on the stand-in share: one operator of each family, entries, errors."""

from __future__ import annotations

import cupy
import ml_dtypes
import numpy as np

import structmat as sm

BF16 = np.dtype(ml_dtypes.bfloat16)
TOLERANCE = {
    "float16": 3e-3,
    "bfloat16": 2e-2,
    "float32": 1e-5,
    "float64": 1e-12,
    "complex64": 1e-5,
    "complex128": 1e-12,
}


def on_device(x):
    return cupy.asarray(np.ascontiguousarray(x))


def entries(shape, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else x).astype(dtype)


def error(got, expected):
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    got = got.get().astype(wide)
    assert got.shape == expected.shape
    return np.linalg.norm(got - expected) / max(1e-30, np.linalg.norm(expected.astype(wide)))


FAMILIES = {
    "monarch": lambda **o: sm.Monarch.random((48, 40), blocks=8, rank=2, **o),
    "monarch padded": lambda **o: sm.Monarch.random((47, 37), blocks=6, **o),
    "btt": lambda **o: sm.BlockTensorTrain.random((48, 40), blocks=8, rank=2, **o),
    "butterfly": lambda **o: sm.Butterfly.random((64, 64), radix=2, **o),
    "low rank": lambda **o: sm.LowRank.random((30, 41), rank=5, **o),
    "block diagonal": lambda **o: sm.BlockDiagonal.random((40, 48), blocks=8, **o),
    "block diagonal padded": lambda **o: sm.BlockDiagonal.random((37, 45), blocks=8, **o),
    "kronecker": lambda **o: sm.Kronecker.random((48, 60), **o),
    "kronecker of three": lambda **o: sm.Kronecker.random((60, 60), shapes=[(3, 5), (4, 3), (5, 4)], **o),
}
