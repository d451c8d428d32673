from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from hub_cases import IDS, assert_complete, assert_same, compressed, logits, make_truncated
from safetensors.torch import load_file
from tiny import FAMILIES as ALL_FAMILIES
from tiny import aligned, causal_model, causal_module, mlp
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from fasc_lightning.layers import PivotedLinear, compressed_layers, swap_modules, swap_to_dense
from fasc_lightning.models import attach_config, load_compressed
from fasc_lightning.models._attach import provenance_of

FAMILIES = ("llama", "gpt2", "opt")


@pytest.fixture
def folder(tmp_path):
    """A saved tiny llama to tamper with."""
    compressed().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("layout", ["pivot", "factors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tmp_path, family, layout):
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


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_and_every_auto_class(tmp_path, family):
    model = compressed(family)
    model.save_pretrained(tmp_path / "causal")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "causal"), model)
    base = aligned(AutoModel.from_pretrained(tmp_path / "causal"))
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)
    # A classifier starts from the compressed layers with a new head, as it does from dense ones; then it is its own.
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "causal", num_labels=3, pad_token_id=0, output_loading_info=True
    )
    assert {key.rpartition(".")[0] for key in info["missing_keys"]} <= {"score"}
    assert len(compressed_layers(classifier)) == len(compressed_layers(model))
    classifier.save_pretrained(tmp_path / "classifier")
    for load in (AutoModelForSequenceClassification.from_pretrained, load_compressed):
        assert_same(load(tmp_path / "classifier"), classifier)


def test_a_saved_folder_holds_no_pickle_and_no_code(folder):
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("model_class", [None, AutoModelForCausalLM, transformers.LlamaForCausalLM])
def test_code_in_the_folder_is_not_run(folder, tmp_path, model_class):
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(load_compressed(folder, model_class), compressed())
    assert not ran.exists()


def test_importing_the_package_is_all_that_transformers_needs(folder):
    code = (
        "import sys, fasc_lightning\n"
        "assert 'transformers.modeling_utils' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True)
    assert result.stdout == "PivotedLinear\n"


def test_both_sides_and_biases_are_covered():
    layers = [layer for family in FAMILIES for layer in compressed_layers(compressed(family)).values()]
    pivoted = [layer for layer in layers if isinstance(layer, PivotedLinear)]
    assert {(layer.side, layer.bias is not None) for layer in pivoted} >= {("out", True), ("in", True), ("in", False)}


def test_resave_of_a_reloaded_model(folder, tmp_path):
    model = compressed()
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(again)
    assert_same(load_compressed(again), model)
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_sharded_files(tmp_path):
    model = compressed()
    attach_config(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert_same(load_compressed(str(tmp_path)), model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").exists()
    assert_same(load_compressed(tmp_path / "one"), model)
    shards[0].unlink()
    with pytest.raises(OSError, match=shards[0].name):
        load_compressed(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(tmp_path, family):
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


def test_casts_of_a_reloaded_model(folder):
    model = load_compressed(folder)
    assert_same(model.bfloat16(), compressed().bfloat16())
    assert model.float().dtype == torch.float32
    assert model.half().dtype == torch.float16
    assert all(layer.permutation.dtype == torch.int32 for layer in compressed_layers(model).values())


def test_generate_and_train_after_reload(folder):
    model, reloaded = compressed(), load_compressed(folder)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(reloaded.generate(IDS, **options), model.generate(IDS, **options))
    reloaded.train()(input_ids=IDS, labels=IDS).loss.backward()
    layers = compressed_layers(reloaded)
    assert all(p.grad is not None for layer in layers.values() for p in layer.parameters())


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(folder, device_map):
    pytest.importorskip("accelerate")
    assert_same(load_compressed(folder, device_map=device_map), compressed())
    assert_same(AutoModelForCausalLM.from_pretrained(folder, device_map=device_map), compressed())


@pytest.mark.filterwarnings("ignore:.*offloaded modules")
def test_offloaded_layers(folder, tmp_path):
    pytest.importorskip("accelerate")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    where |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load_compressed(folder, device_map=where, offload_folder=tmp_path / "offload")
    assert model.model.layers[0].mlp.up_proj.basis.weight.is_meta
    assert torch.equal(logits(model), logits(compressed()))
    model.save_pretrained(tmp_path / "again")
    assert_same(load_compressed(tmp_path / "again"), compressed())


def test_tied_embeddings(tmp_path):
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
def test_base_model_from_a_model_with_a_head(tmp_path, family):
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


def test_attach_config_follows_the_model(tmp_path):
    model = compressed()
    attach_config(model)
    swap_to_dense(model)
    attach_config(model)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_a_swap_that_is_undone_leaves_ties_and_configuration_as_they_were(tmp_path):
    model = causal_model(tie_word_embeddings=True).eval()
    ties = dict(model.all_tied_weights_keys)
    replaced = swap_modules(model, {"lm_head": make_truncated(model.lm_head)})
    attach_config(model)
    assert model.all_tied_weights_keys == {}
    swap_modules(model, replaced)
    attach_config(model)
    assert model.all_tied_weights_keys == ties
    assert model.config.tie_word_embeddings
    assert not hasattr(model, "hf_quantizer")
    model.save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_output_embeddings_that_were_compressed_are_not_tied_again(tmp_path):
    model = causal_model(tie_word_embeddings=True).eval()
    swap_modules(model, {"lm_head": make_truncated(model.lm_head)})
    attach_config(model)
    model.dequantize()
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_the_base_model_is_noted_by_name(tmp_path):
    causal_model().save_pretrained(tmp_path / "some-base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "some-base")
    name = "model.layers.0.mlp.up_proj"
    swap_modules(model, {name: make_truncated(model.get_submodule(name))})
    attach_config(model, method="svd")
    assert provenance_of(model) == {"base_model": "some-base", "method": "svd"}
    model.save_pretrained(tmp_path / "small")
    assert provenance_of(load_compressed(tmp_path / "small")) == provenance_of(model)
    assert provenance_of(causal_model()) == {}


def test_attach_config_refuses_a_second_quantiser():
    model = compressed()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="LlamaForCausalLM already carries the quantization_config of 'gptq'"):
        attach_config(model)
    assert model.config.quantization_config == {"quant_method": "gptq"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", ["dequantize", "swap_to_dense"])
def test_dense_again(tmp_path, family, by):
    model = compressed(family)
    attach_config(model)
    model.save_pretrained(tmp_path / "small")
    reloaded = load_compressed(tmp_path / "small")
    if by == "dequantize":
        reloaded.dequantize()
    else:
        swap_to_dense(reloaded)
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
