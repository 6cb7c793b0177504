"""Initialisation, learning rates, weight decay, coordinate check and densify."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import structmat as sm  # noqa: E402
import structmat.nn as snn  # noqa: E402
from structmat.nn.scaling import expected_gain  # noqa: E402

STRUCTURES = [
    ("btt", {"blocks": 16}),
    ("btt", {"blocks": 16, "rank": 4}),
    ("btt", {"cores": 3}),
    ("monarch", {"blocks": 8}),
    ("low_rank", {"rank": 16}),
    ("kronecker", {}),
    ("butterfly", {}),
    ("block_diagonal", {"blocks": 8}),
    ("dense", {}),
]


def rms(layer, n=256, seed=0):
    x = torch.randn(512, n, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return float(layer(x).square().mean().sqrt())


@pytest.mark.parametrize(("structure", "options"), STRUCTURES)
@pytest.mark.parametrize("rule", ["spectral", "variance"])
def test_outputs_at_the_start_have_the_predicted_size(structure, options, rule):
    torch.manual_seed(0)
    layer = snn.StructuredLinear(256, 256, bias=False, structure=structure, init=rule, **options)
    gain = expected_gain(layer, rule)
    assert 0.5 < rms(layer) / gain < 2
    if rule == "variance":
        assert gain == pytest.approx(1)
    nn.Sequential(layer).apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    assert 0.5 < rms(layer) / gain < 2


@pytest.mark.parametrize("shape", [(251, 257), (64, 256), (256, 64)])
def test_rectangles_and_primes_start_at_the_same_size(shape):
    torch.manual_seed(0)
    for structure in ("btt", "monarch", "butterfly", "block_diagonal"):
        layer = snn.StructuredLinear(shape[1], shape[0], bias=False, structure=structure, init="variance")
        assert 0.5 < rms(layer, shape[1]) < 2, structure


def test_sums_start_at_the_size_of_one_term():
    torch.manual_seed(0)
    layer = snn.StructuredLinear(256, 256, bias=False, structure="pixelfly", init="variance")
    assert 0.5 < rms(layer) < 2


def test_standard_deviations_are_those_of_the_paper():
    torch.manual_seed(0)
    d, r = 1024, 4
    layer = snn.StructuredLinear(d, d, structure="btt", blocks=32, rank=r)
    left, right = (float(f.detach().std()) for f in layer.factors)
    assert right == pytest.approx(d**-0.25, rel=0.02)
    assert left == pytest.approx(1 / (r * d**0.25), rel=0.02)


@pytest.mark.parametrize("structure", ["btt", "low_rank", "kronecker", "butterfly", "pixelfly", sm.Interpolative])
def test_zero_makes_the_layer_zero_and_it_can_still_learn(structure):
    layer = snn.StructuredLinear(16, 16, bias=False, structure=structure, init="zero")
    x = torch.randn(8, 16)
    assert float(layer(x).detach().abs().max()) == 0
    layer(x).sum().backward()
    assert any(float(f.grad.abs().max()) > 0 for f in layer.factors)


def test_a_generator_makes_it_repeat():
    layer = snn.StructuredLinear(16, 16)
    values = []
    for _ in range(2):
        snn.initialize(layer, generator=torch.Generator().manual_seed(3))
        values.append(torch.cat([p.detach().flatten() for p in layer.parameters()]))
    assert torch.equal(*values)
    with pytest.raises(ValueError, match="spectral, variance, zero"):
        snn.initialize(layer, "xavier")


def test_multipliers_are_those_of_the_table():
    d = 1024
    for structure, options, expected in (
        ("dense", {}, (1,)),
        ("low_rank", {"rank": 32}, (d / 64, 0.5)),
        ("kronecker", {}, (16, 16)),
        ("monarch", {"blocks": 16, "rank": 4}, (8, 8)),
        ("btt", {"blocks": 32, "rank": 4}, (4, 16)),
    ):
        layer = snn.StructuredLinear(d, d, structure=structure, device="meta", **options)
        assert snn.multipliers(layer) == pytest.approx(expected), structure
    layer = snn.StructuredLinear(d, d, structure="btt", blocks=32, rank=4, device="meta")
    assert snn.multipliers(layer, "sgd") == pytest.approx((1 / 8, 2))
    with pytest.raises(ValueError, match="adam, sgd"):
        snn.multipliers(layer, "lion")


def model(width=64):
    return nn.Sequential(
        nn.Linear(32, width),
        nn.LayerNorm(width),
        snn.StructuredLinear(width, width, structure="btt", rank=2),
        snn.StructuredLinear(width, width, structure="low_rank", rank=8, bias=False),
        nn.Linear(width, 3),
    )


def rates(module, **options):
    groups = snn.param_groups(module, 0.1, **options)
    return {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own imports
def test_groups_hold_every_parameter_once_and_are_found_through_wrappers():
    net = model()
    groups = snn.param_groups(net, 0.1, weight_decay=0.5, base_width=32)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, net.parameters()))
    plain = rates(net, weight_decay=0.5, base_width=32)
    assert plain["4.weight"] == pytest.approx((0.05, 0.5))
    assert plain["0.weight"] == pytest.approx((0.1, 0.5))
    assert plain["1.weight"] == plain["2.bias"] == (0.1, 0.0)
    assert plain["2.factors.1"][0] == pytest.approx(0.1 * 32 / 64 * 4)
    assert rates(torch.compile(net), weight_decay=0.5, base_width=32) == plain
    assert rates(nn.DataParallel(net), weight_decay=0.5, base_width=32) == plain
    assert rates(torch.compile(nn.DataParallel(net)), weight_decay=0.5, base_width=32) == plain
    net[2].__class__ = type("Generated", (snn.StructuredLinear,), {})  # as fully_shard does
    assert rates(net, weight_decay=0.5, base_width=32) == plain


def test_overrides_win_and_must_match():
    got = rates(model(), overrides={"*.factors.*": 1.0, "2.factors.0": 3.0})
    assert got["2.factors.0"][0] == pytest.approx(0.3)
    assert got["3.factors.1"][0] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="decoder"):
        rates(model(), overrides={"decoder.*": 1.0})
    with pytest.raises(ValueError, match="no parameters"):
        snn.param_groups(nn.ReLU(), 0.1)


@pytest.mark.parametrize("structure", ["btt", "low_rank", "kronecker", "butterfly"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_weight_decay_is_that_of_the_product(structure, optimizer):
    layer = snn.StructuredLinear(16, 16, structure=structure, dtype=torch.float64)
    kind = "sgd" if optimizer is torch.optim.SGD else "adam"
    groups = snn.param_groups(layer, 1e-3, weight_decay=0.5, base_width=4, optimizer=kind)
    before = layer.operator.to_dense().clone()
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer(groups).step()
    shrunk = float((layer.operator.to_dense() / before).nanmedian())
    assert 1 - shrunk == pytest.approx(1e-3 * 4 / 16 * 0.5, rel=1e-3)  # what the dense layer would lose


# ---- coordinate check -------------------------------------------------------------------------------------------------


def batches():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(64, 64, generator=g), torch.randint(10, (64,), generator=g)) for _ in range(3)]


def net_of(structure):
    def make(width):
        head = nn.Linear(width, 10)
        nn.init.zeros_(head.weight)
        layers = [snn.StructuredLinear(width, width, structure=structure) for _ in range(2)]
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), head)

    return make


@pytest.mark.parametrize("structure", ["btt", "kronecker"])
def test_changes_do_not_depend_on_the_width_with_the_rates_of_the_structure(structure):
    def dense_rule(module):
        groups = snn.param_groups(module, 2**-9, base_width=64, overrides={"*.factors.*": 1.0})
        for g in groups:
            width = module[2].in_features
            g["lr"] = 2**-9 * 64 / width if any("factors" in n for n in g["names"]) else g["lr"]
        return groups

    arguments = (net_of(structure), (64, 1024), batches())
    state = torch.random.get_rng_state()
    good = snn.coordinate_check(*arguments, lr=2**-9)
    assert torch.equal(state, torch.random.get_rng_state())
    bad = snn.coordinate_check(*arguments, lr=2**-9, groups=dense_rule)
    assert 0.4 < good.ratios["4"] < 2.5, str(good)
    assert bad.ratios["4"] < 0.25, str(bad)
    assert str(good).splitlines()[0].split() == ["layer", "64", "1024", "ratio"]


def test_coordinate_check_needs_widths_batches_and_structured_layers():
    with pytest.raises(ValueError, match="two widths"):
        snn.coordinate_check(net_of("btt"), (64,), batches(), lr=0.1)
    with pytest.raises(ValueError, match="no structured"):
        snn.coordinate_check(lambda w: nn.Linear(64, 10), (64, 128), batches(), lr=0.1)


# ---- densify ------------------------------------------------------------------------------------------------------------


def test_densify_is_exact_and_keeps_what_is_shared():
    net = model().double()
    net.append(net[2])
    net.insert(5, nn.Linear(3, 64).double())
    x = torch.randn(4, 32, dtype=torch.float64)
    y, bias = net(x), net[2].bias
    assert snn.densify(net) is net
    assert not any(isinstance(m, snn.StructuredLinear) for m in net.modules())
    assert net[2] is net[6]
    assert net[2].bias is bias
    assert net[3].bias is None
    torch.testing.assert_close(net(x), y)
    root = snn.densify(snn.StructuredLinear(4, 4))
    assert type(root) is nn.Linear
    with pytest.raises(ValueError, match="no structured layer"):
        snn.densify(nn.Linear(3, 3))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_densify_hands_the_optimizer_over(optimizer):
    torch.manual_seed(0)
    net = model()
    kind = "sgd" if optimizer is torch.optim.SGD else "adam"
    options = {"momentum": 0.9} if kind == "sgd" else {}
    stepper = optimizer(snn.param_groups(net, 0.01, weight_decay=0.1, base_width=32, optimizer=kind), **options)
    net(torch.randn(8, 32)).square().sum().backward()
    stepper.step()
    kept = copy.deepcopy({k: v for k, v in stepper.state.items() if k is net[2].bias})
    factors = {id(f) for m in net.modules() if isinstance(m, snn.StructuredLinear) for f in m.factors}
    snn.densify(net, stepper)
    held = [p for g in stepper.param_groups for p in g["params"]]
    assert sorted(map(id, held)) == sorted(map(id, net.parameters()))
    assert not factors & {id(p) for p in stepper.state}
    assert stepper.state[net[2].weight] == {} or net[2].weight not in stepper.state
    assert len(kept) == 1
    group = next(g for g in stepper.param_groups if any(p is net[2].weight for p in g["params"]))
    assert group["lr"] == pytest.approx(0.01 * 32 / 64)
    assert group["weight_decay"] == pytest.approx(0.1)
    before = net[2].weight.detach().clone()
    stepper.zero_grad()
    net(torch.randn(8, 32)).square().sum().backward()
    stepper.step()
    assert not torch.equal(before, net[2].weight)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("interpolative", [False, True])
def test_densify_gives_layers_that_share_a_factor_the_rates_of_dense_ones(kind, interpolative):
    """Layers of unequal heights: the rule of SGD has another rate for the shared factor in each of them."""
    operators = [sm.LowRank.random((m, 32), rank=4, rng=0) for m in (64, 16, 16)]
    if interpolative:
        operators = [sm.Interpolative.random((m, 32), rank=4, side="columns", rng=0) for m in (64, 16, 16)]
    net = nn.Sequential(*(snn.StructuredLinear.from_operator(a) for a in operators))
    slot = 0 if interpolative else 1
    for layer in net:
        layer.factors[slot] = net[0].factors[slot]
    groups = snn.param_groups(net, 0.1, weight_decay=0.01, optimizer=kind)
    stepper = (torch.optim.SGD if kind == "sgd" else torch.optim.AdamW)(groups)
    snn.densify(net, stepper)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in stepper.param_groups for p in g["params"]}
    for layer in net:
        assert found[id(layer.weight)] == pytest.approx((0.1, 0.01))


def test_densify_does_not_take_an_override_of_another_layer_over():
    net = nn.Sequential(*(snn.StructuredLinear(8, 8, structure="low_rank", rank=2, bias=False) for _ in range(2)))
    net[1].factors[0] = net[0].factors[0]
    stepper = torch.optim.SGD(snn.param_groups(net, 0.1, optimizer="sgd", overrides={"0.factors.0": 3.0}), lr=0.1)
    snn.densify(net, stepper)
    found = {id(p): g["lr"] for g in stepper.param_groups for p in g["params"]}
    assert found[id(net[1].weight)] == pytest.approx(0.1)


def test_densify_where_all_factors_of_a_layer_are_those_of_another():
    operators = [sm.Interpolative.random((m, 32), rank=4, side="columns", rng=0) for m in (64, 16, 16)]
    net = nn.Sequential(*(snn.StructuredLinear.from_operator(a) for a in operators))
    net[2].factors[0], net[2].factors[1] = net[0].factors[0], net[1].factors[1]
    stepper = torch.optim.SGD(snn.param_groups(net, 0.1, optimizer="sgd"), lr=0.1)
    snn.densify(net, stepper)
    found = {id(p): g["lr"] for g in stepper.param_groups for p in g["params"]}
    assert [found[id(layer.weight)] for layer in net] == pytest.approx([0.1, 0.1, 0.1])


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("held", [False, True])
def test_densify_with_a_frozen_factor(frozen, held):
    """An optimizer of the trained parameters knows all that it needs; the product is trained if a factor is."""
    net = nn.Sequential(snn.StructuredLinear(8, 8, structure="low_rank", rank=2))
    net[0].factors[frozen].requires_grad_(False)
    assert net[0].weight.requires_grad
    assert net[0].to_linear().weight.requires_grad
    groups = snn.param_groups(net, 0.1, weight_decay=0.01)
    for group in groups:
        group["params"] = [p for p in group["params"] if held or p.requires_grad]
    stepper = torch.optim.AdamW([g for g in groups if g["params"]])
    snn.densify(net, stepper)
    assert net[0].weight.requires_grad
    assert {id(p) for g in stepper.param_groups for p in g["params"]} == {id(p) for p in net.parameters()}
    group = next(g for g in stepper.param_groups if g["params"][0] is net[0].weight)
    assert (group["lr"], group["weight_decay"]) == pytest.approx((0.1, 0.005))  # that of the factor that was trained
    net = nn.Sequential(snn.StructuredLinear(8, 8, structure="low_rank", rank=2)).requires_grad_(False)
    assert not net[0].weight.requires_grad
    assert not snn.densify(net)[0].weight.requires_grad


def test_densify_with_an_optimizer_of_one_group_and_a_strange_one():
    net = model()
    stepper = torch.optim.Adam(net.parameters(), lr=0.01)
    snn.densify(net, stepper)
    assert sorted(id(p) for g in stepper.param_groups for p in g["params"]) == sorted(map(id, net.parameters()))
    assert {g["lr"] for g in stepper.param_groups} == {0.01}
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    half = torch.optim.Adam([net[2].factors[0]])
    with pytest.raises(ValueError, match="1 of the 2 factors"):
        snn.densify(net, half)
    assert isinstance(net[2], snn.StructuredLinear)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    stranger = torch.optim.Adam(model().parameters())
    snn.densify(net, stranger)
