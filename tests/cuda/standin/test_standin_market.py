"""The operator market through the CuPy backend's own code: values, transposes, rows, vectors, stacks, empty operands."""

from __future__ import annotations

import cupy
import numpy as np
import pytest
from market import market, names

import structmat as sm
from structmat.backends.cupy import CupyBackend
from structmat.testing import assert_matches, check_operator, tolerance

# SciPy objects stay with NumPy, and so does the iterative inverse
ALL = [p for p in market() if not p.name.startswith(("external", "cosine")) and "inverse-lazy" not in p.name]
on_all = pytest.mark.parametrize("pair", ALL, ids=names(ALL))
KERNELS = {"products": ("products",), "chosen": ("products", "dense", "fused")}


@pytest.fixture(params=KERNELS)
def backend(request):
    made = CupyBackend(kernels=KERNELS[request.param])
    made.name = f"cupy-{request.param}"
    sm.backends.register(made, "cupy")
    with sm.use_backend(made.name):
        yield made


@on_all
def test_conformance(pair, backend):
    a = pair.operator.to("cupy")
    assert a.kind in ("cupy", None)
    check_operator(a)
    assert_matches(a, pair.dense)
    assert_matches(a.T, np.swapaxes(pair.dense, -1, -2))
    assert_matches(a.H, np.swapaxes(pair.dense, -1, -2).conj())


@on_all
def test_rows_vectors_and_empty_batches(pair, backend):
    a, d = pair.operator.to("cupy"), pair.dense
    m, n = d.shape[-2:]
    tol = tolerance(d.dtype) * max(n, m) * max(1.0, float(np.abs(d).max(initial=0)))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((37, n)).astype(d.dtype)
    for operand in (x, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x[::-1], x[:1], x[:0]):
        got = cupy.asarray(operand) if operand.flags.c_contiguous else _like(operand)
        y = got @ a.T
        assert isinstance(y, cupy.ndarray)
        assert y.dtype == np.result_type(d.dtype, x.dtype)
        expected = operand @ np.swapaxes(d, -1, -2)
        assert y.shape == expected.shape
        assert np.abs(y.get() - expected).max(initial=0) <= tol * 10
        y = a @ got.T
        assert np.abs(y.get() - d @ operand.T).max(initial=0) <= tol * 10
    y = a @ cupy.asarray(x[0])
    assert np.abs(y.get() - d @ x[0]).max(initial=0) <= tol * 10


def _like(x):
    """A device array with the values and the strides of ``x (k, n)``."""
    room = cupy.empty(2 * x.size + 1, x.dtype)
    size, first = x.itemsize, max(0, -x.strides[0]) * max(0, len(x) - 1) // x.itemsize
    made = cupy.ndarray(np.ndarray(x.shape, x.dtype, room._a, first * size, x.strides))
    assert made.strides == x.strides
    made._a[...] = x
    return made


def test_there_and_back():
    for pair in ALL:
        back = pair.operator.to("cupy").to("numpy")
        assert type(back) is type(pair.operator)
        assert np.array_equal(back.to_dense(), pair.operator.to_dense())
