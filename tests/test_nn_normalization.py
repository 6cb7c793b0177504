"""Weight normalisation: the formula, what stays the same, and what takes part in it."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import structmat.nn as snn  # noqa: E402
from structmat.nn.normalization import sigmas  # noqa: E402

STRUCTURES = ["btt", "monarch", "low_rank", "kronecker", "butterfly", "pixelfly", "block_diagonal"]


def layer_of(structure="btt", n=36, m=30, scale=1.0, **options):
    torch.manual_seed(0)
    layer = snn.StructuredLinear(n, m, structure=structure, dtype=torch.float64, **options)
    with torch.no_grad():
        for factor in layer.factors:
            factor.mul_(scale)
    return layer


def rows(n=36, count=5):
    return torch.randn(count, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_outputs_stay_the_same_when_it_comes_and_when_it_goes(structure, scale):
    layer, x = layer_of(structure, scale=scale), rows()
    y, factors = layer(x).detach(), list(layer.factors)
    assert snn.weight_norm(nn.Sequential(layer))[0] is layer
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.to_linear()(x), y)
    torch.testing.assert_close(x @ layer.to_dense().T + layer.bias, y)
    torch.testing.assert_close(torch.as_tensor(layer.operator.to_dense()), layer.to_dense().detach())
    expected = [
        max(1.0, (float(f.detach().square().mean()) + 1e-8) ** 0.5 / s)
        for f, s in zip(factors, sigmas(layer), strict=True)
    ]
    assert layer.gains.tolist() == pytest.approx(expected)
    snn.remove_weight_norm(layer)
    assert type(layer) is snn.StructuredLinear
    assert all(a is b for a, b in zip(layer.factors, factors, strict=True))
    torch.testing.assert_close(layer(x), y)


def test_factors_are_capped_and_multiplied_by_their_gains():
    layer, x = snn.weight_norm(layer_of(rank=2)), rows()
    with torch.no_grad():
        layer.gains.copy_(torch.tensor([0.5, 2.0]))
        layer.factors[0].mul_(100)
        layer.factors[1].mul_(0.01)
    left, right = (f.detach() for f in layer.factors)
    caps = sigmas(layer)
    plain = layer_of(rank=2)
    with torch.no_grad():
        plain.factors[0].copy_(left * 0.5 * caps[0] / (left.square().mean() + 1e-8).sqrt())
        plain.factors[1].copy_(2.0 * right)  # below its cap
    torch.testing.assert_close(layer(x), plain(x))


def test_training_at_a_rate_that_is_far_too_high_cannot_blow_factors_up():
    x = rows(count=64)
    sizes = []
    for normalized in (False, True):
        layer = layer_of()
        if normalized:
            snn.weight_norm(layer)
        frozen = [p for n, p in layer.named_parameters() if n != "gains"]
        optimizer = torch.optim.Adam(frozen, lr=10.0)
        for _ in range(5):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            sizes.append(float(layer(x).square().mean().sqrt()))
        if normalized:
            for value, gain, cap in zip(layer._values(), layer.gains, sigmas(layer), strict=True):
                assert float(value.detach().square().mean().sqrt()) <= float(gain.detach()) * cap * (1 + 1e-9)
    assert sizes[0] > 30 * sizes[1]


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_gradients_go_through_the_cap_and_to_the_gains(scale):
    layer = snn.weight_norm(layer_of(n=6, m=4))
    with torch.no_grad():
        for factor in layer.factors:
            factor.mul_(scale)
    names = [name for name, _ in layer.named_parameters()]

    def product(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = rows(n=6, count=3).requires_grad_()
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(product, (x, *values))
    assert torch.autograd.gradgradcheck(product, (x, *values))


def test_copies_checkpoints_and_files_keep_it(tmp_path):
    model = nn.Sequential(nn.Linear(8, 36), layer_of().float(), nn.ReLU())
    snn.weight_norm(model)
    with torch.no_grad():
        model[1].gains.copy_(torch.tensor([0.5, 3.0]))
        model[1].factors[0].mul_(5)
    x = torch.randn(4, 8)
    y = model(x)
    assert {k for k in model.state_dict() if k.startswith("1.")} == {"1.bias", "1.gains", "1.factors.0", "1.factors.1"}
    assert torch.equal(copy.deepcopy(model)(x), y)
    snn.save(model, tmp_path / "model.safetensors")
    dense = nn.Sequential(nn.Linear(8, 36), nn.Linear(36, 30), nn.ReLU())
    found = snn.load(dense, tmp_path / "model.safetensors")
    assert isinstance(found[1], snn.NormalizedLinear)
    assert torch.equal(found(x), y)
    fresh = nn.Sequential(nn.Linear(8, 36), layer_of().float(), nn.ReLU())
    with pytest.raises(RuntimeError, match="gains"):
        fresh.load_state_dict(model.state_dict())
    snn.initialize(found[1])
    assert found[1].gains.tolist() == [1.0, 1.0]


def test_models_of_transformers_keep_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 30,
    }
    model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    plan = snn.plan(model, {r"re:encoder.*": {"structure": "low_rank", "rank": 8}})
    snn.convert(model, plan)
    snn.weight_norm(model)
    layer = model.encoder.layer[0].output.dense
    with torch.no_grad():
        layer.gains.copy_(torch.tensor([0.5, 3.0]))
    ids = torch.arange(6)[None]
    y = model(ids).last_hidden_state
    model.save_pretrained(tmp_path / "normalized")
    again = transformers.BertModel.from_pretrained(tmp_path / "normalized").eval()
    assert isinstance(again.encoder.layer[0].output.dense, snn.NormalizedLinear)
    assert torch.equal(again(ids).last_hidden_state, y)
    snn.remove_weight_norm(model)
    model.save_pretrained(tmp_path / "plain")
    plain = transformers.BertModel.from_pretrained(tmp_path / "plain").eval()
    assert type(plain.encoder.layer[0].output.dense) is snn.StructuredLinear
    torch.testing.assert_close(plain(ids).last_hidden_state, y)


def test_it_is_compiled_and_follows_autocast():
    layer = snn.weight_norm(layer_of().float())
    x = rows().float()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_gains_have_the_base_rate_and_no_decay_and_leave_the_optimizer_with_the_factors():
    model = nn.Sequential(snn.weight_norm(layer_of()), nn.ReLU(), nn.Linear(30, 2).double())
    groups = snn.param_groups(model, 0.1, weight_decay=0.5, base_width=8)
    rates = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    assert rates["0.gains"] == (0.1, 0.0)
    assert rates["0.factors.0"][1] > 0
    optimizer = torch.optim.AdamW(groups)
    y = model(rows())
    y.sum().backward()
    optimizer.step()
    y = model(rows())
    gains = model[0].gains
    snn.densify(model, optimizer)
    torch.testing.assert_close(model(rows()), y)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    assert gains not in optimizer.state
    assert all(len(g["params"]) == len(g["names"]) for g in optimizer.param_groups)


def test_what_cannot_be_normalised_is_refused_and_left_as_it_was():
    with pytest.raises(ValueError, match="no structured layer"):
        snn.weight_norm(nn.Linear(3, 3))
    first, second = layer_of(), snn.weight_norm(layer_of())
    with pytest.raises(ValueError, match="normalised already"):
        snn.weight_norm(nn.Sequential(first, second))
    assert type(first) is snn.StructuredLinear
    with pytest.raises(ValueError, match="no layer is normalised"):
        snn.remove_weight_norm(first)
    other = layer_of()
    other.factors[1] = second.factors[1]
    snn.weight_norm(other)
    with pytest.raises(ValueError, match="share a factor"):
        snn.remove_weight_norm(nn.Sequential(second, other))

    class Special(snn.StructuredLinear):
        pass

    with pytest.raises(TypeError, match="Special"):
        snn.weight_norm(nn.Sequential(first, Special(4, 4)))
    assert type(first) is snn.StructuredLinear
    meta = snn.weight_norm(snn.StructuredLinear(8, 8, device="meta"))
    assert meta.gains.is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_normalised_in_single(dtype):
    layer = snn.weight_norm(snn.StructuredLinear(16, 16, structure="low_rank", rank=4, init="zero", dtype=dtype))
    x = torch.randn(3, 16, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer.bias.expand(3, -1)), "a factor of zeros is one of zeros, not NaN"
    y.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())
    large = snn.StructuredLinear(16, 16, structure="low_rank", rank=4, dtype=dtype)
    with torch.no_grad():
        large.factors[0].fill_(300.0)  # whose square is none of float16
        large.factors[1].mul_(1e-3)
    y = large(x)
    torch.testing.assert_close(snn.weight_norm(large)(x), y, rtol=3e-2, atol=3e-2)


def test_a_factor_of_no_entries():
    layer = snn.StructuredLinear.from_linear(nn.Linear(8, 8), structure="low_rank", rank=8, interpolative=True)
    assert any(f.numel() == 0 for f in layer.factors)
    x = torch.randn(3, 8)
    y = layer(x)
    snn.weight_norm(layer)
    assert bool(layer.gains.isfinite().all())
    empty = next(i for i, f in enumerate(layer.factors) if f.numel() == 0)
    assert layer.gains[empty] == 1.0
    torch.testing.assert_close(layer(x), y)
    layer(x).sum().backward()
    assert bool(layer.gains.grad.isfinite().all())
