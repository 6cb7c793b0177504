"""The custom operators of torch: the market through them, torch's own checks, transforms, dtypes, copies counted."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from market import market, names, small_market  # noqa: E402
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import structmat as sm  # noqa: E402
import structmat.nn as snn  # noqa: E402
from structmat import arrays  # noqa: E402
from structmat.backends.base import ChainLayout  # noqa: E402
from structmat.backends.torch import chain_op, forward, gradients, hadamard_op, kron, kron_op, layout, product  # noqa: E402
from structmat.nn import functions  # noqa: E402
from structmat.testing import assert_matches, check_operator, tolerance  # noqa: E402

OPS = torch.ops.structmat


# ---- the market -------------------------------------------------------------------------------------------------------


def on_torch(pairs):
    """SciPy objects stay with NumPy, and so does the iterative inverse."""
    return [p for p in pairs if not p.name.startswith(("external", "cosine")) and "inverse" not in p.name]


ALL, SMALL = on_torch(market()), on_torch(small_market())


@pytest.fixture
def calls(monkeypatch):
    """Everything on torch goes through the operators; their calls are counted."""
    counted = []
    for module in (chain_op, kron_op, hadamard_op):
        inner = module.product
        monkeypatch.setattr(
            module, "product", lambda *a, inner=inner, name=module.__name__: counted.append(name) or inner(*a)
        )
    with sm.use_backend("torch-op"):
        yield counted


def planned(operator) -> bool:
    """Whether a chain or a Kronecker product of arrays is in an operator."""
    if isinstance(operator, sm.Kronecker):
        return all(type(f) is sm.Dense for f in operator.factors) or any(map(planned, operator.factors))
    parts = [p for v in operator._values() for p in (v if isinstance(v, tuple) else (v,))]
    return isinstance(operator, sm.Chain) or any(planned(p) for p in parts if isinstance(p, sm.Operator))


@pytest.mark.parametrize("pair", ALL, ids=names(ALL))
def test_the_market_through_the_operators(pair, calls):
    operator = pair.operator.to("torch")
    assert_matches(operator, pair.dense)
    assert_matches(operator.T, np.swapaxes(pair.dense, -1, -2))
    assert bool(calls) == planned(pair.operator)


@pytest.mark.parametrize("pair", SMALL, ids=names(SMALL))
def test_conformance_and_gradients_of_the_market_through_the_operators(pair, calls):
    operator = pair.operator.to("torch")
    check_operator(operator)
    leaves = [x.clone().requires_grad_() if arrays.is_inexact(x.dtype) else x for x in operator.arrays]
    replace = {id(x): y for x, y in zip(operator.arrays, leaves, strict=True)}
    live = operator._map(lambda x: replace[id(x)])
    values = [y for y in leaves if getattr(y, "requires_grad", False)]
    n = pair.dense.shape[-1]
    x = torch.tensor(np.cos(np.arange(2.0 * n)).reshape(n, 2), dtype=operator.dtype).requires_grad_()

    def found(y):
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
        return torch.autograd.grad((y * weights).abs().square().sum(), [x, *values], allow_unused=True)

    if not (live @ x).requires_grad:  # a zero operator
        return
    expected = found(live.to_dense() @ x)
    for y in (live @ x, (x.mT @ live.T).mT, live.T.T @ x):
        for u, v in zip(found(y), expected, strict=True):
            u, v = (torch.zeros(1) if w is None else w for w in (u, v))
            scale = max(1.0, float(v.abs().max()) if v.numel() else 1.0)
            assert float((u - v).abs().max() if u.numel() else 0) <= 1e3 * tolerance(np.float64) * scale


# ---- torch's own checks -------------------------------------------------------------------------------------------------


CHAINS = {
    "btt": sm.BlockTensorTrain.random((12, 10), blocks=2, rng=0),
    "btt rank 2 padded": sm.BlockTensorTrain.random((11, 7), blocks=(3, 2), rank=2, rng=0),
    "btt transposed": sm.BlockTensorTrain.random((12, 10), blocks=2, rng=0).T,
    "monarch": sm.Monarch.random((12, 8), blocks=2, rank=2, rng=0),
    "butterfly": sm.Butterfly.random((8, 8), rng=0),
    "low rank": sm.LowRank.random((6, 7), rank=2, rng=0),
    "block diagonal": sm.BlockDiagonal.random((6, 9), blocks=3, rng=0),
}
BOTH = pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])


def layout_of(operator):
    return layout.layout_of(ChainLayout(operator.patterns, *operator.shape, operator.out_order, operator.in_order))


def arguments(operator, columns=False, batch=5, dtype=torch.float64, grad=False):
    """Operand, bias, factors, layout, columns of ``structmat::chain``, and the dense matrix."""
    torch.manual_seed(0)
    walk = layout_of(operator)
    factors = [
        torch.from_numpy(f).reshape(s).to(dtype, copy=True) for f, s in zip(operator.factors, walk.shapes, strict=True)
    ]
    n = operator.shape[1]
    x, bias = (
        torch.randn((n, batch) if columns else (batch, n), dtype=dtype),
        torch.randn(operator.shape[0], dtype=dtype),
    )
    for t in (x, bias, *factors):
        t.requires_grad_(grad)
    return (x, bias, factors, list(walk.code), columns), torch.from_numpy(operator.to_dense()).to(dtype)


def dense_result(args, W):
    x, bias, *_, columns = args
    return W @ x + bias[:, None] if columns else x @ W.T + bias


def kron_arguments(columns=False, dtype=torch.float64, grad=False):
    torch.manual_seed(0)
    factors = [torch.randn(s, dtype=dtype) for s in ((2, 3), (4, 2), (2, 2))]
    x, bias = torch.randn((12, 5) if columns else (5, 12), dtype=dtype), torch.randn(16, dtype=dtype)
    for t in (x, bias, *factors):
        t.requires_grad_(grad)
    W = torch.kron(torch.kron(factors[0].detach(), factors[1].detach()), factors[2].detach())
    return (x, bias, factors, columns), W


CASES = [(name, columns) for name in (*CHAINS, "kron") for columns in (False, True)]
on_cases = pytest.mark.parametrize(("name", "columns"), CASES, ids=str)


def case(name, columns=False, **kwargs):
    """The operator, its arguments and the dense matrix."""
    if name == "kron":
        return OPS.kron, *kron_arguments(columns, **kwargs)
    return OPS.chain, *arguments(CHAINS[name], columns, **kwargs)


def called(op, args):
    """The operator as a function of all its tensors alone."""
    x, bias, factors, *rest = args
    return lambda x, bias, *factors: op(x, bias, list(factors), *rest), (x, bias, *factors)


@on_cases
def test_values_strides_and_derivatives_of_both_orders(name, columns):
    op, args, W = case(name, columns, grad=True)
    y = op(*args)
    torch.testing.assert_close(y, dense_result(args, W))
    assert y.is_contiguous()
    call, tensors = called(op, args)
    assert gradcheck(call, tensors)
    assert gradgradcheck(call, tensors)


def backward_cases(args):
    """Gradient, arguments, and every kind of need, for the backward operator."""
    x, _, factors, *rest = args
    for needs in (
        [True] * (2 + len(factors)),
        [True, False] + [False] * len(factors),
        [False, True] + [False] * (len(factors) - 1) + [True],
        [False, False, True] + [False] * (len(factors) - 1),
        [False] * (2 + len(factors)),
    ):
        yield (x, factors, *rest, needs)


@pytest.mark.parametrize(
    ("name", "columns"),
    [pytest.param(*c, marks=() if c[0] in ("btt", "kron") else pytest.mark.slow) for c in CASES],
    ids=str,
)
def test_opcheck(name, columns):
    op, args, _ = case(name, columns, grad=True)
    passed = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}
    assert torch.library.opcheck(op.default, args) == dict.fromkeys(passed, "SUCCESS")
    dy = torch.randn_like(op(*args)).requires_grad_()
    backward = getattr(OPS, f"{op.__name__}_backward")
    for rest in list(backward_cases(args))[:3:2]:
        assert torch.library.opcheck(backward.default, (dy, *rest)) == dict.fromkeys(passed, "SUCCESS")


@on_cases
def test_the_backward_operator_returns_what_is_needed(name, columns):
    op, args, _ = case(name, columns)
    live = case(name, columns, grad=True)[1]
    dy = torch.randn(op(*args).shape, dtype=torch.float64)
    leaves = (live[0], live[1], *live[2])
    expected = torch.autograd.grad(op(*live), leaves, dy)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (dy, args[0], *args[2])]
    for x, factors, *rest in backward_cases(args):
        needs = rest[-1]
        backward = getattr(OPS, f"{op.__name__}_backward")
        found = backward(dy, x, factors, *rest)
        wanted = [g for g, need in zip(expected, needs, strict=True) if need]
        torch.testing.assert_close(found, wanted)
        with mode:
            shapes = backward(fakes[0], fakes[1], fakes[2:], *rest)
        assert [(g.shape, g.stride()) for g in found] == [(g.shape, g.stride()) for g in shapes]


@BOTH
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_hadamard_operator(columns):
    H = torch.from_numpy(np.asarray(sm.hadamard(32)))
    x = torch.randn((32, 3) if columns else (3, 32), dtype=torch.float64, requires_grad=True)

    def f(x):
        return OPS.hadamard(x, 0.5, columns)

    expected = 0.5 * (H @ x if columns else x @ H)
    torch.testing.assert_close(f(x), expected)
    assert gradcheck(f, (x,))
    assert gradgradcheck(f, (x,))
    assert set(torch.library.opcheck(OPS.hadamard.default, (x, 0.5, columns)).values()) == {"SUCCESS"}
    torch.testing.assert_close(torch.func.jvp(f, (x.detach(),), (x.detach(),))[1], expected.detach())
    torch.testing.assert_close(torch.vmap(f)(torch.stack([x, 2 * x])), torch.stack([expected, 2 * expected]))
    with torch.autocast("cpu", torch.bfloat16):
        assert f(x.float()).dtype == torch.bfloat16
    assert flops(f, x) == 3 * 32 * 5
    with pytest.raises(ValueError, match=r"power of two, got torch.float64 \(3, 31\)"):
        OPS.hadamard(torch.ones(3, 31, dtype=torch.float64), 1.0)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_hadamard_product_of_16_bits_overflows_only_where_its_result_does(columns, dtype):
    n, count, value = 4096, 64, 1200.0  # sums of 64 entries without the scale are beyond float16
    x = torch.zeros(1, n, dtype=dtype)
    x[0, :count] = value
    y = OPS.hadamard(x.t().contiguous() if columns else x, n**-0.5, columns).flatten()
    found, expected = y[::count], torch.full((n // count,), count * value * n**-0.5, dtype=dtype)
    assert torch.equal(found, expected)  # exact: powers of two times 1200
    assert int(y.count_nonzero()) == n // count


@BOTH
def test_hadamard_factors_are_made_on_the_device(columns):
    """A copy from the host is not permitted while a CUDA graph is captured."""
    with torch._subclasses.FakeTensorMode(), Everything() as mode:
        y = hadamard_op._composed(torch.empty(16, 16, device="cuda:0"), 0.5, columns)
    assert y.device == torch.device("cuda:0")
    assert "bmm" in mode.names
    assert not {"lift", "lift_fresh", "_to_copy", "copy_"} & mode.names


class Everything(TorchDispatchMode):
    """Names of all operations, views and allocations too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_only_hadamard_matrices_without_gradients_are_taken_for_one():
    A = sm.hadamard(8).to("torch")
    pairs = [f.array for f in A.factors]
    assert hadamard_op.scale_of([*pairs[:2], -3 * pairs[2]]) == -3
    for other in (
        [*pairs[:2], pairs[2].clone().requires_grad_()],
        [*pairs[:2], pairs[2].abs()],
        [*pairs[:2], pairs[2].to(torch.complex128)],
        [*pairs[:2], torch.eye(3)],
        pairs[:1],
        [pairs[0].to("meta")] * 2,
    ):
        assert hadamard_op.scale_of(other[::-1]) is None


# ---- transforms: right, and never silently zero ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own rules use torch.jit
@on_cases
def test_torch_func(name, columns):
    op, args, W = case(name, columns)
    x, bias, factors, *rest = args
    v = torch.randn_like(x)
    image = W @ v if columns else v @ W.T

    def f(x):
        return op(x, bias, factors, *rest)

    y, tangent = torch.func.jvp(f, (x,), (v,))
    torch.testing.assert_close(y, dense_result(args, W))
    torch.testing.assert_close(tangent, image)
    tangent = torch.func.jvp(lambda k: op(x, bias, [k, *factors[1:]], *rest), (factors[0],), (factors[0],))[1]
    torch.testing.assert_close(tangent, dense_result((x, 0 * bias, *args[2:]), W))
    got = torch.func.grad(lambda x: f(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(f(leaf).square().sum(), leaf)[0])
    ahead = torch.func.jvp(torch.func.grad(lambda x: f(x).square().sum() / 2), (x,), (v,))[1]
    torch.testing.assert_close(ahead, W.T @ image if columns else image @ W)
    stack = torch.stack([x, v])
    torch.testing.assert_close(torch.vmap(f)(stack), torch.stack([f(x), f(v)]))
    per = torch.vmap(torch.func.grad(lambda k, x: op(x, bias, [k, *factors[1:]], *rest).sum()), in_dims=(None, 0))
    both = per(factors[0], stack)
    leaf = factors[0].clone().requires_grad_()
    torch.testing.assert_close(both[1], torch.autograd.grad(op(v, bias, [leaf, *factors[1:]], *rest).sum(), leaf)[0])


@on_cases
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_and_transforms_of_the_backward_operator(name, columns):
    op, args, W = case(name, columns)
    x, bias, factors, *rest = args
    v = torch.randn_like(x)
    for grad in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(grad), v)
            tangent = forward_ad.unpack_dual(op(dual, bias, factors, *rest)).tangent
        torch.testing.assert_close(tangent, W @ v if columns else v @ W.T)
    dy = torch.randn(op(*args).shape, dtype=torch.float64)
    backward, needs = getattr(OPS, f"{op.__name__}_backward"), [True] * (2 + len(factors))
    tangents = torch.func.jvp(lambda g: tuple(backward(g, x, factors, *rest, needs)), (dy,), (dy,))[1]
    torch.testing.assert_close(list(tangents), backward(dy, x, factors, *rest, needs))
    stack = torch.vmap(lambda g: tuple(backward(g, x, factors, *rest, needs)))(torch.stack([dy, 2 * dy]))
    torch.testing.assert_close([2 * s[0] for s in stack], [s[1] for s in stack])


# ---- dtypes, strides, empty batches, copies of modules -----------------------------------------------------------------------


@on_cases
def test_autocast_takes_the_bias_along(name, columns):
    op, args, W = case(name, columns, dtype=torch.float32, grad=True)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            y = op(*args)
        assert y.dtype == dtype
        y.float().sum().backward()
        assert all(t.grad.dtype == torch.float32 for t in (args[0], args[1], *args[2]))
        torch.testing.assert_close(y.float(), dense_result(args, W), rtol=0.05, atol=0.05)
    op, args, _ = case(name, columns)
    with torch.autocast("cpu", torch.bfloat16):
        assert op(*args).dtype == torch.float64  # as autocast treats every product of doubles


@on_cases
def test_strides_of_operands_of_results_and_of_fakes(name, columns):
    op, args, W = case(name, columns)
    x, *rest = args
    spaced = x.new_zeros(2 * x.shape[0], 2 * x.shape[1])[::2, ::2]
    spaced.copy_(x)
    for other in (x, spaced, x.t().contiguous().t(), x[:1].expand(x.shape)):
        y = op(other, *rest)
        torch.testing.assert_close(y, dense_result((other, *rest), W))
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(
                mode.from_tensor(other),
                *[torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, r) for r in rest],
            )
        assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)
        leaf = other.detach().requires_grad_()
        (dx,) = torch.autograd.grad(op(leaf, *rest).sum(), leaf)  # an expanded gradient
        torch.testing.assert_close(dx, torch.autograd.grad(dense_result((leaf, *rest), W).sum(), leaf)[0])


@on_cases
def test_empty_batches(name, columns):
    op, (x, bias, factors, *rest), W = case(name, columns, grad=True)
    x = (x[:, :0] if columns else x[:0]).detach().requires_grad_()
    y = op(x, bias, factors, *rest)
    assert y.shape == ((W.shape[0], 0) if columns else (0, W.shape[0]))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(float(t.grad.abs().sum()) == 0 for t in (bias, *factors))


@BOTH
@pytest.mark.parametrize("name", CHAINS)
def test_chunks_of_the_batch_change_nothing(name, columns, monkeypatch):
    op, args, W = case(name, columns, grad=True)
    leaves = (args[0], args[1], *args[2])
    expected = torch.autograd.grad(op(*args).square().sum(), leaves)
    monkeypatch.setattr(forward, "LEAST_CHUNK", 2)
    monkeypatch.setattr(forward, "CACHE_BYTES", 0)
    y = op(*args)
    torch.testing.assert_close(y, dense_result(args, W))
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaves), expected)


def test_errors_name_what_is_given_and_expected():
    op, (x, bias, factors, code, columns), _ = case("btt")
    for bad, kind, match in (
        ((x[:, :9], bias, factors, code, columns), ValueError, r"\(B, 10\), got \(5, 9\)"),
        ((x.t(), bias, factors, code, columns), ValueError, r"\(B, 10\)"),
        ((x, bias, factors, code, True), ValueError, r"\(10, B\)"),
        ((x, bias[:3], factors, code, columns), ValueError, r"\(12,\), got \(3,\)"),
        ((x, bias, factors[:1], code, columns), ValueError, "factors of shapes"),
        ((x, bias, factors, code[:-1], columns), ValueError, "integers of a chain"),
        ((x, bias, factors, [*code, 1], columns), ValueError, "integers of a chain"),
        ((x.float(), bias, factors, code, columns), TypeError, r"torch.float32, torch.float64"),
        ((x.to("meta"), bias, factors, code, columns), TypeError, "one device, got cpu, meta"),
        ((x, bias.to("meta"), factors, code, columns), TypeError, "one device, got cpu, meta"),
        ((x, None, [factors[0], factors[1].to("meta")], code, columns), TypeError, "one device, got cpu, meta"),
    ):
        with pytest.raises(kind, match=match):
            op(*bad)
    op, (x, bias, factors, columns), _ = case("kron")
    for bad, kind, match in (
        ((x[:, :9], bias, factors, columns), ValueError, r"\(B, 12\), got \(5, 9\)"),
        ((x, bias[:3], factors, columns), ValueError, r"\(16,\), got \(3,\)"),
        ((x, bias, [], columns), ValueError, "factors"),
        ((x.float(), bias, factors, columns), TypeError, r"torch.float32, torch.float64"),
        ((x.to("meta"), bias, factors, columns), TypeError, "one device, got cpu, meta"),
        ((x, bias.to("meta"), factors, columns), TypeError, "one device, got cpu, meta"),
        ((x, None, [*factors[:2], factors[2].to("meta")], columns), TypeError, "one device, got cpu, meta"),
    ):
        with pytest.raises(kind, match=match):
            op(*bad)


class Layer(torch.nn.Module):
    """A module that calls an operator by itself."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.op, (self.x, bias, factors, *self.rest), _ = case(name, dtype=torch.float32)
        self.bias, self.factors = torch.nn.Parameter(bias), torch.nn.ParameterList(factors)

    def forward(self, x):
        return self.op(x, self.bias, list(self.factors), *self.rest)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["btt", "monarch", "kron"])
def test_checkpoint_deepcopy_export_and_compilation_of_one_node(name):
    torch._dynamo.reset()
    layer = Layer(name)
    x = layer.x.clone().requires_grad_()
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    again = checkpoint(layer, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), leaves), expected)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    exported = torch.export.export(layer, (layer.x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    targets = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert targets == [layer.op.default]
    torch.testing.assert_close(exported.module()(layer.x.repeat(3, 1)), layer(layer.x.repeat(3, 1)))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (1, 2, 3):
        x = layer.x.repeat(count, 1).requires_grad_()
        leaves = [x, *layer.parameters()]
        torch.testing.assert_close(compiled(x), layer(x))
        got = torch.autograd.grad(compiled(x).square().sum(), leaves)
        torch.testing.assert_close(got, torch.autograd.grad(layer(x).square().sum(), leaves))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["btt", "kron"])
def test_compiled_by_inductor(name):
    torch._dynamo.reset()
    layer = Layer(name)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for count in (2, 3):
        x = layer.x.repeat(count, 1).requires_grad_()
        leaves = [x, *layer.parameters()]
        got = torch.autograd.grad(compiled(x).square().sum(), leaves)
        torch.testing.assert_close(got, torch.autograd.grad(layer(x).square().sum(), leaves), rtol=1e-4, atol=1e-5)


# ---- flops and copies, counted ------------------------------------------------------------------------------------------


@on_cases
def test_flop_formulas_are_those_of_the_products_inside(name, columns):
    op, args, _ = case(name, columns)
    x, bias, factors, *rest = args
    walk = [] if op is OPS.kron else [layout.decoded(tuple(rest[0]))]
    inside, back = (kron.run, kron.gradients) if op is OPS.kron else (forward.run, gradients.gradients)
    assert flops(op, *args) == flops(inside, x, bias, *walk, factors, columns) > 0
    dy = torch.randn(op(*args).shape, dtype=torch.float64)
    for _, _, *others in backward_cases(args):
        counted = flops(getattr(OPS, f"{op.__name__}_backward"), dy, x, factors, *others)
        assert counted == flops(back, x, dy, *walk, factors, others[-1], columns)


def flops(call, *args) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*args)
    return counter.get_total_flops()


class Recorded(TorchDispatchMode):
    """Names of the operations that are not views and not allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func.__name__.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def recorded(call) -> list[str]:
    with Recorded() as mode:
        call()
    return sorted(mode.names)


@BOTH
@pytest.mark.parametrize("name", ["btt", "btt transposed", "low rank"])
def test_two_products_forward_five_backward_and_no_copy(name, columns):
    _, (x, _, factors, code, _), W = case(name, columns, batch=16)
    walk = layout.decoded(tuple(code))
    products = ["mm", "mm"] if walk.plain and not columns else ["bmm", "bmm"]
    assert recorded(lambda: forward.run(x, None, walk, factors, columns)) == products
    dy = torch.randn((W.shape[0], 16) if columns else (16, W.shape[0]), dtype=torch.float64)
    needs = [True, False, True, True]
    assert recorded(lambda: gradients.gradients(x, dy, walk, factors, needs, columns)) == ["bmm"] * 5


@BOTH
def test_nothing_is_copied_below_the_operators_either(columns):
    operator = sm.BlockTensorTrain.random((64, 64), blocks=8, rng=0)
    args, _ = arguments(operator, columns, batch=32, dtype=torch.float32, grad=True)
    x, _, factors, code, _ = args
    dy = torch.randn(64, 32) if columns else torch.randn(32, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(OPS.chain(x, None, factors, code, columns), (x, *factors), dy)
    counts = {e.key: e.count for e in profile.key_averages()}
    assert counts["aten::bmm"] == 7
    assert not {"aten::copy_", "aten::clone", "aten::contiguous"} & set(counts)


@pytest.mark.parametrize("family", [sm.Monarch, sm.BlockTensorTrain])
def test_operators_apply_without_a_copy_in_both_layouts(family):
    A = family.random((64, 48), blocks=(4, 8), rank=2, dtype=torch.float32, rng=0)
    x = torch.randn(16, 48)
    with sm.use_backend("torch-op"):
        columns = x.t().contiguous()
        for call in (lambda: x @ A.T, lambda: A @ x.t(), lambda: A @ columns, lambda: A @ x[0]):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                call()
            counts = {e.key: e.count for e in profile.key_averages()}
            assert counts["aten::bmm"] == 2
            assert not {"aten::copy_", "aten::clone"} & set(counts)
        torch.testing.assert_close(x @ A.T, x @ A.to_dense().T, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("structure", ["btt", "monarch", "butterfly", "low_rank", "block_diagonal"])
def test_layers_where_the_operator_is_the_way(structure, monkeypatch):
    """As on a CUDA device: eagerly, in a compiled graph, under a flop counter, transformed."""
    torch._dynamo.reset()
    n = 256 if structure == "butterfly" else 16  # small ones are multiplied out before
    layer = snn.StructuredLinear(n, n, structure=structure, dtype=torch.float64)
    if structure == "low_rank":
        layer = snn.StructuredLinear.from_operator(sm.LowRank.random((12, n), rank=2, rng=0).to("torch"))
    x = torch.randn(5, n, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    calls = []
    for module in (product, functions):
        monkeypatch.setattr(module, "takes_operator", lambda x: True)
    monkeypatch.setattr(product, "merges", lambda x: True)
    inner = chain_op.product
    monkeypatch.setattr(chain_op, "product", lambda *a: calls.append(1) or inner(*a))
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), leaves), expected)
    assert bool(calls) == (structure != "low_rank")  # products of dense matrices need none
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == layer.flops(5) or structure == "butterfly"  # whose merged factors do more
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), leaves), expected)
    v = torch.randn_like(x)
    tangent = torch.func.jvp(layer, (x.detach(),), (v,))[1]
    torch.testing.assert_close(tangent, v @ layer.to_dense().T)


# ---- to other libraries ---------------------------------------------------------------------------------------------------


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on a CUDA device."""

    device = torch.device("cuda", 0)


@pytest.fixture
def cupy_of_the_host(monkeypatch):
    """As much of CuPy as conversions ask for, on host memory; DLPack, as there, knows no lazy negation."""

    class Cupy:
        class cuda:
            is_available = staticmethod(lambda: True)

        asarray = staticmethod(np.asarray)

        @staticmethod
        def from_dlpack(x):
            assert not x.is_neg()
            assert not x.is_conj()
            return x.as_subclass(torch.Tensor).numpy()

    monkeypatch.setitem(sys.modules, "cupy", Cupy)


def test_a_lazy_negation_is_done_before_values_leave_torch(cupy_of_the_host):
    torch.manual_seed(0)
    z = torch.randn(4, 4, dtype=torch.complex64)
    x = z.conj().imag
    assert x.is_neg()
    expected = -z.imag.numpy()
    for found in (
        sm.Dense(x).to("numpy").to_dense(),
        arrays.convert(x, "cupy"),
        arrays.convert(x.as_subclass(OnDevice), "cupy"),
    ):
        assert np.array_equal(found, expected)
    both = torch._neg_view(z.conj())
    for found in (arrays.convert(both, "numpy"), arrays.convert(both.as_subclass(OnDevice), "cupy")):
        assert np.array_equal(found, -z.conj().resolve_conj().numpy())
    short = z.real.bfloat16()
    found = arrays.convert(torch._neg_view(short), "cupy")
    assert found.dtype.name == "bfloat16"
    assert np.array_equal(found.astype(np.float32), -short.float().numpy())
