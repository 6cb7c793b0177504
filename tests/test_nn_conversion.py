"""Planning, calibrating, converting and reporting on whole models."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import structmat as sm

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import structmat.nn as snn  # noqa: E402
from structmat.nn import conversion, fitting  # noqa: E402
from structmat.nn.joint import grouped  # noqa: E402

LOW = {"structure": "low_rank"}
FREE = pytest.mark.filterwarnings("ignore:convert. .* without calibration data")
FEW = pytest.mark.filterwarnings("ignore:convert. .* fewer than 5 samples")


class Attention(nn.Module):
    """Query, key and value read one tensor; then an output and a two-layer network with skip connections."""

    def __init__(self, n=24, bias=True):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(n, n, bias=bias) for _ in range(4))
        self.up, self.down = nn.Linear(n, 2 * n), nn.Linear(2 * n, n)
        self.norm = nn.LayerNorm(n)

    def forward(self, x, mask=None):
        score = self.query(x) @ self.key(x).transpose(-1, -2) / 5
        x = x + self.out(score.softmax(-1) @ self.value(x))
        return self.norm(x + self.down(torch.relu(self.up(x))))


class Model(nn.Module):
    """Embedding, blocks in a list, a head tied to the embedding."""

    def __init__(self, blocks=2, n=24):
        super().__init__()
        self.embed = nn.Embedding(50, n)
        self.blocks = nn.ModuleList([Attention(n) for _ in range(blocks)])
        self.head = nn.Linear(n, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, attention_mask=None):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, mask=attention_mask)
        return self.head(x)


def model(**options):
    torch.manual_seed(0)
    return Model(**options).eval()


def tokens(count=8, seed=1, lengths=None):
    g = torch.Generator().manual_seed(seed)
    found = torch.randint(50, (count, 16), generator=g)
    if lengths is None:
        return {"tokens": found}
    mask = (torch.arange(16) < torch.randint(3, 17, (count, 1), generator=g)).long()
    return {"tokens": found, "attention_mask": mask}


def values(module):
    return {k: x.clone() for k, x in module.state_dict().items()}


def unchanged(module, before, kinds):
    now = module.state_dict()
    same = now.keys() == before.keys() and all(torch.equal(now[k], x) for k, x in before.items())
    return same and [type(m) for m in module.modules()] == kinds


def kinds(module):
    return [type(m) for m in module.modules()]


# ---- plan -----------------------------------------------------------------------------------------------------------------


def test_patterns_and_their_precedence():
    a = model()
    found = snn.plan(
        a,
        {
            r"re:blocks\.\d\.(query|key|value)": {"structure": "low_rank", "rank": 3},
            "key": {"structure": "low_rank", "rank": 4},  # later than the expression: not used for key
            "blocks.1.value": {"structure": "low_rank", "rank": 5},  # exact: wins
            "out": {"structure": "monarch", "blocks": 4},
            lambda module, name: name.endswith("0.query"): None,  # None: wins over all
        },
    )
    chosen = {e.name: (e.choice.label if e.choice else None) for e in found}
    assert chosen["blocks.0.query"] is None
    assert chosen["blocks.1.query"] == "low_rank(rank=3)"
    assert chosen["blocks.0.key"] == "low_rank(rank=3)"
    assert chosen["blocks.1.value"] == "low_rank(rank=5)"
    assert chosen["blocks.0.out"] == "monarch(blocks=4)"
    assert "blocks.0.up" not in chosen
    assert [e.name for e in found.skipped] == ["blocks.0.query"]
    entry = next(e for e in found if e.name == "blocks.1.value")
    assert (entry.params, entry.dense_params, entry.flops) == (5 * 48, 576, 10 * 48)
    text = str(found)
    assert "skipped: as asked" in text
    assert "matched by no pattern: blocks.0.up" in text
    assert f"{len(found.converted)} of {len(found)} layers" in text


def test_nothing_matched_is_an_error_and_an_unmatched_pattern_a_warning():
    with pytest.raises(ValueError, match=r"no linear layer matches; Model has blocks.0.query"):
        snn.plan(model(), {"quary": LOW}, budget=0.5)
    with pytest.warns(UserWarning, match="no linear layer matches 'quary'"):
        snn.plan(model(), {"quary": LOW, "query": LOW}, budget=0.5)
    with pytest.raises(ValueError, match="at least one pattern"):
        snn.plan(model(), {})


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        ({"structure": "low_rank", "budget": 1.5}, {}, ValueError, "fraction in"),
        ("low_rank", {"budget": 1.01}, ValueError, "fraction in"),
        (
            {"structure": "low_rank", "rank": 25},
            {},
            ValueError,
            r"fits none of 2 layers; blocks.0.query: rank: expected.* 24",
        ),
        (
            {"structure": "low_rank", "budget": 0.01},
            {},
            ValueError,
            "no LowRank of this shape has at most 5 parameters",
        ),
        ({"structure": "btt", "blocks": 2, "budget": 0.01}, {}, ValueError, "fits none"),
        ({"structure": "low_rang"}, {}, ValueError, "low_rang"),
        ({"rank": 3}, {}, ValueError, "needs a structure"),
        ({"structure": "low_rank", "blocks": 3}, {}, TypeError, "blocks: 'low_rank' has no such option"),
        (7, {}, TypeError, "int"),
        ("low_rank", {"tied": "both"}, ValueError, "tied"),
        ("low_rank", {"batch": 0}, ValueError, "batch"),
    ],
)
def test_a_config_that_cannot_be(config, options, error, message):
    with pytest.raises(error, match=message):
        snn.plan(model(), {"query": config}, **options)


def test_a_config_that_fits_some_layers():
    a = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 2))
    found = snn.plan(a, {"structure": "low_rank", "rank": 6})
    assert [e.skipped is None for e in found] == [True, False]
    assert "rank: expected" in found.entries[1].skipped


@pytest.mark.parametrize(
    "config",
    [
        {"structure": "low_rank"},
        {"structure": "low_rank", "interpolative": True},
        {"structure": "btt", "blocks": 4},
        {"structure": "monarch", "blocks": (4, 2), "interpolative": True},
        {"structure": "btt"},
        {"structure": "kronecker"},
        {"structure": sm.BlockDiagonal},
        {"structure": "pixelfly", "block": 6},
        {"structure": "butterfly", "radix": 4, "budget": None},
    ],
    ids=str,
)
@FREE
def test_what_is_planned_is_what_comes_out(config):
    config = {k: v for k, v in config.items() if v is not None or k != "budget"}
    free = config["structure"] == "butterfly"
    a = nn.Sequential(nn.Linear(48, 24), nn.Linear(24, 48, bias=False))
    found = snn.plan(a, config, budget=None if free else 0.5, min_speedup=0)
    snn.convert(a, found, threads=1)
    for entry, layer in zip(found, a, strict=True):
        assert entry.params <= 0.5 * entry.dense_params or free
        tried = config["structure"] in ("btt", "kronecker", sm.BlockDiagonal, "pixelfly") and "blocks" not in config
        if not tried:  # there a random matrix stands for the weight
            assert entry.params == sum(p.numel() for p in layer.factors)
            assert entry.flops == layer.flops()


def test_tied_weights():
    a = model()
    found = snn.plan(a, {"head": LOW, "query": LOW}, budget=0.5)
    assert [e.skipped for e in found if e.name == "head"] == ["tied to embed.weight"]
    with pytest.raises(ValueError, match=r"head: its weight is tied to embed\.weight"):
        snn.plan(a, {"head": LOW}, budget=0.5, tied="error")
    with pytest.raises(ValueError, match=r"no layer can be converted; head: tied"):
        snn.plan(a, {"head": LOW}, budget=0.5)
    before = a.embed.weight.clone()
    moments = {"head": sm.Moments.of(np.random.default_rng(0).standard_normal((500, 24)))}
    snn.convert(a, snn.plan(a, {"head": LOW}, budget=0.5, tied="untie"), moments)
    assert isinstance(a.head, snn.StructuredLinear)
    assert torch.equal(a.embed.weight, before)


@FREE
def test_a_module_in_two_places_is_converted_once():
    linear = nn.Linear(24, 24)
    a = nn.Sequential(linear, nn.ReLU(), linear)
    found = snn.plan(a, LOW, budget=0.5)
    assert [e.places for e in found] == [("0", "2")]
    assert "(also 2)" in str(found)
    snn.convert(a, found)
    assert a[0] is a[2]
    assert isinstance(a[0], snn.StructuredLinear)


@FREE
def test_the_model_itself():
    linear = nn.Linear(24, 24)
    made = snn.convert(linear, snn.plan(linear, LOW, budget=0.5))
    assert isinstance(made, snn.StructuredLinear)
    assert isinstance(snn.dequantize(made), nn.Linear)


class Own(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Sub(nn.Linear):
    pass


def test_layers_that_must_be_left_are_left_with_the_reason():
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    parts = {
        "own": Own(8, 8),
        "sub": Sub(8, 8),
        "hooked": hooked,
        "lazy": nn.LazyLinear(8),
        "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        "attention": nn.MultiheadAttention(8, 2),
    }
    found = snn.plan(nn.ModuleDict(parts), LOW, budget=0.5)
    why = {e.name: e.skipped for e in found}
    assert why["sub"] is None
    assert "forward of its own" in why["own"]
    assert "hooks" in why["hooked"]
    assert "lazy" in why["lazy"]
    assert "parametrised" in why["normed"]
    assert "never calls the layer" in why["attention.out_proj"]
    assert "fused attention, not converted: attention" in str(found)


def test_slow_layers_stay_dense_where_the_batch_is_known(monkeypatch):
    a = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 48))
    plan_module = sys.modules["structmat.nn.plan"]
    asked = []

    def measured(operator, batch, dtype, device):
        asked.append((operator.shape, batch, dtype))
        return 0.8 if operator.shape == (24, 24) else 1.3

    monkeypatch.setattr(plan_module, "measured_speed", measured)
    found = snn.plan(a, LOW, budget=0.5, batch=100)
    assert asked == [((24, 24), 100, torch.float32), ((48, 24), 100, torch.float32)]
    assert found.entries[0].skipped == "measured 0.80 times as fast as dense at 100 rows, expected 1"
    assert found.entries[1].skipped is None
    assert "measured on this machine, 100 rows" in str(found)
    assert len(snn.plan(a, LOW, budget=0.5, batch=100, min_speedup=0).converted) == 2
    assert len(snn.plan(a, LOW, budget=0.5).converted) == 2, "without a batch nothing is measured"


def test_speed_is_measured():
    found = snn.plan(
        nn.Linear(64, 64), {"structure": "low_rank", "rank": 4, "interpolative": True}, batch=32, min_speedup=0
    )
    assert 0.01 < found.entries[0].speed < 100


def test_more_flops_than_dense_are_refused():
    a = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    found = snn.plan(a, {"0": {"structure": "low_rank", "rank": 20}, "1": {"structure": "low_rank", "rank": 2}})
    assert "times the flops of dense" in found.entries[0].skipped


# ---- calibration ----------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_real_rows_and_shared():
    a = model()
    data = [tokens(4, 1, lengths=True), tokens(3, 2, lengths=True)]
    found = snn.calibrate(
        a, data, ["blocks.0.query", "blocks.0.key", "blocks.0.value", "blocks.1.query", "blocks.1.down"]
    )
    assert found.groups == (
        ("blocks.0.query", "blocks.0.key", "blocks.0.value"),
        ("blocks.1.query",),
        ("blocks.1.down",),
    )
    inputs = []
    hook = a.blocks[1].down.register_forward_pre_hook(lambda m, x: inputs.append(x[0]))
    with torch.no_grad():
        for batch in data:
            a(**batch)
    hook.remove()
    rows = torch.cat([x[b["attention_mask"] != 0] for x, b in zip(inputs, data, strict=True)]).double().numpy()
    moments = found["blocks.1.down"]
    assert moments.count == len(rows) == found.tokens
    np.testing.assert_allclose(moments.gram, rows.T @ rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.total, rows.sum(0), rtol=1e-5, atol=1e-5)
    exact = snn.calibrate(a, data, ["blocks.1.down"], dtype=torch.float64)["blocks.1.down"]
    np.testing.assert_allclose(exact.gram, rows.T @ rows, rtol=1e-12)
    unmasked = snn.calibrate(a, data, ["blocks.1.down"], mask=None)
    assert unmasked.tokens == 7 * 16


def test_moments_of_parts_add_up():
    a, names = model(), ["blocks.0.query", "blocks.0.key", "blocks.1.up"]
    data = [tokens(4, 1), tokens(4, 2)]
    both, one, two = (snn.calibrate(a, d, names, dtype=torch.float64) for d in (data, data[:1], data[1:]))
    for name in names:
        np.testing.assert_allclose((one + two)[name].gram, both[name].gram, rtol=1e-13)
    with pytest.raises(ValueError, match="other layers"):
        one + snn.calibrate(a, data, names[:1])


def test_batches_of_all_kinds_and_layouts():
    linear, x = nn.Linear(3, 2), torch.randn(4, 5, 3)
    mask = torch.tensor([[1, 1, 0, 0, 0]] * 4)
    count = {"tensor": ([x], None), "tuple": ([(x,)], None), "dict": ([{"input": x}], None)}
    for batches, how in count.values():
        assert snn.calibrate(linear, batches, [""], mask=how).tokens == 20
    for y in (x, x.transpose(0, 1), x.reshape(20, 3)):
        assert snn.calibrate(linear, [y], [""], mask=lambda _: mask).tokens == 8
    pooled = snn.calibrate(linear, [x[:, 0]], [""], mask=lambda _: mask)
    assert pooled.tokens == 4, "one row a text: all count"
    with pytest.raises(ValueError, match="does not fit the mask"):
        snn.calibrate(linear, [x], [""], mask=lambda _: torch.ones(3, 3))
    with pytest.raises(ValueError, match="every row of its inputs is masked"):
        snn.calibrate(linear, [x], [""], mask=lambda _: mask * 0)


def test_calibration_leaves_no_trace_whatever_happens():
    a = model().train()
    a.blocks[0].eval()
    modes = [m.training for m in a.modules()]
    with pytest.raises(TypeError):
        snn.calibrate(a, [{"nonsense": 1}], ["blocks.0.query"])
    b = copy.deepcopy(a)
    nn.init.constant_(b.embed.weight, float("nan"))
    with pytest.raises(ValueError, match=r"blocks\.0\.query: its inputs hold NaN"):
        snn.calibrate(b, [tokens()], ["blocks.0.query"])
    snn.calibrate(a, [tokens()], ["blocks.0.query"])
    assert [m.training for m in a.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in a.modules())


def test_calibration_names_what_is_missing():
    a = model()
    a.unused = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="unused: never ran on the 1 batches"):
        snn.calibrate(a, [tokens()], ["unused", "blocks.0.query"])
    with pytest.raises(KeyError, match="Model has no layer 'nowhere'"):
        snn.calibrate(a, [tokens()], ["nowhere"])
    with pytest.raises(ValueError, match="at least one batch"):
        snn.calibrate(a, [], ["blocks.0.query"])
    with pytest.raises(ValueError, match="at least one layer"):
        snn.calibrate(a, [tokens()], [])


REDUCE = """
import sys, numpy as np, torch, torch.distributed as dist, structmat.nn as snn
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()
x = torch.randn(30, 6, dtype=torch.float64)
mine = x[:10] if rank == 0 else x[10:]
found = snn.calibrate(model, [mine], ["0", "2"], dtype=torch.float64).reduce()
whole = snn.calibrate(model, [x], ["0", "2"], dtype=torch.float64)
for name in ("0", "2"):
    assert found[name].count == 30
    np.testing.assert_allclose(found[name].gram, whole[name].gram, rtol=1e-13)
    np.testing.assert_allclose(found[name].total, whole[name].total, rtol=1e-12, atol=1e-13)
dist.destroy_process_group()
"""


def test_moments_of_two_processes(tmp_path):
    with pytest.raises(RuntimeError, match="not initialised"):
        snn.calibrate(nn.Linear(2, 2), [torch.ones(3, 2)], [""]).reduce()
    code = textwrap.dedent(REDUCE)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(r), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True
        )
        for r in (0, 1)
    ]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err


# ---- conversion -----------------------------------------------------------------------------------------------------------


def calibrated(a, plan, count=40):
    return snn.calibrate(a, [tokens(count, 1), tokens(count, 2)], plan, dtype=torch.float64)


BLOCKS = {r"re:blocks.*": {"structure": "low_rank", "interpolative": True}}


def test_moments_keep_the_outputs_and_the_report_says_so():
    a, x = model(), tokens(20, 9)
    y = a(**x)
    plan = snn.plan(a, BLOCKS, budget=0.5)
    moments = calibrated(a, plan)
    held = snn.calibrate(a, [x], plan)
    weights = {e.name: a.get_submodule(e.name).weight.detach().double().numpy() for e in plan}
    aware = snn.convert(copy.deepcopy(a), plan, moments, held_out=held)
    with pytest.warns(UserWarning, match=r"12 layers to 50% of their parameters without calibration data"):
        free = snn.convert(copy.deepcopy(a), plan)
    assert (aware(**x) - y).norm() < 0.9 * (free(**x) - y).norm()
    report = snn.report(aware)
    assert len(report) == 12
    for line in report:
        layer, W = aware.get_submodule(line.name), weights[line.name]
        D = W - np.asarray(layer.to_dense().detach().double())
        m = moments[line.name]
        C = m.second_moment - np.outer(m.mean, m.mean)
        assert line.record.weight_error == pytest.approx(np.linalg.norm(D) / np.linalg.norm(W), rel=1e-9)
        expected = np.sqrt(np.vdot(D, D @ C) / np.vdot(W, W @ C))
        assert line.record.output_error == pytest.approx(expected, rel=1e-7)
        assert line.record.held_out_error > 0
        assert line.record.tokens == m.count
    assert report.output_error < report.weight_error
    assert "12 layers: weighted truncated SVD (optimal)" in str(report)
    assert snn.report(free).output_error is None
    assert [line for line in str(report).splitlines() if line.startswith("all")]


@FEW
def test_the_bias_makes_the_mean_output_exact_and_none_stays_none():
    torch.manual_seed(0)
    x = torch.randn(400, 24, dtype=torch.float64) + 3
    a = nn.Sequential(nn.Linear(24, 24, dtype=torch.float64))
    b = nn.Sequential(nn.Linear(24, 24, bias=False, dtype=torch.float64))
    for module in (a, b):
        expected = module(x).mean(0)
        plan = snn.plan(module, {"structure": "low_rank", "rank": 3})
        snn.convert(module, plan, snn.calibrate(module, [x], plan, dtype=torch.float64))
        if module is a:
            torch.testing.assert_close(module(x).mean(0), expected, rtol=0, atol=1e-10)
        else:
            assert module[0].bias is None


@FREE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_structured_already_is_recovered(dtype):
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(24, 32, dtype=dtype))
    with torch.no_grad():
        a[0].weight.copy_(torch.randn(32, 4, dtype=torch.double) @ torch.randn(4, 24, dtype=torch.double))
    dense, bias = a[0].weight.detach().clone(), a[0].bias.detach().clone()
    snn.convert(a, snn.plan(a, {"structure": "low_rank", "rank": 4}))
    assert {p.dtype for p in a.parameters()} == {dtype}
    scale = dense.double().norm()
    assert (a[0].to_dense().double() - dense.double()).norm() <= 8 * torch.finfo(dtype).eps * scale
    assert torch.equal(a[0].bias, bias)


@FREE
def test_mode_and_requires_grad_are_kept():
    a = model().train()
    a.blocks[0].eval()
    a.blocks[1].requires_grad_(False)
    snn.convert(a, snn.plan(a, BLOCKS, budget=0.5))
    assert not a.blocks[0].query.training
    assert a.blocks[1].query.training
    assert all(p.requires_grad for p in a.blocks[0].query.parameters())
    assert not any(p.requires_grad for p in a.blocks[1].query.parameters())


@FREE
@pytest.mark.parametrize("grad", [True, False])
def test_the_fused_path_of_the_encoder_layer_calls_the_structured_layers(grad):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 48, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 7, 24), torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = True
    plan = snn.plan(
        encoder, {"structure": "low_rank", "rank": 24}, min_speedup=0
    )  # full rank: the outputs must not change
    assert {e.name.split(".")[-1] for e in plan.skipped} == {"out_proj"}
    expected = encoder(x, src_key_padding_mask=padding)[~padding]
    snn.convert(encoder, plan)
    calls = []
    for module in encoder.modules():
        if isinstance(module, snn.StructuredLinear):
            module.register_forward_hook(lambda m, *_: calls.append(m))
    with torch.set_grad_enabled(grad):
        found = encoder(x, src_key_padding_mask=padding)[~padding]
    assert len(calls) == 4, "linear1 and linear2 of both layers, once each"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@FEW
def test_conv1d_of_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=1, n_head=2)
    torch.manual_seed(0)
    a = transformers.GPT2Model(config).eval()
    names = [e.name for e in snn.plan(a, {"structure": "low_rank", "rank": 2})]
    assert names == [f"h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    plan = snn.plan(a, {"structure": "low_rank", "rank": 24}, min_speedup=0)
    x = tokens()["tokens"]
    y = a(x).last_hidden_state
    moments = snn.calibrate(a, [x, tokens(seed=3)["tokens"]], plan)
    snn.convert(a, plan, moments)
    assert isinstance(a.h[0].mlp.c_fc, snn.StructuredLinear)
    torch.testing.assert_close(a(x).last_hidden_state, y, rtol=1e-4, atol=1e-4)
    snn.dequantize(a)
    assert type(a.h[0].mlp.c_fc).__name__ == "Conv1D"
    torch.testing.assert_close(a(x).last_hidden_state, y, rtol=1e-4, atol=1e-4)


def broken(monkeypatch, error):
    real = fitting.fit

    def fit(jobs):
        if jobs[0].name == "blocks.1.down":
            raise error
        return real(jobs)

    monkeypatch.setattr(conversion, "fit", fit)


@FREE
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), np.linalg.LinAlgError("no")], ids=repr)
@pytest.mark.parametrize("sequential", [False, True])
def test_an_error_or_interrupt_leaves_the_model_as_it_was(monkeypatch, error, sequential):
    a = model().train()
    before, types = values(a), kinds(a)
    plan = snn.plan(a, BLOCKS, budget=0.5)
    broken(monkeypatch, error)
    do, data = (snn.convert_sequentially, [tokens(40)]) if sequential else (snn.convert, None)
    with pytest.raises(type(error)):
        do(a, plan, data)
    assert unchanged(a, before, types)
    assert all(m.training for m in a.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in a.modules())


def bad_moments():
    good = sm.Moments.of(np.random.default_rng(0).standard_normal((600, 24)))
    narrow = sm.Moments(np.eye(7), np.zeros(7), 9)
    return {
        "none for a layer": ({}, ValueError, "moments: none for blocks.0.query"),
        "of another width": ({"blocks.0.query": narrow}, ValueError, "has 24 inputs, its moments are of 7"),
        "no moments": ({"blocks.0.query": np.eye(24)}, TypeError, "expected structmat.Moments, got ndarray"),
        "NaN": ({"blocks.0.query": sm.Moments(good.gram * np.nan, good.total, 600)}, ValueError, "blocks.0.query: .*NaN"),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_moments())
def test_bad_moments(name):
    moments, error, message = bad_moments()[name]
    a = model()
    before, types = values(a), kinds(a)
    with pytest.raises(error, match=message):
        snn.convert(a, snn.plan(a, {"blocks.0.query": LOW}, budget=0.5), moments)
    assert unchanged(a, before, types)


def test_indefinite_moments_are_lifted_and_that_is_said():
    x = np.random.default_rng(0).standard_normal((600, 24))
    good = sm.Moments.of(x)
    bad = sm.Moments(good.gram - 900 * np.eye(24), good.total, 600)
    a = model()
    snn.convert(a, snn.plan(a, {"blocks.0.query": LOW}, budget=0.5), {"blocks.0.query": bad})
    assert "indefinite moments, lowest eigenvalue" in str(snn.report(a))


def test_moments_of_few_samples_warn_and_are_damped_more():
    a = model()
    plan = snn.plan(a, {"blocks.0.query": LOW}, budget=0.5)
    few = sm.Moments.of(np.random.default_rng(0).standard_normal((30, 24)))
    with pytest.warns(UserWarning, match=r"blocks.0.query: 30 samples of 24 inputs"):
        snn.convert(a, plan, {"blocks.0.query": few})
    assert "damped by 0.1" in str(snn.report(a))


@FREE
def test_optimizers_plans_and_models_that_do_not_go_together():
    a = model()
    plan = snn.plan(a, BLOCKS, budget=0.5)
    before, types = values(a), kinds(a)
    with pytest.raises(ValueError, match="optimizer was built before the conversion and holds parameters of 12 layers"):
        snn.convert(a, plan, optimizer=torch.optim.SGD(a.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="threads"):
        snn.convert(a, plan, threads=0)
    with pytest.raises(ValueError, match=r"blocks\.0\.query: in the plan, not in the model"):
        snn.convert(nn.Linear(3, 3), plan)
    with pytest.raises(ValueError, match="the plan is for a linear layer"):
        snn.convert(model(n=32), plan)
    with pytest.raises(ValueError, match="meta device"):
        snn.convert(model().to("meta"), plan)
    assert unchanged(a, before, types)
    snn.convert(a, plan, optimizer=torch.optim.SGD(a.embed.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="converted already; make a new plan"):
        snn.convert(a, plan)
    with pytest.raises(ValueError, match="converted already; use densify"):
        snn.plan(a, BLOCKS, budget=0.5)
    with pytest.raises(ValueError, match="no structured layers"):
        snn.report(model())


BAD = {
    "a config that fits no layer": (
        lambda a: snn.plan(a, {"query": {"structure": "btt", "blocks": 2, "budget": 0.01}}),
        "fits none of 2 layers",
    ),
    "a rank above full": (lambda a: snn.plan(a, {"query": {"structure": "low_rank", "rank": 25}}), "rank: expected"),
    "a budget above 1": (lambda a: snn.plan(a, {"query": LOW}, budget=1.5), "fraction in"),
    "nothing to convert": (lambda a: snn.plan(a, {"nowhere": LOW}, budget=0.5), "no linear layer matches"),
    "an optimizer from before": (
        lambda a: snn.convert(a, snn.plan(a, BLOCKS, budget=0.5), optimizer=torch.optim.Adam(a.parameters())),
        "optimizer was built before",
    ),
    "an optimizer from before, sequential": (
        lambda a: snn.convert_sequentially(
            a, snn.plan(a, BLOCKS, budget=0.5), [tokens()], optimizer=torch.optim.Adam(a.parameters())
        ),
        "optimizer was built before",
    ),
    "a module converted already": (
        lambda a: snn.plan(converted_query(a), {"blocks.0.query": LOW}, budget=0.5),
        "converted already",
    ),
    "a plan from before": (
        lambda a: snn.convert(converted_query(a), snn.plan(model(), {"blocks.0.query": LOW}, budget=0.5)),
        "converted already",
    ),
    "a plan from before, sequential": (
        lambda a: snn.convert_sequentially(
            converted_query(a), snn.plan(model(), {"blocks.0.query": LOW}, budget=0.5), [tokens()]
        ),
        "converted already",
    ),
    "held-out moments of another width": (
        lambda a: snn.convert(
            a,
            snn.plan(a, {"blocks.0.query": LOW}, budget=0.5),
            snn.calibrate(a, [tokens(60)], ["blocks.0.query"]),
            held_out={"blocks.0.query": sm.Moments(np.eye(7), np.zeros(7), 9)},
        ),
        "held_out: blocks.0.query has 24 inputs",
    ),
    "moments that no damping makes positive": (
        lambda a: snn.convert(
            a,
            snn.plan(a, {"blocks.0.query": LOW}, budget=0.5),
            {"blocks.0.query": sm.Moments(np.zeros((24, 24)), np.zeros(24), 600)},
        ),
        "blocks.0.query: weight: expected a second moment that is not zero",
    ),
}


def converted_query(a):
    """The model with its first query structured, by hand: what the caller had before."""
    if isinstance(a.blocks[0].query, nn.Linear):
        torch.manual_seed(0)
        a.blocks[0].query = snn.StructuredLinear(24, 24, structure="low_rank", rank=2)
    return a


@FREE
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_the_model_is_as_it_was(name):
    do, message = BAD[name]
    a = model()
    if "already" in name or "a plan from before" in name:
        converted_query(a)
    before, types = values(a), kinds(a)
    with pytest.raises(ValueError, match=message):
        do(a)
    assert unchanged(a, before, types)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in a.modules())


def test_planning_needs_no_memory():
    with torch.device("meta"):
        a = Model(n=512)
    assert len(snn.plan(a, BLOCKS, budget=0.5, batch=64).converted) == 12


# ---- joint ----------------------------------------------------------------------------------------------------------------


def joined(a, interpolative, how="config"):
    config = {"structure": "low_rank", "interpolative": interpolative} | ({"joint": True} if how == "config" else {})
    plan = snn.plan(a, {r"re:blocks.*": config}, budget=0.5)
    if how == "sequential":
        return snn.convert_sequentially(a, plan, [tokens(60, 1), tokens(60, 2)], joint=True)
    return snn.convert(a, plan, calibrated(a, plan), joint=how == "argument")


@pytest.mark.parametrize("how", ["config", "argument", "sequential"])
@pytest.mark.parametrize("interpolative", [False, True])
def test_layers_with_one_input_share_their_right_factor(interpolative, how):
    a = joined(model(), interpolative, how)
    slot = 0 if interpolative else 1
    for block in a.blocks:
        parts = block.query, block.key, block.value
        assert parts[0].factors[slot] is parts[1].factors[slot] is parts[2].factors[slot]
        assert block.out.factors[slot] is not block.up.factors[slot]
    dense = sum(p.numel() for n, p in model().named_parameters() if n.startswith("blocks") and p.ndim == 2)
    stored = {id(f): f.numel() for m in a.modules() if isinstance(m, snn.StructuredLinear) for f in m.factors}
    report = snn.report(a)
    assert report.params == sum(stored.values()) <= 0.5 * dense
    assert "jointly with key, value" in str(report)
    b = copy.deepcopy(a)
    assert b.blocks[0].query.factors[slot] is b.blocks[0].value.factors[slot]
    optimizer = torch.optim.AdamW(snn.param_groups(a, lr=0.01))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(a.parameters()))


@FEW
@pytest.mark.parametrize("interpolative", [False, True])
def test_a_joint_projection_is_that_of_the_stacked_matrix(interpolative):
    a = model().double()
    x = torch.randn(90, 16, 24, dtype=torch.float64)
    block = a.blocks[0]
    weight = torch.cat([block.query.weight, block.key.weight, block.value.weight]).detach().numpy()
    mean = torch.cat([block.query(x), block.key(x), block.value(x)], -1).mean((0, 1))
    plan = snn.plan(
        block,
        {n: {"structure": "low_rank", "rank": 7, "interpolative": interpolative} for n in ("query", "key", "value")},
    )
    snn.convert(block, plan, snn.calibrate(block, [x], plan, dtype=torch.float64), damping=0.0, joint=True)
    rows = x.reshape(-1, 24).numpy()
    p = sm.project(weight, sm.LowRank, rank=7, activations=rows, mean=True)
    found = torch.cat([block.query.to_dense(), block.key.to_dense(), block.value.to_dense()]).detach().numpy()
    np.testing.assert_allclose(found, np.asarray(p.operator), atol=1e-8)
    now = torch.cat([block.query(x), block.key(x), block.value(x)], -1).mean((0, 1))
    torch.testing.assert_close(now, mean, rtol=0, atol=1e-9)


def test_joint_layers_are_nearer_at_the_same_budget():
    a, x = model(), tokens(20, 9)
    y = a(**x)
    plan = snn.plan(a, {r"re:.*(query|key|value)": {"structure": "low_rank"}}, budget=0.5)
    moments = calibrated(a, plan)
    apart = snn.convert(copy.deepcopy(a), plan, moments)
    joint = snn.convert(copy.deepcopy(a), plan, moments, joint=True)
    assert snn.report(joint).output_error < snn.report(apart).output_error
    assert (joint(**x) - y).norm() < (apart(**x) - y).norm()


@pytest.mark.parametrize("interpolative", [False, True])
def test_joint_layers_are_trained_and_multiplied_out(interpolative):
    a, x = joined(model(), interpolative), tokens(4, 9)
    optimizer = torch.optim.AdamW(snn.param_groups(a, lr=0.01))
    before = a.blocks[0].key.factors[0 if interpolative else 1].detach().clone()
    a(**x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(a.blocks[0].key.factors[0 if interpolative else 1], before)
    y = a(**x)
    linear = a.blocks[0].value.to_linear()
    torch.testing.assert_close(linear.weight, a.blocks[0].value.to_dense())
    snn.densify(a, optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in a.parameters()}
    torch.testing.assert_close(a(**x), y, rtol=1e-4, atol=1e-4)


def test_layers_that_differ_are_not_joined():
    a = model()
    a.blocks[0].key = nn.Linear(24, 24, bias=False)
    plan = snn.plan(
        a.blocks[0],
        {
            "query": LOW,
            "key": LOW,
            "value": {"structure": "low_rank", "interpolative": True},
            "out": {"structure": "btt", "blocks": 2},
        },
        budget=0.5,
    )
    x = torch.randn(90, 16, 24) + 1
    expected = a.blocks[0].key(x)
    moments = snn.calibrate(a.blocks[0], [x], plan)
    snn.convert(a.blocks[0], plan, moments, joint=True)
    block = a.blocks[0]
    assert block.query.factors[1] is block.key.factors[1]
    assert all(f is not block.query.factors[1] for f in block.value.factors)
    assert block.key.bias is None
    assert (block.key(x) - expected).norm() < expected.norm()


def test_joint_needs_to_know_the_inputs():
    a = model()
    before, types = values(a), kinds(a)
    plan = snn.plan(a, BLOCKS, budget=0.5)
    moments = calibrated(a, plan)
    with pytest.warns(UserWarning, match="without calibration data"), pytest.raises(ValueError, match="got NoneType"):
        snn.convert(a, plan, joint=True)
    with pytest.raises(ValueError, match=r"blocks\.0\.query is known from a calibration; .* got dict"):
        snn.convert(a, plan, dict(moments), joint=True)
    btt = snn.plan(a, {"query": {"structure": "btt", "blocks": 2}}, budget=0.5)
    with pytest.raises(ValueError, match="no layer of the plan is low-rank"):
        snn.convert(a, btt, snn.calibrate(a, [tokens(60)], btt), joint=True)
    for config, error, message in (
        ({"structure": "btt", "joint": True}, TypeError, "joint: 'btt' has no such option"),
        ({"structure": "low_rank", "joint": 1}, TypeError, "joint: expected True or False"),
        ({"structure": "low_rank", "joint": True, "transposed": True}, ValueError, "transposed"),
    ):
        with pytest.raises(error, match=message):
            snn.plan(a, {"query": config}, budget=0.5)
    assert unchanged(a, before, types)


class Projections(nn.Module):
    """Query, key and value of given heights on one input."""

    def __init__(self, *heights, n=64):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(n, m) for m in heights)

    def forward(self, x):
        return torch.cat((self.query(x), self.key(x), self.value(x)), -1)


def projected(heights, config, sequential=False, frozen=()):
    torch.manual_seed(0)
    a, x = Projections(*heights), torch.randn(700, 64) @ torch.randn(64, 64)
    for name in frozen:
        a.get_submodule(name).weight.requires_grad_(False)
    plan = snn.plan(a, {"structure": "low_rank", "joint": True} | config, min_speedup=0)
    if sequential:
        return snn.convert_sequentially(a, plan, [x])
    return snn.convert(a, plan, snn.calibrate(a, [x], plan))


def together(a):
    """Names of the layers that share a factor with another one."""
    holders = {}
    for name, layer in a.named_children():
        for factor in layer.factors:
            holders.setdefault(id(factor), []).append(name)
    return {name for names in holders.values() if len(names) > 1 for name in names}


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    ("heights", "config", "expected"),
    [
        ((64, 64, 64), {"budget": 0.5}, {"query", "key", "value"}),  # 24 of the 32 that dense flops allow
        ((64, 8, 8), {"budget": 0.5}, set()),  # rank 17 for all; 7 is what a key can bear
        ((64, 48, 8), {"budget": 0.5}, {"query", "key"}),  # the value leaves, the two others stay
        ((64, 64, 64), {"budget": 0.7}, set()),  # rank 33 of 32
        ((64, 64, 64), {"budget": 0.7, "interpolative": True}, {"query", "key", "value"}),
        ((64, 8, 8), {"budget": 0.5, "interpolative": True}, set()),
        ((64, 8, 8), {"tol": 0.3}, set()),  # known from the projection alone
        ((64, 8, 8), {"rank": 8}, {"query", "key", "value"}),  # would cost as much apart
    ],
)
def test_no_layer_is_made_dearer_than_dense_by_a_joint_rank(heights, config, expected, sequential):
    a = projected(heights, config, sequential)
    assert together(a) == expected
    lines = list(snn.report(a))
    assert [line.name for line in lines] == ["query", "key", "value"]
    if "rank" not in config:
        alone = {n for n, _ in a.named_children()} - expected
        assert all(x.flops <= 2 * x.shape[0] * x.shape[1] for x in lines if x.name in expected or "tol" not in config)
        assert all("jointly" not in x.record.method for x in lines if x.name in alone)
    if "budget" in config:
        assert snn.report(a).params <= config["budget"] * sum(heights) * 64


def test_layers_that_a_tolerance_takes_too_high_leave_the_others_together():
    a = projected((64, 64, 4), {"tol": 0.6})
    assert together(a) == {"query", "key"}
    assert a.query.operator.rank > 4
    apart = projected((64, 64, 4), {"tol": 0.6, "joint": False})
    assert torch.equal(a.value.to_dense(), apart.value.to_dense())


@pytest.mark.parametrize("interpolative", [False, True])
def test_the_plan_has_the_flops_of_the_joint_rank(interpolative):
    heights, config = (64, 48, 8), {"budget": 0.5, "interpolative": interpolative}
    a = projected(heights, config)
    plan = snn.plan(Projections(*heights), {"structure": "low_rank", "joint": True} | config)
    assert [e.flops for e in plan] == [line.flops for line in snn.report(a)]
    assert [e.joint_rank for e in plan] == [a.query.operator.rank, a.query.operator.rank, None]
    assert "joint: flops and speeds are those of the rank" in str(plan)
    apart = snn.plan(Projections(*heights), {"structure": "low_rank"} | config)
    assert [e.params for e in plan] == [e.params for e in apart]
    assert plan.entries[0].flops > apart.entries[0].flops
    assert {e.joint_rank for e in apart} == {None}


def test_layers_are_timed_at_the_joint_rank(monkeypatch):
    ranks = []
    timed = lambda operator, *_: ranks.append((operator.shape, operator.rank)) or 2.0  # noqa: E731
    monkeypatch.setattr(sys.modules["structmat.nn.plan"], "measured_speed", timed)
    for joint in (True, False):
        config = {"structure": "low_rank", "joint": joint, "budget": 0.5}
        assert len(snn.plan(Projections(64, 64, 8), config, batch=32).converted) == 3
    assert ranks == [((64, 64), 21), ((8, 64), 3), ((64, 64), 16), ((8, 64), 3)]


@pytest.mark.parametrize("frozen", [("query",), ("value",), ("query", "key", "value")])
def test_frozen_layers_are_not_joined_with_trained_ones(frozen):
    a = projected((64, 64, 64), {"budget": 0.5}, frozen=frozen)
    assert together(a) == ({"query", "key", "value"} - set(frozen) or set(frozen))
    for name, layer in a.named_children():
        assert {f.requires_grad for f in layer.factors} == {name not in frozen}
        assert layer.bias.requires_grad
        assert layer.weight.requires_grad == layer.to_linear().weight.requires_grad == (name not in frozen)
    snn.densify(a)
    assert {n: m.weight.requires_grad for n, m in a.named_children()} == {
        n: n not in frozen for n in ("query", "key", "value")
    }


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"device": "meta"}], ids=["dtype", "device"])
def test_layers_of_different_kinds_are_not_joined(change):
    a = Projections(64, 64, 64)
    plan = snn.plan(a, {"structure": "low_rank", "budget": 0.5})
    names = [["query", "key", "value"]]
    assert [[e.name for e in group] for group in grouped(plan.entries, names, a, True)] == names
    a.key.to(**change)
    found = grouped(plan.entries, names, a, True)
    assert [[e.name for e in group] for group in found] == [["query", "value"], ["key"]]


# ---- sequential -----------------------------------------------------------------------------------------------------------


def test_the_second_layer_compensates_the_first():
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 8)).double()
    x = torch.randn(500, 12, dtype=torch.float64)
    b = copy.deepcopy(a)
    plan = snn.plan(a, {"structure": "low_rank", "rank": 4}, min_speedup=0)
    snn.convert_sequentially(b, plan, [x[:200], x[200:]], blend=0.5, damping=1e-3, dtype=torch.float64)
    X = torch.tanh(a[0](x)).detach().numpy()
    Y = torch.tanh(b[0](x)).detach().numpy()
    W, bias = a[2].weight.detach().numpy(), a[2].bias.detach().numpy()
    Xc, Yc = X - X.mean(0), Y - Y.mean(0)
    ridge = 1e-3 * np.trace(Yc.T @ Yc) / 500 / 12 * np.eye(12)
    C = Yc.T @ Yc / 500 + ridge
    target = 0.5 * W + 0.5 * W @ (Xc.T @ Yc / 500 + ridge) @ np.linalg.inv(C)
    S = np.linalg.cholesky(C)
    u, s, vh = np.linalg.svd(target @ S)
    expected = (u[:, :4] * s[:4]) @ vh[:4] @ np.linalg.inv(S)
    np.testing.assert_allclose(b[2].to_dense().detach().numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(b[2].bias.detach().numpy(), bias + W @ X.mean(0) - expected @ Y.mean(0), atol=1e-10)


def test_block_after_block_is_the_same_as_the_whole_model_at_once():
    """The chain of blocks is an economy: with the blocks hidden from it the result must be the same."""
    a = model(blocks=3)
    data = [tokens(12, s, lengths=True) for s in (1, 2)]
    plan = snn.plan(a, BLOCKS, budget=0.5)
    chained = snn.convert_sequentially(copy.deepcopy(a), plan, data, dtype=torch.float64)
    hidden = copy.deepcopy(a)
    blocks = list(hidden.blocks)
    del hidden.blocks
    hidden.blocks = _Plain(blocks)
    whole = snn.convert_sequentially(hidden, plan, data, dtype=torch.float64)
    for name, parameter in chained.named_parameters():
        torch.testing.assert_close(whole.get_parameter(name), parameter, rtol=1e-3, atol=1e-4)


class _Plain(nn.Module):
    """A list of modules that is no ModuleList."""

    def __init__(self, modules):
        super().__init__()
        for i, module in enumerate(modules):
            self.add_module(str(i), module)

    def __iter__(self):
        return iter(self.children())


def test_sequential_conversion_is_nearer_in_a_deep_network():
    a, x = model(blocks=4), tokens(40, 9)
    y = a(**x)
    plan = snn.plan(a, BLOCKS, budget=0.5)
    data = [tokens(60, s) for s in (1, 2, 3)]
    plain = snn.convert(copy.deepcopy(a), plan, snn.calibrate(a, data, plan))
    sequential = snn.convert_sequentially(copy.deepcopy(a), plan, data)
    assert (sequential(**x) - y).norm() < (plain(**x) - y).norm()
    assert len(snn.report(sequential)) == 24


def test_sequential_conversion_refuses():
    a = model()
    plan = snn.plan(a, BLOCKS, budget=0.5)
    with pytest.raises(ValueError, match="blend"):
        snn.convert_sequentially(a, plan, [tokens()], blend=2)
    with pytest.raises(ValueError, match="at least one batch"):
        snn.convert_sequentially(a, plan, [])
    btt = snn.plan(a, {"query": {"structure": "btt", "blocks": 2}}, budget=0.5)
    with pytest.raises(ValueError, match="convert_sequentially: joint: no layer of the plan is low-rank"):
        snn.convert_sequentially(a, btt, [tokens(60)], joint=True)
    assert type(a.blocks[0].query) is nn.Linear
    linear = nn.Linear(24, 24)
    twice = nn.Sequential(linear, nn.ReLU(), linear)
    with pytest.raises(ValueError, match="ran 2 times on 1 batches"):
        snn.convert_sequentially(twice, snn.plan(twice, LOW, budget=0.5), [torch.randn(300, 24)])
    assert twice[0] is linear


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    a = model().train()
    before, types = values(a), kinds(a)
    plan = snn.plan(a, BLOCKS, budget=0.5)
    with pytest.raises(UserWarning, match="fewer than 5 samples"):
        snn.convert_sequentially(a, plan, [tokens(4)])
    assert unchanged(a, before, types)
    assert all(m.training for m in a.modules())
    a.blocks[0].eval()
    with pytest.warns(UserWarning, match="fewer than 5 samples"):
        snn.convert_sequentially(a, plan, [tokens(4)])
    assert not a.blocks[0].query.training
    assert a.blocks[1].query.training
