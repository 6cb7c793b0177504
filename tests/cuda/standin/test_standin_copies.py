"""What the CuPy backend launches: products without copies, chunks, merged factors, results in place."""

from __future__ import annotations

import cupy
import fakecupy
import numpy as np
import pytest
from standin_families import FAMILIES, entries, error, on_device

import structmat as sm
from structmat.backends.cuda.roofline import H200
from structmat.backends.cupy import CupyBackend

pytestmark = pytest.mark.usefixtures("products_only")

CALLS = {  # products in columns, and copies in rows forward and transposed
    "monarch": (2, 0, 1), "monarch padded": (3, 0, 1), "btt": (2, 0, 0), "butterfly": (2, 0, 1), "low rank": (2, 0, 0),
    "block diagonal": (1, 0, 0), "block diagonal padded": (2, 0, 0), "kronecker": (2, 0, 0),
    "kronecker of three": (2, 0, 0),
}  # fmt: skip


# ---- no copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_products_and_copies_are_counted(name):
    host = FAMILIES[name](rng=0)
    a = host.to("cupy")
    x = entries((host.shape[1], 24))
    _, _ = a @ on_device(x), a.T @ on_device(entries((host.shape[0], 2)))  # merges factors, once
    count, forward, transposed = CALLS[name]
    with fakecupy.counted() as c:
        y = a @ on_device(x)
    assert (len(c.gemms), c.kernels) == (count, [])
    assert error(y, host @ x) < 1e-12
    assert y.flags.c_contiguous or host.padded
    with fakecupy.counted() as c:
        y = on_device(x.T) @ a.T
    assert len(c.kernels) == forward
    assert error(y, (host @ x).T) < 1e-12
    z = entries((24, host.shape[0]))
    with fakecupy.counted() as c:
        y = on_device(z) @ a
    assert len(c.kernels) + len(c.launches) == transposed
    assert all(launched.startswith("transpose<") for launched in c.launches), "the one kernel of ours that copies"
    assert error(y, z @ host) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_strided_and_stacked_operands_take_no_copy(name):
    host = FAMILIES[name](rng=0)
    a, n = host.to("cupy"), host.shape[1]
    room = on_device(entries((3, 30, n + 5)))
    _ = a @ room[0, :2, :n].T
    for view in (room[0, :, :n], room[:, :, :n], room[1, ::2, 2 : n + 2], room[:, 0, :n]):
        with fakecupy.counted() as c:
            y = view @ a.T
        assert c.kernels == []
        assert error(y, view.get() @ host.T) < 1e-12
    for view in (room.swapaxes(1, 2)[:, :n], room[0, :, :n].T, room[0].T[:n, ::3]):
        with fakecupy.counted() as c:
            y = a @ view
        assert c.kernels == []
        assert error(y, host @ view.get()) < 1e-12
    many = on_device(entries((20, 7, 3, n)))[:, 1:5]
    with fakecupy.counted() as c:
        y = many @ a.T
    assert c.kernels == ["ascontiguousarray"], "twenty stacked matrices that do not follow each other"
    assert error(y, many.get() @ host.T) < 1e-12
    odd = room[0, :, : 2 * (n // 2) : 2]  # no unit stride: one copy
    if name == "low rank":
        small = sm.LowRank(np.ones((3, 2)), np.ones((2, n // 2))).to("cupy")
        with fakecupy.counted() as c:
            _ = odd @ small.T
        assert len(c.kernels) == 1


def test_butterfly_levels_become_two_factors():
    host = sm.Butterfly.random((4096, 4096), radix=2, rng=0, dtype=np.float32)
    a = host.to("cupy")
    assert len(a.factors) == 12
    x = entries((4096, 2), np.float32)
    _ = a @ on_device(x)
    with fakecupy.counted() as c:
        y = a @ on_device(x)
    assert [g[1:] for g in c.gemms] == [(64, 64, 64)] * 2
    assert error(y, host @ x) < 1e-5


def test_a_kronecker_product_of_many_small_factors_becomes_two():
    a = sm.hadamard(4096, np.float32).to("cupy")
    _ = a @ on_device(np.eye(4096, 1, dtype=np.float32))
    with fakecupy.counted() as c:
        y = a @ on_device(np.eye(4096, 1, dtype=np.float32))
    assert len(c.gemms) == 2
    assert (y.get() == 1).all()


def test_large_batches_go_in_chunks_whose_intermediates_stay_in_the_cache():
    small_cache = CupyBackend(H200._replace(cache_bytes=200_000, call=1e-9), ("products",))
    sm.backends.register(small_cache, "cupy")
    host = sm.Monarch.random((64, 64), blocks=8, rng=0, dtype=np.float32)
    with sm.use_backend("cupy"):
        for rows in (False, True):
            a = host.to("cupy")
            x = entries((64, 1100), np.float32)
            with fakecupy.counted() as c:
                y = on_device(x.T) @ a.T if rows else a @ on_device(x)
            assert [g[1] if g[0] == 8 else g[0] for g in c.gemms] == [256] * 8 + [76] * 2
            assert c.kernels == []
            assert error(y, (host @ x).T if rows else host @ x) < 1e-5
        assert "256 rows at a time" in a.plan(batch=1100, rows=True).kernel


# ---- results into place ---------------------------------------------------------------------------------------------


def test_sums_accumulate_in_the_last_product():
    b = sm.BlockTensorTrain.random((48, 48), blocks=8, rng=1)
    r, k = sm.LowRank.random((48, 48), rank=3, rng=2), sm.Kronecker.random((48, 48), rng=3)
    host = b + r + k
    a, x = host.to("cupy"), entries((48, 20))
    for rows in (False, True):
        _ = a @ on_device(x)
        with fakecupy.counted() as c:
            y = on_device(x.T) @ a.T if rows else a @ on_device(x)
        assert c.kernels == []
        assert len(c.gemms) == 6
        assert error(y, (host @ x).T if rows else host @ x) < 1e-12
    plan = a.terms[1]._plan()
    out = on_device(np.ones((48, 20)))
    assert not plan.add(on_device(x), out[:, :19])
    assert not plan.add(on_device(x), cupy.broadcast_to(out[:, :1], (48, 20)))
    assert not plan.add(on_device(x.astype(np.complex128)), out)
    assert not plan.add(out, out)
    assert (out.get() == 1).all(), "nothing was done"
    assert plan.add(on_device(x), out)
    assert error(out, 1 + r @ x) < 1e-12


def test_out_is_written_in_place():
    host = sm.Monarch.random((48, 40), blocks=8, rng=0)
    a, x = host.to("cupy"), entries((40, 6))
    room = on_device(np.full((48, 9), 7.0))
    _ = a @ on_device(x)
    with fakecupy.counted() as c:
        assert a.matmat(on_device(x), out=room[:, 1:7]) is not room
    assert c.kernels == []
    assert (room.get()[:, [0, 7, 8]] == 7).all()
    assert error(room[:, 1:7], host @ x) < 1e-12
    square = sm.Monarch.random((40, 40), blocks=8, rng=0)
    y = on_device(x)
    square.to("cupy").matmat(y, out=y)  # an operand that is its own result
    assert error(y, square @ x) < 1e-12
    single = on_device(np.zeros((48, 6), np.float32))
    with pytest.raises(TypeError, match="out: dtype float32"):
        a.matmat(on_device(x), out=single)
    with pytest.raises(ValueError, match="out: expected shape"):
        a.matmat(on_device(x), out=room)
    padded = sm.Monarch.random((47, 37), blocks=6, rng=0)
    out = on_device(np.zeros((47, 5)))
    padded.to("cupy").matmat(on_device(x[:37, :5]), out=out)
    assert error(out, padded @ x[:37, :5]) < 1e-12
