"""The Numba backend's kernels: every one that a planner may choose, against the definition; vectors of every width."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chains import BAND, DTYPES, check_kernels, dense_of, guarded, kernels, layouts, untouched, with_transposes
from hypothesis import given, settings
from hypothesis import strategies as st
from market import dense_chain, entries, market, names

import structmat as sm

pytest.importorskip("numba")

from structmat.backends.numba.backend import NumbaBackend
from structmat.backends.numba.plan import NumbaPlan
from structmat.backends.numba.simd import VECTOR_BYTES
from structmat.testing import tolerance

PLANNED = [pair for pair in market() if hasattr(pair.operator, "_plan")]
BATCHES = (1, 3, 17, 64, 130)
CHAINS = {f"{name}-{np.dtype(d).name}": chain for d in DTYPES for name, chain in with_transposes(d)}
on_all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


def plan_of(operator):
    with sm.use_backend("numba"):
        return operator._plan()


# ---- whole operators ------------------------------------------------------------------------------------------------


def products(operator):
    """Every form of application, for every batch."""
    *_, m, n = operator.shape
    dtype = operator.dtype
    yield operator @ entries((n,), dtype, 1)
    for k in BATCHES:
        x, rows = entries((n, k), dtype, k), entries((k, n), dtype, k)
        yield operator @ x
        yield rows @ operator.T
        yield operator.matmat(x, out=np.full((*operator.batch_shape, m, k), np.nan, dtype))
        if not operator.batch_shape:
            yield operator.matvec(rows)
    if not operator.batch_shape:
        yield operator @ entries((2, 3, n, 5), dtype, 2)
        yield entries((2, 3, 5, n), dtype, 2) @ operator.T


@pytest.mark.parametrize("pair", market(), ids=names(market()))
def test_the_market_equals_the_numpy_backend(pair):
    with sm.use_backend("numpy"):
        expected = list(products(pair.operator))
    with sm.use_backend("numba"):
        got = list(products(pair.operator))
    slack = tolerance(pair.operator.dtype) * (1e3 if "inverse" in pair.name else 10)
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        if pair.operator.dtype.kind == "c":
            np.testing.assert_array_equal(x, y, err_msg="complex values go NumPy's way")
        else:
            np.testing.assert_allclose(x, y, rtol=0, atol=slack * max(1.0, np.abs(y).max(initial=0)))


@pytest.mark.parametrize("pair", PLANNED, ids=names(PLANNED))
def test_every_kernel_of_the_market(pair):
    operator = pair.operator
    plan = plan_of(operator)
    real = operator.dtype.kind == "f" and not operator.batch_shape
    if not isinstance(plan, NumbaPlan):
        assert not (isinstance(operator, sm.Chain) and real and 0 not in [f.size for f in operator.factors])
        return
    assert real
    for k in (1, 3, 37):
        assert check_kernels(plan, pair.dense.astype(float), k, operator.dtype)


# ---- every kernel of a chain ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAINS)
def test_every_kernel_of_a_chain(name):
    chain = CHAINS[name]
    dense = dense_of(chain)
    ran = {kernel for k in (1, 5, 37, 130) for kernel in check_kernels(plan_of(chain), dense, k, chain.dtype)}
    assert "dense" in ran
    if "orders" not in name and "levels" not in ran:
        lanes = VECTOR_BYTES // chain.dtype.itemsize
        assert {"vector", f"tile {lanes}", f"tile {2 * lanes}", f"tile {4 * lanes}"} <= ran


@given(layouts(), st.sampled_from([1, 2, 9, 19]), st.sampled_from(DTYPES))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_every_kernel_of_any_small_chain(layout, k, dtype):
    check_layout(layout, k, dtype)


@given(layouts(size=11), st.sampled_from([1, 7, 35]), st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_kernel_of_any_chain_with_larger_blocks(layout, k, dtype):
    check_layout(layout, k, dtype)


def check_layout(layout, k, dtype):
    blocks = [entries((p.a, p.d, p.b, p.c), dtype, i) for i, p in enumerate(layout.patterns)]
    dense = dense_chain(
        [b.astype(float) for b in blocks], (layout.rows, layout.cols), layout.out_order, layout.in_order
    )
    assert check_kernels(NumbaBackend().chain(layout, blocks), dense, k, dtype)


@pytest.mark.parametrize("name", [name for name in CHAINS if name.startswith(("monarch-9", "btt-2-rank-3", "orders-"))])
def test_remainders_of_every_size(name):
    chain = CHAINS[name]
    dense, lanes = dense_of(chain), VECTOR_BYTES // chain.dtype.itemsize
    for k in range(1, 2 * lanes + 2):
        check_kernels(plan_of(chain), dense, k, chain.dtype)


@on_all_dtypes
def test_nothing_outside_of_out_is_written(dtype):
    """By the front door: ``out`` is a view inside a larger array."""
    for operator in (
        sm.Monarch.random((97, 89), dtype=dtype, rng=0),
        sm.Butterfly.random((128, 128), radix=2, dtype=dtype, rng=0),
        sm.Kronecker.random((60, 35), dtype=dtype, rng=0),
        sm.LowRank.random((41, 67), rank=3, dtype=dtype, rng=0),
    ):
        dense = operator.to_dense().astype(float)
        for k in (1, 2, 7, 16, 33, 130):
            x = entries((operator.shape[1], k), dtype, k)
            whole, out = guarded((operator.shape[0], k), dtype)
            with sm.use_backend("numba"):
                assert operator.matmat(x, out=out) is out
            assert np.allclose(out, dense @ x, atol=1e-3 if dtype is np.float32 else 1e-10)
            assert untouched(whole)
    assert not untouched(np.zeros(2 * BAND))


# ---- numbers that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [n for n in CHAINS if n.endswith("float32") and "-T" not in n])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_and_infinity_stay_in_their_sample(name, value):
    chain = CHAINS[name]
    plan, (m, n) = plan_of(chain), chain.shape
    for k in (1, 21):
        x = entries((n, k), chain.dtype, 3)
        bad = x.copy()
        j = k // 2
        bad[n // 2, j] = value
        others = np.arange(k) != j
        for rows in (False, True):
            expected = ~np.isfinite(plan.reference.columns(bad)[:, j])
            assert expected.any()
            for kernel, apply in kernels(plan, k, rows).items():
                results = []
                for operand in (x, bad):
                    out = np.empty((k, m) if rows else (m, k), chain.dtype)
                    apply(np.array(operand.T if rows else operand, order="C").reshape(-1), out.reshape(-1), 0)
                    results.append(out.T if rows else out)
                clean, got = results
                np.testing.assert_array_equal(got[:, others], clean[:, others], err_msg=kernel)
                lost = ~np.isfinite(got[:, j])
                assert (lost >= expected).all(), f"{kernel} hides it"
                assert kernel == "dense" or (lost == expected).all(), f"{kernel} spreads it"


@on_all_dtypes
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_in_a_weight_reaches_its_results_only(dtype):
    blocks = entries((8, 8, 8), dtype, 1)
    blocks[3, 2, 5] = np.nan
    plan = plan_of(sm.BlockDiagonal(blocks))
    x = np.ones((64, 21), dtype)
    for rows in (False, True):
        for kernel, apply in kernels(plan, 21, rows).items():
            out = np.empty((21, 64) if rows else (64, 21), dtype)
            apply(x.reshape(-1), out.reshape(-1), 0)
            lost = np.isnan(out if rows else out.T)
            assert (lost == (np.arange(64) == 26)).all(), kernel


# ---- other vectors --------------------------------------------------------------------------------------------------

WIDTHS = {
    32: {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+sse2"},
    16: {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse2,+sse4.1"},
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the targets are x86 processors")
@pytest.mark.parametrize("width", WIDTHS)
def test_narrower_vectors(width, tmp_path):
    if width >= VECTOR_BYTES:
        pytest.skip("this machine's vectors are tested by the other tests")
    env = {**os.environ, **WIDTHS[width], "NUMBA_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).parent / "chains.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == width
