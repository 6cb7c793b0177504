"""Saving models with structured layers: exact, strict, and through transformers in a process of its own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import structmat as sm

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

import structmat.nn as snn  # noqa: E402

OPERATORS = {
    "low_rank": lambda: sm.LowRank.random((12, 18), rank=3, rng=0),
    "interpolative": lambda: sm.Interpolative.random((12, 18), rank=3, rng=0),
    "interpolative columns": lambda: sm.Interpolative.random((12, 18), rank=3, side="columns", rng=0),
    "monarch": lambda: sm.Monarch.random((12, 18), blocks=3, rank=2, rng=0),
    "btt": lambda: sm.BlockTensorTrain.random((12, 18), blocks=(4, 3), rank=2, rng=0),
    "interpolative blocks": lambda: sm.InterpolativeBlocks.random((12, 18), blocks=3, rank=2, rng=0),
    "kronecker": lambda: sm.Kronecker.random((12, 18), rng=0),
    "butterfly": lambda: sm.Butterfly.random((12, 18), rng=0),
    "block_diagonal": lambda: sm.BlockDiagonal.random((12, 18), blocks=3, rng=0),
    "sum": lambda: sm.LowRank.random((12, 18), rank=2, rng=0) + sm.BlockDiagonal.random((12, 18), blocks=3, rng=1),
}


class Net(torch.nn.Module):
    """Three linear layers, two of which share a weight."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(18, 12)
        self.second = torch.nn.Linear(12, 12, bias=False)
        self.tied = torch.nn.Linear(12, 12, bias=False)
        self.tied.weight = self.second.weight

    def forward(self, x):
        return self.tied(torch.relu(self.second(torch.relu(self.first(x)))))


def structured(operator=None):
    torch.manual_seed(0)
    model = Net()
    operator = OPERATORS["low_rank"]() if operator is None else operator
    model.first = snn.StructuredLinear.from_operator(operator, torch.randn(12), dtype=torch.float32)
    return model


def values(model):
    return {k: x.clone() for k, x in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], x) for k, x in before.items())


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_loaded_is_bit_equal(name, tmp_path):
    model, x = structured(OPERATORS[name]()), torch.randn(7, 18)
    snn.save(model, tmp_path / "m.safetensors")
    torch.manual_seed(1)
    fresh = Net()
    assert snn.load(fresh, tmp_path / "m.safetensors") is fresh
    assert torch.equal(fresh(x), model(x))
    assert fresh.first.config == model.first.config
    assert fresh.tied.weight is fresh.second.weight, "tied weights stay tied"
    fresh(x).sum().backward()
    assert all(p.grad is not None for p in fresh.first.parameters())


def test_load_into_a_model_that_has_the_structure_and_into_one_without_memory(tmp_path):
    model, x = structured(), torch.randn(3, 18)
    snn.save(model, tmp_path / "m.safetensors")
    again = structured()
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    assert torch.equal(snn.load(again, tmp_path / "m.safetensors")(x), model(x))
    with torch.device("meta"):
        empty = Net()
    assert torch.equal(snn.load(empty, tmp_path / "m.safetensors")(x), model(x))


def test_the_dtype_of_the_model_wins_and_its_mode(tmp_path):
    snn.save(structured(), tmp_path / "m.safetensors")
    fresh = snn.load(Net().to(torch.bfloat16).eval(), tmp_path / "m.safetensors")
    assert {p.dtype for p in fresh.parameters()} == {torch.bfloat16}
    assert not fresh.first.training


def test_a_module_in_two_places_and_the_whole_model(tmp_path):
    linear = torch.nn.Linear(18, 18)
    shared = torch.nn.Sequential(linear, torch.nn.ReLU(), linear)
    layer = snn.StructuredLinear(18, 18, structure="low_rank", rank=2)
    snn.save(torch.nn.Sequential(layer, torch.nn.ReLU(), layer), tmp_path / "m.safetensors")
    loaded = snn.load(shared, tmp_path / "m.safetensors")
    assert loaded[0] is loaded[2]
    snn.save(layer, tmp_path / "one.safetensors")
    root = snn.load(torch.nn.Linear(18, 18), tmp_path / "one.safetensors")
    x = torch.randn(2, 18)
    assert torch.equal(root(x), layer(x))


def test_a_file_holds_plain_tensors_and_no_pickle(tmp_path):
    model = structured()
    snn.save(model, tmp_path / "m.safetensors")
    found = safetensors.load_file(tmp_path / "m.safetensors")
    assert set(found) == set(model.state_dict()) - {"tied.weight"}
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        about = json.loads(file.metadata()["structmat"])
    assert about["aliases"] == {"tied.weight": "second.weight"}
    assert about["layers"]["first"]["config"]["structure"] == "low_rank"
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"], "nothing is left beside it"


def rewritten(path, tensors=None, metadata=None, **about):
    """The file with other tensors or metadata, its checksum kept."""
    with safetensors.safe_open(path, "pt") as file:
        old = file.metadata()
    found = safetensors.load_file(path) if tensors is None else tensors
    old["structmat"] = json.dumps(json.loads(old["structmat"]) | about)
    safetensors.save_file(found, path, old if metadata is None else metadata)


def damage_bits(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


def drop(path):
    tensors = safetensors.load_file(path)
    del tensors["first.factors.1"]
    from structmat.files import checksum

    rewritten(path, tensors, checksum=checksum(tensors))


def add(path):
    tensors = safetensors.load_file(path) | {"third.weight": torch.zeros(2, 2)}
    from structmat.files import checksum

    rewritten(path, tensors, checksum=checksum(tensors))


def move(path):
    with safetensors.safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()["structmat"])["layers"]
    rewritten(path, layers={"elsewhere": layers["first"]})


DAMAGE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-40]), "damaged"),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:100]), "damaged"),
    "no safetensors": (lambda p: p.write_bytes(b"PK\x03\x04" * 40), "damaged or no safetensors"),
    "a bit": (damage_bits, "checksum"),
    "foreign": (lambda p: safetensors.save_file({"weight": torch.zeros(2)}, p), "not of structmat.nn.save"),
    "later version": (lambda p: rewritten(p, version=99), "version 99"),
    "no JSON": (lambda p: rewritten(p, metadata={"structmat": "{"}), "cannot be read"),
    "missing": (drop, "1 missing: first.factors.1"),
    "unexpected": (add, "1 unexpected: third.weight"),
    "another layer": (move, "no layer 'elsewhere'"),
    "no description": (lambda p: rewritten(p, layers={"first": {"config": {"version": 1}}}), "first"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_does_not_fit_is_refused_and_the_model_is_as_it_was(name, tmp_path):
    harm, message = DAMAGE[name]
    path = tmp_path / "m.safetensors"
    snn.save(structured(), path)
    harm(path)
    model = Net()
    before, modules = values(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        snn.load(model, path)
    assert same(model, before)
    assert [type(m) for m in model.modules()] == modules


def test_other_refusals(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="no file"):
        snn.load(Net(), path)
    snn.save(structured(), path)
    wide = Net()
    wide.first = torch.nn.Linear(20, 12)
    with pytest.raises(ValueError, match=r"first: the file has shape \(12, 18\), the model \(12, 20\)"):
        snn.load(wide, path)
    more = structured()
    more.second = snn.StructuredLinear(12, 12, bias=False)
    with pytest.raises(ValueError, match="second: structured in the model, dense in the file"):
        snn.load(more, path)
    with pytest.raises(ValueError, match="meta device"):
        snn.save(Net().to("meta"), path)
    assert torch.isfinite(snn.load(Net(), path)(torch.ones(18))).all(), "a failed save leaves the old file"


@pytest.mark.parametrize("other", ["meta", "half meta", "memory"])
def test_tied_parameters_stay_tied_wherever_they_are(other, tmp_path):
    model, x = structured(), torch.randn(3, 18)
    model.register_buffer("steps", torch.tensor([3.0]))
    model.register_buffer("again", model.steps)
    snn.save(model, tmp_path / "m.safetensors")
    fresh = Net().requires_grad_(False)
    fresh.register_buffer("steps", torch.zeros(1))
    fresh.register_buffer("again", fresh.steps)
    if other == "meta":
        fresh.to("meta")
        fresh.tied.weight, fresh.again = fresh.second.weight, fresh.steps
    elif other == "half meta":
        fresh.second.to("meta")
        fresh.tied.weight = fresh.second.weight
        fresh.first.double()
        fresh.steps.data = fresh.steps.double()
    steps = fresh.steps
    snn.load(fresh, tmp_path / "m.safetensors")
    assert fresh.tied.weight is fresh.second.weight
    assert fresh.again is fresh.steps
    assert fresh.steps.item() == 3.0
    assert not any(p.requires_grad for p in fresh.parameters())
    if other == "half meta":
        assert fresh.first.factors[0].dtype == torch.float64
        assert fresh.steps is steps, "what has memory is written to"
        assert fresh.steps.dtype == torch.float64
        assert fresh.second.weight.dtype == torch.float32
    else:
        assert torch.equal(fresh(x), model(x))


def test_what_the_model_does_not_tie_has_memory_of_its_own(tmp_path):
    snn.save(structured(), tmp_path / "m.safetensors")
    fresh = Net().to("meta")
    fresh.tied = torch.nn.Linear(12, 12, bias=False, device="meta")
    snn.load(fresh, tmp_path / "m.safetensors")
    assert fresh.tied.weight is not fresh.second.weight
    with torch.no_grad():
        fresh.tied.weight.zero_()
    assert fresh.second.weight.abs().sum() > 0


def test_frozen_layers_stay_frozen(tmp_path):
    snn.save(structured(), tmp_path / "m.safetensors")
    fresh = Net()
    fresh.first.weight.requires_grad_(False)
    snn.load(fresh, tmp_path / "m.safetensors")
    flags = {name: p.requires_grad for name, p in fresh.first.named_parameters()}
    assert flags == {"bias": True, "factors.0": False, "factors.1": False}
    again = structured()
    again.first.factors[1].requires_grad_(False)
    snn.load(again, tmp_path / "m.safetensors")
    flags = {name: p.requires_grad for name, p in again.first.named_parameters()}
    assert flags == {"bias": True, "factors.0": True, "factors.1": False}
    snn.save(joined(), tmp_path / "joined.safetensors")
    for frozen in ("query", "key"):
        pair = dense_pair()
        pair[frozen].requires_grad_(False)
        snn.load(pair, tmp_path / "joined.safetensors")
        assert pair["key"].factors[1].requires_grad, "one of the two is trained"
        assert not pair[frozen].factors[0].requires_grad


class Extra(torch.nn.Linear):
    """A layer with a state that is no tensor."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def test_a_state_that_is_no_tensor_is_named(tmp_path):
    path = tmp_path / "m.safetensors"
    model = torch.nn.Sequential(snn.StructuredLinear(18, 18), Extra(18, 2))
    with pytest.raises(TypeError, match=r"save: expected tensors alone in the state dict, got 1\._extra_state: dict"):
        snn.save(model, path)
    assert not path.exists()
    snn.save(torch.nn.Sequential(snn.StructuredLinear(18, 18), torch.nn.Linear(18, 2)), path)
    with pytest.raises(TypeError, match=r"load: .* got 1\._extra_state: dict"):
        snn.load(model, path)


@pytest.mark.filterwarnings("ignore:convert. .* without calibration data")
@pytest.mark.parametrize("structure", [None, {"structure": "low_rank", "rank": 2}])
def test_a_file_of_an_unfused_model_says_what_to_do(structure, tmp_path):
    def encoder():
        torch.manual_seed(0)
        return torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()

    model, x = snn.unfuse_attention(encoder()), torch.randn(2, 5, 16)
    if structure:
        snn.convert(model, snn.plan(model, {r"re:.*(query|value)": structure}, min_speedup=0))
    snn.save(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="call unfuse_attention first"):
        snn.load(encoder(), tmp_path / "m.safetensors")
    assert torch.equal(snn.load(snn.unfuse_attention(encoder()), tmp_path / "m.safetensors")(x), model(x))
    snn.save(torch.nn.Linear(3, 3), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="missing") as error:
        snn.load(encoder(), tmp_path / "m.safetensors")
    assert "unfuse_attention" not in str(error.value)


def test_an_input_without_axes_is_refused_with_its_shape():
    with pytest.raises(ValueError, match=r"expected an input of shape \(\.\.\., 18\), got \(\)"):
        structured().first(torch.tensor(1.0))


def joined():
    """Two layers with one right factor, as a joint projection makes them."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(18, 12) for name in ("query", "key")})
    for name in model:
        model[name] = snn.StructuredLinear.from_operator(OPERATORS["low_rank"](), torch.randn(12), dtype=torch.float32)
    model["key"].factors[1] = model["query"].factors[1]
    return model


def dense_pair():
    return torch.nn.ModuleDict({name: torch.nn.Linear(18, 12) for name in ("query", "key")})


@pytest.mark.parametrize("place", ["cpu", "meta", "structured"])
def test_a_shared_factor_is_stored_once_and_is_one_parameter_again(place, tmp_path):
    model, x = joined(), torch.randn(3, 18)
    snn.save(model, tmp_path / "m.safetensors")
    assert "key.factors.1" not in safetensors.load_file(tmp_path / "m.safetensors")
    fresh = joined() if place == "structured" else dense_pair().to(place)
    snn.load(fresh, tmp_path / "m.safetensors")
    assert fresh["key"].factors[1] is fresh["query"].factors[1]
    assert len(list(fresh.parameters())) == 5
    assert all(torch.equal(fresh[name](x), model[name](x)) for name in model)


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ({"1": ["nowhere", 1]}, "shares factor 1 with"),
        ({"7": ["query", 1]}, "shares factor 7 with"),
        ({"0": ["query", 1]}, "is said to be"),
        ({"x": 3}, "shares factor x with"),
    ],
)
def test_a_shared_factor_that_is_not_there_is_refused(shared, message, tmp_path):
    path = tmp_path / "m.safetensors"
    snn.save(joined(), path)
    with safetensors.safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()["structmat"])["layers"]
    layers["key"]["shared"] = shared
    rewritten(path, layers=layers)
    model = dense_pair()
    before = values(model)
    with pytest.raises(ValueError, match=message):
        snn.load(model, path)
    assert same(model, before)


# ---- transformers -----------------------------------------------------------------------------------------------------------


TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**TINY)).eval()


def converted(**config):
    model = bert()
    config = config or {"structure": "low_rank", "interpolative": True}
    with pytest.warns(UserWarning, match="without calibration data"):
        return snn.convert(model, snn.plan(model, {r"re:encoder.*": config}, budget=0.5))


def outputs(model):
    with torch.no_grad():
        return model(torch.arange(12).reshape(2, 6)).last_hidden_state


NEW = """
import sys
{imports}
import torch
from transformers import AutoModel
model, info = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True)
found = [len(info[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")]
with torch.no_grad():
    torch.save((found, model.eval()(torch.arange(12).reshape(2, 6)).last_hidden_state), sys.argv[2])
"""


def in_a_new_process(folder, out, imports):
    code = NEW.format(imports=imports)
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), str(out)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("imports", ["import structmat.nn", "import transformers.quantizers.auto, structmat.nn"])
def test_from_pretrained_in_a_new_process_is_bit_equal(imports, tmp_path):
    model = converted()
    model.save_pretrained(tmp_path / "m")
    done = in_a_new_process(tmp_path / "m", tmp_path / "out.pt", imports)
    assert done.returncode == 0, done.stderr
    found, y = torch.load(tmp_path / "out.pt")
    assert found == [0, 0, 0]
    assert torch.equal(y, outputs(model))
    assert "trust_remote_code" not in (tmp_path / "m" / "config.json").read_text()


def test_a_process_that_does_not_know_structmat_fails_loudly(tmp_path):
    converted().save_pretrained(tmp_path / "m")
    done = in_a_new_process(tmp_path / "m", tmp_path / "out.pt", "")
    assert done.returncode != 0
    assert "mismatch" in done.stderr.lower()
    assert "structmat" in done.stderr, "the log says what is missing"


def test_reload_save_again_dequantize(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = converted(structure="btt", blocks=2)
    model.save_pretrained(tmp_path / "a")
    again = transformers.AutoModel.from_pretrained(tmp_path / "a").eval()
    again.save_pretrained(tmp_path / "b")
    third = transformers.AutoModel.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(outputs(third), outputs(model))
    dense = third.dequantize()
    assert not any(isinstance(m, snn.StructuredLinear) for m in dense.modules())
    assert torch.allclose(outputs(dense), outputs(model), atol=1e-5)
    dense.save_pretrained(tmp_path / "c")
    assert "quantization_config" not in json.loads((tmp_path / "c" / "config.json").read_text())
    plain = transformers.AutoModel.from_pretrained(tmp_path / "c").eval()
    assert torch.equal(outputs(plain), outputs(dense))


def test_pretrained_in_half_precision_and_a_config_that_does_not_fit(tmp_path):
    transformers = pytest.importorskip("transformers")
    converted().save_pretrained(tmp_path / "m")
    half = transformers.AutoModel.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    path = Path(tmp_path / "m" / "config.json")
    config = json.loads(path.read_text())
    layers = config["quantization_config"]["layers"]
    layers["encoder.layer.7.output.dense"] = next(iter(layers.values()))
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no layer 'encoder.layer.7.output.dense'"):
        transformers.AutoModel.from_pretrained(tmp_path / "m")


def test_the_body_of_a_saved_model_and_a_model_around_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = converted()
    model.save_pretrained(tmp_path / "body")
    options = {"output_loading_info": True}
    whole, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", **options)
    assert torch.equal(outputs(whole.eval().bert), outputs(model))
    assert info["unexpected_keys"] == set()
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    whole.save_pretrained(tmp_path / "whole")
    body, info = transformers.AutoModel.from_pretrained(tmp_path / "whole", **options)
    assert torch.equal(outputs(body.eval()), outputs(model))
    assert info["missing_keys"] == set()


@pytest.mark.filterwarnings("ignore:convert")
def test_pretrained_models_inside_others_are_told_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    head = transformers.BertForSequenceClassification(transformers.BertConfig(**TINY)).eval()
    outer = torch.nn.ModuleDict({"inner": head})
    snn.convert(outer, snn.plan(outer, {r"re:.*encoder.*": {"structure": "low_rank"}}, budget=0.5))
    for model, kind in ((head, "AutoModelForSequenceClassification"), (head.bert, "AutoModel")):
        model.save_pretrained(tmp_path / kind)
        found, info = getattr(transformers, kind).from_pretrained(tmp_path / kind, output_loading_info=True)
        assert info["missing_keys"] == info["unexpected_keys"] == set()
        body = getattr(found.eval(), "bert", found)
        assert torch.equal(outputs(body), outputs(head.bert))
    snn.dequantize(outer)
    assert not hasattr(head, "hf_quantizer")
    assert not hasattr(head.bert, "hf_quantizer")
    assert getattr(head.config, "quantization_config", None) is None


@pytest.mark.parametrize("interpolative", [False, True])
def test_shared_factors_of_a_pretrained_model(interpolative, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, slot = bert(), 0 if interpolative else 1
    config = {"structure": "low_rank", "interpolative": interpolative, "joint": True}
    plan = snn.plan(model, {r"re:encoder.*": config}, budget=0.5)
    snn.convert(model, plan, snn.calibrate(model, [torch.randint(40, (64, 16))], plan))
    count = sum(p.numel() for p in model.parameters())

    def right(found):
        attention = found.encoder.layer[1].attention.self
        shared = attention.query.factors[slot] is attention.key.factors[slot] is attention.value.factors[slot]
        return shared and sum(p.numel() for p in found.parameters()) == count

    assert right(model)
    model.save_pretrained(tmp_path / "a")
    again, info = transformers.AutoModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values())
    assert right(again)
    assert torch.equal(outputs(again.eval()), outputs(model))
    again.save_pretrained(tmp_path / "b")
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "b").eval()
    assert right(whole.bert)
    assert torch.equal(outputs(whole.bert), outputs(model))
    done = in_a_new_process(tmp_path / "b", tmp_path / "out.pt", "import structmat.nn")
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt")[1], outputs(model))
    dense = again.dequantize()
    assert not getattr(dense, "all_tied_weights_keys", None)
    dense.save_pretrained(tmp_path / "c")
    plain, info = transformers.AutoModel.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not any(info.values())
    assert torch.allclose(outputs(plain.eval()), outputs(model), atol=1e-5)


def test_snn_save_and_load_of_a_pretrained_model(tmp_path):
    model = converted()
    snn.save(model, tmp_path / "m.safetensors")
    fresh = snn.load(bert(), tmp_path / "m.safetensors")
    assert torch.equal(outputs(fresh), outputs(model))
    fresh.save_pretrained(tmp_path / "m")
    assert "structmat" in (tmp_path / "m" / "config.json").read_text()
    assert np.isfinite(outputs(copy.deepcopy(fresh)).numpy()).all()
