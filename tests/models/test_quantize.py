from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hub_cases import assert_complete, assert_same, assert_same_state, logits
from safetensors.torch import load_file
from tiny import causal_model, causal_module, feature_loader, mlp, token_loader
from torch import nn
from transformers import AutoModelForCausalLM

from fasc_lightning import FascCallback, compress, load_compressed, quantize, save_compressed
from fasc_lightning.layers import compressed_layers, is_compressed, is_guard, quantization_of, swap_to_dense
from fasc_lightning.layers._int8 import Int8Linear, is_aligned
from fasc_lightning.layers._quantized_layers import DenseLinear
from fasc_lightning.models import attach_config
from fasc_lightning.models._config import FascConfig

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def compressed():
    """A compressed model of a family and its report, made once."""
    made = {}

    def get(family="llama", **options):
        key = (family, *sorted(options.items()))
        if key not in made:
            model = causal_model(family).eval()
            options = {"keep": 0.7, "refit": False, **options}
            made[key] = model, compress(model, list(token_loader(samples=16)), progress=False, **options)
        model, report = made[key]
        return copy.deepcopy(model), report

    return get


def test_loaded_int8_weights_lie_where_the_kernel_can_read_them(compressed, tmp_path):
    model, _ = compressed(layout="factors", quantize="int8")
    save_compressed(model.bfloat16(), tmp_path / "saved")
    loaded = load_compressed(tmp_path / "saved")
    weights = [module.weight for module in loaded.modules() if isinstance(module, Int8Linear)]
    assert len(weights) > 10
    assert all(map(is_aligned, weights))
    assert_same_state(model, loaded)


def tensor_bytes(model):
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


# As an option of a compression


@pytest.mark.parametrize("layout", ["pivot", "factors"])
def test_factors_become_int8_and_the_report_says_what_that_saves(compressed, layout):
    plain, before = compressed(layout=layout)
    model, report = compressed(layout=layout, quantize="int8")
    layers = compressed_layers(model)
    assert set(layers) == {layer.name for layer in report.layers}
    assert {quantization_of(layer) for layer in layers.values()} == {"int8"}
    difference = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < difference < 0.05

    assert report.options["quantize"] == "int8"
    assert report.kept == before.kept
    assert report.whole["compressed"].bytes == tensor_bytes(model)
    assert report.whole["unquantized"].bytes == before.whole["compressed"].bytes == tensor_bytes(plain)
    assert report.targeted["dense"] == before.targeted["dense"]
    for name in ("parameters", "flops_per_token"):
        assert getattr(report.targeted["compressed"], name) == getattr(before.targeted["compressed"], name)
    numbers = report.targeted["compressed"].parameters
    rows = sum(m.scale.numel() for m in model.modules() if isinstance(m, Int8Linear))
    index = sum(layer.extra_bytes for layer in layers.values())
    assert report.targeted["compressed"].bytes == numbers + 4 * rows + index
    assert sum(p.numel() for p in model.parameters()) == report.whole["compressed"].parameters
    assert set(report.to_dict()["targeted"]["bytes"]) == {"dense", "unquantized", "compressed"}
    assert "quantize" in report.seconds
    assert "in int8" in str(report)


def test_layers_that_stay_dense_become_int8_too(compressed):
    model, report = compressed(keep=1.0, quantize="int8")
    assert {layer.layout for layer in report.layers} == {"dense"}
    assert {type(layer) for layer in compressed_layers(model).values()} == {DenseLinear}
    assert report.kept == 1.0
    assert report.targeted["compressed"].bytes < 0.4 * report.targeted["dense"].bytes


def test_what_is_not_targeted_is_left_alone(compressed):
    model, _ = compressed(targets=r".*\.mlp\..*", quantize="int8")
    dense = causal_model().state_dict()
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in dense.items() if ".mlp." not in name)
    assert all(state[name].dtype == torch.int8 for name in state if ".mlp." in name and name.endswith(".weight"))


def test_refitted_factors_are_quantised_after_the_refit(compressed):
    batches = list(token_loader(samples=32))
    plain, model = causal_model().eval(), causal_model().eval()
    before = compress(plain, batches, keep=0.7, refit=True, progress=False)
    report = compress(model, batches, keep=0.7, refit=True, quantize="int8", progress=False)
    assert report.refit == before.refit
    quantize(plain)
    assert_same(model, plain)


def test_a_fit_ends_quantised_and_goes_on_with_what_trains(make_trainer):
    module = causal_module()
    trainer = make_trainer(FascCallback(keep=0.7, quantize="int8", targets=["up_proj", "down_proj"]))
    trainer.fit(module, token_loader(samples=16))
    int8 = {name: value.clone() for name, value in module.state_dict().items() if value.dtype == torch.int8}
    assert int8
    norm = module.model.model.norm.weight.detach().clone()
    make_trainer().fit(module, token_loader(samples=16))
    state = module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in int8.items())
    assert not torch.equal(module.model.model.norm.weight, norm)


def test_a_failure_after_the_quantisation_puts_the_dense_layers_back(make_trainer):
    class Failing(FascCallback):
        def _quantized(self, pl_module, report):
            super()._quantized(pl_module, report)
            assert {quantization_of(layer) for layer in compressed_layers(pl_module).values()} == {"int8"}
            raise OSError("disk full")

    module = causal_module()
    state = copy.deepcopy(module.state_dict())
    callback = Failing(keep=0.95, layout="factors", quantize="int8", update_weights=False)
    with pytest.raises(OSError, match="disk full"):
        make_trainer(callback).fit(module, token_loader(samples=16))
    assert not is_compressed(module)
    assert callback.report is None
    assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())
    assert not hasattr(module.model.config, "quantization_config")


def test_modules_that_are_not_of_transformers():
    module = mlp()
    report = compress(module, feature_loader(), keep=0.8, quantize="int8-dynamic", progress=False)
    assert {quantization_of(layer) for layer in compressed_layers(module).values()} == {"int8-dynamic"}
    assert report.targeted["compressed"].bytes < report.targeted["unquantized"].bytes
    assert torch.isfinite(module(torch.randn(4, 12))).all()


@pytest.mark.parametrize("value", ["int4", True, 8])
def test_unknown_kinds_are_refused_before_any_work(value):
    with pytest.raises(ValueError, match=r"quantize='int8' together with a rank|`quantize` to be one of 'int8'"):
        FascCallback(keep=0.5, quantize=value)
    with pytest.raises(ValueError, match=r"`quantize` to be one of|without calibration batches but got 'int4'"):
        quantize(causal_model(), value)


def test_monitoring_alone_does_not_round_inputs():
    with pytest.raises(ValueError, match=r"'int8-dynamic' together with `rank` or `keep`"):
        FascCallback(monitor_every_n_steps=5, quantize="int8-dynamic")


# On its own


def test_after_a_compression(compressed):
    model, _ = compressed(keep=0.9, layout="factors")
    names = quantize(model)
    assert_same(model, compressed(keep=0.9, layout="factors", quantize="int8")[0])
    assert names == list(compressed_layers(model))
    assert not any(isinstance(m, Int8Linear) for m in model.lm_head.modules())


def test_a_dense_model(tmp_path):
    model = causal_model("gpt2").eval()
    before = logits(model)
    quantize(model)
    assert {type(layer) for layer in compressed_layers(model).values()} == {DenseLinear}
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0.05)
    model.save_pretrained(tmp_path)
    assert_same(load_compressed(tmp_path), model)
    swap_to_dense(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in causal_model("gpt2").modules()]


def test_targets_and_exclude(compressed):
    model, _ = compressed()
    assert quantize(model, targets=["up_proj", "lm_head"], exclude=["layers.1.mlp.up_proj"]) == [UP, "lm_head"]
    assert quantization_of(model.lm_head) == "int8"
    kinds = {quantization_of(layer) for name, layer in compressed_layers(model).items() if name not in (UP, "lm_head")}
    assert kinds == {None}
    with pytest.raises(ValueError, match="matches none"):
        quantize(model, targets=["basis"])  # a part of a layer


def test_nothing_is_quantised_where_one_layer_cannot_be(compressed):
    model, _ = compressed()
    quantize(model, targets=[UP])
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"Layer '{UP}' cannot be quantised\. .* \('int8'\) already"):
        quantize(model)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="already carries the quantization_config of 'gptq'"):
        quantize(model, targets=["q_proj"])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_a_quantised_model_is_not_compressed_again(compressed):
    model, _ = compressed(keep=1.0, quantize="int8")
    with pytest.raises(Exception, match="holds compressed layers already"):
        compress(model, list(token_loader(samples=16)), keep=0.5, progress=False)


# Saved and reloaded


@pytest.mark.sampled(4)
@pytest.mark.parametrize("quantization", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("layout", ["pivot", "factors"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_round_trip(compressed, tmp_path, family, layout, quantization):
    model, report = compressed(family, layout=layout, quantize=quantization)
    model.save_pretrained(tmp_path)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert_complete(info)
    assert_same(reloaded, model)
    assert_same(load_compressed(tmp_path), model)
    assert repr(reloaded) == repr(model)
    assert reloaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    assert reloaded.config.quantization_config.provenance["options"]["quantize"] == quantization
    assert {p.requires_grad for p in reloaded.parameters() if p.dtype == torch.int8} == {False}
    assert tensor_bytes(reloaded) == report.whole["compressed"].bytes
    again = tmp_path / "again"
    reloaded.save_pretrained(again)
    assert_same(load_compressed(again), model)


def test_bytes_on_disk_are_those_in_memory(compressed, tmp_path):
    model, report = compressed(quantize="int8")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert {type(value) for value in weights.values()} == {torch.Tensor}
    stored = sum(value.numel() * value.element_size() for value in weights.values() if not is_guard(value))
    buffers = {name: b for name, b in model.named_buffers() if name not in model.state_dict()}
    assert stored == report.whole["compressed"].bytes - sum(b.numel() * b.element_size() for b in buffers.values())


def test_a_folder_with_its_card(compressed, tmp_path):
    model, report = compressed(keep=0.95, quantize="int8-dynamic")
    assert "dense" in {layer.layout for layer in compressed_layers(model).values()}
    save_compressed(model, tmp_path / "small", report=report)
    assert_same(load_compressed(tmp_path / "small"), model)
    assert "* quantised: int8-dynamic\n" in (tmp_path / "small" / "README.md").read_text()


def test_the_card_of_a_model_that_was_quantised_after_its_report(compressed, tmp_path):
    model, report = compressed(keep=0.7)
    quantize(model, "int8")
    save_compressed(model, tmp_path / "small", report=report)
    card = (tmp_path / "small" / "README.md").read_text()
    assert "* quantised: int8\n" in card
    row = next(line for line in card.splitlines() if line.startswith("| whole model, MB"))
    megabytes = [f"{size / 1e6:,.1f}" for size in (report.whole["dense"].bytes, tensor_bytes(model))]
    assert megabytes[0] in row
    kept = tensor_bytes(model) / report.whole["dense"].bytes
    assert f"{kept:.1%}" in row


@pytest.mark.parametrize("change", [swap_to_dense, quantize])
def test_offloaded_layers_are_refused(compressed, change):
    model, _ = compressed()
    layer = model.get_submodule(UP)
    layer.to("meta")
    kinds = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=rf"those of layer '{UP}' are offloaded"):
        change(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_a_reload_in_another_dtype(compressed, tmp_path):
    model, _ = compressed(quantize="int8")
    model.save_pretrained(tmp_path)
    half = load_compressed(tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in half.state_dict().values()} == {torch.bfloat16, torch.int8, torch.int32}
    model.to(torch.bfloat16)
    assert_same_state(half, model)
    # A conversion rounds the frequencies of rotary embeddings, too, and a load does not.
    torch.testing.assert_close(logits(half), logits(model), rtol=0.02, atol=0.01)


def test_shards_and_a_device_map(compressed, tmp_path):
    model, _ = compressed(quantize="int8")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(load_compressed(tmp_path, device_map="cpu"), model)


@pytest.mark.parametrize("by", ["dequantize", "swap_to_dense"])
def test_dense_again(compressed, tmp_path, by):
    model, _ = compressed("gpt2", quantize="int8")
    model.save_pretrained(tmp_path / "small")
    reloaded = load_compressed(tmp_path / "small")
    if by == "dequantize":
        reloaded.dequantize()
    else:
        swap_to_dense(reloaded)
        attach_config(reloaded)
    assert not is_compressed(reloaded)
    torch.testing.assert_close(logits(reloaded), logits(model))
    assert all(p.requires_grad for p in reloaded.parameters())
    reloaded.save_pretrained(tmp_path / "dense")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), reloaded)


def edit_config(folder, change):
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["layers"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda layers: layers[UP].pop("quantize"),
            r"Expected floats as 'model\.layers\.0\.mlp\.up_proj.* but got torch\.int8",
        ),
        (lambda layers: layers[UP].update(quantize="int4"), r'a quantised layer "quantize": "int8", "int8-dynamic" or'),
        (lambda layers: layers[UP].update(rank=1), r"of another shape: model\.layers\.0\.mlp\.up_proj"),
        (lambda layers: layers.pop(UP), r"of another shape: model\.layers\.0\.mlp\.up_proj\.weight"),
        (lambda layers: layers.update({UP: {"rank": 32, "layout": "dense", "bias": False}}), 'may then be "dense"'),
    ],
)
def test_edited_descriptions_are_refused(compressed, tmp_path, change, match):
    compressed(quantize="int8")[0].save_pretrained(tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(ValueError, match=match):
        load_compressed(tmp_path)


def test_the_configuration_holds_plain_types():
    layers = {"a.b": {"rank": 4, "layout": "dense", "bias": True, "quantize": "int8"}}
    assert json.loads(FascConfig(layers).to_json_string())["layers"] == layers


# With torchao


def test_torchao_quantises_the_factors_in_floating_point(compressed):
    """Its tensors in the factors' place: for kernels that it has and this package not. They cannot be saved."""
    import warnings

    model, _ = compressed(layout="factors", allocation="uniform")  # of rank 1 it (0.18) makes an error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra `quant`)")
        factors = {f"{name}.{child}" for name, layer in compressed_layers(model).items() for child in layer._modules}
        theirs = copy.deepcopy(model)
        torchao.quantize_(
            theirs, torchao.Int8WeightOnlyConfig(), lambda m, name: isinstance(m, nn.Linear) and name in factors
        )
        got = logits(theirs)
    torch.testing.assert_close(got, logits(model), rtol=0, atol=0.05)
    with pytest.raises(TypeError, match=r"layers as the factors of a compressed layer, found torchao\..*Int8Tensor"):
        swap_to_dense(theirs)
