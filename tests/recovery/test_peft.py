from __future__ import annotations

import copy

import pytest
import torch
from tiny import causal_model, token_loader

from fasc_lightning import CausalLMModule, compress, load_compressed, quantize
from fasc_lightning.layers import QUANTIZATIONS, LowRankLinear, PivotedLinear, compressed_layers, swap_to_dense
from fasc_lightning.layers._int8 import Int8Linear

peft = pytest.importorskip("peft", reason="peft is not installed")
lora = pytest.importorskip("peft.tuners.lora")

LAYOUTS = ("pivot", "factors")
#: Names of the linear layers that compressed ones are made of.
FACTORS = ["factor_in", "factor_out", "basis", "coefficients"]
IDS = torch.arange(3, 17).reshape(2, 7)

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of compressed models."""
    made = {}

    def get(layout="pivot"):
        if layout not in made:
            model = causal_model().eval()
            compress(model, list(token_loader(samples=16)), keep=0.7, layout=layout, refit=False, progress=False)
            made[layout] = tmp_path_factory.mktemp("model")
            model.save_pretrained(made[layout])
        return made[layout]

    return get


def lora_config(**options):
    """Adapters that are not nothing from the start."""
    return peft.LoraConfig(**{"r": 2, "target_modules": FACTORS, "init_lora_weights": False, **options})


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def adapted_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_go_onto_the_factors(folders, layout):
    model = load_compressed(folders(layout))
    factors = {f"{name}.{child}" for name, layer in compressed_layers(model).items() for child in layer._modules}
    assert factors
    before = logits(model)
    adapted = peft.get_peft_model(model, lora_config(init_lora_weights=True))
    assert adapted_names(adapted) == {f"base_model.model.{name}" for name in factors}
    assert torch.equal(logits(adapted), before)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_all_linear_means_the_factors_and_what_stayed_dense(folders):
    model = load_compressed(folders("factors"))
    dense = {name for name, m in model.named_modules() if type(m) is torch.nn.Linear and name != "lm_head"}
    assert {name.rpartition(".")[2] for name in dense} > {"factor_in", "factor_out"}
    adapted = peft.get_peft_model(model, lora_config(target_modules="all-linear"))
    assert adapted_names(adapted) == {f"base_model.model.{name}" for name in dense}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_recovery_fit_trains_adapters_that_merge_at_the_same_rank(folders, layout, make_trainer, tmp_path):
    model = load_compressed(folders(layout)).train()
    state = copy.deepcopy(model.state_dict())
    module = CausalLMModule(model, learning_rate=1e-2)
    module.model = peft.get_peft_model(model, lora_config(init_lora_weights=True))
    make_trainer(max_epochs=2).fit(module, token_loader(samples=16))
    adapted = module.model
    trained = logits(adapted)
    with adapted.disable_adapter():
        untouched = logits(adapted)
    merged = adapted.merge_and_unload()
    assert merged is model
    assert not torch.allclose(trained, untouched, atol=1e-3)
    torch.testing.assert_close(logits(merged), trained)
    after = merged.state_dict()
    assert {name: value.shape for name, value in after.items()} == {name: v.shape for name, v in state.items()}
    # An ordinary compressed model again: it is saved, and made dense.
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load_compressed(tmp_path)), logits(merged))
    dense = copy.deepcopy(merged)
    swap_to_dense(dense)
    torch.testing.assert_close(logits(dense), logits(merged))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_adapters_load_onto_the_reloaded_model(folders, layout, tmp_path):
    adapted = peft.get_peft_model(load_compressed(folders(layout)), lora_config())
    adapted.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = peft.PeftModel.from_pretrained(load_compressed(folders(layout)), tmp_path)
    assert torch.equal(logits(again), logits(adapted))
    torch.testing.assert_close(logits(again.merge_and_unload(safe_merge=True)), logits(adapted))


def test_adapters_through_transformers_itself(folders, tmp_path):
    model, other = load_compressed(folders()), load_compressed(folders())
    plain = logits(model)
    model.add_adapter(lora_config())
    adapted = logits(model)
    assert not torch.equal(adapted, plain)
    model.save_pretrained(tmp_path)  # saves the adapters alone
    other.load_adapter(tmp_path)
    assert torch.equal(logits(other), adapted)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)


def test_other_kinds_of_adapters(folders):
    for config in (
        lora_config(use_dora=True, init_lora_weights=True),
        peft.IA3Config(target_modules=FACTORS, feedforward_modules=[]),
        peft.VeraConfig(target_modules=["coefficients"], r=4),
    ):
        model = load_compressed(folders())
        before = logits(model)
        adapted = peft.get_peft_model(model, config)
        torch.testing.assert_close(logits(adapted), before)
        adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in adapted.parameters())


def test_adapted_factors_have_no_dense_form_until_they_are_merged(folders):
    adapted = peft.get_peft_model(load_compressed(folders()), lora_config())
    wanted = logits(adapted)
    with pytest.raises(
        TypeError, match=r"plain linear layers as the factors of a compressed layer, found peft\..*\.Linear\. Merge"
    ):
        swap_to_dense(adapted)
    dense = adapted.merge_and_unload()
    swap_to_dense(dense)
    torch.testing.assert_close(logits(dense), wanted)


# Around whole layers


def test_a_whole_layer_is_no_target_unless_registered(folders):
    with pytest.raises(ValueError, match="Target module PivotedLinear"):
        peft.get_peft_model(load_compressed(folders()), lora_config(target_modules=["q_proj"]))


@pytest.mark.filterwarnings("ignore:Unsupported layer type .* encountered:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_of_the_dense_model_load_around_whole_layers(folders, layout, tmp_path):
    """Trained before the compression, they name layers that are compressed now."""
    theirs = peft.get_peft_model(causal_model().eval(), lora_config(target_modules=["q_proj", "up_proj"]))
    theirs.save_pretrained(tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    config._register_custom_module({PivotedLinear: lora.Linear, LowRankLinear: lora.Linear})
    model = load_compressed(folders(layout))
    adapted = peft.PeftModel.from_pretrained(model, tmp_path, config=config)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    layer, dense = adapted.get_submodule(name), theirs.get_submodule(name)
    assert isinstance(layer.get_base_layer(), PivotedLinear | LowRankLinear)
    x = torch.randn(3, 32)
    torch.testing.assert_close(
        layer(x) - layer.get_base_layer()(x), dense(x) - dense.get_base_layer()(x), rtol=1e-4, atol=1e-5
    )
    # The sum would be of a higher rank.
    state = copy.deepcopy(adapted.state_dict())
    with pytest.raises(RuntimeError, match="would change the weight of a compressed layer, which is computed from"):
        adapted.merge_adapter()
    assert all(torch.equal(adapted.state_dict()[key], value) for key, value in state.items())


# Over int8


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_int8_factors_are_no_target_unless_registered(folders, quantization):
    model = load_compressed(folders())
    quantize(model, quantization)
    with pytest.raises(ValueError, match="Target module Int8Linear"):
        peft.get_peft_model(copy.deepcopy(model), lora_config())
    with pytest.raises(ValueError, match="No `target_modules`"):
        peft.get_peft_model(model, lora_config(target_modules="all-linear"))


@pytest.mark.filterwarnings("ignore:Unsupported layer type .* encountered:UserWarning")
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_adapters_train_over_int8_factors_and_stay_beside_them(folders, quantization, make_trainer):
    model = load_compressed(folders()).train()
    quantize(model, quantization)
    int8 = {name: value.clone() for name, value in model.named_parameters() if value.dtype == torch.int8}
    before = logits(model)
    config = lora_config(init_lora_weights=True)
    config._register_custom_module({Int8Linear: lora.Linear})
    module = CausalLMModule(model.train(), learning_rate=1e-2)
    module.model = peft.get_peft_model(model, config)
    make_trainer(max_epochs=2).fit(module, token_loader(samples=16))
    assert not torch.allclose(logits(module.model), before, atol=1e-3)
    with pytest.raises(RuntimeError, match="can't be cast"):
        module.model.merge_adapter()
    restored = module.model.unload()
    assert torch.equal(logits(restored), before)
    assert all(torch.equal(restored.get_parameter(name), value) for name, value in int8.items())
