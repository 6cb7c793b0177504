"""LoRA by PEFT on top of structured layers: trained, saved, loaded, merged, taken off again."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import structmat as sm  # noqa: E402
import structmat.nn as snn  # noqa: E402

STRUCTURES = {
    "low_rank": {"rank": 3},
    "btt": {"blocks": 2},
    "monarch": {"blocks": 4},
    "kronecker": {},
    "butterfly": {},
}


class Net(torch.nn.Module):
    """Two structured layers and a dense head."""

    def __init__(self, structure="low_rank", **options):
        super().__init__()
        self.up = snn.StructuredLinear(12, 24, structure=structure, **options)
        self.down = snn.StructuredLinear(24, 12, bias=False, structure=structure, **options)
        self.head = torch.nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.down(torch.relu(self.up(x))))


def net(structure="low_rank"):
    torch.manual_seed(0)
    return Net(structure, **STRUCTURES[structure]).eval()


def config(**options):
    return snn.lora(peft.LoraConfig(target_modules=["up", "down"], r=2, lora_alpha=4, **options))


def trained(model, steps=3):
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().sum().backward()
        optimizer.step()
    return model


def test_peft_alone_refuses_structured_layers():
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(net(), peft.LoraConfig(target_modules=["up"], r=2))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_adapters_are_trained_and_merged(structure):
    base, x = net(structure), torch.randn(5, 12)
    y, before = base(x), {k: v.clone() for k, v in base.state_dict().items()}
    model = peft.get_peft_model(base, config())
    assert torch.equal(model(x), y), "an adapter starts at zero"
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 4
    assert all("lora_" in n for n in names)
    trained(model)
    adapted = model(x)
    assert not torch.allclose(adapted, y, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(x), y)
    model.merge_adapter()
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
    assert isinstance(model.base_model.model.up.get_base_layer(), snn.StructuredLinear)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-6)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), adapted, rtol=1e-4, atol=1e-5)
    assert type(merged.up) is snn.StructuredLinear
    assert merged.up.nparams < merged.up.in_features * merged.up.out_features or structure != "low_rank"
    if structure == "low_rank":
        assert isinstance(merged.up.operator, sm.LowRank)
        assert merged.up.operator.rank == 5
    assert all(torch.equal(v, before[k]) for k, v in merged.state_dict().items() if k.startswith("head"))


def test_unload_gives_the_layers_back():
    base, x = net(), torch.randn(5, 12)
    y = base(x)
    model = trained(peft.get_peft_model(base, config()))
    model.merge_adapter()
    model.unmerge_adapter()
    back = model.unload()
    assert torch.equal(back(x), y)
    assert type(back.up) is snn.StructuredLinear


def test_adapters_are_saved_and_loaded(tmp_path):
    base, x = net(), torch.randn(5, 12)
    model = trained(peft.get_peft_model(copy.deepcopy(base), config()))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path, config=snn.lora(peft.LoraConfig.from_pretrained(tmp_path))
    )
    torch.testing.assert_close(again.eval()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_of_the_adapter_and_other_dtypes(dtype):
    base, x = net().to(dtype), torch.randn(5, 12, dtype=dtype)
    model = peft.get_peft_model(base, snn.lora(peft.LoraConfig(target_modules=["up"], r=2, lora_bias=True)))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    y = model(x)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(model.merge_and_unload(safe_merge=True)(x), y, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:convert. .* without calibration data")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # read by peft
def test_on_a_pretrained_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    base = transformers.BertModel(transformers.BertConfig(vocab_size=40, max_position_embeddings=20, **sizes)).eval()
    snn.convert(base, snn.plan(base, {r"re:encoder.*": {"structure": "low_rank"}}, budget=0.5))
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, snn.lora(peft.LoraConfig(target_modules=["query", "value", "output.dense"], r=2)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.arange(12).reshape(2, 6)
    y = model(tokens).last_hidden_state
    model.save_pretrained(tmp_path / "adapter")
    fresh = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()
    config_again = snn.lora(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter", config=config_again).eval()
    torch.testing.assert_close(again(tokens).last_hidden_state, y)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(tokens).last_hidden_state, y, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    whole = transformers.AutoModel.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(whole(tokens).last_hidden_state, merged(tokens).last_hidden_state)


REFUSED = (
    ({"init_lora_weights": "pissa"}, "lora: expected init_lora_weights of True, .*'orthogonal' .* got 'pissa'"),
    ({"init_lora_weights": "olora"}, "lora: expected init_lora_weights of .* got 'olora'"),
    ({"use_dora": True}, "lora: use_dora needs a dense weight"),
)


def randomised(model):
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_orthogonal_adapters_need_no_dense_weight():
    model, x = peft.get_peft_model(net(), config(init_lora_weights="orthogonal")), torch.randn(5, 12)
    up = model.base_model.model.up
    first, last = up.lora_A["default"].weight, up.lora_B["default"].weight
    assert min(float(first.detach().norm()), float(last.detach().norm())) > 0.1
    torch.testing.assert_close(last @ first, torch.zeros(24, 12), rtol=0, atol=1e-6)
    y = trained(model)(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-4, atol=1e-5)


def test_variants_are_trained_and_never_merged():
    model, x = peft.get_peft_model(net(), config()), torch.randn(5, 12)
    model.add_adapter("activated", config(alora_invocation_tokens=[1], task_type="CAUSAL_LM"))
    randomised(model)
    before = model(x)
    with pytest.raises(NotImplementedError, match=r"lora: activated \(ALora.*cannot be merged"):
        model.base_model.merge_adapter(["default", "activated"])
    up = model.base_model.model.up
    assert not up.merged
    assert torch.equal(model(x), before)
    model.set_adapter("activated")
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_and_unload()


def test_a_merge_that_fails_late_merges_nothing():
    model, x = peft.get_peft_model(net(), config()), torch.randn(5, 12)
    model.add_adapter("broken", config())
    randomised(model)
    up = model.base_model.model.up
    base = up.get_base_layer()
    torch.nn.init.constant_(up.lora_B["broken"].weight, float("nan"))
    y = model(x)
    with pytest.raises(ValueError, match="NaNs detected"):
        up.merge(safe_merge=True, adapter_names=["default", "broken"])
    assert not up.merged
    assert up.get_base_layer() is base
    assert torch.equal(model(x), y)


def test_two_adapters_are_merged_and_taken_off_where_the_model_has_gone():
    base, x = net(), torch.randn(5, 12)
    y = base(x)
    model = peft.get_peft_model(base, config())
    model.add_adapter("two", config())
    randomised(model)
    model.base_model.set_adapter(["default", "two"])
    both = model(x)
    model.base_model.merge_adapter(["default", "two"])
    torch.testing.assert_close(model(x), both, rtol=1e-4, atol=1e-5)
    model.double().train()
    model.base_model.unmerge_adapter()
    up = model.base_model.model.up.get_base_layer()
    assert up.training
    assert {p.dtype for p in up.parameters()} == {torch.float64}
    torch.testing.assert_close(model(x.double()).float(), both, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(x.double()).float(), y, rtol=1e-5, atol=1e-6)


def test_refusals():
    with pytest.raises(TypeError, match=r"expected a peft\.LoraConfig, got dict"):
        snn.lora({})
    for options, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(net(), config(**options))
        model = peft.get_peft_model(net(), config())
        with pytest.raises(ValueError, match=message):
            model.add_adapter("other", config(**options))
        assert list(model.base_model.model.up.lora_A) == ["default"]
    with pytest.warns(UserWarning, match="has no bias"):
        model = peft.get_peft_model(net(), config(lora_bias=True))
    with pytest.raises(ValueError, match="without a bias"):
        model.merge_adapter()
    broken = peft.get_peft_model(net(), config())
    torch.nn.init.constant_(broken.base_model.model.up.lora_B["default"].weight, float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        broken.merge_adapter(safe_merge=True)
    assert not broken.base_model.model.up.merged
