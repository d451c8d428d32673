"""Weights of compressed layers that are not what they say: in checkpoints, in plans, in folders."""

from __future__ import annotations

import copy

import pytest
import torch
from hub_cases import compressed, edit_config, edit_weights, logits
from safetensors.torch import load_file
from tiny import causal_model, causal_module
from transformers import AutoModelForCausalLM

from fasc_lightning import CausalLMModule, FascCallback, apply_plan, compression_plan, load_compressed, save_compressed
from fasc_lightning.layers import compressed_layers
from fasc_lightning.models import match_checkpoint, quantize_layers

LAYER = "model.layers.0.mlp.up_proj"


def twice(value):
    value = value.clone()
    value[1] = value[0]
    return value


def with_entry(place, number):
    def change(value):
        value = value.clone()
        value.reshape(-1)[place] = number
        return value

    return change


CHANGES = {
    "a duplicate": ("permutation", twice, "no permutation"),
    "a negative": ("permutation", with_entry(0, -1), "no permutation"),
    "one out of range": ("permutation", with_entry(0, 10**6), "no permutation"),
    "a float index": ("permutation", lambda value: value.float(), "no permutation|Expected integers"),
    "an index of flags": ("permutation", lambda value: value.bool(), "no permutation"),
    "integers": ("basis.weight", lambda value: (value * 100).long(), "floating-point type|Expected floats"),
    "flags": ("coefficients.weight", lambda value: value > 0, "floating-point type|Expected floats"),
    "NaN": ("basis.weight", with_entry(3, torch.nan), "finite weights"),
    "infinity": ("coefficients.weight", with_entry(0, -torch.inf), "finite weights"),
    "a vector": ("basis.weight", lambda value: value[0], "matrix|shape"),
}


@pytest.fixture(scope="module")
def model():
    return compressed(layout="pivot")


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("form", ["dense", "compressed"])
def test_checkpoints_are_refused_and_the_module_left(model, case, form):
    part, change, message = CHANGES[case]
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    weights[f"model.{LAYER}.{part}"] = change(weights[f"model.{LAYER}.{part}"])
    module = causal_module() if form == "dense" else CausalLMModule(copy.deepcopy(model))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=rf"checkpoint.*({message})"):
        match_checkpoint(module, {"state_dict": weights})
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("case", CHANGES)
def test_plans_with_such_weights_are_refused(model, case):
    part, change, message = CHANGES[case]
    weights = dict(model.state_dict())
    weights[f"{LAYER}.{part}"] = change(weights[f"{LAYER}.{part}"])
    dense = causal_model()
    with pytest.raises(ValueError, match=message):
        apply_plan(dense, compression_plan(model), weights)
    assert not compressed_layers(dense)


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("load", [load_compressed, AutoModelForCausalLM.from_pretrained])
def test_folders_are_refused_however_they_are_loaded(tmp_path, model, case, load):
    if case == "a vector" and load is not load_compressed:
        pytest.skip("transformers itself refuses shapes")
    part, change, message = CHANGES[case]
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({f"{LAYER}.{part}": change(weights[f"{LAYER}.{part}"])}))
    with pytest.raises(ValueError, match=message) as refused:
        load(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_weights_that_are_not_compressed_are_looked_at_too(tmp_path, model):
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda w: w["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"finite weights at 'model\.norm\.weight'"):
        load_compressed(tmp_path)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    weights["model.model.norm.weight"] = weights["model.model.norm.weight"].long()
    with pytest.raises(ValueError, match=r"floating-point type at 'model\.model\.norm\.weight'"):
        match_checkpoint(causal_module(), {"state_dict": weights})


def test_quantised_weights_are_int8(tmp_path, model):
    quantized = copy.deepcopy(model)
    quantize_layers(quantized, list(compressed_layers(quantized)), "int8")
    weights = {f"model.{name}": value for name, value in quantized.state_dict().items()}
    match_checkpoint(module := causal_module(), {"state_dict": weights})
    module.load_state_dict(weights)
    weights[f"model.{LAYER}.basis.weight"] = weights[f"model.{LAYER}.basis.weight"].float()
    with pytest.raises(ValueError, match=r"in int8 at .*basis\.weight"):
        match_checkpoint(causal_module(), {"state_dict": weights})


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ([], "a mapping of names but got a list"),
        ({"state_dict": []}, "a mapping of names but got a list"),
        ({"state_dict": {3: torch.ones(1)}}, "names as keys but got 3"),
        (
            {"state_dict": {f"{LAYER}.basis.weight": 1, f"{LAYER}.coefficients.weight": 2, f"{LAYER}.permutation": 3}},
            "Expected",
        ),
    ],
)
def test_checkpoints_of_another_form_are_refused(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        match_checkpoint(causal_module(), checkpoint)


# The checksums of a folder.


@pytest.fixture
def folder(tmp_path, model):
    save_compressed(copy.deepcopy(model), tmp_path / "saved")
    return tmp_path / "saved"


def test_values_altered_in_a_saved_folder_are_noticed(folder):
    edit_weights(folder, lambda weights: weights[f"{LAYER}.basis.weight"].mul_(1.01))
    for load in (load_compressed, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"saved/model\.safetensors is truncated or damaged, or was altered since"):
            load(folder)
    edit_config(folder, lambda config: config["quantization_config"].pop("files"))
    assert torch.isfinite(logits(load_compressed(folder))).all()  # as it was meant


def test_a_file_that_was_not_saved_with_the_others_is_noticed(tmp_path, model):
    save_compressed(copy.deepcopy(model), tmp_path / "saved", max_shard_size="20KB")
    path = tmp_path / "saved" / "config.json"
    assert len(load_file(next((tmp_path / "saved").glob("*.safetensors")))) > 0
    edit_config(path.parent, lambda config: config["quantization_config"]["files"].popitem())
    with pytest.raises(ValueError, match="is none of the files that were saved"):
        load_compressed(path.parent)


def test_whoever_saves_the_model_again_writes_no_stale_checksum(folder, tmp_path):
    model = load_compressed(folder)
    with torch.no_grad():
        model.get_submodule(LAYER).basis.weight.mul_(2)
    model.save_pretrained(tmp_path / "again")
    again = load_compressed(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(folder)  # over the one with checksums
    assert torch.equal(logits(load_compressed(folder)), logits(model))
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    assert torch.equal(logits(load_compressed(folder)), logits(model))


def test_more_layers_than_there_are_weights_are_refused_at_once(folder):
    edit_config(folder, lambda config: config.update(num_hidden_layers=10**9))
    with pytest.raises(ValueError, match=r"num_hidden_layers of at most \d+ in .*config\.json.*got 1000000000"):
        load_compressed(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[]", r"config\.json is damaged or was edited\. Expected a mapping"),
        ("config.json", "[" * 100_000, r"config\.json is not valid JSON"),
        ("generation_config.json", "3", r"generation_config\.json is damaged or was edited"),
        ("model.safetensors.index.json", '{"weight_map": []}', r"index\.json is damaged or was edited.*'weight_map'"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 3}}', r"a text at 'weight_map\.a'"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "../b.safetensors"}}',
            r"beside .* but it names '\.\./b",
        ),
    ],
)
def test_json_of_another_form_is_refused_by_name(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_compressed(folder)


def test_a_callbacks_state_of_another_form_is_refused(model):
    callback = FascCallback(keep=0.5)
    state = callback.state_dict()
    for change, message in (
        ({"rho_history": None}, "mapping of names at 'rho_history' but got None"),
        ({"report": {}}, "the entry 'method' in 'report'"),
        ({"checksum": "0" * 32}, "their checksum differs"),
    ):
        with pytest.raises(ValueError, match=message):
            callback.load_state_dict({**state, **change})
