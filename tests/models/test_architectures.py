"""Folders of architectures whose weights transformers renames, splits or merges between file and modules."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from architectures import compress_at_random, converts, model_classes, model_types, small_model
from hub_cases import assert_same_state, edit_weights
from safetensors.torch import load_file
from transformers import AutoModel, Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from fasc_lightning import load_compressed, save_compressed
from fasc_lightning.layers import compressed_layers, is_guard, swap_to_dense
from fasc_lightning.models import attach_config

#: A few of each kind: renamed, under another prefix, merged, split, several models, ties, strange initialisation.
SAMPLE = (
    "vit",
    "beit",
    "dinov2",
    "swin",
    "segformer",
    "llava",
    "clip_vision_model",
    "qwen2_vl",
    "mixtral",
    "qwen3_omni_moe_thinker",
    "mm-grounding-dino",
    "oneformer",
)

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about configurations made small


@torch.no_grad()
def outputs(model):
    # A copy, since products of weights that lie unaligned in a mapped file can differ in the last bit.
    model = copy.deepcopy(model)
    return model(pixel_values=PIXELS.to(model.dtype))[0]


def assert_refused_alone(load, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "fasc")
        patch.delitem(AUTO_QUANTIZER_MAPPING, "fasc")
        with pytest.raises(RuntimeError, match=r"ignore_mismatched_sizes|automatic conversion"):
            load(folder)


def check_folder(model, folder, monkeypatch):
    names = compress_at_random(model)
    assert names
    save_compressed(model, folder / "once")
    reloaded = load_compressed(folder / "once")
    assert_same_state(reloaded, model)
    again, info = type(model).from_pretrained(folder / "once", output_loading_info=True)
    assert not any(info.values())
    assert_same_state(again, model)
    assert compressed_layers(again).keys() == compressed_layers(model).keys()
    save_compressed(again, folder / "twice")
    assert_same_state(load_compressed(folder / "twice"), model)
    assert_refused_alone(type(model).from_pretrained, folder / "once", monkeypatch)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", SAMPLE)
def test_folders_of_some_architectures(kind, tmp_path, monkeypatch):
    model = small_model(model_classes(kind)[0], kind)
    assert converts(model) or kind in ("mm-grounding-dino", "oneformer")
    check_folder(model, tmp_path, monkeypatch)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", model_types())
def test_folders_of_every_architecture_that_converts(kind, tmp_path, monkeypatch):
    reasons = ["there is no class"]
    for model_class in model_classes(kind)[:2]:
        try:
            model = small_model(model_class, kind)
            assert converts(model), "nothing is converted"
            model.save_pretrained(tmp_path / "dense")
            model_class.from_pretrained(tmp_path / "dense")  # of some, transformers' own files do not load
        except Exception as error:  # whatever else keeps a small one from being made
            reasons.append(str(error))
        else:
            reasons.clear()
            check_folder(model, tmp_path / model_class.__name__, monkeypatch)
    if reasons:
        pytest.skip(reasons[-1])


@pytest.fixture
def vit():
    """A small ViT with a head, compressed."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**VIT, num_labels=5)).eval()
    compress_at_random(model)
    return model


@pytest.mark.parametrize("load", [load_compressed, ViTForImageClassification.from_pretrained])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_shards_and_types(vit, load, sharded, dtype, tmp_path):
    vit = vit.to(dtype)
    save_compressed(vit, tmp_path, max_shard_size="10KB" if sharded else None)
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    assert torch.equal(outputs(load(tmp_path)), outputs(vit))


def test_a_base_model_with_and_without_a_head(vit, tmp_path):
    save_compressed(vit, tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head", add_pooling_layer=False)
    assert_same_state(base, ViTModel.from_pretrained(tmp_path / "head", add_pooling_layer=False))
    assert_same_state(base, vit.vit)
    save_compressed(base, tmp_path / "base")
    assert_same_state(AutoModel.from_pretrained(tmp_path / "base", add_pooling_layer=False), base)
    head, info = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=5, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    assert_same_state(head.vit, base)


@pytest.mark.parametrize("load", [AutoModel.from_pretrained, ViTForImageClassification.from_pretrained])
def test_transformers_alone_fails_on_both(vit, load, tmp_path, monkeypatch):
    save_compressed(vit, tmp_path)
    assert_refused_alone(load, tmp_path, monkeypatch)


def test_files_hold_the_names_of_modules(vit, tmp_path):
    vit.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() - {key for key, value in saved.items() if is_guard(value)} == vit.state_dict().keys()
    assert {key.removesuffix(".weight") for key, value in saved.items() if is_guard(value)} == set(
        compressed_layers(vit)
    )
    vit.load_state_dict(saved)


@pytest.mark.parametrize("by", [swap_to_dense, lambda model: model.dequantize()])
@pytest.mark.parametrize("reload", [False, True])
def test_dense_again_the_names_are_those_of_dense_files(by, reload, tmp_path):
    dense = ViTForImageClassification(ViTConfig(**VIT, num_labels=5))
    dense.save_pretrained(tmp_path / "dense")
    names = load_file(tmp_path / "dense" / "model.safetensors").keys()
    model = ViTForImageClassification.from_pretrained(tmp_path / "dense")
    conversions = model._weight_conversions
    assert conversions
    compress_at_random(model)
    if reload:
        save_compressed(model, tmp_path / "small")
        model = load_compressed(tmp_path / "small")
    by(model)
    attach_config(model)
    if not reload:
        assert model._weight_conversions is conversions
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == names
    assert torch.equal(outputs(ViTForImageClassification.from_pretrained(tmp_path / "again")), outputs(model))


def test_folders_under_the_names_of_dense_files_are_read(vit, tmp_path):
    del vit._weight_conversions  # as folders were written before
    vit.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in saved
    reloaded = load_compressed(tmp_path)
    assert_same_state(reloaded, vit)
    reloaded.save_pretrained(tmp_path)
    assert "vit.layers.0.attention.q_proj.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_state(load_compressed(tmp_path), vit)


def test_a_key_mapping_is_followed(vit, tmp_path):
    save_compressed(vit, tmp_path)

    def rename(weights):
        for key in [key for key, value in weights.items() if key.startswith("classifier.") and not is_guard(value)]:
            weights[f"odd.{key.removeprefix('classifier.')}"] = weights.pop(key)

    edit_weights(tmp_path, rename)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["files"]  # the checksum of the file that was edited
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"classifier\."):
        load_compressed(tmp_path)
    assert_same_state(load_compressed(tmp_path, key_mapping={"^odd": "classifier"}), vit)


def test_merged_weights_of_which_one_is_compressed(tmp_path, monkeypatch):
    """SwiGLU layers of DINOv2 are one weight in files, split in two as it is read."""
    model = Dinov2Model(Dinov2Config(**VIT, use_swiglu_ffn=True)).eval()
    check_folder(model, tmp_path, monkeypatch)
    mlp = model.encoder.layer[0].mlp
    kinds = {name: type(getattr(mlp, name)).__name__ for name in ("gate_proj", "up_proj")}
    assert len(set(kinds.values())) == 2
    assert torch.equal(outputs(load_compressed(tmp_path / "once")), outputs(model))
