"""Memory, devices, streams, CUDA graphs, torch on the stand-in; and that the stand-in is strict."""

from __future__ import annotations

import cupy
import fakecublas
import fakecupy
import fakelibrary
import numpy as np
import pytest
from standin_families import BF16, entries, error, on_device

import structmat as sm
from structmat.backends.cupy import CupyBackend

pytestmark = pytest.mark.usefixtures("products_only")

# ---- errors, devices, streams ---------------------------------------------------------------------------------------


def test_out_of_memory_changes_nothing_and_says_what_helps():
    host = sm.Monarch.random((64, 64), blocks=8, rng=0)
    a, x, out = host.to("cupy"), on_device(entries((64, 100))), on_device(np.full((64, 100), 7.0))
    _ = a @ x
    before = x.get()
    with fakecupy.memory_limit(1000):
        for apply in (lambda: a @ x, lambda: a.matmat(x, out=out), lambda: x.T @ a.T):
            with fakecupy.counted() as c, pytest.raises(MemoryError, match="free_all_blocks"):
                apply()
            assert (c.gemms, c.kernels) == ([], [])
        with pytest.raises(MemoryError, match="free_all_blocks"):
            host.to("cupy")
    assert (out.get() == 7).all()
    assert (x.get() == before).all()
    assert error(a @ x, host @ before) < 1e-12, "and the next call works"


def test_devices_do_not_mix():
    host = sm.Monarch.random((16, 16), blocks=4, rng=0)
    with cupy.cuda.Device(1):
        a = host.to("cupy")
    x = entries((16, 3))
    here = on_device(x)
    with pytest.raises(TypeError, match=r"Device 1.*Device 0"):
        a @ here
    with pytest.raises(TypeError, match=r"cupy.*numpy"):
        a @ x
    with cupy.cuda.Device(1):
        there = on_device(x)
    y = a @ there  # another device is current
    assert y.device == a.device
    assert error(y, host @ x) < 1e-12
    with pytest.raises(TypeError, match="cannot mix"):
        a + host.to("cupy")


def test_work_goes_to_the_current_stream():
    a, x = sm.Monarch.random((16, 16), blocks=4, rng=0).to("cupy"), on_device(entries((16, 3)))
    with cupy.cuda.Stream(7), fakecupy.counted() as c:
        _ = a @ x
    assert c.streams == {7}


def test_products_are_captured_by_a_handle_of_our_own(monkeypatch):
    from structmat.backends.cupy import capture

    own = fakelibrary.library()
    monkeypatch.setattr(capture, "_library", lambda: own)
    capture.handle.cache_clear()
    host = sm.Monarch.random((48, 40), blocks=8, rng=0, dtype=np.float32)
    a, x = host.to("cupy"), on_device(entries((40, 24), np.float32))
    before = len(a._plan().products._captured)
    capture.prepare()
    with cupy.cuda.Stream(5), fakecupy.capturing(), fakecupy.counted() as c:
        y = a @ x
    assert len(c.gemms) == 2
    assert c.kernels == []
    assert fakelibrary.calls == ["create", "stream 5", "workspace", "gemm", "stream 5", "workspace", "gemm"]
    assert error(y, host @ x.get()) < 1e-6
    kept = a._plan().products._captured[before:]
    assert [v.size for v in kept] == [x.size, 64 * 24], "the graph's memory is not given to others"
    fakelibrary.status = 7
    with fakecupy.capturing(), pytest.raises(RuntimeError, match="cublasSetStream failed with status 7"):
        a @ x
    fakelibrary.status = 0
    capture.handle.cache_clear()


def test_without_the_library_a_capture_is_refused():
    a, x = sm.Monarch.random((16, 16), blocks=4, rng=0).to("cupy"), on_device(entries((16, 3)))
    with fakecupy.capturing(), pytest.raises(RuntimeError, match=r"libcublas.*cannot be captured into a CUDA graph"):
        a @ x


def test_dtypes_that_cublas_does_not_multiply():
    a = sm.Monarch.random((16, 16), blocks=4, rng=0).to("cupy")
    with pytest.raises(TypeError, match="cuBLAS does not multiply"):
        a @ on_device(entries((16, 3)).astype(np.longdouble))


def test_backends_of_other_kernels_are_refused():
    with pytest.raises(ValueError, match="expected kernels of products, dense, fused"):
        CupyBackend(kernels=("magic",))


def test_bfloat16_does_not_leave_the_device():
    a = sm.Monarch.random((16, 16), blocks=4, rng=0).to("cupy").astype(BF16)
    for call in (lambda: a.to("numpy"), lambda: np.asarray(a)):
        with pytest.raises(TypeError, match=r"NumPy has no bfloat16.*astype"):
            call()
    with pytest.raises(TypeError, match="expected an array of floating or complex numbers"):
        sm.Dense(np.ones((2, 2), BF16))


# ---- torch ----------------------------------------------------------------------------------------------------------


def test_from_torch_on_the_host():
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        host = sm.Monarch.random((16, 16), blocks=4, rng=0, dtype=dtype if dtype != torch.bfloat16 else torch.float32)
        a = host.astype(dtype).to("cupy")
        assert a.kind == "cupy"
        assert a.dtype.name == str(dtype).removeprefix("torch.")
        dense = host.astype(dtype).to_dense().to(torch.complex64 if dtype.is_complex else torch.float32).numpy()
        assert error(a.to_dense(), dense) < 1e-2


# ---- the stand-in itself --------------------------------------------------------------------------------------------


def test_the_stand_in_is_strict():
    x, host = on_device(np.ones((2, 3))), np.ones((2, 3))
    for mixed in (
        lambda: np.asarray(x),
        lambda: x + host,
        lambda: host + x,
        lambda: x @ host.T,
        lambda: host @ x.T,
        lambda: cupy.matmul(x, host.T),
        lambda: np.add(x, host),
        lambda: cupy.concatenate([x, host]),
    ):
        with pytest.raises(TypeError):
            mixed()
    with pytest.raises(TypeError):
        x[0] = host[0]
    assert isinstance(x.sum(), cupy.ndarray)
    assert np.isnan(cupy.empty(3).get()).all()
    with cupy.cuda.Device(1):
        other = on_device(np.ones((2, 3)))
    with pytest.raises(ValueError, match="device"):
        x + other


def test_the_emulated_cublas_is_strict():
    x = on_device(np.ones((4, 4)))
    one = np.ones(1)
    ok = {"handle": 1, "transa": 0, "transb": 0, "batch": 1, "compute": 70, "algo": -1}
    ok |= dict.fromkeys("mnk", 4) | dict.fromkeys("ABC", x.data.ptr) | dict.fromkeys(("lda", "ldb", "ldc"), 4)
    ok |= dict.fromkeys(("Atype", "Btype", "Ctype"), 1) | dict.fromkeys(("strideA", "strideB", "strideC"), 0)
    ok |= dict.fromkeys(("alpha", "beta"), one.ctypes.data)
    fakecublas.gemmStridedBatchedEx(**ok)
    for wrong in ({"lda": 3}, {"transa": 2}, {"Atype": 0}, {"compute": 68}, {"batch": 2}, {"k": 0}, {"strideB": -1}):
        with pytest.raises(fakecublas.CUBLASError):
            fakecublas.gemmStridedBatchedEx(**{**ok, **wrong})
    for wrong in ({"n": 5}, {"A": 64}, {"ldc": 5}):
        with pytest.raises(MemoryError, match="illegal address"):
            fakecublas.gemmStridedBatchedEx(**{**ok, **wrong})
