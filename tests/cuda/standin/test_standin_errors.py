"""Memory, devices, dtypes, torch on the stand-in; and that the stand-in is strict."""

from __future__ import annotations

import cupy
import fakecublas
import fakecupy
import numpy as np
import pytest
from standin_families import BF16, FAMILIES, entries, error, on_device

import structmat as sm
from structmat.backends.cuda.roofline import H200
from structmat.backends.cupy import CupyBackend

pytestmark = pytest.mark.usefixtures("products_only")

# ---- errors, devices -----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kernels", [("products",), ("dense",), ("fused",)], ids=lambda kernels: kernels[0])
def test_everything_is_made_on_the_device_of_the_operator(name, kernels):
    host, slow = FAMILIES[name](rng=0, dtype=np.float32), H200._replace(call=1e-3)
    sm.backends.register(CupyBackend(slow, kernels), "cupy")
    with sm.use_backend("cupy"):
        for dtype in (np.float32, np.float16, np.float64, np.int32, np.bool_):
            x = (3 * entries((host.shape[1], 4))).astype(dtype)
            with cupy.cuda.Device(1):
                a, there, rows, stack = host.to("cupy"), on_device(x), on_device(x.T), on_device(np.stack([x.T] * 24))
                flat, out = stack[::2], on_device(np.zeros((host.shape[0], 4), (host @ x).dtype))
            expected, device = host @ x, a.device
            assert cupy.cuda.runtime.getDevice() == 0, "another one is current"
            found = a @ there, a.T.rdot(rows).T, a.matmat(there, out=out), a.T.rdot(flat)[3].T, a._once(there)
            for y in found:
                assert y.device == device
                assert error(y, expected) < 1e-3
            added = a._add(there, out, False)
            assert added == ("padded" not in name), "padding takes a copy"
            assert error(out, (1 + added) * expected) < 1e-3
            assert sm.tune(a, batch=4).kernel
        with cupy.cuda.Device(1):
            there = on_device(entries((host.shape[1], 4), np.float32))
        with pytest.raises(TypeError, match=r"out: on <CUDA Device 0>, the operand on <CUDA Device 1>"):
            a.matmat(there, out=on_device(np.zeros((host.shape[0], 4), np.float32)))


def test_a_fused_kernel_meets_an_operand_of_another_dtype_on_its_device():
    host = sm.BlockTensorTrain.random((256, 256), blocks=16, rng=0, dtype=np.float32)
    sm.backends.register(CupyBackend(H200._replace(call=1e-3), ("fused",)), "cupy")
    with cupy.cuda.Device(1), sm.use_backend("cupy"):
        a, x = host.to("cupy").astype(np.float16), on_device(np.ones((3, 256), bool))
    with sm.use_backend("cupy"), fakecupy.counted() as c:
        y = a.T.rdot(x)
    assert len(c.launches) == 1
    assert y.device == a.device
    assert error(y, x.get().astype(float) @ host.to_dense().T) < 2e-3


def test_dtypes_that_cublas_does_not_multiply():
    a = sm.Monarch.random((16, 16), blocks=4, rng=0).to("cupy")
    with pytest.raises(TypeError, match="cuBLAS does not multiply"):
        a @ on_device(entries((16, 3)).astype(np.longdouble))


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.float16])
def test_bfloat16_has_no_common_dtype_with_every_other(dtype):
    host = sm.Monarch.random((16, 16), blocks=4, rng=0, dtype=np.float32)
    a, x = host.to("cupy").astype(BF16), on_device(np.ones((16, 16), dtype))
    name = np.dtype(dtype).name
    for call, what in (
        (lambda: a @ x, "matmul"),
        (lambda: a.T.rdot(x), "matmul"),
        (lambda: a.matmat(x), "matmat"),
        (lambda: a._plan().rows(x), "matmul"),
        (lambda: a._plan().add(x, x), "matmul"),
    ):
        with pytest.raises(
            TypeError, match=rf"^{what}: bfloat16 operator and {name} operand have no common dtype; use x"
        ):
            call()
    assert (a @ x.astype(np.int8)).dtype == BF16
    assert (a @ x.astype(np.float32)).dtype == np.float32


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
