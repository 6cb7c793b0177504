"""Kernels of our own below the custom operators, run behind the tests' shim on the memory of CPU tensors; merged factors."""

from __future__ import annotations

import sys
from pathlib import Path

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


def test_launches_go_to_the_current_stream_of_the_tensors_device(monkeypatch):
    entered = []

    class Context:
        def __init__(self, *what):
            self.what = what

        def __enter__(self):
            entered.append(self.what)

        def __exit__(self, *failure):
            entered.append("left")

    class Stream:
        from_external = staticmethod(lambda stream: Context("stream", stream))

    class Cupy:
        class cuda:
            Device = staticmethod(lambda index: Context("device", index))

    Cupy.cuda.Stream = Stream
    monkeypatch.setitem(sys.modules, "cupy", Cupy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr("structmat.backends.cupy.launch.launch", entered.append)
    fused.launch("call", torch.device("cuda", 3))
    assert entered == [("device", 3), ("stream", "stream of cuda:3"), "call", "left", "left"]


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
