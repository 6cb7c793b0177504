"""StructuredLinear against nn.Linear: values, gradients, dtypes, transforms, compilation, export, the weight's place."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import structmat as sm  # noqa: E402
import structmat.nn as snn  # noqa: E402
from structmat.backends.torch import forward  # noqa: E402
from structmat.nn import inference  # noqa: E402
from structmat.nn.merging import LARGEST, merging_of  # noqa: E402
from structmat.patterns import AxisOrder  # noqa: E402

STRUCTURES = {
    "btt": ("btt", {}),
    "btt rank 2": ("btt", {"blocks": (3, 2), "rank": 2}),
    "btt 3 cores": ("btt", {"cores": 3, "rank": 2}),
    "monarch": ("monarch", {}),
    "monarch rank 3": ("monarch", {"rank": 3}),
    "low rank": ("low_rank", {"rank": 3}),
    "kronecker": ("kronecker", {}),
    "butterfly": ("butterfly", {}),
    "block diagonal": ("block_diagonal", {}),
    "pixelfly": ("pixelfly", {}),
    "chain": ("chain", {}),
    "dense": ("dense", {}),
    "interpolative": (sm.Interpolative, {}),
    "interpolative columns": (sm.Interpolative, {"side": "columns"}),
    "interpolative blocks": (sm.InterpolativeBlocks, {"rank": 2, "blocks": 2}),
    "toeplitz": (sm.Toeplitz, {}),
}
SHAPES = ((12, 16), (13, 7), (16, 16), (1, 5))


def make(name: str, shape=(13, 7), **kwargs) -> snn.StructuredLinear:
    structure, options = STRUCTURES[name]
    torch.manual_seed(0)
    return snn.StructuredLinear(shape[1], shape[0], structure=structure, **options, **kwargs)


def fits(name: str, shape: tuple[int, int]) -> bool:
    return min(shape) >= 3 or name not in ("btt rank 2", "low rank", "interpolative blocks", "pixelfly")


CASES = [(name, shape) for name in STRUCTURES for shape in SHAPES if fits(name, shape)]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_rows_are_those_of_the_dense_matrix(name, shape):
    n = shape[1]
    layer = make(name, shape, dtype=torch.float64)
    W = layer.operator.to_dense()
    x = torch.randn(2, 3, n, dtype=torch.float64)
    expected = nn.functional.linear(x, W, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.to_dense(), W)
    linear = layer.to_linear()
    torch.testing.assert_close(linear(x), expected)
    assert type(linear) is nn.Linear
    assert layer.nparams == layer.operator.nparams
    assert layer.flops() == layer.operator.flops()


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("transposed", [False, True])
def test_an_operator_becomes_a_layer_and_back(name, transposed):
    operator = make(name, (12, 10), dtype=torch.float64).operator
    operator = operator.T if transposed else operator
    layer = snn.StructuredLinear.from_operator(operator, torch.arange(float(operator.shape[0])))
    assert type(layer.operator) is type(operator)
    torch.testing.assert_close(layer.operator.to_dense(), operator.to_dense())
    x = torch.randn(4, operator.shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ operator.to_dense().T + torch.arange(float(operator.shape[0])))


def test_sums_products_and_multiples_are_layers_too():
    rng = np.random.default_rng(0)
    A = sm.Monarch.random((8, 8), rng=rng) + sm.LowRank.random((8, 8), rank=2, rng=rng)
    B = 0.5 * sm.Diagonal.random((8, 8), rng=rng) @ sm.Permutation(rng.permutation(8)) + sm.Identity(8)
    C = sm.Product(sm.Monarch.random((6, 8), rng=rng), sm.Sum(A, B)) if hasattr(sm, "Product") else A @ B
    for operator in (A, B, C, sm.kron(sm.Monarch.random((4, 4), rng=rng), sm.Diagonal.random((3, 3), rng=rng))):
        layer = snn.StructuredLinear.from_operator(operator)
        x = torch.randn(3, operator.shape[1], dtype=torch.float64)
        torch.testing.assert_close(layer(x), x @ torch.from_numpy(np.asarray(operator)).T)
        again = snn.StructuredLinear.from_config(json.loads(json.dumps(layer.config)), dtype=torch.float64)
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(x), layer(x))


def combinations() -> dict[str, sm.Operator]:
    rng = np.random.default_rng(0)
    A, B = sm.Monarch.random((6, 8), rng=rng), sm.LowRank.random((6, 8), rank=2, rng=rng)
    symmetric = rng.standard_normal(6)
    return {
        "side by side": sm.hstack([A, B]),
        "on top of each other": sm.vstack([A, B, sm.Toeplitz.random((3, 8), rng=rng)]),
        "along the diagonal": sm.block_diag(A, sm.Circulant.random(5, rng=rng)),
        "a part": (A + B)[[5, 0, 0, 2], :][:, [1, 1, 7]],
        "one array, two places": sm.Toeplitz(symmetric),
        "sum with circulant": sm.Circulant.random(6, rng=rng) + 2.0 * sm.Identity(6),
    }


@pytest.mark.parametrize("what", combinations())
def test_layers_of_the_algebra_and_of_fourier_transforms(what):
    operator = combinations()[what]
    layer = snn.StructuredLinear.from_operator(operator, torch.ones(operator.shape[0], dtype=torch.float64))
    x = torch.randn(2, 3, operator.shape[1], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), x @ torch.from_numpy(np.asarray(operator)).T + 1)
    assert layer.flops() == operator.flops()
    assert layer.nparams == operator.nparams or what == "one array, two places"
    assert torch.autograd.gradcheck(layer, (x,))
    low = copy.deepcopy(layer).bfloat16()
    assert low(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(low(x.bfloat16()).double(), layer(x), rtol=0.1, atol=0.1)


def test_fourier_matrices_in_a_layer():
    operator = sm.fourier(6).H @ sm.Diagonal(np.arange(6) + 1j) @ sm.fourier(6)
    layer = snn.StructuredLinear.from_operator(operator)
    x = torch.randn(4, 6, dtype=torch.complex128)
    torch.testing.assert_close(layer(x), x @ torch.from_numpy(np.asarray(operator)).T)
    assert layer(x[:0]).shape == (0, 6)


class Doubled(sm.Diagonal):
    """Somebody's family that inherits the fields of another and multiplies by something else."""

    def _matmat(self, x):
        return 2 * super()._matmat(x)

    def _rows(self, x):
        return 2 * super()._rows(x)


def test_operators_of_others_are_asked_for_their_own_product():
    layer = snn.StructuredLinear.from_operator(Doubled(torch.arange(1.0, 4)))
    assert layer(torch.ones(3)).tolist() == [2, 4, 6]
    inverse = (sm.Monarch.random((4, 4), rank=2, rng=0) + sm.Monarch.random((4, 4), blocks=1, rng=1)).inv()
    with pytest.raises(TypeError, match="cannot be a layer"):
        snn.StructuredLinear.from_operator(inverse)


def test_axis_orders_of_every_kind_are_undone():
    rng = np.random.default_rng(0)
    factors = [rng.standard_normal((1, 4, 3, 6)), rng.standard_normal((6, 1, 4, 2))]
    orders = [None, AxisOrder((3, 4), (1, 0)), AxisOrder((4, 3), (1, 0)), AxisOrder((2, 6), (1, 0))]
    for out_order in orders:
        for in_order in [None, AxisOrder((2, 6), (1, 0)), AxisOrder((6, 2), (1, 0)), AxisOrder((2, 3, 2), (2, 1, 0))]:
            operator = sm.Chain(factors, (11, 10), out_order, in_order)
            layer = snn.StructuredLinear.from_operator(operator)
            x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
            expected = x @ torch.from_numpy(np.asarray(operator)).T
            torch.testing.assert_close(layer(x), expected)
            (got,) = torch.autograd.grad(layer(x).square().sum(), x)
            torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), x)[0])


# ---- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
def test_gradients_and_second_gradients(name):
    layer = make(name, (5, 7), dtype=torch.float64)
    names = [n for n, _ in layer.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(call, (x, *layer.parameters()))


@pytest.mark.parametrize("name", ["btt", "monarch", "monarch rank 3", "btt 3 cores", "butterfly", "block diagonal"])
@pytest.mark.parametrize("shape", [(12, 16), (13, 7)])
def test_the_training_path_is_the_composed_one_in_chunks(name, shape, monkeypatch):
    monkeypatch.setattr(forward, "LEAST_CHUNK", 3)
    monkeypatch.setattr(forward, "CACHE_BYTES", 0)
    monkeypatch.setattr("structmat.nn.merging.merging_of", lambda *_: None)
    layer = make(name, shape, dtype=torch.float64)
    x = torch.randn(10, shape[1], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert "Chain" in type(y.grad_fn.next_functions[0][0]).__name__ or "Chain" in type(y.grad_fn).__name__
    got = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    with monkeypatch.context() as m:
        m.setattr("structmat.nn.functions.eager", lambda *_: False)
        m.setattr("structmat.backends.torch.autograd.eager", lambda *_: False)
        z = layer(x)
        assert "Chain" not in type(z.grad_fn.next_functions[0][0]).__name__ + type(z.grad_fn).__name__
        expected = torch.autograd.grad(z.square().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(y, z)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def composed(layer, x):
    """The layer without its training path."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr("structmat.nn.functions.eager", lambda *_: False)
        m.setattr("structmat.backends.torch.autograd.eager", lambda *_: False)
        return layer(x)


@pytest.mark.parametrize("shape", [(64, 64), (50, 64), (96, 40), (16, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_small_factors_are_multiplied_out_and_get_their_gradients(shape, dtype):
    torch.manual_seed(0)
    layer = snn.StructuredLinear(shape[1], shape[0], structure="butterfly", dtype=dtype)
    merging = merging_of(layer.program.chain, 512)
    assert len(merging.merged) < len(layer.factors)
    assert max(max(p.b, p.c) for p in merging.merged) <= LARGEST
    x = torch.randn(512, shape[1], dtype=dtype, requires_grad=True)
    y, z = layer(x), composed(layer, x)
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(y, z, **tolerance)
    wanted = [x, *layer.parameters()]
    got, expected = (torch.autograd.grad(r.square().mean(), wanted) for r in (y, z))
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm()) <= (0.05 if dtype == torch.bfloat16 else 1e-12) * float(b.norm())


def test_multiplied_out_factors_that_are_frozen():
    layer = snn.StructuredLinear(64, 64, structure="butterfly", dtype=torch.float64)
    for factor in (*list(layer.factors)[:3], layer.factors[4]):
        factor.requires_grad_(False)
    x = torch.randn(512, 64, dtype=torch.float64)
    wanted = [layer.factors[3], layer.factors[5], layer.bias]
    got, expected = (torch.autograd.grad(y.square().mean(), wanted) for y in (layer(x), composed(layer, x)))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_second_gradients_through_multiplied_out_factors():
    torch.manual_seed(0)
    layer = snn.StructuredLinear(16, 16, structure="butterfly", dtype=torch.float64)
    assert merging_of(layer.program.chain, 256)
    x = torch.randn(256, 16, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    results = []
    for y in (layer(x), composed(layer, x)):
        first = torch.autograd.grad(y.pow(3).mean(), wanted, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_factors_are_merged_where_it_pays():
    chain = snn.StructuredLinear(4096, 4096, structure="butterfly", device="meta").program.chain
    assert merging_of(chain, 1) is None  # once through twelve factors is less than multiplying them out
    assert [p.b for p in merging_of(chain, 512).merged] == [16, 16, 16]
    monarch = snn.StructuredLinear(4096, 4096, structure="monarch", device="meta").program.chain
    assert merging_of(monarch, 512) is None


@pytest.mark.parametrize("name", ["monarch", "btt", "butterfly"])
def test_nothing_but_the_input_is_saved(name):
    layer = make(name, (64, 64))
    x = torch.randn(128, 64, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in own | {x.untyped_storage().data_ptr()}]
    assert not extra


def test_frozen_parts_get_no_gradient():
    layer = make("btt", (16, 16))
    layer.factors[0].requires_grad_(False)
    layer(torch.randn(3, 16)).sum().backward()
    assert layer.factors[0].grad is None
    assert layer.factors[1].grad is not None
    layer.requires_grad_(False)
    x = torch.randn(3, 16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_expanded_gradients():
    layer = make("btt", (16, 16), dtype=torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.operator.to_dense().sum(0).expand(3, -1))


@pytest.mark.parametrize("name", STRUCTURES)
def test_checkpointing_and_gradients_per_sample(name):
    layer = make(name, dtype=torch.float64)
    x = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    plain = torch.autograd.grad(layer(x).square().sum(), wanted)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), wanted)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(layer.named_parameters()), x.detach())
    for got, expected in zip(samples.values(), plain[1:], strict=True):
        torch.testing.assert_close(got.sum(0), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own rules use torch.jit
@pytest.mark.parametrize("name", STRUCTURES)
def test_forward_mode(name):
    layer = make(name, dtype=torch.float64)
    x, v = torch.randn(2, 4, 7, dtype=torch.float64)
    y, tangent = torch.func.jvp(layer, (x,), (v,))
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(tangent, v @ layer.operator.to_dense().T)


# ---- inputs and dtypes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
def test_inputs_of_every_shape(name):
    layer = make(name)
    x = torch.randn(4, 3, 7)
    y = layer(x)
    assert y.shape == (4, 3, 13)
    assert y.is_contiguous()
    torch.testing.assert_close(layer(x[0, 0]), y[0, 0])
    torch.testing.assert_close(layer(x.transpose(0, 1)), y.transpose(0, 1))
    torch.testing.assert_close(layer(x[:, ::2]), y[:, ::2])
    assert layer(x[:0]).shape == (0, 3, 13)
    assert layer(x[:, :0]).shape == (4, 0, 13)
    empty = x[:0].clone().requires_grad_()
    layer(empty).sum().backward()
    assert empty.grad.shape == (0, 3, 7)
    assert all(float(p.grad.abs().sum()) == 0 for p in layer.parameters())
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", STRUCTURES)
def test_dtypes_are_those_of_linear(name):
    def outcome(layer, x, autocast):
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = layer(x)
            y.float().sum().backward()
        except RuntimeError:
            return RuntimeError
        return y.dtype, layer.bias.grad.dtype

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for autocast in (False, True):
            for input_dtype in (torch.float32, torch.float64, torch.bfloat16):
                x = torch.randn(3, 7, dtype=input_dtype)
                layer, linear = make(name, dtype=dtype), nn.Linear(7, 13, dtype=dtype)
                assert outcome(layer, x, autocast) == outcome(linear, x, autocast), (dtype, autocast, input_dtype)


@pytest.mark.parametrize("name", ["btt", "monarch rank 3", "low rank", "kronecker"])
def test_bfloat16_is_as_near_as_its_rounding(name, monkeypatch):
    monkeypatch.setattr(forward, "LEAST_CHUNK", 8)
    monkeypatch.setattr(forward, "CACHE_BYTES", 0)
    layer = make(name, (64, 64))
    low = copy.deepcopy(layer).bfloat16()
    x = torch.randn(200, 64)
    for module, inputs in ((layer, x), (low, x.bfloat16())):
        module(inputs).float().square().mean().backward()
    for a, b in zip(layer.factors, low.factors, strict=True):
        assert float((a.grad - b.grad.float()).norm() / a.grad.norm()) < 0.02


def test_complex_layers():
    layer = snn.StructuredLinear.from_operator(sm.Monarch.random((6, 6), dtype=complex, rng=0))
    x = torch.randn(4, 6, dtype=torch.complex128, requires_grad=True)
    torch.testing.assert_close(layer(x), x @ layer.operator.to_dense().T)
    (got,) = torch.autograd.grad(layer(x).abs().square().sum(), x)
    expected = torch.autograd.grad((x @ layer.operator.to_dense().T).abs().square().sum(), x)[0]
    torch.testing.assert_close(got, expected)


# ---- inference by compiled kernels --------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="the row kernels are Numba's")
@pytest.mark.parametrize("name", ["btt", "monarch rank 3", "butterfly", "block diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_by_row_kernels_sees_every_change(name, dtype, monkeypatch):
    calls = []
    made = inference.Inference._made
    monkeypatch.setattr(inference.Inference, "_made", lambda self, f: calls.append(1) or made(self, f))
    layer, x = make(name, (20, 24), dtype=dtype), torch.randn(64, 24, dtype=dtype)

    def check(count):
        with torch.no_grad():
            y = layer(x)
        torch.testing.assert_close(y, nn.functional.linear(x, layer.operator.to_dense(), layer.bias))
        assert type(y) is torch.Tensor
        assert not y.requires_grad
        assert len(calls) == count

    check(1)
    check(1)
    with torch.no_grad():
        layer.factors[0].mul_(2)
    check(2)
    layer.factors[0].data[0, 0, 0] += 1  # no new version
    check(3)
    layer.factors[0].data = layer.factors[0].data.flip(0)
    check(4)
    layer.load_state_dict(make(name, (20, 24), dtype=dtype, init="variance").state_dict())
    check(5)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.operator.to_dense(), layer.bias))
    layer(x).sum().backward()  # gradients are wanted: the training path
    assert len(calls) == 5
    other = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    with torch.no_grad():
        torch.testing.assert_close(other(x), layer(x))


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="the row kernels are Numba's")
def test_inference_leaves_the_number_of_threads_alone():
    code = """
import torch, structmat.nn as snn
torch.set_num_threads(1)
with torch.no_grad():
    snn.StructuredLinear(512, 512)(torch.zeros(2000, 512))
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


# ---- compilation, export, counting ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["btt", "monarch rank 3", "low rank", "kronecker", "butterfly", "pixelfly", "toeplitz"]
)
def test_compiled_without_graph_breaks(name):
    torch._dynamo.reset()
    layer = make(name)
    x = torch.randn(4, 3, 7, requires_grad=True)
    assert torch._dynamo.explain(layer)(x).graph_break_count == 0
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for lead in ((4, 3), (5, 2), (9, 4)):
        x = torch.randn(*lead, 7, requires_grad=True)
        expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        got = torch.autograd.grad(compiled(x).square().sum(), [x, *layer.parameters()])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Together(nn.Module):
    """A layer of every family, each on as many features as it takes: exporters are slow to start."""

    def __init__(self) -> None:
        super().__init__()
        made = [snn.StructuredLinear.from_operator(operator).float() for operator in combinations().values()]
        self.layers = nn.ModuleList([make(name, (13, 16)) for name in STRUCTURES] + made)

    def forward(self, x):
        """What every layer makes of the first features."""
        return tuple(layer(x[..., : layer.in_features]) for layer in self.layers)


def check_all(got, expected):
    for layer, a, b in zip((*STRUCTURES, *combinations()), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, layer=layer: f"{layer}: {text}")


SIZES = {0: torch.export.Dim("batch", min=2, max=4096), 1: torch.export.Dim("tokens", min=2, max=4096)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_family_is_one_graph_for_dynamo():
    torch._dynamo.reset()
    model = Together()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in (torch.randn(4, 3, 16), torch.randn(7, 2, 16)):
        check_all(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
def test_every_family_is_exported_with_dynamic_sizes(strict):
    model, x = Together(), torch.randn(6, 5, 16)
    program = torch.export.export(model, (torch.randn(4, 3, 16),), dynamic_shapes={"x": SIZES}, strict=strict)
    check_all(program.module()(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_family_in_onnx_as_its_reference_implementation_evaluates_it():
    model, x = Together(), torch.randn(6, 5, 16)
    example = (torch.randn(4, 3, 16),)
    program = torch.onnx.export(model, example, dynamo=True, dynamic_shapes=(SIZES,), verbose=False)
    got = ReferenceEvaluator(program.model_proto).run(None, {"x": x.numpy()})
    check_all([torch.from_numpy(y) for y in got], model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STRUCTURES)
def test_jit_trace(name):
    layer = make(name)
    x = torch.randn(4, 7)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), layer(x))


@pytest.mark.parametrize("name", ["btt", "monarch rank 3", "low rank", "kronecker", "butterfly", "block diagonal"])
def test_flops_are_counted_exactly(name):
    layer = make(name)
    x = torch.randn(5, 3, 7, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == layer.flops(15)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * layer.flops(15)
    assert y.shape == (5, 3, 13)


# ---- as a module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
def test_copies_configurations_and_state_dicts(name):
    layer, x = make(name), torch.randn(3, 7)
    y = layer(x)
    config = json.loads(json.dumps(layer.config))
    meta = snn.StructuredLinear.from_config(config, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    assert meta(torch.empty(2, 7, device="meta")).shape == (2, 13)
    meta = meta.to_empty(device="cpu")
    meta.reset_parameters()
    assert torch.isfinite(meta(x)).all()
    meta.load_state_dict(layer.state_dict(), strict=True)
    loaded = io.BytesIO()
    torch.save(layer.state_dict(), loaded)
    loaded.seek(0)
    fresh = snn.StructuredLinear.from_config(config)
    fresh.load_state_dict(torch.load(loaded))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), meta, fresh):
        assert torch.equal(other(x), y)
    state = layer.state_dict()
    assert set(state) == {"bias", *(n for n in state if n.startswith(("factors.", "places_")))}
    assert all(v.is_contiguous() for v in state.values())
    assert len({v.untyped_storage().data_ptr() for v in state.values()}) == len(state)


def test_axis_0_of_a_factor_is_the_block_axis():
    for structure, options in (
        ("btt", {}),
        ("monarch", {}),
        ("low_rank", {"rank": 4}),
        ("kronecker", {}),
        ("butterfly", {}),
    ):
        layer = snn.StructuredLinear(64, 64, structure=structure, **options)
        assert all(f.shape[0] > 1 for f in layer.factors), structure


def test_the_operator_is_over_the_same_memory():
    layer = make("monarch", (16, 16))
    operator = layer.operator
    with torch.no_grad():
        layer.factors[0].zero_()
    assert float(operator.to_dense().abs().max()) == 0.0
    assert not operator.to_dense().requires_grad


def test_representation_and_arguments():
    layer = snn.StructuredLinear(4096, 4096, structure="btt", blocks=64, device="meta", bias=False)
    assert "524,288 parameters (3.1% of dense)" in repr(layer)
    assert layer.bias is None
    assert layer.to_linear().bias is None
    assert make("btt", dtype=torch.float64, bias=False).factors[0].dtype == torch.float64
    for arguments, match in (
        (((0, 4), {}), "in_features"),
        (((4, 4), {"structure": "monach"}), "expected one of btt"),
        (((4, 4), {"structure": "low_rank", "rank": 9}), "between 1 and 4"),
        (((4, 4), {"structure": "btt", "blocks": 9}), "between 1 and 4"),
        (((4, 4), {"init": "kaiming"}), "spectral"),
    ):
        with pytest.raises(ValueError, match=match):
            snn.StructuredLinear(*arguments[0], **arguments[1])
    with pytest.raises(TypeError, match="radix"):
        snn.StructuredLinear(4, 4, structure="btt", radix=2)
    with pytest.raises(ValueError, match=r"\(\.\.\., 7\), got \(3, 6\)"):
        make("btt")(torch.randn(3, 6))
    with pytest.raises(TypeError, match="operator"):
        snn.StructuredLinear.from_operator(np.eye(3))
    with pytest.raises(ValueError, match="stack"):
        snn.StructuredLinear.from_operator(sm.Dense(np.ones((2, 3, 3))))
    with pytest.raises(ValueError, match="no values"):
        snn.StructuredLinear.from_operator(sm.Identity(3))
    with pytest.raises(ValueError, match="bias"):
        snn.StructuredLinear.from_operator(sm.Dense(np.ones((2, 3))), torch.ones(3))
    with pytest.raises(ValueError, match="version"):
        snn.StructuredLinear.from_config(make("btt").config | {"version": 99})
    with pytest.raises(ValueError, match="nobody:Family"):
        snn.StructuredLinear.from_config(make("btt").config | {"operator": {"family": "nobody:Family", "fields": []}})
    with pytest.raises(ValueError, match="damaged"):
        snn.StructuredLinear.from_config(make("btt").config | {"operator": {"family": "Monarch", "fields": []}})
    with pytest.raises(RuntimeError, match="from_linear"):
        make("btt").load_state_dict(nn.Linear(7, 13).state_dict())


# ---- from a dense layer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "structure", ["btt", "monarch", "low_rank", "kronecker", "butterfly", "block_diagonal", "pixelfly"]
)
def test_from_linear_recovers_what_is_structured(structure):
    torch.manual_seed(0)
    options = {"rank": 2} if structure in ("btt", "monarch", "low_rank") else {}
    original = snn.StructuredLinear(12, 8, structure=structure, dtype=torch.float64, **options)
    linear = original.to_linear().eval()
    before = copy.deepcopy(linear.state_dict())
    layer = snn.StructuredLinear.from_linear(linear, structure=structure, **options)
    x = torch.randn(5, 12, dtype=torch.float64)
    if structure != "pixelfly":  # alternating projections approach, they do not arrive
        torch.testing.assert_close(layer(x), linear(x))
        assert layer.projection.relative_error < 1e-12
    exact = float((linear.weight - layer.to_dense()).detach().norm())
    assert math.isclose(layer.projection.error, exact, rel_tol=1e-6, abs_tol=1e-12)
    assert layer.structure == structure
    assert not layer.training
    assert all(torch.equal(before[k], v) for k, v in linear.state_dict().items())


def test_from_linear_with_moments_dtypes_and_no_bias():
    torch.manual_seed(0)
    linear = nn.Linear(16, 12, bias=False)
    x = torch.randn(200, 16) * torch.logspace(0, -2, 16)
    aware = snn.StructuredLinear.from_linear(linear, "low_rank", rank=4, weight=(x.T @ x / 200).double().numpy())
    blind = snn.StructuredLinear.from_linear(linear, "low_rank", rank=4)
    assert aware.bias is None
    assert float((aware(x) - linear(x)).detach().norm()) < 0.5 * float((blind(x) - linear(x)).detach().norm())
    low = nn.Linear(16, 12, dtype=torch.bfloat16)
    layer = snn.StructuredLinear.from_linear(low, "low_rank", rank=4)
    assert layer.factors[0].dtype == torch.bfloat16
    exact = float((low.weight.double() - layer.to_dense().double()).detach().norm())
    assert math.isclose(layer.projection.error, exact, rel_tol=0.02)
    with pytest.raises(TypeError, match="weight matrix"):
        snn.StructuredLinear.from_linear(nn.ReLU(), "btt")


# ---- the place of the weight ------------------------------------------------------------------------------------------------


def test_the_weight_knows_its_shape_and_refuses_everything_else():
    layer = make("btt")
    weight = layer.weight
    assert (tuple(weight.shape), weight.dtype, weight.device.type) == ((13, 7), torch.float32, "cpu")
    assert (weight.ndim, weight.dim(), weight.size(0), weight.numel()) == (2, 2, 13, 91)
    assert weight.requires_grad
    assert "weight" not in layer.state_dict()
    x = torch.randn(3, 7)
    for use in (
        lambda: x @ weight,
        lambda: weight @ x,
        lambda: weight * 2,
        lambda: 2 * weight,
        lambda: nn.functional.linear(x, weight),
        lambda: torch.norm(weight),
        lambda: weight[0],
        lambda: np.asarray(weight),
        lambda: bool(weight),
        lambda: x + weight,
    ):
        with pytest.raises(TypeError, match="to_linear"):
            use()
    with pytest.raises(AttributeError, match="to_linear"):
        _ = weight.data


def structured_calls(module: nn.Module) -> list[str]:
    calls: list[str] = []
    for name, child in module.named_modules():
        if isinstance(child, snn.StructuredLinear):
            child.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_fused_encoder_layers_call_the_structured_layers(mode):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    for name in ("linear1", "linear2"):
        setattr(encoder, name, snn.StructuredLinear.from_linear(getattr(encoder, name), "btt"))
    encoder.train(mode == "train")
    calls = structured_calls(encoder)
    x = torch.randn(2, 5, 16)
    with torch.set_grad_enabled(mode != "no_grad"):
        y = encoder(x)
    assert calls == ["linear1", "linear2"]
    dense = copy.deepcopy(encoder)
    dense.linear1, dense.linear2 = encoder.linear1.to_linear(), encoder.linear2.to_linear()
    torch.testing.assert_close(dense(x), y)


def test_attention_refuses_a_structured_output_projection():
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    attention.out_proj = snn.StructuredLinear.from_linear(attention.out_proj, "btt")
    x = torch.randn(2, 5, 16)
    with pytest.raises(TypeError, match="structured layer"):
        attention(x, x, x)
