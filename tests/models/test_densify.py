from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hub_cases import IDS, assert_complete, assert_same, compressed, compressed_with_report, logits
from tiny import FAMILIES, causal_model, mlp
from torch import nn
from transformers import AutoModelForCausalLM

from fasc_lightning import CausalLMModule, load_compressed, to_dense
from fasc_lightning.layers import is_compressed, make_lowrank, model_size


@pytest.mark.sampled(5)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reloaded", [True, False])
def test_a_dense_model_is_an_ordinary_one(tmp_path, family, reloaded):
    model, report = compressed_with_report(family)
    before = logits(model)
    if reloaded:
        model.save_pretrained(tmp_path / "small")
        model = load_compressed(tmp_path / "small")
    assert to_dense(model) is model
    assert not is_compressed(model)
    assert not hasattr(model.config, "quantization_config")
    assert [type(m) for m in model.modules()] == [type(m) for m in causal_model(family).modules()]
    torch.testing.assert_close(logits(model), before)
    assert model_size(model) == report.whole["dense"]  # what was saved is given back
    model.save_pretrained(tmp_path / "dense")
    dense, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert_complete(info)
    assert_same(dense, model)
    with pytest.raises(ValueError, match="Expected a folder with a compressed model"):
        load_compressed(tmp_path / "dense")


def test_it_is_loaded_where_the_package_is_not_known(tmp_path):
    model = to_dense(compressed())
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "logits.pt")
    code = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        f"logits = model(torch.tensor({IDS.tolist()})).logits\n"
        "assert torch.equal(logits, torch.load(sys.argv[1] + '/logits.pt'))\n"
        "assert 'fasc_lightning' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "quantization" not in result.stderr


def test_the_dtype_and_the_flags_stay():
    model = compressed().bfloat16()
    model.model.layers[0].requires_grad_(False)
    to_dense(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.model.layers[0].parameters())
    assert all(p.requires_grad for p in model.model.layers[1].parameters())


def test_models_inside_modules_and_models_of_no_library():
    module = CausalLMModule(compressed())
    assert to_dense(module) is module
    assert not hasattr(module.model.config, "quantization_config")
    plain = mlp()
    plain.net[0] = make_lowrank(torch.randn(24, 3), torch.randn(3, 12))
    to_dense(plain)
    assert type(plain.net[0]) is nn.Linear


def test_refusals_leave_the_model_alone():
    with pytest.raises(ValueError, match="LlamaForCausalLM has none: it is dense"):
        to_dense(causal_model())
    model = compressed()
    model.model.layers[1].mlp.up_proj.basis = nn.Sequential()
    with pytest.raises(TypeError, match="Merge adapters, and undo quantisation by other libraries"):
        to_dense(model)
    assert hasattr(model.config, "quantization_config")
    assert is_compressed(model.model.layers[0])
