"""``nn.MultiheadAttention`` with projections that are layers: the same numbers, and every structured layer is called."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import structmat.nn as snn  # noqa: E402

FREE = pytest.mark.filterwarnings("ignore:convert. .* without calibration data")
NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of the fused path
KINDS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "other widths": {"kdim": 8, "vdim": 20},
    "other widths, batch first": {"kdim": 8, "vdim": 20, "batch_first": True},
    "appended": {"add_bias_kv": True, "add_zero_attn": True},
    "appended zeros": {"add_zero_attn": True, "batch_first": True},
}


def attention(**options):
    torch.manual_seed(0)
    fused = nn.MultiheadAttention(12, 4, **options).eval()
    for parameter in fused.parameters():
        nn.init.normal_(parameter, std=0.3)
    return fused


def inputs(fused, queries=5, keys=7, batch=3):
    g = torch.Generator().manual_seed(1)
    found = [torch.randn(n, batch, d, generator=g) for n, d in ((queries, 12), (keys, fused.kdim), (keys, fused.vdim))]
    return [x.transpose(0, 1) for x in found] if fused.batch_first else found


def masks(queries=5, keys=7, batch=3, heads=4):
    g = torch.Generator().manual_seed(2)
    hidden = torch.rand(queries, keys, generator=g) < 0.3
    padding = torch.rand(batch, keys, generator=g) < 0.3
    hidden[:, 0], padding[:, 0] = False, False
    numbers = torch.zeros(queries, keys).masked_fill(hidden, float("-inf"))
    many = torch.rand(batch * heads, queries, keys, generator=g)
    return {
        "none": {},
        "booleans": {"attn_mask": hidden},
        "numbers": {
            "attn_mask": numbers,
            "key_padding_mask": torch.zeros(batch, keys).masked_fill(padding, float("-inf")),
        },
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "padding": {"key_padding_mask": padding},
        "for every head": {"attn_mask": many},
    }


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers(kind, mask):
    fused = attention(**KINDS[kind])
    unfused = snn.unfuse_attention(fused)
    assert isinstance(unfused, snn.UnfusedAttention)
    assert isinstance(fused, nn.MultiheadAttention), "the fused module itself is as it was"
    q, k, v = inputs(fused)
    for options in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        with torch.no_grad():
            expected, weights = fused(q, k, v, **masks()[mask], **options)
            y, found = unfused(q, k, v, **masks()[mask], **options)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        assert (found is None) == (weights is None)
        if weights is not None:
            torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-6)


def test_one_text_and_the_causal_hint():
    fused = attention(batch_first=True)
    unfused = snn.unfuse_attention(fused)
    x = torch.randn(6, 12)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    padding = torch.tensor([False] * 4 + [True] * 2)
    for options in (
        {},
        {"key_padding_mask": padding},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"attn_mask": causal, "is_causal": True},
    ):
        with torch.no_grad():
            expected, y = fused(x, x, x, **options), unfused(x, x, x, **options)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="attn_mask"):
        unfused(x, x, x, is_causal=True)


def test_gradients_and_what_is_trained():
    fused = attention(batch_first=True)
    fused.in_proj_weight.requires_grad_(False)
    unfused = snn.unfuse_attention(copy.deepcopy(fused)).train()
    assert not unfused.key.weight.requires_grad
    assert unfused.key.bias.requires_grad
    x = torch.randn(2, 5, 12)
    fused.train()(x, x, x)[0].square().sum().backward()
    unfused(x, x, x)[0].square().sum().backward()
    assert fused.in_proj_bias.grad is not None
    torch.testing.assert_close(unfused.value.bias.grad, fused.in_proj_bias.grad[24:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unfused.out_proj.weight.grad, fused.out_proj.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_it_loads_what_the_fused_module_has_saved(kind):
    fused = attention(**KINDS[kind])
    unfused = snn.unfuse_attention(attention(**KINDS[kind]))
    with torch.no_grad():
        for parameter in unfused.parameters():
            parameter.zero_()
    state = fused.state_dict()
    before = dict(state)
    nn.Sequential(unfused).load_state_dict({f"0.{k}": x for k, x in state.items()})
    assert state.keys() == before.keys()
    q, k, v = inputs(fused)
    with torch.no_grad():
        torch.testing.assert_close(unfused(q, k, v)[0], fused(q, k, v)[0], rtol=1e-5, atol=1e-6)
    again = snn.unfuse_attention(attention(**KINDS[kind]))
    again.load_state_dict(unfused.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), unfused.parameters(), strict=True))


def encoder(layers=2):
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 48, batch_first=True), layers).eval()


def counted(model):
    calls = []
    for module in model.modules():
        if isinstance(module, snn.StructuredLinear):
            real = module.forward
            module.forward = lambda x, real=real, m=module: (calls.append(m), real(x))[
                1
            ]  # no hook: hooks end the fast path
    return calls


@FREE
@NESTED
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_structured_layer_of_an_encoder_is_called(mode, masked):
    model, x = encoder(), torch.randn(3, 7, 24)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = masked
    options = {"src_key_padding_mask": padding} if masked else {}
    with torch.no_grad():
        expected = model(x, **options)
    snn.unfuse_attention(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x, **options)[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
    plan = snn.plan(model, {"structure": "low_rank", "rank": 24}, min_speedup=0)  # full rank: the same outputs
    assert len(plan.converted) == 12
    snn.convert(model, plan)
    calls = counted(model.train(mode == "train"))
    with torch.set_grad_enabled(mode != "no_grad"):
        y = model(x, **options)
    assert len(calls) == len(set(calls)) == 12
    if mode != "train":
        torch.testing.assert_close(y[~padding], expected[~padding], rtol=1e-4, atol=1e-4)


@FREE
def test_a_whole_transformer_and_joint_projection_of_its_attention():
    torch.manual_seed(0)
    model = nn.Transformer(24, 4, 2, 2, 48, batch_first=True).eval()
    source, target = torch.randn(4, 6, 24), torch.randn(4, 5, 24)
    expected = model(source, target)
    snn.unfuse_attention(model)
    torch.testing.assert_close(model(source, target), expected, rtol=1e-4, atol=1e-5)
    plan = snn.plan(model, {"structure": "low_rank", "interpolative": True}, budget=0.5)
    data = [(torch.randn(40, 6, 24), torch.randn(40, 5, 24)) for _ in range(2)]
    moments = snn.calibrate(model, data, plan)
    groups = {tuple(n.rpartition(".")[2] for n in g) for g in moments.groups}
    assert {("query", "key", "value"), ("query",)} <= groups
    assert any(len(g) >= 4 and {n.rpartition(".")[2] for n in g} == {"key", "value"} for g in moments.groups)
    snn.convert(model, plan, moments, joint=True)
    calls = counted(model)
    model(source, target)
    assert len(set(calls)) == len(calls) == len(plan.converted)


def test_what_cannot_be_unfused_leaves_the_model_as_it_was():
    with pytest.raises(ValueError, match=r"Linear has no nn\.MultiheadAttention"):
        snn.unfuse_attention(nn.Linear(2, 2))

    class Own(nn.MultiheadAttention):
        def forward(self, *args, **options):
            return super().forward(*args, **options)

    hooked, parametrised, tied = encoder(), encoder(), encoder()
    hooked.layers[1].self_attn.register_forward_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(parametrised.layers[1].self_attn.out_proj)
    tied.layers[1].self_attn.in_proj_weight = tied.layers[0].self_attn.in_proj_weight
    own = nn.ModuleList([nn.MultiheadAttention(12, 4), Own(12, 4)])
    for model, message in (
        (hooked, r"layers.1.self_attn: has hooks"),
        (parametrised, r"parametrised"),
        (tied, r"in_proj_weight is the same parameter as layers"),
        (own, "Own has a forward of its own"),
    ):
        kinds = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=message):
            snn.unfuse_attention(model)
        assert [type(m) for m in model.modules()] == kinds
    model = encoder()
    with pytest.raises(ValueError, match=r"optimizer was built before and holds layers\.0\.self_attn\.in_proj"):
        snn.unfuse_attention(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(model.layers[0].self_attn, nn.MultiheadAttention)
    kept = torch.optim.SGD(model.layers[0].linear1.parameters(), lr=0.1)
    snn.unfuse_attention(model, optimizer=kept)


def test_a_module_in_two_places_stays_one_and_bad_masks_are_refused():
    fused = attention(batch_first=True)
    model = snn.unfuse_attention(nn.ModuleList([fused, fused]))
    assert model[0] is model[1]
    x = torch.randn(2, 5, 12)
    for options in (
        {"attn_mask": torch.zeros(4, 5)},
        {"key_padding_mask": torch.zeros(5, 2, dtype=torch.bool)},
        {"attn_mask": torch.zeros(5, 5, dtype=torch.int32)},
    ):
        with pytest.raises(ValueError, match="attention: expected"):
            model[0](x, x, x, **options)
    with pytest.raises(ValueError, match="all of 2 or all of 3"):
        model[0](x, x[0], x[0])
    with torch.device("meta"):
        empty = snn.unfuse_attention(nn.TransformerEncoderLayer(12, 2, 24))
    assert empty.self_attn.query.weight.is_meta


@pytest.mark.parametrize("options", [{}, {"average_attn_weights": False}, {"need_weights": False}])
def test_attention_weights_are_dropped_in_training_alone(options):
    fused = attention(batch_first=True, dropout=0.5)
    unfused = snn.unfuse_attention(copy.deepcopy(fused))
    x = torch.randn(2, 6, 12)
    kept = unfused(x, x, x, **options)[0]
    torch.testing.assert_close(kept, fused(x, x, x, **options)[0], rtol=1e-5, atol=1e-6)
    torch.manual_seed(3)
    expected, weights = fused.train()(x, x, x, **options)
    torch.manual_seed(3)
    y, found = unfused.train()(x, x, x, **options)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(y, kept, atol=1e-3)
    if weights is not None:
        torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-6)
    if options == {"average_attn_weights": False}:
        assert 0.2 < (found == 0).float().mean() < 0.8


def test_inputs_that_do_not_belong_together_are_refused():
    unfused = snn.unfuse_attention(attention(batch_first=True))
    x = torch.randn(3, 5, 12)
    for q, k, v in ((x, x[:1], x[:1]), (x, x, x[:2]), (x, x, x[:, :4])):
        for need in (True, False):
            with pytest.raises(ValueError, match="attention: expected one batch size, and key and value of one length"):
                unfused(q, k, v, need_weights=need)
    assert unfused(x, x[:, :4], x[:, :4])[0].shape == x.shape


def test_a_packed_parameter_that_another_module_holds_is_not_replaced():
    for kind in ("weight", "bias"):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 4), "linear": nn.Linear(12, 36)})
        setattr(model["linear"], kind, getattr(model["attention"], f"in_proj_{kind}"))
        with pytest.raises(ValueError, match=rf"linear\.{kind} is the same parameter as attention\.in_proj_{kind}"):
            snn.unfuse_attention(model)
        assert isinstance(model["attention"], nn.MultiheadAttention)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 4, kdim=8, vdim=20), "linear": nn.Linear(12, 12)})
    model["linear"].weight = model["attention"].q_proj_weight
    snn.unfuse_attention(model)
    assert model["attention"].query.weight is model["linear"].weight, "what is kept stays tied"


def test_assigned_projections_have_memory_of_their_own():
    unfused = snn.unfuse_attention(attention())
    state = attention().state_dict()
    unfused.load_state_dict(state, assign=True)
    for name in ("query", "key", "value"):
        weight = getattr(unfused, name).weight
        assert weight.untyped_storage().nbytes() == weight.nbytes
    assert torch.equal(unfused.key.weight, state["in_proj_weight"][12:24])
    assert unfused.out_proj.weight.data_ptr() == state["out_proj.weight"].data_ptr(), "assigned, not copied"
