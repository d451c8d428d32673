"""Folders in the format of compressed-tensors: written for other libraries, and read by this package alone."""

from __future__ import annotations

import json
import subprocess
import sys

import expert_cases
import pytest
import torch
import transformers
from hub_cases import IDS, assert_same, assert_same_state, edit_config, edit_weights, logits, make_truncated
from huggingface_hub import ModelCard
from packed_cases import FOUR, ROWS, random_rounded, round_layers, rounded_model, sized
from safetensors.torch import load_file
from tiny import causal_model
from torch import nn

from fasc_lightning import load_compressed, quantize, save_compressed
from fasc_lightning.layers import Grid, compressed_layers, quantization_of, rounded_layer, swap_modules
from fasc_lightning.layers._int8 import Int8Linear
from fasc_lightning.models import attach_config

UP = "model.layers.0.mlp.up_proj"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: Grids of models that transformers reads with compressed-tensors, by name.
CASES = {
    "int4 with zero points": (FOUR,),
    "int3 with zero points, one group an output": (Grid(3, None),),
    "int8": (ROWS,),
    "symmetric int4": (Grid(4, 16, True),),
    "symmetric, of several bits": (Grid(4, 16, True), Grid(2, 8, True), ROWS, Grid(3, None, True)),
}

#: What a size gives: zero points on several grids, and a type that some layers keep.
SIZED = (Grid(2, 16), Grid(3, 16), FOUR, ROWS)

LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM

folder, *names = sys.argv[1:]
for name in names:
    path = f"{folder}/{name}"
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), (name, info)
    with torch.no_grad():
        torch.save(model(torch.load(f"{folder}/ids.pt")).logits, f"{path}/logits.pt")
assert "fasc_lightning" not in sys.modules
"""


def described(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def is_packed(folder):
    return described(folder)["quant_method"] == "compressed-tensors"


@pytest.fixture
def alone(monkeypatch):
    """Make every import of compressed-tensors fail."""
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)


# Read by other libraries


def test_other_programs_read_the_folders(tmp_path):
    """A new interpreter without this package gets the same logits: the test that proves the format."""
    pytest.importorskip("compressed_tensors")
    torch.save(IDS, tmp_path / "ids.pt")
    expected = {}
    for i, (dtype, grids) in enumerate((dtype, grids) for dtype in DTYPES[:2] for grids in CASES.values()):
        model = rounded_model(grids=grids, dtype=dtype, attention_bias=True)
        save_compressed(model, tmp_path / str(i))
        assert is_packed(tmp_path / str(i))
        expected[str(i)] = logits(model)
    command = [sys.executable, "-c", LOAD, str(tmp_path), *expected]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name, logit in expected.items():
        tolerance = 1e-5 if logit.dtype == torch.float32 else 0.02
        torch.testing.assert_close(torch.load(tmp_path / name / "logits.pt"), logit, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore")
def test_why_several_grids_with_zero_points_are_not_chosen(tmp_path):
    """If a later version reads them, `is_read_elsewhere` can say so."""
    if pytest.importorskip("compressed_tensors").__version__ != "0.20.1":
        pytest.skip("another version")
    save_compressed(rounded_model(grids=SIZED), tmp_path, format="compressed-tensors")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("grids", [*CASES.values(), SIZED], ids=[*CASES, "sized"])
def test_the_library_itself_makes_the_same_weights(tmp_path, grids):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressor = pytest.importorskip("compressed_tensors.compressors").PackedQuantizationCompressor
    model = rounded_model(grids=grids)
    save_compressed(model, tmp_path, format="compressed-tensors")
    weights = load_file(tmp_path / "model.safetensors")
    config = quantization.QuantizationConfig.model_validate(described(tmp_path))
    for name, layer in compressed_layers(model).items():
        schemes = [s for s in config.config_groups.values() if s.targets == ["Linear"] or name in s.targets]
        assert len(schemes) == 1
        part = {key.removeprefix(f"{name}."): v for key, v in weights.items() if key.startswith(f"{name}.")}
        found = compressor.decompress(part, schemes[0])["weight"]
        assert torch.equal(found, layer.matrix.dequantize())


@pytest.mark.parametrize("grids", [*CASES.values(), SIZED], ids=[*CASES, "sized"])
def test_the_configuration_is_the_documented_one(tmp_path, grids):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    match = pytest.importorskip("compressed_tensors.utils.match").match_named_modules
    save_compressed(rounded_model(grids=grids), tmp_path, format="compressed-tensors")
    config = quantization.QuantizationConfig.model_validate(described(tmp_path))
    assert (config.quant_method, config.format) == ("compressed-tensors", "pack-quantized")
    assert config.quantization_status == quantization.QuantizationStatus.COMPRESSED
    schemes = config.config_groups.values()
    assert {(s.weights.num_bits, s.weights.group_size, s.weights.symmetric) for s in schemes} == {
        (grid.bits, grid.group, grid.symmetric) for grid in grids
    }
    targeted = [target for scheme in schemes for target in scheme.targets]
    linear = {name for name, m in causal_model().named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, _ in match(causal_model(), targeted, config.ignore)} == linear - {"lm_head"}
    # What vLLM reads of it, in CompressedTensorsConfig and CompressedTensorsWNA16: these entries of the configuration,
    # of a group, and of its weights. Its parameters have these names and shapes (weight_shape is not used).
    raw = described(tmp_path)
    assert raw["ignore"] == ["lm_head"]
    for group in raw["config_groups"].values():
        assert group["input_activations"] is None
        wanted = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder"}
        assert wanted <= group["weights"].keys()
        assert (group["weights"]["type"], group["weights"]["dynamic"]) == ("int", False)
        grid = Grid(group["weights"]["num_bits"], group["weights"]["group_size"], group["weights"]["symmetric"])
        weights = load_file(tmp_path / "model.safetensors")
        for name in linear - {"lm_head"} if group["targets"] == ["Linear"] else group["targets"]:
            m, n = weights[f"{name}.weight_shape"].tolist()
            shapes = {"weight_packed": (m, -(-n * grid.bits // 32)), "weight_scale": (m, grid.groups(n))}
            shapes |= {} if grid.symmetric else {"weight_zero_point": (-(-m * grid.bits // 32), grid.groups(n))}
            found = {key.rpartition(".")[2]: v for key, v in weights.items() if key.startswith(f"{name}.")}
            assert {key: tuple(v.shape) for key, v in found.items() if key != "weight_shape"} == shapes
            assert found["weight_packed"].dtype == torch.int32
            assert f"{name}.weight" not in weights


# Read by this package


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grids", [*CASES.values(), SIZED], ids=[*CASES, "sized"])
def test_round_trip_without_the_library(tmp_path, alone, grids, dtype):
    model = rounded_model(grids=grids, dtype=dtype, attention_bias=True)
    save_compressed(model, tmp_path / "small", format="compressed-tensors")
    assert is_packed(tmp_path / "small")
    reloaded = load_compressed(tmp_path / "small")
    assert_same(reloaded, model)
    assert repr(reloaded) == repr(model)
    assert not any(p.requires_grad for n, p in reloaded.named_parameters() if "weight_" in n)
    save_compressed(reloaded, tmp_path / "again", format="compressed-tensors")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()
    reloaded.save_pretrained(tmp_path / "own")
    assert described(tmp_path / "own")["quant_method"] == "fasc"
    assert_same(load_compressed(tmp_path / "own"), model)


@pytest.mark.parametrize(
    "options", [{"device_map": "cpu"}, {"dtype": torch.bfloat16}, {"attn_implementation": "eager"}]
)
def test_arguments_of_from_pretrained(tmp_path, alone, options):
    model = rounded_model(grids=(FOUR, ROWS))
    save_compressed(model, tmp_path, format="compressed-tensors", max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    reloaded = load_compressed(tmp_path, transformers.AutoModelForCausalLM, **options)
    for name, layer in compressed_layers(model).items():
        expected = layer.matrix.dequantize()
        found = reloaded.get_submodule(name).matrix.dequantize()
        # Only 8 bits in rows have scales of the model's type.
        exact = "dtype" not in options or not isinstance(layer.matrix, Int8Linear)
        torch.testing.assert_close(found, expected, rtol=0 if exact else 0.01, atol=0)
    assert reloaded.dtype == options.get("dtype", torch.float32)
    assert reloaded.config._attn_implementation == options.get("attn_implementation", "sdpa")


def test_other_architectures_and_partial_models(tmp_path, alone):
    for family in ("opt", "qwen2", "gpt_neox"):
        model = rounded_model(family, (Grid(4, 16, True), ROWS))
        save_compressed(model, tmp_path / family)
        assert is_packed(tmp_path / family)
        assert_same(load_compressed(tmp_path / family), model)
    model = rounded_model(targets=("up_proj", "lm_head"))
    save_compressed(model, tmp_path / "partial")
    assert len(described(tmp_path / "partial")["ignore"]) == 12
    assert_same(load_compressed(tmp_path / "partial"), model)


def test_a_model_whose_initialisation_reads_weights_of_layers(tmp_path, alone):
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    round_layers(model, [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"], SIZED)
    save_compressed(model, tmp_path, format="compressed-tensors")
    assert_same_state(load_compressed(tmp_path), model)
    half = load_compressed(tmp_path, dtype=torch.float16)  # in which transformers keeps some layers in float32
    scales = {value.dtype for key, value in half.state_dict().items() if key.endswith("weight_scale")}
    assert scales == {torch.bfloat16}


def test_a_fitted_model_by_its_size(tmp_path, alone):
    model, report = sized()
    save_compressed(model, tmp_path, report=report, format="compressed-tensors")
    reloaded = load_compressed(tmp_path)
    assert_same(reloaded, model)
    assert reloaded.config.quantization_config.provenance == model.config.quantization_config.provenance


# Chosen, or impossible


def of_experts():
    model = expert_cases.make("mixtral")
    round_layers(model, [f"{expert_cases.PLACE}.0.w_up"], [FOUR])
    return model


def of_low_rank():
    model = rounded_model(targets=("up_proj",))
    name = "model.layers.1.mlp.down_proj"
    swap_modules(model, {name: make_truncated(model.get_submodule(name))})
    attach_config(model)
    return model


def of_dynamic():
    model = causal_model().eval()
    quantize(model, "int8-dynamic")
    return model


def of_tied():
    model = rounded_model(tie_word_embeddings=True)
    round_layers(model, ["lm_head"], [FOUR])
    return model


def of_own_class():
    class Own(nn.Linear):
        pass

    model = causal_model().eval()
    layer = model.get_submodule(UP)
    layer.__class__ = Own
    swap_modules(model, {UP: rounded_layer(layer, random_rounded(48, 32, FOUR))})
    attach_config(model)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: rounded_model(grids=(Grid(4, 24),)),
            r"layer 'model.*q_proj' has groups of 24 .* do not divide its 32",
        ),
        (lambda: rounded_model("gpt2"), r"layer 'transformer.*' was a Conv1D"),
        (of_experts, r"layer 'model.*experts\.0\.w_up' is a projection of an expert"),
        (of_low_rank, r"layer 'model\.layers\.1\.mlp\.down_proj' is of low rank"),
        (of_dynamic, r"layer 'model.*q_proj' is quantised as 'int8-dynamic'"),
        (of_tied, r"layer 'lm_head' is tied"),
        (of_own_class, rf"layer '{UP}' was a Own, a class of its own"),
    ],
)
def test_models_that_the_format_does_not_hold(tmp_path, make, reason):
    model = make()
    with pytest.raises(ValueError, match=rf"format='compressed-tensors' holds, but {reason}.*format='fasc'"):
        save_compressed(model, tmp_path / "small", format="compressed-tensors")
    assert not list(tmp_path.iterdir())
    save_compressed(model, tmp_path / "small")
    assert not is_packed(tmp_path / "small")
    assert torch.equal(logits(load_compressed(tmp_path / "small")), logits(model))


def test_the_choice(tmp_path):
    save_compressed(rounded_model(grids=SIZED), tmp_path)
    assert not is_packed(tmp_path)  # transformers does not read several grids with zero points
    save_compressed(rounded_model(), tmp_path)
    assert is_packed(tmp_path)
    save_compressed(rounded_model(), tmp_path, format="fasc")
    assert not is_packed(tmp_path)
    model = causal_model().eval()
    quantize(model)
    save_compressed(model, tmp_path)
    assert is_packed(tmp_path)
    assert {quantization_of(layer) for layer in compressed_layers(load_compressed(tmp_path)).values()} == {"int8"}
    with pytest.raises(ValueError, match="`format` to be one of 'auto', 'fasc', 'compressed-tensors' but got 'gguf'"):
        save_compressed(model, tmp_path, format="gguf")
    with pytest.raises(ValueError, match="is dense"):
        save_compressed(causal_model(), tmp_path, format="compressed-tensors")


def test_a_failed_save_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model = rounded_model()
    quantizer, state = model.hf_quantizer, {key: value.clone() for key, value in model.state_dict().items()}
    with monkeypatch.context() as patched:
        patched.setattr("fasc_lightning.models._save.add_checksums", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_compressed(model, tmp_path / "small")
    assert not list(tmp_path.iterdir())
    assert type(model.hf_quantizer) is type(quantizer)
    assert model.config.quantization_config.quant_method == "fasc"
    assert_same_state(model, type("Before", (), {"state_dict": lambda self: state})())


@pytest.mark.parametrize(
    ("grids", "told"), [((FOUR,), "pip install compressed-tensors"), (SIZED, "does not read several")]
)
def test_the_code_in_the_card_loads_the_model(tmp_path, grids, told):
    pytest.importorskip("compressed_tensors")
    model = rounded_model(grids=grids)
    save_compressed(model, tmp_path, format="compressed-tensors")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["fasc", "compressed-tensors", "quantization", "compression"]
    assert told in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace('"..."', repr(str(tmp_path))), names)
    torch.testing.assert_close(logits(names["model"]), logits(model))


# Folders that are not what they say


def of_config(change):
    return lambda folder: edit_config(folder, lambda config: change(config["quantization_config"]))


def of_weights(end, change):
    def edit(weights):
        key = f"{UP}.{end}"
        if (value := change(weights.pop(key))) is not None:
            weights[key] = value

    def both(folder):
        edit_weights(folder, edit)
        of_config(lambda c: c.pop("files"))(folder)

    return both


def of_group(**changes):
    return of_config(lambda c: c["config_groups"]["group_0"]["weights"].update(changes))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (of_group(num_bits=3), "Expected a matrix on the grid {'bits': 3"),
        (of_group(group_size=8), "Expected a matrix on the grid {.*'group': 8"),
        (of_group(symmetric=True), "Expected a matrix on the grid {.*'symmetric': True"),
        (of_group(num_bits=5), "Expected 'group_0' of config_groups .* Load it with transformers"),
        (of_group(type="float"), "It has {'type': 'float'}"),
        (of_group(strategy="tensor"), "Expected 'group_0' of config_groups"),
        (
            of_config(lambda c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8})),
            "It has {'input",
        ),
        (of_config(lambda c: c.update(format="int-quantized")), "Expected the format 'pack-quantized'"),
        (of_config(lambda c: c.update(config_groups={})), "Expected config_groups"),
        (of_config(lambda c: c["ignore"].append(UP)), rf"1 differ: {UP}\. The first is missing in the config_groups"),
        (of_config(lambda c: c["ignore"].clear()), r"1 differ: lm_head\. The first is missing in the files of weights"),
        (of_weights("weight_shape", lambda v: v + 1), rf"weight_shape \[48, 32\] of layer '{UP}' but got \[49, 33\]"),
        (of_weights("weight_packed", lambda v: v[:-1].clone()), rf"in layer '{UP}'.*weight_packed \(47, 4\)"),
        (
            of_weights("weight_scale", lambda v: v * 1.001),
            rf"scales of layer '{UP}' that are numbers of torch.bfloat16",
        ),
        (of_weights("weight_scale", lambda v: v / 0), rf"finite weights at '{UP}"),
        (of_weights("weight_zero_point", lambda v: None), f"in layer '{UP}'"),
        (of_weights("weight_shape", lambda v: None), f"weight_shape beside each weight_packed, but {UP} have none"),
        (lambda folder: edit_weights(folder, lambda w: w["lm_head.weight"].zero_()), "its checksum differs"),
    ],
)
def test_such_folders_are_refused(tmp_path, alone, change, match):
    save_compressed(rounded_model(), tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=match) as refused:
        load_compressed(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_targets_of_other_writers(tmp_path, alone):
    """Patterns, and names before classes, as compressed-tensors matches them."""
    model = rounded_model(grids=(Grid(4, 16, True), Grid(4, 8, True)), targets=("up_proj", "down_proj"))
    up, down = ([n for n in compressed_layers(model) if n.endswith(end)] for end in ("up_proj", "down_proj"))
    grids = {name: quantization_of(model.get_submodule(name)) for name in (*up, *down)}
    assert len(set(grids.values())) == 2
    save_compressed(model, tmp_path)

    def change(config):
        groups = {len(group["targets"][0]): group for group in config["config_groups"].values()}
        longer, shorter = groups[len(down[0])], groups[len(up[0])]
        shorter["targets"], longer["targets"] = ["Linear"], ["re:.*down_proj"]
        config["ignore"] = ["lm_head", "re:.*self_attn.*", "re:.*gate_proj"]

    of_config(change)(tmp_path)
    assert_same(load_compressed(tmp_path), model)
