from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
import transformers
from hub_cases import assert_same, compressed, edit_config, edit_weights
from safetensors.torch import load_file
from tiny import causal_model
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from fasc_lightning.models import _quantizer as hub
from fasc_lightning.models import load_compressed
from fasc_lightning.models._config import FORMAT_VERSION, FascConfig


@pytest.fixture
def folder(tmp_path):
    """A saved tiny llama to tamper with."""
    compressed().save_pretrained(tmp_path)
    return tmp_path


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
    with pytest.raises(
        ValueError, match=r"unexpected: model\.layers\.0\.mlp\.up_proj.*; of another shape: .*up_proj\.weight"
    ):
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


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("size", [0, 30, -9])
def test_truncated_json(tmp_path, name, size):
    compressed().save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"{name} is not valid JSON.*truncated or damaged"):
        load_compressed(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} is not valid JSON"):
        load_compressed(tmp_path.parent, subfolder=tmp_path.name)


def test_an_index_that_names_a_file_that_is_not_there(tmp_path):
    compressed().save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], first: "elsewhere.safetensors"}}))
    with pytest.raises(OSError, match=r"elsewhere\.safetensors"):
        load_compressed(tmp_path)


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
def test_unknown_architecture(folder, names):
    edit_config(folder, lambda config: config.update(architectures=names))
    with pytest.raises(ValueError, match=r"to name a model class of transformers.*Give the class as model_class"):
        load_compressed(folder)
    assert_same(load_compressed(folder, transformers.LlamaForCausalLM), compressed())


def test_a_partial_load_is_refused_by_load_compressed(folder):
    with pytest.raises(ValueError, match=r"unexpected: lm_head\.weight.*model_class is not the class"):
        load_compressed(folder, AutoModel)


def test_no_such_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"config\.json"):
        load_compressed(tmp_path / "empty")
    with pytest.raises(OSError, match="nowhere"):
        load_compressed(tmp_path / "nowhere")


@pytest.mark.parametrize("local", [False, True])
def test_a_missing_folder_is_named_without_the_hub(tmp_path, monkeypatch, local):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", None)
    (tmp_path / "compressed").mkdir()
    (tmp_path / "model.txt").touch()
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "compresed", str(tmp_path / "compresed"), "./compresed", "compresed/", Path("compresed")):
        with pytest.raises(FileNotFoundError, match=r"is not a folder\. Did you mean 'compressed'\?") as raised:
            load_compressed(name, local_files_only=local)
        assert "a folder that save_compressed(model, folder) wrote, or its hub id" in str(raised.value)
        assert str(tmp_path / "compresed") in str(raised.value)
    for name in ("", "a/b/c", "model.txt"):
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            load_compressed(name, local_files_only=local)


def test_a_hub_id_that_does_not_exist_is_asked_for_once(monkeypatch):
    asked = []

    def model_info(self, name, **options):
        asked.append((name, options["revision"]))
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.raises(FileNotFoundError, match=r"'nope': there is no such folder, and the hub .* \(no route\)"):
        load_compressed("nope", revision="v1")
    assert asked == [("nope", "v1")]


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


def test_importing_twice(folder):
    before = AUTO_QUANTIZER_MAPPING["fasc"]
    importlib.reload(hub)
    assert AUTO_QUANTIZER_MAPPING["fasc"] is hub.FascQuantizer is not before
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["fasc"] is hub.FascConfig
    assert_same(AutoModelForCausalLM.from_pretrained(folder), compressed())
