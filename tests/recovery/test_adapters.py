from __future__ import annotations

import copy

import pytest
import torch
from recovery_cases import same, values
from tiny import causal_model
from torch import nn

from fasc_lightning.layers import LowRankLinear, compressed_layers
from fasc_lightning.models import apply_plan
from fasc_lightning.recovery._adapters import Adapters, adapted_factors, carries_adapters, factor_names, put_values

peft = pytest.importorskip("peft", reason="peft is not installed")

IDS = torch.arange(3, 17).reshape(2, 7)


@pytest.fixture(params=["pivot", "factors"])
def model(request):
    model = causal_model("qwen2").eval()  # with biases
    plan = {
        name: {"rank": 6, "layout": request.param}
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "lm_head" not in name
    }
    apply_plan(model, plan)
    return model


def config(**options):
    return peft.LoraConfig(**{"r": 3, **options})


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def trained(model, **options):
    """Adapters on the model that add something."""
    adapters = Adapters(model, config(**options))
    adapters.put_on()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return adapters


def test_adapters_sit_on_every_factor_and_add_nothing_at_first(model):
    before, wanted = logits(model), {name: type(layer) for name, layer in model.named_modules()}
    random = torch.get_rng_state()
    adapters = Adapters(model, config(), seed=1)
    adapters.put_on()
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(logits(model), before)
    assert {name for name, _ in adapted_factors(model)} == set(adapters.factors)
    assert len(adapters.factors) == 2 * len(compressed_layers(model))
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    # The module's own classes stay.
    assert all(type(model.get_submodule(n)) is kind for n, kind in wanted.items() if n not in adapters.factors)
    adapters.take_off(merge=False)
    assert not adapters.on
    assert carries_adapters(model) is None


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_alpha": 1}])
def test_merging_keeps_ranks_names_and_function(model, options):
    plain, layers = values(model), compressed_layers(model)
    ranks = {name: layer.rank for name, layer in layers.items()}
    adapters = trained(model, **options)
    wanted, promised = logits(model), values(model)
    assert list(promised) == list(plain)
    adapters.take_off(merge=True)
    torch.testing.assert_close(logits(model), wanted)
    assert same(values(model), promised)
    assert {name: layer.rank for name, layer in compressed_layers(model).items()} == ranks
    assert all(type(child) is nn.Linear for layer in layers.values() for child in layer.children())
    assert not hasattr(model, "peft_config")
    assert not model._state_dict_hooks
    # The product of merged factors is the layer's matrix, of the rank of the factors.
    for layer in compressed_layers(model).values():
        assert torch.linalg.matrix_rank(layer.to_weight().double(), rtol=1e-5) <= layer.rank


def test_without_merging_factors_are_what_they_were(model):
    before = values(model)
    trained(model).take_off(merge=False)
    assert same(values(model), before)


def test_adapters_that_are_not_finite_are_not_merged(model):
    before = values(model)
    adapters = trained(model)
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"finite adapters but that of .*q_proj"):
        adapters.take_off(merge=True)
    adapters.take_off(merge=False)
    assert same(values(model), before)


def test_the_state_with_adapters_loads_into_a_plain_model(model):
    plain = copy.deepcopy(model)
    adapters = trained(model)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(plain), logits(model))
    adapters.take_off(merge=False)


def test_half_precision_factors_have_adapters_in_float32(model):
    model.to(torch.bfloat16)
    adapters = Adapters(model, config())
    adapters.put_on()
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    adapters.take_off(merge=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_patterns_select_layers_or_factors():
    model = nn.Sequential(LowRankLinear(8, 6, 2), LowRankLinear(6, 8, 2), nn.Linear(8, 3))
    assert factor_names(model) == ["0.factor_in", "0.factor_out", "1.factor_in", "1.factor_out"]
    assert factor_names(model, "all-linear") == factor_names(model)
    assert factor_names(model, ["1"]) == ["1.factor_in", "1.factor_out"]
    assert factor_names(model, {"factor_in"}) == ["0.factor_in", "1.factor_in"]
    assert factor_names(model, r"0\..*") == ["0.factor_in", "0.factor_out"]
    with pytest.raises(ValueError, match="`target_modules` to select compressed layers"):
        factor_names(model, ["2"])


def test_excluded_layers_and_factors_carry_none():
    model = nn.Sequential(LowRankLinear(8, 6, 2), LowRankLinear(6, 8, 2))
    assert factor_names(model, exclude=["1"]) == ["0.factor_in", "0.factor_out"]
    assert factor_names(model, ["0"], r".*\.factor_in") == ["0.factor_out"]
    with pytest.raises(ValueError, match=r"\['0'\] without \['0'\] matches none"):
        factor_names(model, ["0"], ["0"])


def found_in(model, options):
    """Return the rank and the alpha of every adapter."""
    adapters = Adapters(model, config(**options))
    adapters.put_on()
    assert adapters.factors == [name for name, _ in adapted_factors(model)]
    found = {name: (layer.r["default"], layer.lora_alpha["default"]) for name, layer in adapted_factors(model)}
    adapters.take_off(merge=False)
    return found


def test_patterns_of_a_config_name_layers_as_well_as_factors(model):
    first = "model.layers.0.self_attn.q_proj"
    options = {
        "lora_alpha": 7,
        "rank_pattern": {r"0\.self_attn\.q_proj": 5, r"factor_in|basis": 4, "q_proj": 2},
        "alpha_pattern": {first: 9, "v_proj": 11},
        "exclude_modules": ["k_proj"],
    }
    found = found_in(model, options)
    assert not any("k_proj" in name for name in found)
    for name, (rank, alpha) in found.items():
        layer, _, child = name.rpartition(".")
        inner = child in ("factor_in", "basis")
        assert rank == (5 if layer == first else 4 if inner else 2 if layer.endswith("q_proj") else 3), name
        assert alpha == (9 if layer == first else 11 if layer.endswith("v_proj") else 7), name


def test_a_pattern_is_not_of_a_layer_whose_name_ends_alike():
    model = nn.ModuleDict({"fc": LowRankLinear(8, 6, 2), "block": nn.ModuleDict({"fc": LowRankLinear(8, 6, 2)})})
    found = found_in(model, {"rank_pattern": {"^fc": 5}})
    assert {name: rank for name, (rank, _) in found.items()} == {
        "fc.factor_in": 5,
        "fc.factor_out": 5,
        "block.fc.factor_in": 3,
        "block.fc.factor_out": 3,
    }


def test_patterns_that_name_nothing_are_said(model):
    with pytest.warns(UserWarning, match=r"\['lm_head'\] of `rank_pattern` name no compressed layer"):
        Adapters(model, config(rank_pattern={"lm_head": 5, "q_proj": 4}))


def test_only_the_layers_that_are_to_be_transformed_are(model):
    assert all(".layers.1." in name for name in found_in(model, {"layers_to_transform": [1]}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_will_be_kept_can_be_looked_at_before(model, dtype):
    model.to(dtype)
    adapters = trained(model)
    beside, state = logits(model), values(model)
    with adapters.as_kept():
        kept = logits(model)
    assert torch.equal(logits(model), beside)
    assert same(values(model), state)
    adapters.take_off(merge=True)
    if dtype == torch.bfloat16:
        assert torch.equal(logits(model), kept)
        assert not torch.equal(beside, kept)
    else:
        torch.testing.assert_close(logits(model), kept)


def test_a_layer_in_two_places_has_one_adapter():
    shared = LowRankLinear(8, 8, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    before = list(model.state_dict())
    adapters = Adapters(model, config())
    adapters.put_on()
    assert list(model.state_dict()) == before
    adapters.take_off(merge=True)
    assert model["a"] is model["b"] is shared
    assert type(shared.factor_in) is nn.Linear


def test_values_of_another_recovery_are_refused(model):
    before = values(model)
    name = next(iter(dict(model.named_parameters())))
    for wrong in ({name: torch.zeros(1)}, {"nothing": torch.zeros(1)}):
        with pytest.raises(ValueError, match="not there or of another shape"):
            put_values(model, wrong)
    assert same(values(model), before)
