from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, causal_model, mlp
from transformers import GptOssConfig, LlamaConfig, MixtralConfig, PreTrainedConfig, T5Config

from fasc_lightning.layers import layer_shapes, select_layers, target_layers
from fasc_lightning.planning import model_on_meta

MIXTRAL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_has_the_layers_of_its_model(family):
    model = causal_model(family)
    planned = target_layers(model_on_meta(model.config))
    assert planned.shapes == layer_shapes(select_layers(model))
    assert set(planned.token_shares.values()) == {1.0}
    assert all(layer.weight.is_meta for layer in planned.modules.values())


def test_a_module_is_taken_as_it_is():
    module = mlp()
    assert model_on_meta(module) is module


def test_the_dtype_of_a_config_can_be_chosen():
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    assert {p.dtype for p in model_on_meta(config, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_each_expert_has_its_matrices_and_the_router_is_left_alone():
    model = model_on_meta(MixtralConfig(**MIXTRAL))
    planned = target_layers(model)
    experts = {name: shape for name, shape in planned.shapes.items() if ".experts." in name}
    assert len(experts) == 2 * 4 * 3
    assert {shape for name, shape in experts.items() if name.endswith("w_down")} == {(32, 48)}
    assert {shape for name, shape in experts.items() if not name.endswith("w_down")} == {(48, 32)}
    fused = [p for name, p in model.named_parameters() if ".experts." in name]
    assert sum(m * n for m, n in experts.values()) == sum(p.numel() for p in fused)
    assert {planned.token_shares[name] for name in experts} == {0.5}
    assert not any(m == 4 for m, _ in planned.shapes.values())
    only = target_layers(model, targets=["w_down"])
    assert len(only.modules) == 8
    assert not any("experts" in name for name in target_layers(model, exclude=r".*experts.*").modules)


def test_experts_of_an_unknown_kind_are_not_planned_for_and_it_is_said():
    model = model_on_meta(GptOssConfig(**MIXTRAL, head_dim=8))
    with pytest.warns(UserWarning, match="2 modules hold experts of a kind that is not known here"):
        planned = target_layers(model)
    assert not any("experts" in name for name in planned.modules)


def test_what_has_no_shapes_is_refused():
    with pytest.raises(ValueError, match="config of a causal language model but got PreTrainedConfig"):
        model_on_meta(PreTrainedConfig())
    with pytest.raises(ValueError, match="config of a causal language model but got T5Config"):
        model_on_meta(T5Config())
    with pytest.raises(TypeError, match="a module or a transformers config but got str"):
        model_on_meta("llama")


@pytest.mark.parametrize("size", [None, 0, -1])
@pytest.mark.parametrize(
    "name",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_local_experts"],
)
def test_a_config_that_lacks_a_size_is_refused_with_what_to_check(name, size):
    config = MixtralConfig(**MIXTRAL)
    object.__setattr__(config, name, size)  # as a config.json may come to hold
    with pytest.raises(ValueError, match=r"MixtralConfig with the shapes of a model .* HINT: check hidden_size"):
        model_on_meta(config)
