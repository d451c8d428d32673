from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import causal_model, causal_module, feature_loader, mlp, token_loader
from torch import nn
from watching import assert_untouched, state

from fasc_lightning import CompressionReport, FascCallback, apply_plan, compress, compression_plan, load_compressed
from fasc_lightning.layers import (
    LowRankLinear,
    PivotedLinear,
    compressed_layers,
    is_compressed,
    quantization_of,
    swap_modules,
    swap_to_dense,
)

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def compressed(layout="auto", family="llama", **options):
    model = causal_model(family)
    report = compress(model, list(token_loader()), keep=0.6, layout=layout, progress=False, refit=False, **options)
    return model.eval(), report


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.sampled(4)
@pytest.mark.parametrize("quantize", [None, "int8", "int8-dynamic"])
@pytest.mark.parametrize("layout", ["pivot", "factors"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plan_and_a_plain_state_dict_make_the_compressed_model_again(tmp_path, layout, family, quantize):
    model, report = compressed(layout, family, quantize=quantize)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    for plan in (compression_plan(model), report.plan):
        fresh = causal_model(family)
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.zero_()
        replaced = apply_plan(fresh, json.loads(json.dumps(plan)), load_file(tmp_path / "model.safetensors"))
        assert torch.equal(logits(fresh), logits(model))
        assert compression_plan(fresh) == compression_plan(model)
        assert set(replaced) == set(plan)
        assert all(p.requires_grad == p.is_floating_point() for p in fresh.parameters())


def test_the_weights_file_of_a_saved_folder_serves_too(tmp_path):
    model, report = compressed()
    model.save_pretrained(tmp_path)
    fresh = causal_model()
    apply_plan(fresh, report.plan, load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("quantize", ["int8", "int8-dynamic"])
def test_without_weights_a_quantised_plan_rounds_the_nearest_layers(quantize):
    model, report = compressed(quantize=quantize)
    expected = logits(model)
    swap_to_dense(model)
    apply_plan(model, report.plan)
    layers = compressed_layers(model)
    assert {name: quantization_of(layer) for name, layer in layers.items()} == dict.fromkeys(report.plan, quantize)
    torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.02)


def test_a_planned_model_takes_weights_afterwards_too():
    model, report = compressed()
    fresh = causal_model()
    apply_plan(fresh, report.plan)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize(("layout", "family"), [("pivot", "llama"), ("factors", "gpt2")])
def test_without_weights_low_rank_layers_are_found_again(layout, family):
    model, report = compressed(layout, family)
    expected = logits(model)
    swap_to_dense(model)
    assert not is_compressed(model)
    apply_plan(model, report.plan)
    assert compression_plan(model).keys() == report.plan.keys()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_without_weights_each_layer_is_the_nearest_of_its_rank():
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 9, bias=False))
    dense = [layer.weight.detach().double() for layer in model]
    bias = model[0].bias.detach().clone()
    apply_plan(model, {"0": {"rank": 3, "layout": "factors"}, "1": {"rank": 2, "layout": "pivot", "side": "out"}})
    for layer, weight, k in zip(model, dense, (3, 2), strict=True):
        lost = (layer.to_weight().double() - weight).norm()
        torch.testing.assert_close(lost, torch.linalg.svdvals(weight)[k:].norm(), rtol=1e-5, atol=1e-6)
    assert torch.equal(model[0].bias, bias)
    assert (type(model[0]), model[0].rank) == (LowRankLinear, 3)
    assert (type(model[1]), model[1].rank, model[1].side) == (PivotedLinear, 2, "out")  # not the smaller side


def test_types_devices_and_flags_are_those_of_the_dense_layers():
    model, _ = compressed()
    target = causal_model().to(torch.bfloat16)
    target.model.layers[0].requires_grad_(False)
    apply_plan(target, compression_plan(model), model.state_dict())
    for name, layer in compressed_layers(target).items():
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
        assert {p.requires_grad for p in layer.parameters()} == {".layers.0." not in name}
        for key, value in layer.state_dict().items():
            expected = model.get_submodule(name).state_dict()[key]
            assert torch.equal(value, expected.to(value.dtype))
    with torch.device("meta"):
        empty = causal_model()
    apply_plan(empty, compression_plan(model))
    empty.load_state_dict(model.state_dict(), assign=True)
    assert not any(p.is_meta for p in empty.parameters())


def test_a_planned_model_is_saved_and_loaded_as_any_compressed_one(tmp_path):
    model, report = compressed()
    fresh = causal_model()
    apply_plan(fresh, report.plan, model.state_dict())
    fresh.save_pretrained(tmp_path)
    assert torch.equal(logits(load_compressed(tmp_path)), logits(model))


def test_what_was_replaced_undoes_it():
    model = causal_model()
    before = state(model)
    replaced = apply_plan(model, {"model.layers.0.mlp.up_proj": {"rank": 4, "layout": "pivot"}})
    assert is_compressed(model)
    swap_modules(model, replaced)
    assert_untouched(model, before)


def test_a_dense_model_has_no_plan_and_layers_that_are_as_planned_stay():
    assert compression_plan(causal_model()) == {}
    model, report = compressed()
    before = state(model)
    assert apply_plan(model, report.plan) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


MISFITS = {
    "another model": ({"layers.0.q_proj": {"rank": 2, "layout": "pivot"}}, "names some that are not there"),
    "no linear layer": ({"model.norm": {"rank": 2, "layout": "pivot"}}, "linear"),
    "too high a rank": ({"model.layers.0.mlp.up_proj": {"rank": 99, "layout": "factors"}}, "rank between 1 and 32"),
    "no rank": ({"model.layers.0.mlp.up_proj": {"layout": "factors"}}, "up_proj"),
    "an unknown layout": ({"model.layers.0.mlp.up_proj": {"rank": 2, "layout": "tucker"}}, "tucker"),
    "another bias": ({"model.layers.0.mlp.up_proj": {"rank": 2, "layout": "pivot", "bias": True}}, "bias=False"),
    "no mapping": ([("model.layers.0.mlp.up_proj", 2)], r"Expected a plan as \{"),
    "no descriptions": ({"model.layers.0.mlp.up_proj": 2}, r"Expected a plan as \{"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_plan_that_does_not_fit_changes_nothing(case):
    plan, message = MISFITS[case]
    model = causal_model()
    before = state(model)
    fitting = {"model.layers.1.mlp.up_proj": {"rank": 4, "layout": "pivot"}}
    with pytest.raises(ValueError, match=message):
        apply_plan(model, {**fitting, **plan} if isinstance(plan, dict) else plan)
    assert_untouched(model, before)
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("edit", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_change_nothing(edit):
    model, report = compressed()
    weights = model.state_dict()
    name = "model.layers.1.mlp.up_proj.basis.weight"
    if edit == "missing":
        del weights[name]
    elif edit == "unexpected":
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32)
    else:
        weights[name] = weights[name][:-1]
    fresh = causal_model()
    before = state(fresh)
    words = {"missing": "missing: ", "unexpected": "unexpected: ", "shape": "of another shape: "}
    with pytest.raises(ValueError, match=words[edit] + r"model\.layers\.1\.mlp\.up_proj"):
        apply_plan(fresh, report.plan, weights)
    assert_untouched(fresh, before)
    assert not hasattr(fresh.config, "quantization_config")


def test_a_model_on_the_meta_device_takes_the_weights_over():
    small = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6))
    plan = {"0": {"rank": 2, "layout": "pivot"}}
    apply_plan(small, plan)
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6))
    apply_plan(fresh, plan, small.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), small(x))
    assert all(p.requires_grad for p in fresh.parameters())


def test_a_layer_that_is_compressed_otherwise_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    apply_plan(model, {"0": {"rank": 2, "layout": "factors"}})
    with pytest.raises(ValueError, match=r"'0' is compressed, as .*'rank': 2.* and not as .*'rank': 3.*to_dense"):
        apply_plan(model, {"0": {"rank": 3, "layout": "factors"}})


def test_the_plan_of_any_module_is_that_of_its_report(make_trainer):
    module = mlp()
    callback = FascCallback(keep=0.6)
    make_trainer(callback).fit(module, feature_loader())
    assert callback.report.plan.keys() == compression_plan(module).keys()
    fresh = mlp()
    apply_plan(fresh, callback.report.plan, module.state_dict())
    x = torch.randn(5, 12)
    assert torch.equal(fresh.eval()(x), module.eval()(x))


def test_a_report_is_made_again_of_its_json(make_trainer, tmp_path):
    callback = FascCallback(keep=0.6)
    make_trainer(callback).fit(causal_module(), token_loader())
    callback.report.to_json(tmp_path / "report.json")
    again = CompressionReport.from_dict(json.loads((tmp_path / "report.json").read_text()))
    assert again.to_dict() == callback.report.to_dict()
    assert str(again) == str(callback.report)
    assert again.plan == callback.report.plan
