from __future__ import annotations

import json

import pytest
import torch
from tiny import causal_model, token_loader
from transformers import GptOssConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from fasc_lightning import FascCallback, compress, plan
from fasc_lightning.layers import _fused_experts as expert_views
from fasc_lightning.layers import model_size, select_layers
from fasc_lightning.planning._stored_layers import ranked_layers
from fasc_lightning.planning._time import Rates

WIDE = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4)
RATES = Rates(1e9, 1e9, 1e9)


def planned(model=WIDE, **options):
    return plan(model, **{"keep": 0.6, "memory": "10GB", "probed": False, **options})


@pytest.mark.parametrize("budget", [{"keep": 0.8}, {"rank": 0.5}, {"rank": 8}])
def test_sizes_are_those_of_a_uniform_compression(budget):
    model = causal_model()
    found = planned(model, **{"keep": None, **budget}, allocation="uniform")
    batches = [{"input_ids": torch.randint(64, (4, 32))}]
    report = compress(model, batches, **budget, allocation="uniform", refit=False, progress=False)
    assert found.targeted == report.targeted
    assert found.whole == report.whole
    assert [(layer.name, layer.rank) for layer in found.layers] == [(x.name, x.rank) for x in report.layers]
    assert found.moments_bytes == pytest.approx(report.moments_bytes, rel=0.05)


def test_a_config_a_meta_model_and_a_model_have_one_plan():
    model = causal_model()
    with torch.device("meta"):
        meta = type(model)(model.config)
    first, *others = (planned(m).to_dict() for m in (model, meta, model.config))
    assert others == [first, first]
    assert first["parts"]["weights"] == model_size(model).bytes
    json.dumps(first)


def test_exact_moments_serve_where_they_fit_and_sketches_where_not():
    easy = planned()
    assert {(layer.moments, layer.place) for layer in easy.layers} == {("exact", "cpu")}
    assert easy.options == {}
    for sketch, kind in (("auto", "projected"), ("range", "range")):
        tight = planned(memory=easy.peak.device - 1, sketch=sketch, sketch_size=32, sketch_above=512, passes=1)
        assert {layer.moments for layer in tight.layers} == {"exact", kind}
        sizes = {"sketch_size": 32, "sketch_above": 512} if kind == "range" else {"update_weights": False}
        assert tight.options == {"sketch": kind, **sizes}
    assert {layer.name.rpartition(".")[2] for layer in tight.layers if layer.moments == "range"} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert tight.peak.device < easy.peak.device
    assert "options: sketch='range'" in str(tight)


def test_another_device_may_leave_moments_on_the_cpu():
    easy = planned(device="cuda")
    assert easy.layers[0].place == "device"
    beside = planned(device="cuda", memory=int(0.7 * easy.peak.device), host_memory="1GB")
    assert beside.options == {"moments_device": "cpu"}
    assert 0 < beside.peak.host <= 1e9
    assert beside.factors_place == "cpu"
    assert {layer.moments for layer in beside.layers} == {"exact"}


@pytest.mark.parametrize(
    "options",
    [
        {"sketch": None},
        {"sketch": "projected"},
        {"sketch": "range", "sketch_size": 6, "sketch_above": 40},
        {"sketch": "gaussian", "sketch_size": 6, "sketch_above": 40},
        {"sketch": None, "passes": 3},
        {"sketch": "projected", "passes": 14},
    ],
)
def test_the_options_of_a_plan_are_accepted_and_lead_to_its_moments(options):
    found = planned(causal_model(), **options)
    FascCallback(keep=0.6, **found.options)
    report = compress(causal_model().eval(), token_loader(), keep=0.6, refit=False, progress=False, **found.options)
    # But for counts, which are not planned, and means of inputs, which layers share.
    assert report.moments_bytes == pytest.approx(found.parts["moments"], rel=0.02)


@pytest.mark.parametrize("options", [{"update_weights": True}, {"keeps_moments": True}])
def test_passes_are_not_planned_where_a_fit_has_one(options):
    easy = planned(sketch=None, **options)
    with pytest.raises(MemoryError, match="update_weights=False"):
        planned(memory=int(0.9 * easy.peak.device), sketch=None, **options)
    with pytest.raises(ValueError, match=r"passes=2"):
        planned(passes=2, **options)


def test_passes_are_as_few_as_fit():
    easy = planned(sketch=None)
    tight = planned(memory=int(0.9 * easy.peak.device), sketch=None)
    assert tight.passes > 1
    with pytest.raises(MemoryError):
        planned(memory=int(0.9 * easy.peak.device), sketch=None, passes=tight.passes - 1)


def test_the_refusal_names_what_would_do_and_that_does():
    easy = planned()
    with pytest.raises(MemoryError, match=r"14 layers to fit into .* What would do: .* passes over the data fit") as e:
        planned(memory=int(0.9 * easy.peak.device), passes=1, sketch=None)
    count = int(str(e.value).split(" passes over")[0].split()[-1])
    assert planned(memory=int(0.9 * easy.peak.device), passes=count, sketch=None).passes == count
    with pytest.raises(MemoryError, match=r"Not even one layer fits: the weights take .* \(1024, 256\)"):
        planned(memory="3MB")
    with pytest.raises(MemoryError, match="moments_device='cpu' with 1GB"):
        planned(device="cuda", memory=int(0.7 * easy.peak.device), passes=1, sketch=None)


def test_training_activations_and_kept_moments_add_to_the_peak():
    easy = planned()
    weights = easy.parts["weights"]
    assert planned(update_weights=True).peak.device == easy.peak.device + 3 * weights
    assert planned(keeps_moments=True).peak.device > easy.peak.device
    busy = planned(batch_tokens=100_000)
    assert busy.peak.device > busy.parts["activations"] + easy.parts["moments"] + weights - 1


def test_experts_take_their_share_of_the_time_and_all_of_the_memory():
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape["num_key_value_heads"] = 2
    few, many = (
        planned(MixtralConfig(vocab_size=64, num_local_experts=e, num_experts_per_tok=2, **shape), probed=RATES)
        for e in (4, 8)
    )
    assert len(many.layers) - len(few.layers) == 3 * 4
    assert many.moments_bytes > 1.5 * few.moments_bytes
    assert many.seconds.per_1000_tokens == pytest.approx(few.seconds.per_1000_tokens)
    assert many.seconds.factorize > few.seconds.factorize


def test_it_prints_layers_memory_sizes_and_seconds():
    text = str(planned(probed=RATES, tokens=5000))
    for words in ("down_proj", "exact", "peak memory: ", "1 pass", "targeted layers: ", "to calibrate", "to factorise"):
        assert words in text
    assert "calibrate" not in str(planned())


def test_a_budget_below_the_lowest_ranks_is_refused_and_one_below_a_share_is_not():
    layers = select_layers(causal_model())
    with pytest.raises(ValueError, match="Expected a budget of at least"):
        planned(causal_model(), keep=0.01)
    assert min(layer.rank for layer in ranked_layers(layers, None, 0.01, "auto").values()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": None}, "neither `rank` nor `keep`"),
        ({"memory": "much"}, "Expected `memory`"),
        ({"host_memory": -1}, "Expected `host_memory`"),
        ({"passes": 0}, "Expected `passes` to be an int of at least 1"),
        ({"sketch_size": "big"}, "Expected `sketch_size`"),
        ({"sketch": "srht"}, "Expected `sketch`"),
        ({"batch_tokens": -1}, "Expected `batch_tokens`"),
        ({"tokens": None}, "Expected `tokens`"),
        ({"layout": "round"}, "Expected `layout`"),
        ({"targets": ["nothing"]}, "Expected `targets` to select linear layers"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        planned(**options)


def test_no_slice_is_made_for_each_of_thousands_of_experts(monkeypatch):
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3MoeConfig(**shape, moe_intermediate_size=48, num_experts=64, num_experts_per_tok=4, head_dim=16)
    sliced = []
    own = expert_views.expert_weight
    monkeypatch.setattr(expert_views, "expert_weight", lambda *args: sliced.append(args[1:]) or own(*args))
    found = planned(config)
    assert len([layer for layer in found.layers if ".experts." in layer.name]) == 2 * 64 * 3
    assert len(sliced) <= 3 * len(found.layers)  # to count parameters, to tell types of sums: each slice takes its time


def test_experts_of_an_unknown_kind_are_named():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GptOssConfig(vocab_size=64, num_local_experts=4, num_key_value_heads=2, head_dim=16, **shape)
    with pytest.warns(UserWarning, match=r"experts of a kind that is not known here \(GptOssExperts, .* stay dense"):
        found = planned(config, keep=0.8)
    assert not any("experts" in layer.name for layer in found.layers)


def test_a_sketch_larger_than_every_layer_is_refused():
    with pytest.raises(ValueError, match="Expected a `sketch_size` that saves memory for some side wider than 512"):
        planned(sketch="range", sketch_size=4096, sketch_above=512)


def test_a_module_on_several_devices_needs_one_to_be_named():
    model = causal_model()
    model.model.layers[1].mlp.down_proj.to("meta")
    with pytest.raises(ValueError, match=r"Expected a model on one device, .* on cpu, meta"):
        planned(model)
    assert planned(model, device="cpu").layers


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there_needs_an_amount_of_memory():
    with pytest.raises(ValueError, match="Expected `memory` together with device cuda"):
        planned(device="cuda", memory=None)
