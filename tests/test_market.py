"""Every operator of the market against itself and against its dense twin, by every public method."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from market import DTYPES, entries, market, names, small_market

import structmat as sm
from structmat.testing import assert_matches, check_operator, tolerance

ALL, SMALL = market(), small_market()
on_all = pytest.mark.parametrize("pair", ALL, ids=names(ALL))
on_small = pytest.mark.parametrize("pair", SMALL, ids=names(SMALL))


def tol_of(pair) -> float:
    return tolerance(pair.operator.dtype) * (100 if "inverse" in pair.name else 1)


def close(got, expected, pair, factor=1.0) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max(initial=0))) * factor
    assert float(np.abs(got - expected).max(initial=0)) <= tol_of(pair) * scale


@on_all
def test_conformance(pair):
    if "inverse" not in pair.name:  # applied iteratively: linear only to its tolerance
        check_operator(pair.operator)


@on_all
def test_dense_twin(pair):
    assert_matches(pair.operator, pair.dense, tol=tol_of(pair))
    assert pair.operator.dtype == pair.dense.dtype


@on_all
def test_transposes(pair):
    a, d = pair.operator, pair.dense
    dt = np.swapaxes(d, -1, -2)
    for got, expected in ((a.T, dt), (a.H, dt.conj()), (a.conj(), d.conj()), (a.T.H, d.conj()), (a.H.T, d.conj())):
        assert_matches(got, expected, tol=tol_of(pair))
    assert a.T.T is a
    assert a.H.H is a


@on_all
def test_transposed_chains_stay_in_their_family(pair):
    a = pair.operator
    if isinstance(a, (sm.Chain, sm.Kronecker, sm.Dense, sm.Diagonal, sm.Permutation, sm.BlockSparse)):
        assert type(a.T) is type(a)
        assert type(a.H) is type(a)
        assert a.T.nparams == a.nparams
        assert a.T._flops() == a._flops() or isinstance(a, sm.Kronecker)


@on_small
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_astype(pair, dtype):
    a, d = pair.operator, pair.dense
    if d.dtype.kind == "c" and np.dtype(dtype).kind != "c":
        with pytest.raises(TypeError, match="imaginary"):
            a.astype(dtype)
        return
    b = a.astype(dtype)
    assert b.dtype == dtype
    assert (b @ np.ones((d.shape[-1], 1), dtype)).dtype == dtype
    slack = 1e4 if "inverse" in pair.name else 1
    assert_matches(b, d.astype(dtype), tol=slack * tolerance(dtype))


@on_small
def test_promotion_with_the_operand(pair):
    a, d = pair.operator, pair.dense
    n = d.shape[-1]
    for x in (
        np.arange(n),
        np.arange(n, dtype=np.float32),
        np.arange(n) * (1 + 1j),
        np.arange(n) % 2 == 0,
        list(range(n)),
    ):
        expected = d @ np.asarray(x)
        got = a @ x
        assert got.dtype == np.result_type(d.dtype, np.asarray(x).dtype)
        close(got, expected, pair, n)


@on_small
def test_methods_of_application(pair):
    a, d = pair.operator, pair.dense
    m, n = d.shape[-2:]
    x, y = entries((n, 3), d.dtype, 1), entries((m, 3), d.dtype, 2)
    dh = np.swapaxes(d, -1, -2).conj()
    close(a.matmat(x), d @ x, pair, n)
    close(a.dot(x), d @ x, pair, n)
    close(a.dot(x[:, 0]), d @ x[:, 0], pair, n)
    close(a.matvec(x[:, 0]), d @ x[:, 0], pair, n)
    close(a.matvec(x[:, :1]), d @ x[:, :1], pair, n)
    close(a.rmatmat(y), dh @ y, pair, m)
    close(a.rmatvec(y[:, 0]), dh @ y[:, 0], pair, m)
    close(y[:, 0] @ a, y[:, 0] @ d, pair, m)
    close(y.T @ a, y.T @ d, pair, m)
    close(a.rdot(y.T), y.T @ d, pair, m)
    if d.ndim == 2:
        stack, rows = entries((2, 1, n, 3), d.dtype, 3), entries((2, 5, n), d.dtype, 4)
        close(a @ stack, d @ stack, pair, n)
        close(rows @ a.T, rows @ d.T, pair, n)
        close(a.matvec(rows), rows @ d.T, pair, n)


@on_small
def test_out(pair):
    a, d = pair.operator, pair.dense
    m, n = d.shape[-2:]
    x = entries((n, 3), d.dtype, 1)
    guarded = np.full((*d.shape[:-2], m + 2, 5), 7, d.dtype)
    out = guarded[..., 1:-1, 1:-1]
    assert a.matmat(x, out=out) is out
    close(out, d @ x, pair, n)
    out[...] = 7
    assert (guarded == 7).all(), "wrote outside out"
    contiguous = np.empty((*d.shape[:-2], m, 3), d.dtype)
    close(a.dot(x, out=contiguous), d @ x, pair, n)
    close(contiguous, d @ x, pair, n)
    with pytest.raises(ValueError, match="out: expected shape"):
        a.matmat(x, out=np.empty((m + 1, 3), d.dtype))
    with pytest.raises(TypeError, match="out: dtype"):
        a.matmat(x, out=np.empty(d.shape[:-1] + (3,), np.int64))


@on_small
def test_layouts_of_the_operand(pair):
    a, d = pair.operator, pair.dense
    n = d.shape[-1]
    base = entries((2 * n, 8), d.dtype, 5)
    frozen = base[:n].copy()
    frozen.flags.writeable = False
    unaligned = np.frombuffer(b"\0" + base[:n].tobytes(), dtype=np.uint8)[1:].view(np.uint8)
    unaligned = np.ndarray((n, 8), d.dtype, buffer=unaligned.data)
    for x in (base[::2], base[:n, ::2], np.asfortranarray(base[:n]), base[:n][:, ::-1], frozen, unaligned):
        kept = x.copy()
        close(a @ x, d @ x, pair, n)
        close(x.T @ a.T, np.swapaxes(d @ x, -1, -2), pair, n)
        assert np.array_equal(x, kept)


@on_small
def test_row_form_of_many_rows(pair):
    a, d = pair.operator, pair.dense
    if d.ndim == 2 and "inverse" not in pair.name:
        x = entries((301, d.shape[-1]), d.dtype, 6)
        close(x @ a.T, x @ d.T, pair, d.shape[-1])


@on_small
def test_indexing(pair):
    a, d = pair.operator, pair.dense
    m, n = d.shape[-2:]
    rows, cols = np.arange(m)[::-1], np.r_[np.arange(n), 0]
    mask = np.arange(m) % 2 == 0
    lead = (Ellipsis,) if d.ndim > 2 else ()
    keys = [
        (0, 0), (-1, -1), (slice(None), slice(1, None, 2)), (slice(None, None, -1), slice(0, 2)), (0, slice(None)),
        (slice(None), -1), (rows, slice(None)), (slice(None), cols), np.ix_(rows, cols), (mask, slice(None)),
        ([0, m - 1], [n - 1, 0]), (0, cols), (rows, 0), (slice(0, 0), slice(None)),
    ]  # fmt: skip
    for key in keys:
        got, expected = a[(*lead, *key)], d[(*lead, *key)]
        if isinstance(got, sm.Operator):
            assert got.dtype == d.dtype
            got = got.to_dense()
        close(got, expected, pair)
    if d.ndim == 2:
        close(np.asarray(a[0]), d[0:1] if isinstance(a[0], sm.Operator) else d[0], pair)
        assert np.ndim(a[0, 0]) == 0
        assert a[0, 0].dtype == d.dtype
        for wrong in ((m, 0), (0, n), (0, 0, 0), (slice(None), np.array([n])), (0.5, 0), (mask[:-1], 0)):
            with pytest.raises(IndexError):
                a[wrong]


@on_all
def test_counts_and_copies(pair):
    a = pair.operator
    assert a.nparams == sum(x.size for x in a.arrays if x.dtype.kind in "fc")
    assert a.flops(3) == 3 * a.flops() >= 0
    assert a.nbytes >= 0
    assert copy.copy(a) is a
    deep, unpickled = copy.deepcopy(a), pickle.loads(pickle.dumps(a))
    for other in (deep, unpickled):
        assert type(other) is type(a)
        assert np.array_equal(other.to_dense(), a.to_dense())
    for mine, theirs in zip(a.arrays, deep.arrays, strict=True):
        assert not np.shares_memory(mine, theirs)
    with pytest.raises(AttributeError, match="immutable"):
        a.shape = (1, 1)


@on_small
def test_scalars_signs_and_powers(pair):
    a, d = pair.operator, pair.dense
    for c in (2, -0.5, 1j, np.float64(3), np.array(2.0)):
        close((c * a).to_dense(), c * d, pair, abs(c))
        close((a * c).to_dense(), d * c, pair, abs(c))
        assert (c * a).dtype == np.result_type(d.dtype, c)
    close((a / 4).to_dense(), d / 4, pair)
    close((-a).to_dense(), -d, pair)
    if d.shape[-1] == d.shape[-2] and d.ndim == 2 and "inverse" not in pair.name:
        for k in (0, 1, 2, 3):
            expected = np.linalg.matrix_power(d, k)
            close((a**k).to_dense(), expected, pair, max(1.0, float(np.abs(d).max()) ** k))


@on_small
def test_inverse(pair):
    a, d = pair.operator, pair.dense
    if d.shape[-1] != d.shape[-2]:
        with pytest.raises(np.linalg.LinAlgError, match="square"):
            a.inv()
        return
    if d.ndim > 2:
        return
    condition = np.linalg.cond(d)
    if not condition < 1e12:
        if not pair.name.startswith(("external", "dense-singular")):  # singular only to rounding, or solved by GMRES
            with pytest.raises(np.linalg.LinAlgError):
                a.inv() @ np.linspace(1, 2, d.shape[-1])
        return
    expected = np.linalg.inv(d)
    if isinstance(a, (sm.Dense, sm.Diagonal, sm.Permutation, sm.Identity, sm.BlockDiagonal)) and not getattr(
        a, "padded", False
    ):
        assert type(a.inv()) is type(a)
    inverse = a.inv()
    if condition < 1e6:
        close(inverse.to_dense(), expected, pair, 10 * condition * np.abs(expected).max())
        assert a.inv().inv().shape == a.shape


@on_small
def test_asarray(pair):
    a, d = pair.operator, pair.dense
    close(np.asarray(a), d, pair)
    assert np.asarray(a).ndim == d.ndim
    assert np.asarray(a, dtype=np.complex128).dtype == np.complex128
    with pytest.raises(TypeError, match="to_dense"):
        np.sum(a)
    with pytest.raises(TypeError):
        np.exp(a)


def test_the_market_is_complete():
    present = {type(p.operator) for p in ALL}
    public = {
        v for v in vars(sm).values() if isinstance(v, type) and issubclass(v, sm.Operator) and v is not sm.Operator
    }
    lazy = {
        v
        for module in (sm.algebra, sm.blocks, sm.indexing)
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, sm.Operator)
    }
    missing = (public | lazy) - present - {sm.Operator, sm.algebra.Combination}
    assert not missing
