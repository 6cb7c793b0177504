"""Kernels of our own below the custom operators, run behind the tests' shim on the memory of CPU tensors; merged factors."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent / "cuda"))

import shim  # noqa: E402

import structmat as sm  # noqa: E402
from structmat.backends.base import ChainLayout  # noqa: E402
from structmat.backends.cuda.roofline import H200  # noqa: E402
from structmat.backends.torch import chain_op, fused, kron_op, layout, merging, product  # noqa: E402, F401

needs_compiler = pytest.mark.skipif(shim.compiler() is None, reason="the shim needs g++")


@pytest.fixture
def launches(monkeypatch):
    """Every CPU tensor counts as one on a device; launches go to the shim and are recorded."""
    made, rates = [], fused.HashableRates(H200)
    monkeypatch.setattr(fused, "here", lambda device: True)
    monkeypatch.setattr(fused, "rates", lambda device: rates)

    def launch(call, device):
        made.append(call)
        shim.build(call.kernel, seed=1)(call.grid, call.arguments)

    monkeypatch.setattr(fused, "launch", launch)
    return made


def on_torch(operator, dtype):
    walk = layout.layout_of(ChainLayout(operator.patterns, *operator.shape, operator.out_order, operator.in_order))
    factors = [torch.from_numpy(f).reshape(s).to(dtype) for f, s in zip(operator.factors, walk.shapes, strict=True)]
    return walk, factors


def near(y, x, dense, bias, dtype):
    expected = x.double() @ dense.T + bias.double()
    error = float((y.double() - expected).norm() / expected.norm())
    assert error < (6e-3 if dtype == torch.bfloat16 else 1e-3), error


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [sm.BlockTensorTrain, sm.Monarch])
def test_two_factors_with_bias_in_one_kernel(family, dtype, launches):
    operator = family.random((256, 256), blocks=16, rank=1, dtype="float32", rng=0)
    walk, factors = on_torch(operator, dtype)
    torch.manual_seed(0)
    x, bias = torch.randn(37, 256).to(dtype), torch.randn(256).to(dtype)
    y = torch.ops.structmat.chain(x, bias, factors, list(walk.code))
    assert len(launches) == 1
    rounded = operator.with_factors(
        tuple(f.double().numpy().reshape(v.shape) for f, v in zip(factors, operator.factors, strict=True))
    )
    near(y, x, torch.from_numpy(rounded.to_dense()), bias, dtype)
    leaves = [t.requires_grad_() for t in (x, bias, *factors)]
    grads = torch.autograd.grad(torch.ops.structmat.chain(x, bias, factors, list(walk.code)).sum(), leaves)
    assert len(launches) == 2  # gradients are products
    assert all(g.isfinite().all() for g in grads)


@needs_compiler
def test_two_kronecker_factors_with_bias_in_one_kernel(launches):
    torch.manual_seed(0)
    factors = [torch.randn(s).bfloat16() / 8 for s in ((32, 16), (16, 32))]
    x, bias = torch.randn(21, 512).bfloat16(), torch.randn(512).bfloat16()
    y = torch.ops.structmat.kron(x, bias, factors)
    assert len(launches) == 1
    near(y, x, torch.kron(*(f.double() for f in factors)), bias, torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hadamard_matrix_in_one_kernel(dtype, launches):
    A = (0.25 * sm.hadamard(256, dtype="float32")).to("torch").astype(dtype)
    x = torch.randn(5, 256).to(dtype).requires_grad_()
    with sm.use_backend("torch-op"):
        y = x @ A.T
        assert sm.hadamard(256, dtype=torch.float32).plan(batch=5, rows=True).kernel == "fused"
    (dx,) = torch.autograd.grad(y, x, x.detach())
    assert len(launches) == 2
    expected = x.detach().double() @ A.to_dense().double()
    for got in (y, dx):
        assert distance(got, expected) < (1e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("broken", [ImportError("no libcublas"), None])
def test_a_cupy_that_cannot_be_used_is_named_once_and_left_alone(broken, monkeypatch):
    class Cupy:
        class cuda:
            @staticmethod
            def is_available():
                if broken:
                    raise broken
                return False

    monkeypatch.setitem(sys.modules, "cupy", Cupy)
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: name)
    fused._cupy_works.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"CuPy cannot be used .*products"):
            assert not fused.here(torch.device("cuda"))
        assert not fused.here(torch.device("cuda"))
    finally:
        fused._cupy_works.cache_clear()


def test_what_a_kernel_does_not_take_goes_through_products(launches):
    operator = sm.BlockTensorTrain.random((256, 256), blocks=16, dtype="float32", rng=0)
    walk, factors = on_torch(operator, torch.bfloat16)
    x = torch.randn(5, 264).bfloat16()
    for other, values in (
        (x[:, 1:257], factors),  # begins between two multiples of 16 bytes
        (torch.randn(256, 5).bfloat16().t(), factors),  # strides
        (x[:0, :256], factors),  # nothing
        (x[:, :256].float(), [f.float() for f in factors]),  # a dtype without tensor cores
        (x[:, :256], [factors[0], factors[1].transpose(1, 2).contiguous().transpose(1, 2)]),  # a factor that is a view
    ):
        y = torch.ops.structmat.chain(other, None, values, list(walk.code))
        torch.testing.assert_close(y.float(), other.float() @ dense(operator).T, rtol=0.05, atol=0.05)
    small = sm.BlockTensorTrain.random((12, 12), blocks=2, dtype="float32", rng=0)
    walk, factors = on_torch(small, torch.bfloat16)
    torch.ops.structmat.chain(torch.randn(5, 12).bfloat16(), None, factors, list(walk.code))
    torch.ops.structmat.kron(
        torch.randn(5, 15).bfloat16(), None, [torch.randn(3, 3).bfloat16(), torch.randn(5, 5).bfloat16()]
    )
    assert not launches


def dense(operator):
    return torch.from_numpy(operator.to_dense()).float()


def test_the_cost_model_decides_and_the_plan_says_it(launches):
    def kernel(n, batch, dtype=torch.bfloat16):
        operator = sm.BlockTensorTrain.random((n, n), dtype="float32", rng=0)
        walk, _ = on_torch(operator, dtype)
        return fused.chain_kernel(walk, str(dtype).removeprefix("torch."), batch, fused.rates(None))

    assert kernel(1024, 1 << 16)
    assert kernel(1024, 64)
    assert not kernel(16384, 1 << 16)  # every tile reads the operand through the cache again
    with sm.use_backend("torch-op"):
        A = sm.BlockTensorTrain.random((1024, 1024), dtype=torch.bfloat16, rng=0)
        assert A.plan(batch=64, rows=True).kernel == "fused"
        assert A.plan(batch=64).kernel == "2 products"
        assert A.astype(torch.float32).plan(batch=64, rows=True).kernel == "2 products"
        K = sm.Kronecker.random((4096, 4096), dtype=torch.bfloat16, rng=0)
        assert K.plan(batch=4096, rows=True).kernel == "fused"
        assert K.plan(batch=4096).kernel == "2 products"
    assert A.plan(batch=64).kernel == "library"


def test_devices_without_the_instructions_of_the_kernels_take_products(launches, monkeypatch):
    with sm.use_backend("torch-op"):
        A = sm.BlockTensorTrain.random((1024, 1024), dtype=torch.bfloat16, rng=0)
        K = sm.Kronecker.random((4096, 4096), dtype=torch.bfloat16, rng=0)
        for capability, kernel in (((8, 0), "fused"), ((7, 5), "2 products")):
            rates = fused.HashableRates(H200._replace(capability=capability))
            monkeypatch.setattr(fused, "rates", lambda device, rates=rates: rates)
            assert A.plan(batch=64, rows=True).kernel == kernel
            assert K.plan(batch=4096, rows=True).kernel == kernel
        torch.randn(64, 1024).bfloat16() @ A.T
        torch.randn(64, 4096).bfloat16() @ K.T
    assert not launches


def test_pointers_are_those_of_one_device(launches):
    x, weights = torch.randn(5, 256).bfloat16(), torch.randn(256).bfloat16()
    assert fused.usable(x, None, weights, weights)
    assert not fused.usable(x, weights.to("meta"), weights)
    assert not fused.usable(x, None, weights, weights.to("meta"))


def test_a_lazy_negation_is_not_lost_below_a_pointer(launches):
    operator = sm.BlockTensorTrain.random((256, 256), blocks=16, dtype="float32", rng=0)
    walk, factors = on_torch(operator, torch.bfloat16)
    small = [torch.randn(s).bfloat16() / 8 for s in ((32, 16), (16, 32))]
    torch.manual_seed(0)
    x, bias, wide = (torch.randn(s).bfloat16() for s in ((37, 256), (256,), (37, 512)))
    neg, W, K = torch._neg_view, dense(operator), torch.kron(*(f.float() for f in small))
    chain, kron = torch.ops.structmat.chain, torch.ops.structmat.kron
    for y, expected in (
        (chain(neg(x), None, factors, list(walk.code)), -x.float() @ W.T),
        (chain(x, neg(bias), factors, list(walk.code)), x.float() @ W.T - bias.float()),
        (chain(x, None, [neg(factors[0]), factors[1]], list(walk.code)), -x.float() @ W.T),
        (kron(neg(wide), None, small), -wide.float() @ K.T),
        (kron(wide, None, [small[0], neg(small[1])]), -wide.float() @ K.T),
    ):
        assert distance(y, expected) < 1e-2
    assert fused.hadamard(neg(x), 256, 1.0) is None
    assert not launches


# ---- streams --------------------------------------------------------------------------------------------------------------


class OldStream:
    """A stream of torch before 2.10: an address, and no method that others could ask."""

    def __init__(self, device=None):
        self.cuda_stream = 1000 + (0 if device is None else device.index or 0)


class StrictCupy:
    """Streams and devices as a stack of contexts; streams of others come by CUDA's stream protocol alone."""

    def __init__(self, convert=None):
        self.devices, self.streams = [7], [0]
        self.cuda = self.Cuda(self, convert)

    class Cuda:
        def __init__(self, outer, convert):
            self.Stream = type("Stream", (), {"from_external": staticmethod(self.from_external)})
            self.runtime = type("runtime", (), {"getDevice": staticmethod(lambda: outer.devices[-1])})
            self.outer, self.convert = outer, convert or self.checked

        def Device(self, index):
            return self.outer.entered(self.outer.devices, index)

        def from_external(self, stream):
            return self.outer.entered(self.outer.streams, self.convert(stream))

        @staticmethod
        def checked(stream):
            version, address = type(stream).__cuda_stream__(stream)
            assert (version, type(address)) == (0, int)
            return address

    @contextlib.contextmanager
    def entered(self, stack, what):
        stack.append(stack[-1] if what is None else what)
        yield
        stack.pop()


@pytest.fixture
def old_streams(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", OldStream)


def test_launches_go_to_the_current_stream_of_the_tensors_device(monkeypatch, old_streams):
    cupy, seen = StrictCupy(), []
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(
        "structmat.backends.cupy.launch.launch", lambda call: seen.append((call, cupy.devices[-1], cupy.streams[-1]))
    )
    fused.launch("call", torch.device("cuda", 3))
    assert seen == [("call", 3, 1003)]
    assert (cupy.devices, cupy.streams) == ([7], [0])


def test_cupy_itself_takes_the_stream_that_it_is_given(monkeypatch, old_streams):
    real = pytest.importorskip("cupy").cuda.Stream.from_external  # needs no device
    cupy, seen = StrictCupy(lambda stream: real(stream).ptr), []
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr("structmat.backends.cupy.launch.launch", lambda call: seen.append(cupy.streams[-1]))
    fused.launch("call", torch.device("cuda", 3))
    assert seen == [1003]


def test_the_benchmark_shares_the_stream_in_the_same_way(monkeypatch, old_streams):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    import gpu_contenders

    cupy = StrictCupy()
    cupy.from_dlpack = lambda x: x
    monkeypatch.setitem(sys.modules, "cupy", cupy)

    class Operator:
        def to(self, library):
            return self

        def plan(self, batch, rows):
            return SimpleNamespace(kernel=f"{batch} rows on stream {cupy.streams[-1]}")

    try:
        plans, notes = {}, {}
        gpu_contenders.cupy_call(Operator(), torch.ones(3, 4), {}, plans, notes)
    finally:
        for name in ("gpu_contenders", "gpu_timing"):
            sys.modules.pop(name, None)
    assert (plans, notes) == ({"cupy": "3 rows on stream 1000"}, {})


@needs_compiler
def test_the_whole_way_to_a_launch_on_torchs_stream(monkeypatch, old_streams):
    """Everything from the operator down to the call of the compiled function; only the device is the shim."""
    cupy, seen, rates = StrictCupy(), [], fused.HashableRates(H200)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(fused, "here", lambda device: True)
    monkeypatch.setattr(fused, "rates", lambda device: rates)

    def function(device, kernel):
        def call(grid, block, arguments, shared_mem):
            seen.append((device, cupy.streams[-1], block, shared_mem))
            assert (block, shared_mem) == ((kernel.threads, 1, 1), kernel.shared)
            shim.build(kernel, seed=1)(grid, arguments)

        return call

    monkeypatch.setattr("structmat.backends.cupy.launch._function", function)
    torch.manual_seed(0)
    operator = sm.BlockTensorTrain.random((256, 256), blocks=16, dtype="float32", rng=0)
    walk, factors = on_torch(operator, torch.bfloat16)
    x, wide = torch.randn(37, 256).bfloat16(), torch.randn(21, 512).bfloat16()
    small = [torch.randn(s).bfloat16() / 8 for s in ((32, 16), (16, 32))]
    y = torch.ops.structmat.chain(x, None, factors, list(walk.code))
    z = torch.ops.structmat.kron(wide, None, small)
    h = torch.ops.structmat.hadamard(x, 0.25)
    assert [launched[:2] for launched in seen] == [(7, 1000)] * 3
    assert distance(y, x.float() @ dense(operator).T) < 1e-2
    assert distance(z, wide.float() @ torch.kron(*(f.float() for f in small)).T) < 1e-2
    assert distance(h, 0.25 * x.float() @ torch.from_numpy(np.asarray(sm.hadamard(256))).float()) < 1e-2


# ---- merged factors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_butterfly_levels_become_two_factors_with_the_gradients_of_the_small_ones(dtype):
    operator = sm.Butterfly.random((4096, 4096), dtype="float64", rng=0)
    walk, factors = on_torch(operator, dtype)
    for f in factors:
        f.requires_grad_()
    merged, values = merging.merged_chain(walk, factors)
    assert len(merged.patterns) == 2
    assert {max(p.b, p.c) for p in merged.patterns} == {64}
    assert [tuple(v.shape) for v in values] == list(merged.shapes)
    x = torch.randn(3, 4096, dtype=dtype)
    y = chain_op.product(x, None, merged, values)
    expected = product.chain_product(x.double(), None, walk, [f.double() for f in factors])
    small = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert distance(y, expected) < small
    got = torch.autograd.grad(y.double().square().sum(), factors)
    wanted = torch.autograd.grad(expected.square().sum(), factors)
    assert max(map(distance, got, wanted)) < 10 * small


def distance(a, b) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def test_what_is_not_merged_stays_as_it_is():
    for operator in (
        sm.BlockTensorTrain.random((4096, 4096), dtype="float32", rng=0),
        sm.Monarch.random((64, 64), rank=2, dtype="float32", rng=0),
        sm.LowRank.random((64, 64), rank=4, dtype="float32", rng=0),
    ):
        walk, factors = on_torch(operator, torch.float32)
        assert merging.merged_chain(walk, factors) == (walk, factors)
        assert merging.chain_layout(walk, torch.float32) is walk


def test_hadamard_becomes_two_kronecker_factors():
    factors = [torch.tensor([[1.0, 1.0], [1.0, -1.0]], requires_grad=True) for _ in range(12)]
    merged = merging.merged_factors(factors)
    assert [tuple(f.shape) for f in merged] == [(64, 64)] * 2
    assert merging.factor_shapes([(2, 2)] * 12, torch.float32) == [(64, 64)] * 2
    x = torch.from_numpy(np.eye(4096, 3, dtype=np.float32)).T
    torch.testing.assert_close(product.kron_product(x, None, merged), product.kron_product(x, None, factors))
    assert merging.merged_factors(merged) is merged
