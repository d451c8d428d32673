from __future__ import annotations

from importlib import import_module

import pytest
import torch
from expert_cases import COMMON, E, batches, make
from tiny import causal_model, causal_module, token_loader
from transformers import GptOssConfig, GptOssForCausalLM

from fasc_lightning import CompressionForecast, FascCallback, compress
from fasc_lightning.layers import is_compressed
from fasc_lightning.planning import batch_tokens


def test_a_dry_run_plans_and_leaves_the_model_and_the_generator_alone():
    model, state = causal_model(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = compress(model, token_loader(), keep=0.8, progress=False, dry_run=True)
    assert isinstance(found, CompressionForecast)
    assert len(found.layers) == 14
    assert found.parts["activations"] > 0
    assert found.seconds.calibrate > 0
    assert not is_compressed(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dry_run_needs_no_weights():
    with torch.device("meta"):
        model = causal_model()
    found = compress(model, list(token_loader()), rank=0.5, progress=False, dry_run=True)
    assert found.whole["compressed"].parameters < found.whole["dense"].parameters


def test_a_dry_run_refuses_what_a_run_refuses():
    with pytest.raises(TypeError, match=r"write \[batch\]"):
        compress(causal_model(), {"input_ids": torch.zeros(2, 8)}, keep=0.8, dry_run=True)
    with pytest.raises(ValueError, match="Expected a budget of at least"):
        compress(causal_model(), token_loader(), keep=0.01, dry_run=True)


def test_a_dry_run_refuses_memory_that_a_run_would_not_find(monkeypatch):
    monkeypatch.setattr("fasc_lightning.planning._plan.available_memory", lambda device: 10_000)
    with pytest.raises(MemoryError, match=r"Not even one layer fits: the weights take .* What would do: "):
        compress(causal_model(), token_loader(), keep=0.8, dry_run=True)


def test_a_dry_run_refuses_a_model_on_several_devices():
    model = causal_model()
    model.model.layers[1].mlp.down_proj.to("meta")
    with pytest.raises(ValueError, match="on cpu, meta"):
        compress(model, token_loader(), keep=0.8, dry_run=True)


def test_a_dry_run_names_experts_of_an_unknown_kind():
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**COMMON, num_local_experts=E, head_dim=8))
    with pytest.warns(UserWarning, match="experts of a kind that is not known here .* stay dense"):
        found = compress(model, batches(1), keep=0.8, progress=False, dry_run=True)
    assert not any("experts" in layer.name for layer in found.layers)


def test_a_dry_run_plans_for_each_expert_what_a_run_reports():
    model = make("mixtral")
    found = compress(model, batches(1), keep=0.8, progress=False, dry_run=True)
    report = compress(model, batches(1), keep=0.8, refit=False, allocation="fisher", progress=False)
    assert [(layer.name, layer.shape) for layer in found.layers] == [(row.name, row.shape) for row in report.layers]


def test_a_dry_run_prints_its_plan_unless_it_shall_be_quiet(monkeypatch):
    said = []
    # The package's attribute of this name is the function.
    monkeypatch.setattr(import_module("fasc_lightning.compress"), "rank_zero_info", said.append)
    compress(causal_model(), token_loader(), keep=0.8, progress=False, dry_run=True)
    assert said == []
    found = compress(causal_model(), token_loader(), keep=0.8, dry_run=True)
    assert said == [f"\n{found}"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"passes": 3}, {"passes": 3, "update_weights": False}),
        ({"sketch": "range", "sketch_size": 4, "sketch_above": 40},) * 2,
        ({"sketch": "projected"}, {"sketch": "projected", "update_weights": False}),
        ({"refit": False}, {}),
    ],
)
def test_a_dry_run_plans_for_the_options_of_the_run(options, expected):
    found = compress(causal_model(), token_loader(), keep=0.5, progress=False, dry_run=True, **options)
    assert found.options == expected
    assert found.passes == expected.get("passes", 1)


def test_tokens_are_those_of_the_first_batch_times_the_batches():
    assert batch_tokens(token_loader(batch_size=2)) == (32, 128)
    assert batch_tokens([(torch.zeros(3, 4), torch.zeros(3))]) == (0, 0)
    assert batch_tokens([]) == (0, 0)
    assert batch_tokens(iter([{"input_ids": torch.zeros(2, 5)}])) == (10, 0)


def test_the_callback_prints_its_plan_before_the_first_batch(make_trainer, monkeypatch):
    said = []
    monkeypatch.setattr("fasc_lightning.calibration._phase.rank_zero_info", said.append)
    make_trainer(FascCallback(rank=0.5)).fit(causal_module(), token_loader())
    assert "Plan of a compression" in said[0]
    assert "down_proj" in said[0]


@pytest.mark.parametrize(("share", "said"), [(3.7, "passes over the data"), (0.1, "Not even one layer fits")])
def test_a_fit_that_does_not_fit_is_refused_before_the_first_batch(make_trainer, monkeypatch, share, said):
    module = causal_module()
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    monkeypatch.setattr("fasc_lightning.calibration._checks.available_memory", lambda device: 10**9)
    monkeypatch.setattr("fasc_lightning.planning._plan.available_memory", lambda device: int(share * weights))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MemoryError, match="14 layers to fit into") as refused:
        make_trainer(FascCallback(rank=0.5)).fit(module, token_loader())
    assert said in str(refused.value)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
