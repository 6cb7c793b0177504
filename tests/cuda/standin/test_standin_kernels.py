"""Kernels of our own on the stand-in, which runs them behind the shim, and the plan that chooses them."""

from __future__ import annotations

import cupy
import fakecupy
import numpy as np
import pytest
from standin_families import BF16, entries, error, on_device

import structmat as sm
from structmat.backends.cuda.roofline import H200
from structmat.backends.cupy import CupyBackend

pytestmark = pytest.mark.usefixtures("products_only")

# ---- kernels of our own ---------------------------------------------------------------------------------------------


FUSED = {  # operator, rows, the kernel's name
    "monarch": (lambda: sm.Monarch.random((256, 256), blocks=16, rank=1, rng=0), 37, "monarch<__half, 16, 16, 16, 16, 1"),
    "btt": (lambda: sm.BlockTensorTrain.random((256, 256), blocks=16, rng=0), 1, "monarch<__half, 16, 16, 16, 16, 1"),
    "kronecker": (lambda: sm.Kronecker.random((512, 256), shapes=[(16, 16), (32, 16)], rng=0), 21, "kron<__half, 16, 16, 32"),
    "hadamard": (lambda: sm.hadamard(256) * 1, 13, "hadamard<__half, 256"),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fused_kernels_are_launched_and_can_be_captured(name):
    make, rows, expected = FUSED[name]
    host = make()
    fused = CupyBackend(H200._replace(call=1e-3), ("fused",))  # launches so slow that one is better than two
    sm.backends.register(fused, "cupy")
    with sm.use_backend("cupy"):
        a, x = host.to("cupy").astype(np.float16), entries((rows, host.shape[1]), np.float16)
        assert a.plan(batch=rows, rows=True).kernel == "fused"
        for seed in (0, 1):
            fakecupy.state["seed"] = seed
            with fakecupy.counted() as c, fakecupy.capturing():
                y = on_device(x) @ a.T
            assert (c.gemms, c.kernels, len(c.launches)) == ([], [], 1)
            assert c.launches[0].startswith(expected)
            assert error(y, x.astype(float) @ host.to_dense().T) < 2e-3
        fakecupy.state["seed"] = 0
        y = a @ on_device(x[0])
        assert error(y, host.to_dense() @ x[0].astype(float)) < 2e-3
        with fakecupy.counted() as c:  # rows that are not 16 bytes apart, in the wrong order, or of another dtype
            odd = on_device(entries((rows, host.shape[1] + 1), np.float16))[:, :-1]
            z = odd @ a.T
            _ = a @ on_device(entries((host.shape[1], 7), np.float16)), on_device(x.astype(np.float32)) @ a.T
        assert len(c.launches) == (rows == 1), "one row has no distance to the next"
        assert c.gemms
        assert error(z, odd.get().astype(float) @ host.to_dense().T) < 2e-3


def test_weights_at_addresses_that_no_kernel_reads_are_copied_once():
    host = sm.Monarch.random((256, 256), blocks=16, rank=1, rng=0).astype(np.float16)

    def shifted(block):
        return on_device(np.concatenate([np.zeros(1, np.float16), block.ravel()]))[1:].reshape(block.shape)

    sm.backends.register(CupyBackend(H200._replace(call=1e-3), ("fused",)), "cupy")
    with sm.use_backend("cupy"):
        a = sm.Monarch(shifted(host.left), shifted(host.right))
        assert a.left.data.ptr % 16
        assert a.plan(batch=5, rows=True).kernel == "fused"
        x = entries((5, 256), np.float16)
        assert error(on_device(x) @ a.T, x.astype(float) @ host.to_dense().astype(float).T) < 2e-3


def test_arguments_of_kernels_are_checked_for_their_widths():
    from structmat.backends.cuda import sources

    kernel = sources.hadamard_kernel("float32", 16)
    module = cupy.RawModule(code=kernel.source, options=("-std=c++17",), name_expressions=[kernel.name])
    function, x = module.get_function(kernel.name), on_device(np.ones((2, 16), np.float32))
    y = cupy.empty((2, 16), np.float32)
    call = sources.hadamard_launch(kernel, x.data.ptr, y.data.ptr, 1.0, 2, 16, 16)
    function(call.grid, (kernel.threads, 1, 1), call.arguments, shared_mem=kernel.shared)
    assert y.get()[:, 0].tolist() == [16.0, 16.0]
    wide = (*call.arguments[:3], np.int64(2), *call.arguments[4:])
    for wrong in (wide, call.arguments[:-1]):
        with pytest.raises(TypeError, match=r"bytes|arguments"):
            function(call.grid, (kernel.threads, 1, 1), wrong, shared_mem=kernel.shared)
    with pytest.raises(RuntimeError, match="max_dynamic_shared_size_bytes"):
        function(call.grid, (kernel.threads, 1, 1), call.arguments, shared_mem=64 << 10)


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_the_plan_says_what_is_launched():
    default = CupyBackend()
    sm.backends.register(default, "cupy")
    with sm.use_backend("cupy"):
        a = sm.Monarch.random((4096, 4096), blocks=64, rng=0, dtype=np.float32).to("cupy").astype(np.float16)
        decision = a.plan(batch=65536, rows=True)
        assert decision.kernel.startswith("2 products")
        assert {c.kernel.split(",")[0] for c in decision.candidates} == {"2 products", "dense", "fused"}
        assert a.T.plan(batch=65536, rows=True).kernel.startswith("2 products + 1 copy")
        assert a.plan(batch=1, rows=True).kernel == "fused"
        kron = sm.Kronecker.random((4096, 4096), rng=0, dtype=np.float32).to("cupy").astype(BF16)
        assert {kron.plan(batch=b, rows=True).kernel for b in (1, 64, 4096, 65536)} == {"fused"}
        large = sm.Monarch.random((16384, 16384), blocks=128, rng=0, dtype=np.float32).to("cupy").astype(BF16)
        assert large.plan(batch=65536, rows=True).kernel.startswith("2 products")
        small = sm.Monarch.random((64, 64), blocks=8, rng=0, dtype=np.float32).to("cupy")
        assert small.plan(batch=512).kernel == "dense"
        x = entries((64, 512), np.float32)
        with fakecupy.counted() as c:
            y = small @ on_device(x)
        assert (64, 512, 64, 1) in c.gemms or (512, 64, 64, 1) in c.gemms
        assert error(y, small.to("numpy") @ x) < 1e-5


@pytest.mark.parametrize("shape", [(64, 64), (24, 96), (96, 24)])
def test_tune_measures_all_kernels(shape):
    sm.backends.register(CupyBackend(), "cupy")
    with sm.use_backend("cupy"):
        host = sm.BlockTensorTrain.random(shape, blocks=8, rng=0)
        a = host.to("cupy")
        for rows in (False, True):
            decision = sm.tune(a, batch=5, rows=rows)
            assert {c.kernel for c in decision.candidates} == {"2 products", "dense"}
            assert decision.kernel == min(decision.candidates, key=lambda c: c.seconds).kernel
            x = entries((shape[1], 5))
            y = on_device(x.T) @ a.T if rows else a @ on_device(x)
            assert error(y, (host @ x).T if rows else host @ x) < 1e-12


def test_rates_come_from_the_properties_of_the_device(monkeypatch):
    from structmat.backends.cupy.device import rates

    assert rates(0) == H200
    found = {"name": b"NVIDIA A100-SXM4-40GB", "major": 8, "minor": 0}
    attributes = {
        "ClockRate": 1_410_000, "MemoryClockRate": 1_215_000, "GlobalMemoryBusWidth": 5120, "MultiProcessorCount": 108,
        "L2CacheSize": 40 << 20, "MaxSharedMemoryPerBlockOptin": 163 << 10,
    }  # fmt: skip
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceProperties", lambda device: found)
    monkeypatch.setattr(cupy.cuda, "Device", lambda device: type("Device", (), {"attributes": attributes}))
    a100 = rates(7)
    assert a100.copy == pytest.approx(1.37e12, rel=0.02)
    assert a100.flops["bfloat16"] == pytest.approx(0.75 * 312e12, rel=0.01)
    assert a100.flops["float32"] == pytest.approx(0.75 * 19.5e12, rel=0.01)
    assert (a100.capability, a100.shared_bytes) == ((8, 0), 163 << 10)
    with monkeypatch.context():
        old = CupyBackend(H200._replace(capability=(7, 5)))
        kron = sm.Kronecker.random((256, 256), rng=0, dtype=np.float32).to("cupy").astype(np.float16)
        assert old.kron([f.array for f in kron.factors]).fused is None


def test_plans_of_stacks_sums_and_empty_operators():
    sm.backends.register(CupyBackend(), "cupy")
    with sm.use_backend("cupy"):
        stack = sm.Monarch(entries((3, 4, 5, 2)), entries((3, 2, 4, 6))).to("cupy")
        assert stack.plan(batch=7).kernel == "4 products"  # one for all the right factors, one for each left one
        total = sm.LowRank.random((40, 40), rank=2, rng=0) + sm.Kronecker.random((40, 40), rng=0)
        assert [part.kernel for part in total.to("cupy").plan(batch=100).parts] == ["dense", "dense"]
        assert sm.LowRank(np.ones((4, 0)), np.ones((0, 4))).to("cupy").plan(batch=3).candidates
