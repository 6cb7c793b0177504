"""Projection of CuPy arrays on the stand-in, which refuses to mix them with NumPy's and with another device's."""

from __future__ import annotations

import contextlib
import sys

import cupy
import fakecupy
import numpy as np
import pytest
import scipy.linalg
from projection_cases import HOST, PLAIN, WEIGHTED, matrix, same, samples

import structmat as sm

# a GPU divides by zero without a word
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning") for what in ("divide by zero", "invalid value")
]


@contextlib.contextmanager
def errstate(*, linalg):
    assert linalg == "raise"
    yield


@pytest.fixture(autouse=True)
def cupyx(monkeypatch):
    """What projection takes from ``cupyx``."""
    for name in ("cupyx", "cupyx.scipy", "cupyx.scipy.linalg"):
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name))
    fakecupy._module("cupyx", errstate=errstate)
    fakecupy._module("cupyx.scipy")
    solve = fakecupy._function_of(scipy.linalg, "solve_triangular")
    fakecupy._module("cupyx.scipy.linalg", solve_triangular=solve)


def on_device(x, index=1):
    with cupy.cuda.Device(index):
        return cupy.asarray(x)


@pytest.fixture
def no_large_copies(monkeypatch):
    """``get`` of more than an eighth of these entries raises."""

    def start(limit):
        def get(self):
            assert self.size <= limit, f"get of {self.shape}"
            return self._a.copy()

        monkeypatch.setattr(cupy.ndarray, "get", get)

    return start


@pytest.mark.parametrize(("family", "options", "shape"), PLAIN.values(), ids=list(PLAIN))
def test_the_same_certificate_as_in_numpy(family, options, shape):
    W = matrix(shape, np.complex128 if min(shape) == 16 else np.float64)
    found = sm.project(on_device(W), family, **options)
    assert found.method.endswith("; computed on cuda:1 by CuPy")
    assert found.operator.kind == "cupy"
    assert found.operator.device == cupy.cuda.Device(1)
    same(found, sm.project(W, family, **options), W)


@pytest.mark.parametrize(("family", "options", "count"), WEIGHTED.values(), ids=list(WEIGHTED))
def test_the_same_in_a_weighted_norm(family, options, count):
    W, X = matrix((24, 16)), samples(count)
    found = sm.project(on_device(W), family, activations=on_device(X), **options)
    assert found.method.endswith("; computed on cuda:1 by CuPy")
    same(found, sm.project(W, family, activations=X, **options), W)


def test_no_copy_of_the_matrix_on_the_host(no_large_copies):
    W, X = matrix((256, 256)), samples(600, 256)
    there, inputs = on_device(W), on_device(X)
    no_large_copies(W.size // 8)
    for family, options in (
        (sm.LowRank, {"rank": 4}),
        (sm.LowRank, {"rank": 2, "method": "randomized"}),
        (sm.Monarch, {}),
        (sm.Butterfly, {"radix": 2, "refine": 1}),
        (sm.Kronecker, {"method": "lanczos"}),
        (sm.LowRank, {"rank": 4, "activations": inputs}),
        (sm.Monarch, {"activations": inputs}),
    ):
        assert sm.project(there, family, **options).method.endswith("; computed on cuda:1 by CuPy")


def test_what_stays_on_the_host_says_so():
    for family, options, shape in HOST.values():
        W = matrix(shape)
        found = sm.project(on_device(W, 0), family, **options)
        assert found.method.endswith("; computed on the host")
        same(found, sm.project(W, family, **options), W)
    W = matrix((24, 16))
    assert sm.project(on_device(W, 0), sm.Monarch, device="host").method.endswith("; computed on the host")


def test_searches_and_compression_say_that_they_are_on_the_host():
    W = matrix((16, 16))
    for found in sm.approximate(on_device(W, 0), budget=0.5, allow_slower=True):
        assert "; computed on " in found.method
        assert found.operator.kind == "cupy"
    plan = sm.allocate({"a": on_device(W, 0)}, budget=0.5)
    assert plan["a"].error == pytest.approx(sm.allocate({"a": W}, budget=0.5)["a"].error)
    sum_of_two = sm.LowRank.random((16, 16), rank=2, rng=0) + sm.LowRank.random((16, 16), rank=2, rng=1)
    smaller = sum_of_two.to("cupy").compress(rank=3)
    assert smaller.method.endswith("; computed on the host")
    assert smaller.operator.kind == "cupy"


def test_moments_are_summed_where_the_samples_are(no_large_copies):
    X, large = samples(300), 16 * 16
    there = on_device(X)
    no_large_copies(large)
    found, expected = sm.Moments.of(there), sm.Moments.of(X)
    assert isinstance(found.gram, np.ndarray)
    assert np.allclose(found.gram, expected.gram)
    assert np.allclose(found.mean, expected.mean)
    same(
        sm.project(matrix((24, 16)), sm.LowRank, rank=2, activations=on_device(X)),
        sm.project(matrix((24, 16)), sm.LowRank, rank=2, activations=X),
        matrix((24, 16)),
    )


def test_inputs_of_another_device_are_named():
    with pytest.raises(TypeError, match=r"activations: on <CUDA Device 0>, the matrix on <CUDA Device 1>"):
        sm.project(on_device(matrix((24, 16))), sm.Monarch, activations=on_device(samples(40), 0))
