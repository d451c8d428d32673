from __future__ import annotations

import copy
import json

import expert_cases
import pytest
import torch
from hub_cases import assert_complete, assert_same, assert_same_state, edit_config, edit_weights, logits, make_truncated
from packed_cases import ROWS, round_layers, rounded_model, sized
from tiny import causal_model, causal_module
from transformers import AutoModelForCausalLM

from fasc_lightning import apply_plan, compression_plan, load_compressed, quantize, save_compressed, to_dense
from fasc_lightning.layers import Grid, compressed_layers, is_compressed, quantization_of, swap_modules
from fasc_lightning.layers._packed_linear import PackedLinear
from fasc_lightning.models import attach_config, match_checkpoint, model_card

UP = "model.layers.0.mlp.up_proj"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: Groups of 24 leave a smaller last group of 32 inputs.
MIXED = (Grid(4, 16), Grid(3, None), Grid(2, 8, True), ROWS, Grid(8, 16), Grid(4, 24))


def packed(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


def version(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_round_trip(tmp_path, family, dtype):
    model = rounded_model(family, MIXED, dtype)
    assert len({quantization_of(layer) for layer in compressed_layers(model).values()}) == len(MIXED)
    model.save_pretrained(tmp_path)
    assert version(tmp_path) == 2
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert_complete(info)
    assert_same(reloaded, model)
    assert repr(reloaded) == repr(model)
    assert reloaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    scales = [matrix.weight_scale for matrix in packed(reloaded).values()]
    assert {(scale.dtype, scale.requires_grad) for scale in scales} == {(torch.bfloat16, False)}
    save_compressed(reloaded, tmp_path / "again", format="fasc")
    assert_same(load_compressed(tmp_path / "again"), model)


def test_beside_layers_of_low_rank(tmp_path):
    model = rounded_model(targets=("up_proj", "q_proj"))
    names = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj")
    swap_modules(model, {name: make_truncated(model.get_submodule(name)) for name in names})
    attach_config(model)
    save_compressed(model, tmp_path)
    assert version(tmp_path) == 2
    assert_same(load_compressed(tmp_path), model)


def test_without_matrices_of_few_bits_the_format_is_the_one_that_earlier_versions_read(tmp_path):
    model = causal_model().eval()
    quantize(model, "int8", targets=["q_proj"])
    swap_modules(model, {UP: make_truncated(model.get_submodule(UP))})
    attach_config(model)
    model.save_pretrained(tmp_path)
    assert version(tmp_path) == 1
    assert_same(load_compressed(tmp_path), model)


@pytest.mark.parametrize("rounded", [True, False])
def test_tied_embeddings(tmp_path, rounded):
    model = rounded_model(tie_word_embeddings=True)
    if rounded:
        round_layers(model, ["lm_head"], [Grid(4)])
    save_compressed(model, tmp_path / "small", format="fasc")
    reloaded = load_compressed(tmp_path / "small")
    assert_same(reloaded, model)
    assert rounded or reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


def test_experts(tmp_path):
    model = expert_cases.make("mixtral")
    round_layers(model, [f"{expert_cases.PLACE}.{e}.{p}" for e in (0, 3) for p in ("w_up", "w_down")], MIXED)
    assert len(packed(model)) == 3
    save_compressed(model, tmp_path)
    assert_same(load_compressed(tmp_path), model)


def test_another_type_changes_no_scale(tmp_path):
    model = rounded_model(grids=(Grid(4, 16), Grid(3, 8, True)))
    model.save_pretrained(tmp_path)
    for dtype in DTYPES[1:]:
        reloaded = load_compressed(tmp_path, dtype=dtype)
        assert reloaded.dtype == dtype
        for name, matrix in packed(reloaded).items():
            assert torch.equal(matrix.dequantize(), model.get_submodule(name).dequantize())
        assert_same(load_compressed(tmp_path), model)


def test_a_model_whose_first_parameter_is_a_scale_keeps_its_type(tmp_path):
    model = rounded_model(targets=("lm_head",))
    model._modules["model"] = model._modules.pop("model")
    assert model.dtype == torch.bfloat16
    save_compressed(model, tmp_path, format="fasc")
    reloaded = load_compressed(tmp_path)
    assert reloaded.model.embed_tokens.weight.dtype == torch.float32
    assert torch.equal(logits(reloaded), logits(model))


def test_trained_scales_and_mixed_types_are_refused(tmp_path):
    model = rounded_model()
    model.get_submodule(UP).matrix.widen_scales()
    with pytest.raises(ValueError, match=rf"scales of torch.bfloat16 but got torch.float32 \('{UP}\.matrix"):
        save_compressed(model, tmp_path / "small")
    model.get_submodule(UP).matrix.narrow_scales()
    model.model.norm.half()
    with pytest.raises(ValueError, match="one floating-point type but got"):
        save_compressed(model, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_layers_in_the_form_of_the_kernel_are_stored_as_before(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    model = rounded_model(grids=(Grid(4, 32),), **sizes)
    save_compressed(model, tmp_path / "small")
    prepared = [matrix.prepare() for matrix in packed(model).values()]
    if not any(prepared):
        pytest.skip("no kernel on this processor")
    save_compressed(model, tmp_path / "prepared")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("small", "prepared")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_shards_and_device_maps(tmp_path, device_map):
    model = rounded_model(grids=MIXED)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(load_compressed(tmp_path, device_map=device_map), model)


@pytest.mark.filterwarnings("ignore:.*offloaded modules")
def test_offloaded_layers(tmp_path):
    model = rounded_model()
    model.save_pretrained(tmp_path / "small")
    places = {f"model.{part}": "cpu" for part in ("embed_tokens", "layers.1", "norm", "rotary_emb")} | {
        "model.layers.0": "disk",
        "lm_head": "cpu",
    }
    reloaded = load_compressed(tmp_path / "small", device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(reloaded), logits(model))
    reloaded.save_pretrained(tmp_path / "again")
    assert_same(load_compressed(tmp_path / "again"), model)


# Folders that are not what they say


def regrid(**changes):
    return lambda folder: edit_config(
        folder, lambda c: c["quantization_config"]["layers"][UP]["quantize"].update(changes)
    )


def retensor(end, change):
    def edit(weights):
        key = f"{UP}.matrix.{end}"
        value = change(weights.pop(key))
        if value is not None:
            weights[key] = value

    return lambda folder: edit_weights(folder, edit)


@pytest.mark.parametrize("load", [load_compressed, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (regrid(bits=3), "on the grid {'bits': 3,"),
        (regrid(group=8), "'group': 8,"),
        (regrid(symmetric=True), "'symmetric': True"),
        (retensor("weight_packed", lambda v: v[:, :-1].clone()), r"weight_packed \(48, 3\)"),
        (retensor("weight_packed", lambda v: v.long()), "of torch.int64"),
        (retensor("weight_scale", lambda v: v[1:].clone()), r"weight_scale \(47, 2\)"),
        (retensor("weight_scale", lambda v: v.int()), "Expected floats"),
        (retensor("weight_scale", lambda v: v.fill_(torch.nan)), "finite weights"),
        (retensor("weight_zero_point", lambda v: None), "on the grid .*'symmetric': False"),
        (retensor("weight_zero_point", lambda v: v.float()), "Expected integers"),
    ],
)
def test_such_folders_are_refused_by_the_name_of_the_layer(tmp_path, change, match, load):
    rounded_model().save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=match) as refused:
        load(tmp_path)
    assert UP in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_an_unknown_grid_is_refused(tmp_path):
    rounded_model().save_pretrained(tmp_path)
    regrid(bits=5)(tmp_path)
    with pytest.raises(ValueError, match=rf"\"group\": int or None.* of layer '{UP}'"):
        load_compressed(tmp_path)


# Checkpoints, plans, dense models


@pytest.mark.parametrize("start", ["rounded", "dense", "other grids"])
def test_checkpoints_load_strictly(start):
    grids = (Grid(4, 16), Grid(3, None), Grid(2, 8, True), ROWS)
    source, module = causal_module(), causal_module()
    source.model = rounded_model(grids=grids)
    if start != "dense":
        module.model = rounded_model(grids=grids if start == "rounded" else (Grid(3, 16),))
    state = source.state_dict()
    match_checkpoint(module, {"state_dict": state})
    module.load_state_dict(state, strict=True)
    assert_same(module.eval().model, source.model)
    assert compression_plan(module) == compression_plan(source)


def test_a_checkpoint_whose_groups_are_not_known_is_refused():
    grids = (Grid(4, 24), Grid(4, 32))
    source, module = causal_module(), causal_module()
    source.model = rounded_model(grids=grids, targets=("down_proj",))
    state, before = source.state_dict(), copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"down_proj' fits one grid but it fits .*group=24.*group=32.*apply_plan"):
        match_checkpoint(module, {"state_dict": state})
    assert not is_compressed(module)
    assert_same_state(module, type("Before", (), {"state_dict": lambda self: before})())
    apply_plan(module, compression_plan(source), state)
    assert_same(module.eval().model, source.model)


@pytest.mark.parametrize(
    ("end", "change", "match"),
    [
        ("weight_packed", lambda v: v.long(), "packed numbers .* in int32"),
        ("weight_zero_point", lambda v: v[0], "Expected a matrix"),
        ("weight_scale", lambda v: v / 0, "finite weights"),
        ("weight_scale", lambda v: v.int(), "floating-point type"),
        ("weight_packed", lambda v: v[:, 1:], "to be compressed from a weight of shape"),
    ],
)
def test_such_checkpoints_are_refused(end, change, match):
    source, module = causal_module(), causal_module()
    source.model = rounded_model()
    state = source.state_dict()
    state[f"model.{UP}.matrix.{end}"] = change(state[f"model.{UP}.matrix.{end}"])
    with pytest.raises(ValueError, match=match) as refused:
        match_checkpoint(module, {"state_dict": state})
    assert UP in str(refused.value)
    assert not is_compressed(module)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dense_again(tmp_path, family):
    model = rounded_model(family, MIXED)
    before = logits(model)
    to_dense(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in causal_model(family).modules()]
    torch.testing.assert_close(logits(model), before)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


# The model card


def lines(card, title):
    return card.text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0].splitlines()


def test_the_card_of_a_size(tmp_path):
    model, report = sized()
    kinds = {row.name.rpartition(".")[2]: row.quantize for row in report.layers}
    card = model_card(model, report)
    assert card.data.tags == ["fasc", "quantization", "compression"]
    assert f"with {len(report.layers)} of its linear layers rounded to few bits, made by" in card.text
    assert "low rank" not in card.text.split("## ")[0]
    made = lines(card, "How it was made")
    assert "* budget: size 0.4, the fraction of the targeted layers' bytes in 16 bits" in made
    (quantised,) = (line for line in made if line.startswith("* quantised:"))
    words = {"int8": "int8"} | {f"{bits}": f"int{bits} in groups of 64" for bits in (2, 3, 4)}
    for kind, form in kinds.items():
        told = "dense" if form is None else words[form if form == "int8" else str(form["bits"])]
        assert told == "dense" or f" {told}" in quantised
        (row,) = (line for line in lines(card, "Bits") if line.startswith(f"| {kind} "))
        assert f"1 x {told}" in row
    dense = [row.name for row in report.layers if row.quantize is None]
    assert f"kept dense: {', '.join(f'`{name}`' for name in dense) or 'none'}." in card.text
    row = next(line for line in card.text.splitlines() if line.startswith("| whole model, MB"))
    assert row.count("|") == 5  # dense, compressed, kept
    save_compressed(model, tmp_path, report=report)
    assert_same(load_compressed(tmp_path), model)


def test_the_card_without_a_report():
    card = model_card(rounded_model(grids=(Grid(4, 16, True), ROWS)))
    made = lines(card, "How it was made")
    assert "* quantised: 7 layers int4 in groups of 16, symmetric, 7 layers int8" in made
    (row,) = (line for line in lines(card, "Bits") if line.startswith("| q_proj "))
    assert "1 x int4 in groups of 16, symmetric, 1 x int8" in row
    assert any("up_proj" in line and "int8" in line for line in lines(card, "Layers"))
