"""The Numba backend as it is called: operands, weights and ``out`` of every kind."""

from __future__ import annotations

import numpy as np
import pytest
from chains import DTYPES, composites, dense_of, operators
from market import entries

import structmat as sm

pytest.importorskip("numba")

on_all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)


@pytest.fixture(autouse=True)
def _numba():
    with sm.use_backend("numba"):
        yield


def unaligned(x):
    raw = np.zeros(x.nbytes + 1, np.uint8)
    view = np.frombuffer(raw.data, x.dtype, x.size, offset=1).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


def of_every_kind(x):
    """Arrays of the same values, or of rounded ones, in every layout and dtype."""
    spread = np.full(tuple(3 * size for size in x.shape), np.nan, x.dtype)
    middle = spread[tuple(slice(1, None, 3) for _ in x.shape)]
    middle[...] = x
    frozen = x.copy()
    frozen.setflags(write=False)
    yield x
    yield np.asfortranarray(x)
    yield middle
    yield x[::-1].copy()[::-1]
    yield x[..., ::-1].copy()[..., ::-1]
    yield np.concatenate([x, x])[: len(x)]
    yield np.broadcast_to(x[..., :1], x.shape)
    yield np.broadcast_to(x[:1], x.shape)
    yield unaligned(x)
    yield frozen
    yield x.astype(x.dtype.newbyteorder())
    yield np.rint(4 * x).astype(np.int16)
    yield x > 0
    yield x.astype(np.float16)
    yield x.astype(np.float32)
    yield x.astype(np.float64)
    yield x + 1j * x
    yield x.astype(np.longdouble)


@on_all_dtypes
def test_operands_of_every_kind(dtype):
    for a in (*operators(dtype), *composites(dtype)):
        dense = a.to_dense()
        for x in (entries((96,), dtype, 1), entries((96, 1), dtype, 2), entries((96, 37), dtype, 3)):
            for operand in of_every_kind(x):
                kept = operand.copy()
                got, expected = a @ operand, dense.astype(np.longdouble) @ operand
                assert got.dtype == np.result_type(dtype, operand.dtype)
                assert got.dtype.isnative
                assert np.abs(got - expected).max() <= 1e3 * np.finfo(dtype).eps * max(1, np.abs(expected).max())
                by_rows = operand.T @ a.T
                assert np.abs(by_rows.T - expected).max() <= 1e3 * np.finfo(dtype).eps * max(1, np.abs(expected).max())
                np.testing.assert_array_equal(operand, kept)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_masked_operands_are_refused(backend):
    a = sm.Monarch.random((16, 16), rng=0)
    x = np.ma.masked_array(np.ones((16, 3)), mask=np.eye(16, 3))
    with sm.use_backend(backend):
        for call in (
            lambda: a @ x,
            lambda: a @ x[:, 0],
            lambda: x.T @ a.T,
            lambda: a.matmat(x),
            lambda: a.matvec(x[:, 0]),
        ):
            with pytest.raises(TypeError, match="masked"):
                call()


@on_all_dtypes
def test_a_kernel_serves_all_batches_of_its_class(dtype):
    for a in (*operators(dtype), *composites(dtype)):
        for sizes in ((31, 16, 17, 30), (9, 15), (255, 128, 129, 200), (300, 511)):  # planned for the first
            for k in sizes:
                x = entries((96, k), dtype, k)
                expected = a.to_dense().astype(float) @ x
                limit = 1e3 * np.finfo(dtype).eps * max(1, np.abs(expected).max())
                assert np.abs(a @ x - expected).max() <= limit
                assert np.abs(x.T.copy() @ a.T - expected.T).max() <= limit


def values_of_every_kind(x):
    yield from list(of_every_kind(x))[:10]  # layouts
    record = np.zeros(x.shape, np.dtype([("one", np.int8), ("value", x.dtype)]))
    record["value"] = x
    yield record["value"]  # strides that are no multiple of an element


@on_all_dtypes
def test_weights_of_every_kind(dtype):
    left, right = entries((8, 6, 7), dtype, 1), entries((7, 8, 5), dtype, 2)
    for l, r in zip(values_of_every_kind(left), values_of_every_kind(right), strict=True):
        a = sm.Monarch(l, r)
        dense = dense_of(a)
        for k in (1, 21):
            x = entries((35, k), dtype, k)
            np.testing.assert_allclose(a @ x, dense @ x, rtol=0, atol=300 * np.finfo(dtype).eps)
            np.testing.assert_allclose(x.T @ a.T, (dense @ x).T, rtol=0, atol=300 * np.finfo(dtype).eps)


def test_weights_of_other_byte_order_and_dtype():
    left, right = entries((4, 3, 4), np.float64, 1), entries((4, 4, 3), np.float64, 2)
    expected = sm.Monarch(left, right) @ np.ones((12, 5))
    for l, r in ((left.astype(">f8"), right), (left.astype(">f8"), right.astype(">f8"))):
        np.testing.assert_allclose(sm.Monarch(l, r) @ np.ones((12, 5)), expected, atol=1e-13)
    mixed = sm.Monarch(left.astype(np.float32), right) @ np.ones((12, 5))
    assert mixed.dtype == np.float64
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


@on_all_dtypes
def test_empty_operands_and_operators(dtype):
    for a in operators(dtype):
        m, n = a.shape
        assert (a @ np.empty((n, 0), dtype)).shape == (m, 0)
        assert (np.empty((0, n), dtype) @ a.T).shape == (0, m)
        assert (a @ np.empty((2, 0, n, 3), dtype)).shape == (2, 0, m, 3)
    for shape in ((0, 4), (4, 0), (0, 0)):
        a = sm.LowRank(np.ones((shape[0], 2), dtype), np.ones((2, shape[1]), dtype))
        np.testing.assert_array_equal(a @ np.ones((shape[1], 3), dtype), np.zeros((shape[0], 3)))
    a = sm.LowRank(np.ones((4, 0), dtype), np.ones((0, 5), dtype))
    np.testing.assert_array_equal(a @ np.ones((5, 3), dtype), np.zeros((4, 3)))


# ---- out ------------------------------------------------------------------------------------------------------------


@on_all_dtypes
def test_out_of_every_kind(dtype):
    for a in (*operators(dtype), *composites(dtype)):
        m, n = a.shape
        for k in (1, 19):
            x = entries((n, k), dtype, k)
            expected = a @ x
            spread = np.zeros((2 * m, 3 * k), dtype)
            wider = np.complex128 if dtype is np.float64 else np.float64
            for out in (
                np.empty((m, k), dtype),
                np.empty((m, k), dtype, order="F"),
                np.empty((m, k), dtype)[::-1],
                spread[1::2, 1::3],
                unaligned(np.zeros((m, k), dtype)),
                np.empty((m, k), wider),
            ):
                assert a.matmat(x, out=out) is out
                np.testing.assert_array_equal(out, expected)
            assert (spread[::2] == 0).all()


@on_all_dtypes
def test_out_that_overlaps_the_operand(dtype):
    for a in (*operators(dtype), *composites(dtype)):
        m, n = a.shape
        for k in (1, 19):
            for shift in (0, 1, 8, 5 * k):
                store = entries((max(m, n) * k + shift,), dtype, 4)
                x, out = store[: n * k].reshape(n, k), store[shift : shift + m * k].reshape(m, k)
                expected = a @ x.copy()
                np.testing.assert_array_equal(a.matmat(x, out=out), expected)
            if m == n:
                x = entries((n, k), dtype, 5)
                expected = a @ x.copy()
                np.testing.assert_array_equal(a.matmat(x, out=x), expected)


@on_all_dtypes
def test_out_that_cannot_take_the_result_is_left_alone(dtype):
    frozen = np.zeros((96, 3), dtype)
    frozen.setflags(write=False)
    a = next(operators(dtype))
    x = entries((96, 3), dtype, 1)
    for out, error in (
        (np.zeros((95, 3), dtype), ValueError),
        (np.zeros((96, 4), dtype), ValueError),
        (np.zeros((3, 96), dtype), ValueError),
        (np.zeros(96 * 3, dtype), ValueError),
        (np.zeros((1, 96, 3), dtype), ValueError),
        (np.zeros((96, 3), np.float16), TypeError),
        (np.zeros((96, 3), np.int64), TypeError),
        (frozen, ValueError),
    ):
        with pytest.raises(error):
            a.matmat(x, out=out)
        assert not out.any()
    with pytest.raises(TypeError, match="complex"):
        a.matmat(x + 1j, out=np.zeros((96, 3), dtype))
