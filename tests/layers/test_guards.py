"""What becomes of a compressed folder where this package was not imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hub_cases import assert_complete, assert_same, compressed, edit_weights
from safetensors.torch import load_file
from tiny import FAMILIES
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from fasc_lightning import load_compressed
from fasc_lightning.layers import compressed_layers, guards, is_guard


@pytest.fixture
def without_the_package(monkeypatch):
    """transformers as it is before the import."""
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "fasc")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "fasc")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("without_the_package")
def test_transformers_alone_fails_instead_of_making_weights_up(tmp_path, family):
    model = compressed(family)
    model.save_pretrained(tmp_path)
    for load in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification, type(model)):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            load.from_pretrained(tmp_path)


@pytest.mark.usefixtures("without_the_package")
def test_it_fails_on_shards_too(tmp_path):
    compressed().save_pretrained(tmp_path, max_shard_size="20KB")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_process_without_the_import(tmp_path):
    compressed().save_pretrained(tmp_path)
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Unknown quantization type, got fasc" in result.stderr
    assert result.stderr.rstrip().splitlines()[-1].startswith("RuntimeError: You set `ignore_mismatched_sizes`")


def test_every_compressed_layer_has_one_and_the_model_none(tmp_path):
    model = compressed()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    found = {key for key, value in saved.items() if is_guard(value)}
    assert found == {f"{name}.weight" for name in compressed_layers(model)}
    assert saved.keys() - found == model.state_dict().keys()


def test_a_base_models_folder_and_classes(tmp_path):
    model = compressed("gpt2")
    model.save_pretrained(tmp_path / "head")
    base, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert info["unexpected_keys"] <= {"lm_head.weight"}
    base.save_pretrained(tmp_path / "base")
    again, info = AutoModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert_complete(info)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), base.state_dict().values(), strict=True))
    head, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert len(compressed_layers(head)) == len(compressed_layers(model))


def test_files_are_read_as_state_dicts_strictly(tmp_path):
    model, other = compressed(), compressed()
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    other.load_state_dict(saved)
    assert_same(other, model)
    assert any(map(is_guard, saved.values()))  # the caller's own is not touched
    saved["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*up_proj\.weight"):
        other.load_state_dict(saved)


def test_folders_without_guards_are_loaded(tmp_path):
    model = compressed()
    model.save_pretrained(tmp_path)

    def drop(weights):
        for key in [key for key, value in weights.items() if is_guard(value)]:
            del weights[key]

    edit_weights(tmp_path, drop)
    assert_same(load_compressed(tmp_path), model)


def test_a_dense_weight_in_a_guards_place_is_unexpected(tmp_path):
    compressed().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)}))
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.0\.mlp\.up_proj\.weight"):
        load_compressed(tmp_path)


def test_a_guard_is_told_from_a_weight():
    (guard,) = guards(["layer"]).values()
    assert is_guard(guard)
    assert not any(map(is_guard, [None, 1, torch.zeros(1), torch.zeros(2, dtype=torch.uint8), torch.zeros(3, 4)]))
