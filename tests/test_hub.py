from __future__ import annotations

import copy
import importlib
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import causal_model, causal_module, mlp, token_loader
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from fasc_lightning import compress, hub
from fasc_lightning.hub import FORMAT_VERSION, FascConfig, attach_config, load_compressed
from fasc_lightning.lowrank import PivotedLinear, make_lowrank
from fasc_lightning.swap import compressed_layers, swap_modules, to_dense

IDS = torch.arange(3, 17).reshape(2, 7)
FAMILIES = ("llama", "gpt2", "opt")


@pytest.fixture(scope="module")
def compressed():
    """A compressed model of a family, made once."""
    made = {}

    def get(family="llama", layout="auto", targets=None, **settings):
        key = (family, layout, str(targets), *sorted(settings.items()))
        if key not in made:
            model = causal_model(family, **settings).eval()
            batches = list(token_loader(samples=16))
            compress(model, batches, keep=0.7, layout=layout, targets=targets, progress=False)
            made[key] = model
        return copy.deepcopy(made[key])

    return get


@pytest.fixture
def folder(compressed, tmp_path):
    """A saved tiny llama to tamper with."""
    model = compressed()
    attach_config(model)
    model.save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def assert_same(reloaded, model):
    assert not reloaded.training
    assert torch.equal(logits(reloaded), logits(model))
    got, expected = reloaded.state_dict(), model.state_dict()
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        assert torch.equal(got[key], value)


def assert_complete(info):
    assert {key: value for key, value in info.items() if value} == {}


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize("layout", ["pivot", "factors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(compressed, tmp_path, family, layout):
    model = compressed(family, layout)
    attach_config(model, method="fasc", budget={"keep": 0.7}, targets=("a", "b"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert_complete(info)
    assert type(reloaded) is type(model)
    assert_same(reloaded, model)
    assert_same(load_compressed(tmp_path), model)
    kinds = {name: (type(layer), repr(layer)) for name, layer in compressed_layers(model).items()}
    assert {name: (type(layer), repr(layer)) for name, layer in compressed_layers(reloaded).items()} == kinds
    assert all(p.requires_grad and not p.is_meta for p in reloaded.parameters())
    config = reloaded.config.quantization_config
    assert config.provenance == {"method": "fasc", "budget": {"keep": 0.7}, "targets": ["a", "b"]}
    assert config.to_dict() == model.config.quantization_config.to_dict()


def test_both_sides_and_biases_are_covered(compressed):
    layers = [layer for family in FAMILIES for layer in compressed_layers(compressed(family)).values()]
    pivoted = [layer for layer in layers if isinstance(layer, PivotedLinear)]
    assert {(layer.side, layer.bias is not None) for layer in pivoted} >= {("out", True), ("in", True), ("in", False)}


def test_resave_of_a_reloaded_model(folder, compressed, tmp_path):
    model = compressed()
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(again)
    assert_same(load_compressed(again), model)
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_sharded_files(compressed, tmp_path):
    model = compressed()
    attach_config(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert_same(load_compressed(str(tmp_path)), model)
    shards[0].unlink()
    with pytest.raises(OSError, match=shards[0].name):
        load_compressed(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(compressed, tmp_path, family):
    model = compressed(family)
    attach_config(model)
    model.save_pretrained(tmp_path)
    half = load_compressed(tmp_path, dtype=torch.bfloat16)
    kinds = {tensor.dtype for tensor in half.state_dict().values()}
    assert kinds == {torch.bfloat16, torch.int32}
    assert_same(half, model.to(torch.bfloat16))
    # A folder saved in half precision is loaded in it.
    half.save_pretrained(tmp_path)
    assert_same(load_compressed(tmp_path), half)


def test_casts_of_a_reloaded_model(folder, compressed):
    model = load_compressed(folder)
    assert_same(model.bfloat16(), compressed().bfloat16())
    assert model.float().dtype == torch.float32
    assert model.half().dtype == torch.float16
    assert all(layer.permutation.dtype == torch.int32 for layer in compressed_layers(model).values())


def test_generate_and_train_after_reload(folder, compressed):
    model, reloaded = compressed(), load_compressed(folder)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(reloaded.generate(IDS, **options), model.generate(IDS, **options))
    reloaded.train()(input_ids=IDS, labels=IDS).loss.backward()
    layers = compressed_layers(reloaded)
    assert all(p.grad is not None for layer in layers.values() for p in layer.parameters())


def test_device_map(folder, compressed):
    pytest.importorskip("accelerate")
    assert_same(load_compressed(folder, device_map="auto"), compressed())


def test_tied_embeddings(compressed, tmp_path):
    model = compressed(tie_word_embeddings=True)
    attach_config(model)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    reloaded = load_compressed(tmp_path)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert_same(reloaded, model)


@pytest.mark.parametrize("tied", [True, False])
def test_compressed_output_embeddings(tmp_path, tied):
    model = causal_model(tie_word_embeddings=tied).eval()
    swap_modules(
        model, {name: make_truncated(model.get_submodule(name)) for name in ("lm_head", "model.layers.1.mlp.gate_proj")}
    )
    attach_config(model)
    model.save_pretrained(tmp_path / "head")
    reloaded = load_compressed(tmp_path / "head")
    assert_same(reloaded, model)
    # The embeddings, which were one tensor with it, are on their own now.
    assert torch.equal(reloaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    reloaded.save_pretrained(tmp_path / "again")
    assert_same(load_compressed(tmp_path / "again"), model)
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert set(load_compressed(tmp_path / "base").config.quantization_config.layers) == set(compressed_layers(base))


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_from_a_model_with_a_head(compressed, tmp_path, family):
    model = compressed(family)
    attach_config(model)
    model.save_pretrained(tmp_path / "head")
    base, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(key.startswith("lm_head") for key in info["unexpected_keys"])
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)
    # And the other way round: the base model's folder, by its own class and by one with a head.
    base.save_pretrained(tmp_path / "base")
    own = load_compressed(tmp_path / "base")
    assert type(own) is type(base)
    assert own.config.quantization_config.layers == base.config.quantization_config.layers
    assert set(own.config.quantization_config.layers) == set(compressed_layers(own))
    head, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] <= {"lm_head.weight"}
    with torch.no_grad():
        assert torch.equal(head.base_model(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)


def test_a_partial_load_is_refused_by_load_compressed(folder):
    with pytest.raises(ValueError, match=r"unexpected: lm_head\.weight.*model_class is not the class"):
        load_compressed(folder, AutoModel)


def test_bert_classifier(tmp_path):
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and min(m.weight.shape) > 3}
    swap_modules(model, {name: make_truncated(m) for name, m in linear.items()})
    attach_config(model)
    model.save_pretrained(tmp_path)
    reloaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert_complete(info)
    assert len(compressed_layers(reloaded)) == len(linear)
    assert_same(reloaded, model)
    assert_same(load_compressed(tmp_path), model)


def make_truncated(linear, rank=6, layout="auto"):
    """A low-rank layer from the first singular directions of a linear layer."""
    U, S, Vh = torch.linalg.svd(linear.weight.detach())
    return make_lowrank(U[:, :rank] * S[:rank], Vh[:rank], linear.bias, layout)


# Folders that are not what they should be.


def test_missing_weight(folder):
    edit_weights(folder, lambda weights: weights.pop("model.layers.0.mlp.up_proj.basis.weight"))
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.mlp\.up_proj\.basis\.weight.*edited or is incom"):
        load_compressed(folder)


def test_unexpected_weight(folder):
    edit_weights(folder, lambda weights: weights.update({"model.extra": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"unexpected: model\.extra"):
        load_compressed(folder)


def layer_spec(config, name="model.layers.1.self_attn.o_proj"):
    return config["quantization_config"]["layers"][name]


def test_changed_rank(folder):
    edit_config(folder, lambda config: layer_spec(config).update(rank=layer_spec(config)["rank"] - 1))
    with pytest.raises(ValueError, match=r"of another shape: model\.layers\.1\.self_attn\.o_proj\.\w+\.weight \("):
        load_compressed(folder)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("load", [load_compressed, AutoModelForCausalLM.from_pretrained])
def test_descriptions_that_do_not_fit(folder, load):
    original = (folder / "config.json").read_text()
    rank = json.loads(original)["quantization_config"]["layers"]["model.layers.1.self_attn.o_proj"]["rank"]

    def refused(change, match):
        (folder / "config.json").write_text(original)
        edit_config(folder, change)
        with pytest.raises(ValueError, match=match):
            load(folder)

    refused(
        lambda c: layer_spec(c).update(rank=33), r"o_proj' does not fit the model: Expected a rank between 1 and 32"
    )
    refused(lambda c: layer_spec(c).update(rank=str(rank)), r'Expected \{"rank": int.*o_proj')
    refused(lambda c: layer_spec(c).update(layout="svd"), r'Expected \{"rank": int.*o_proj')
    refused(lambda c: layer_spec(c).pop("side"), r'Expected \{"rank": int.*o_proj')
    refused(lambda c: c["quantization_config"].pop("layers"), "at least one compressed layer")
    for name, match in (
        ("model.layers.7.mlp.up_proj", r"that LlamaForCausalLM does not have: model\.layers\.7"),
        ("model.norm", r"'model\.norm' does not fit the model: Expected an nn\.Linear"),
    ):
        refused(lambda c, name=name: c["quantization_config"]["layers"].update({name: layer_spec(c)}), match)


def test_a_layer_left_out_of_the_description(folder):
    edit_config(folder, lambda config: config["quantization_config"]["layers"].pop("model.layers.0.mlp.up_proj"))
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.mlp\.up_proj\.weight; unexpected: model"):
        load_compressed(folder)


def test_another_layout_of_the_same_rank(folder):
    name = "model.layers.0.mlp.up_proj"
    spec = {"rank": 4, "layout": "factors", "bias": False}
    edit_config(folder, lambda config: config["quantization_config"]["layers"].update({name: spec}))
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.mlp\.up_proj\.factor_in\.weight"):
        load_compressed(folder)


@pytest.mark.parametrize("change", [lambda c: c.pop("quantization_config"), lambda c: c.update(quantization_config={})])
def test_dense_folder(folder, change):
    edit_config(folder, change)
    with pytest.raises(ValueError, match=r"Expected a folder with a compressed model.*quantization_config of 'fasc'"):
        load_compressed(folder)


@pytest.mark.parametrize("load", [load_compressed, AutoModelForCausalLM.from_pretrained])
def test_newer_format(folder, load):
    def newer(config):
        config["quantization_config"] = {"quant_method": "fasc", "format_version": FORMAT_VERSION + 1, "plan": []}

    edit_config(folder, newer)
    with pytest.raises(ValueError, match=f"format_version {FORMAT_VERSION} or older, got {FORMAT_VERSION + 1}.*newer"):
        load(folder)


def test_edited_permutation(folder):
    edit_weights(folder, lambda weights: weights["model.layers.0.mlp.up_proj.permutation"].fill_(10**6))
    with pytest.raises(ValueError, match=r"no permutation: model\.layers\.0\.mlp\.up_proj\.permutation"):
        load_compressed(folder)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"truncated or damaged"):
        load_compressed(folder)


def test_pickled_weights_are_not_read(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_compressed(folder)
    with pytest.raises(ValueError, match="no pickled weights"):
        load_compressed(folder, use_safetensors=False)


def test_options_that_would_hide_errors(folder):
    with pytest.raises(ValueError, match="not options of load_compressed"):
        load_compressed(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("names", [["NoSuchModel"], [], ["pipeline"], ["LlamaConfig"]])
def test_unknown_architecture(folder, compressed, names):
    edit_config(folder, lambda config: config.update(architectures=names))
    with pytest.raises(ValueError, match=r"to name a model class of transformers.*Give the class as model_class"):
        load_compressed(folder)
    assert_same(load_compressed(folder, transformers.LlamaForCausalLM), compressed())


def test_no_such_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"config\.json"):
        load_compressed(tmp_path / "empty")
    with pytest.raises(OSError, match="nowhere"):
        load_compressed(tmp_path / "nowhere")


# attach_config


def test_attach_config_finds_models_inside_modules():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = causal_module(), causal_model()

    pair = Pair()
    layer = pair.student.model.model.layers[0].mlp.up_proj
    swap_modules(pair, {"student.model.model.layers.0.mlp.up_proj": make_truncated(layer, layout="factors")})
    attach_config(pair, method="svd")
    assert pair.student.model.config.quantization_config.to_dict() == {
        "quant_method": "fasc",
        "format_version": 1,
        "layers": {"model.layers.0.mlp.up_proj": {"rank": 6, "layout": "factors", "bias": False}},
        "provenance": {"method": "svd"},
    }
    assert not hasattr(pair.teacher.config, "quantization_config")
    attach_config(pair)
    assert pair.student.model.config.quantization_config.provenance == {"method": "svd"}
    attach_config(mlp())


def test_attach_config_follows_the_model(compressed, tmp_path):
    model = compressed()
    attach_config(model)
    to_dense(model)
    attach_config(model)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_attach_config_refuses_a_second_quantiser(compressed):
    model = compressed()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="LlamaForCausalLM already carries the quantization_config of 'gptq'"):
        attach_config(model)
    assert model.config.quantization_config == {"quant_method": "gptq"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", ["dequantize", "to_dense"])
def test_dense_again(compressed, tmp_path, family, by):
    model = compressed(family)
    attach_config(model)
    model.save_pretrained(tmp_path / "small")
    reloaded = load_compressed(tmp_path / "small")
    if by == "dequantize":
        reloaded.dequantize()
    else:
        to_dense(reloaded)
        attach_config(reloaded)
    assert not compressed_layers(reloaded)
    torch.testing.assert_close(logits(reloaded), logits(model))
    assert [type(m) for m in reloaded.modules()] == [type(m) for m in causal_model(family).modules()]
    assert any(isinstance(m, Conv1D) for m in reloaded.modules()) == (family == "gpt2")
    reloaded.save_pretrained(tmp_path / "dense")
    dense, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert_complete(info)
    assert_same(dense, reloaded)
    with pytest.raises(ValueError, match="Expected a folder with a compressed model"):
        load_compressed(tmp_path / "dense")


def test_dequantize_keeps_or_sets_the_dtype(folder):
    assert load_compressed(folder).to(torch.float64).dequantize().dtype == torch.float64
    dense = load_compressed(folder).dequantize(dtype=torch.bfloat16)
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}


# The configuration and its registration


def test_config_takes_its_own_dict():
    layers = {"a.b": {"rank": 2, "layout": "pivot", "side": "in", "bias": True}}
    config = FascConfig(layers, method="fasc", provenance={"budget": 0.8})
    written = json.loads(config.to_json_string())
    assert written == config.to_dict()
    assert FascConfig(**written).to_dict() == written
    assert config.provenance == {"method": "fasc", "budget": 0.8}
    layers["a.b"]["rank"] = 3
    assert config.layers["a.b"]["rank"] == 2


def test_config_refuses_what_json_cannot_hold():
    layers = {"a": {"rank": 2, "layout": "factors", "bias": True}}
    with pytest.raises(TypeError, match="JSON"):
        FascConfig(layers, dtype=torch.float32)
    with pytest.raises(ValueError, match="JSON"):
        FascConfig(layers, rho=float("nan"))


@pytest.mark.parametrize("version", [0, "1", None, True])
def test_config_refuses_strange_versions(version):
    with pytest.raises(ValueError, match="format_version to be an integer"):
        FascConfig({}, format_version=version)


def test_a_dense_checkpoint_cannot_be_loaded_as_compressed(tmp_path):
    causal_model().save_pretrained(tmp_path)
    config = FascConfig({"model.layers.0.mlp.up_proj": {"rank": 2, "layout": "factors", "bias": False}})
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_importing_twice(folder, compressed):
    before = AUTO_QUANTIZER_MAPPING["fasc"]
    importlib.reload(hub)
    assert AUTO_QUANTIZER_MAPPING["fasc"] is hub.FascQuantizer is not before
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["fasc"] is hub.FascConfig
    assert_same(AutoModelForCausalLM.from_pretrained(folder), compressed())
