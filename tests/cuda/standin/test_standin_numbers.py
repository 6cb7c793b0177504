"""Dtypes and precisions on the stand-in."""

from __future__ import annotations

import numpy as np
import pytest
from standin_families import BF16, FAMILIES, TOLERANCE, entries, error, on_device

import structmat as sm

pytestmark = pytest.mark.usefixtures("products_only")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FAMILIES)
def test_all_dtypes(name, dtype):
    dtype = np.dtype(dtype) if dtype != "bfloat16" else BF16
    wide = np.complex128 if dtype.kind == "c" else np.float64
    made = FAMILIES[name](rng=0, dtype=np.complex128 if dtype.kind == "c" else np.float32)
    a = made.to("cupy").astype(dtype)
    assert a.dtype == dtype
    host = a.astype(wide).to("numpy")
    x = entries((host.shape[1], 16), dtype)
    y = a @ on_device(x)
    assert y.dtype == dtype
    assert error(y, host @ x.astype(wide)) < TOLERANCE[dtype.name]
    y = on_device(x.T) @ a.T
    assert error(y, (host @ x.astype(wide)).T) < TOLERANCE[dtype.name]
    y = on_device(x[:, 0].conj()) @ a.H
    expected = x[:, 0].astype(wide).conj() @ host.to_dense().conj().T
    assert error(y, expected) < TOLERANCE[dtype.name]


def test_sixteen_bit_products_are_summed_in_single_precision():
    n = 4096
    a = sm.LowRank(np.ones((1, 1)), np.ones((1, n))).to("cupy").astype(np.float16)
    assert float((a @ on_device(np.ones(n, np.float16)))[0]) == n  # in float16 the sum would stop at 2048


def test_mixed_dtypes_promote():
    host = sm.Monarch.random((16, 16), blocks=4, rng=0, dtype=np.float32)
    a = host.to("cupy")
    for dtype in (np.float16, np.float64, np.complex64, np.int64, bool):
        x = (entries((16, 3)) * 3).astype(dtype)
        y = a @ on_device(x)
        assert y.dtype == (host @ x).dtype
        assert error(y, host @ x) < 1e-5
    assert (a.astype(BF16) @ on_device(x.astype(np.float32))).dtype == np.float32


def test_precision_is_chosen_by_the_caller():
    host = sm.LowRank.random((40, 200), rank=30, rng=0, dtype=np.float32)
    a, x = host.to("cupy"), entries((200, 30), np.float32)
    expected = host.astype(np.float64) @ x.astype(np.float64)
    exact = error(a @ on_device(x), expected)
    with sm.backends.use_precision("tf32"):
        rounded = error(a @ on_device(x), expected)
        assert error(a.astype(np.float64) @ on_device(x), expected) < 1e-12, "float64 has no other way"
    assert exact < 1e-6
    assert 1e-5 < rounded < 2e-3
    assert error(a @ on_device(x), expected) == exact
    with pytest.raises(ValueError, match="exact, tf32"):
        sm.backends.use_precision("fast")
