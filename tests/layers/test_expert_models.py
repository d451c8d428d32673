"""Mixtures from end to end: every backend, precision and fit; folders; what comes after a compression."""

from __future__ import annotations

import copy
import logging

import interrupted
import lightning.pytorch as pl
import pytest
import torch
from expert_cases import MIXTURES, PLACE, K, batches, fused, make
from interrupted import Fits, assert_same
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from fasc_lightning import (
    CausalLMModule,
    Distillation,
    FactorRecovery,
    FascCallback,
    LoraRecovery,
    compress,
    load_compressed,
    plan,
    recover,
)
from fasc_lightning.layers import model_size, split_name, swap_to_dense
from fasc_lightning.layers._fused_experts import is_fused_experts
from fasc_lightning.refit import RefitError
from fasc_lightning.studies.pruning._magnitude import prune_magnitude

OPTIONS = {"keep": 0.6, "refit": False, "allocation": "fisher", "progress": False}
ONLY_EXPERTS = ["w_gate", "w_up", "w_down"]


def assert_untouched(model):
    """No hook, no forward of its own and no attribute of ours is left on a model."""
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not [name for name in vars(module) if name == "forward" or name.startswith("_fasc")]


def tokens_of_experts(report):
    return {layer.name: layer.tokens for layer in report.layers if split_name(layer.name)}


def test_a_plan_of_a_config_names_the_layers_that_a_compression_reports():
    model = make("mixtral")
    dense = model_size(model)
    planned = plan(model.config, keep=0.6, probed=False)
    tried = compress(model, batches(1), dry_run=True, **OPTIONS)
    report = compress(model, batches(2), **OPTIONS)
    names = [layer.name for layer in report.layers]
    assert [layer.name for layer in planned.layers] == [layer.name for layer in tried.layers] == names
    assert planned.whole["dense"].flops_per_token == dense.flops_per_token
    # An expert works on K of E tokens, dense and compressed.
    for forecast in (planned, tried):
        fewer = forecast.targeted["compressed"].flops_per_token / forecast.targeted["dense"].flops_per_token
        assert 0.3 < fewer < 1
    assert "knowledge-heavy experts" in str(report)


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
def test_every_backend_of_experts_gives_the_same_compression(backend):
    model, reference = make("qwen3"), make("qwen3")
    model.set_experts_implementation(backend)
    report, expected = compress(model, batches(2), **OPTIONS), compress(reference, batches(2), **OPTIONS)
    assert tokens_of_experts(report) == tokens_of_experts(expected)
    ids = batches(1)[0]["input_ids"]
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.config._experts_implementation == backend
    assert_untouched(model)
    compressed = model(ids).logits
    swap_to_dense(model)
    for other in ("eager", "grouped_mm", "batched_mm"):  # fused again, they run on any
        model.set_experts_implementation(other)
        torch.testing.assert_close(model(ids).logits, compressed, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, reference = make("mixtral"), make("mixtral")
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    report, expected = compress(model, batches(2), **OPTIONS), compress(reference, batches(2), **OPTIONS)
    assert tokens_of_experts(report) == tokens_of_experts(expected)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))
    assert_untouched(model.model.layers)  # transformers has a hook on the embeddings


def test_a_model_in_half_precision_stays_so_and_reloads(tmp_path):
    make("qwen2").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    compress(model, batches(2), **OPTIONS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "compressed")
    again = load_compressed(tmp_path / "compressed")
    ids = batches(1)[0]["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.fixture
def compressed_experts():
    def compressed(family):
        model = make(family)
        compress(model, batches(2), targets=ONLY_EXPERTS, **OPTIONS)
        return model

    return compressed


@pytest.mark.parametrize("family", MIXTURES)
def test_a_folder_in_which_only_experts_are_compressed_reloads_whole_and_as_a_base_model(
    family, compressed_experts, tmp_path
):
    model, ids = compressed_experts(family), batches(1)[0]["input_ids"]
    model.save_pretrained(tmp_path / "one")
    again = load_compressed(tmp_path / "one")
    again.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert torch.equal(load_compressed(tmp_path / "shards")(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path / "one")
    assert torch.equal(base(ids)[0], model.model(ids)[0])


@pytest.mark.parametrize("family", MIXTURES)
def test_transformers_alone_fails_on_it_instead_of_making_experts_up(family, compressed_experts, tmp_path, monkeypatch):
    compressed_experts(family).save_pretrained(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "fasc")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "fasc")
    for load in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            load.from_pretrained(tmp_path)


def test_its_file_is_read_as_a_state_dict_strictly(compressed_experts, tmp_path):
    model = compressed_experts("qwen3")  # whose files have the names of the model
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), model.parameters(), strict=True))


class Failing(pl.Callback):
    """Raises in a calibration, or once the model is compressed."""

    def __init__(self, late: bool) -> None:
        self.late = late

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self.late:
            raise InterruptedError

    def on_fit_end(self, trainer, pl_module):
        raise InterruptedError


@pytest.mark.parametrize("late", [False, True])
def test_a_fit_that_fails_leaves_the_fused_modules_and_their_forwards(late, make_trainer):
    model = make("qwen2")
    before, state = fused(model), copy.deepcopy(model.state_dict())
    callback = FascCallback(keep=0.6, refit=False, update_weights=False, quantize="int8")
    with pytest.raises(InterruptedError):
        make_trainer(callback, Failing(late)).fit(CausalLMModule(model), DataLoader(batches(2), batch_size=None))
    assert fused(model) is before
    assert_untouched(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rhythm", [1, 2])
def test_experts_are_compressed_at_the_end_of_a_fit_that_trains_and_is_monitored(rhythm, make_trainer):
    model = make("mixtral")
    dense = fused(model).down_proj.detach().clone()
    callback = FascCallback(keep=0.6, refit=False, monitor_every_n_steps=rhythm)
    make_trainer(callback).fit(CausalLMModule(model, learning_rate=1e-2), DataLoader(batches(3), batch_size=None))
    assert not torch.equal(fused(model).layer(0, "w_down").weight.detach()[:], dense[0])
    assert sum(tokens_of_experts(callback.report).values()) == 3 * K * 3 * 4 * 24
    assert {row["layer"] for row in callback.rho_history} >= {f"model.{PLACE}.0.w_up"}
    assert_untouched(model)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_calibration_that_is_killed_goes_on(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(interrupted, "causal_module", lambda family: CausalLMModule(make(family)))
    monkeypatch.setattr("fasc_lightning.calibration._sidecar.SIDECAR_BYTES", 0)
    fits = Fits(make_trainer, tmp_path, family="qwen3", refit=False, allocation="fisher")
    straight = fits.straight(5)
    assert_same(fits.resumed(), straight)


def test_sketched_experts_are_compressed_within_the_budget():
    report = compress(make("mixtral"), batches(1), sketch="range", sketch_size=6, sketch_above=16, **OPTIONS)
    assert report.kept <= 0.6
    assert "borrow from their block's" in str(report)


def test_what_is_borrowed_is_said_and_no_second_warning_is_given(caplog):
    with caplog.at_level(logging.INFO):
        compress(make("mixtral"), batches(1), **{**OPTIONS, "progress": True})  # warnings are errors
    assert "borrow from the pooled moments of their block's experts" in caplog.text


@pytest.mark.parametrize("arm", [LoraRecovery, FactorRecovery])
def test_compressed_experts_are_recovered_and_reload(arm, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    model = make("qwen3")
    data, recovery = batches(2), arm(epochs=3, learning_rate=1e-2)
    report = compress(model, data, recovery=recovery, recovery_held_out=data, **OPTIONS)
    assert report.recovery["held_out_loss"]["after"] < report.recovery["held_out_loss"]["before"]
    assert_untouched(model)
    model.save_pretrained(tmp_path)
    ids = batches(1)[0]["input_ids"]
    assert torch.equal(load_compressed(tmp_path)(ids).logits, model(ids).logits)


# peft's own entry for the fused weights of a mixture, which are no more.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module")
def test_adapters_on_the_factors_of_experts_train_and_merge():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, ids = make("qwen3"), batches(1)[0]["input_ids"]
    compress(model, batches(2), **OPTIONS)
    before = model(ids).logits
    config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if ".experts." in name and p.requires_grad]
    assert trained
    assert all(adapted.get_parameter(name).grad is not None for name in trained)
    expected = adapted(ids).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, before)


def test_a_teacher_of_experts_is_refused_before_any_work_is_done():
    model = make("qwen3")
    with pytest.raises(MisconfigurationException, match=r"other than experts. for a teacher.*teacher=None"):
        compress(model, batches(9), recovery=LoraRecovery(teacher="dense"), **OPTIONS)
    assert is_fused_experts(fused(model))
    compress(model, batches(2), **OPTIONS)
    with pytest.raises(MisconfigurationException, match="other than experts' for a teacher"):
        recover(model, batches(9), recovery=FactorRecovery(teacher=Distillation()), dense=make("qwen3"), progress=False)


def test_a_refinement_of_experts_is_refused_before_any_work_is_done():
    model = make("qwen3")
    with pytest.raises(RefitError, match=r"goes into each expert.*refine_steps=0.*exclude the experts"):
        compress(model, batches(9), recovery=FactorRecovery(refine_steps=2), **OPTIONS)
    assert is_fused_experts(fused(model))
    compress(model, batches(2), **OPTIONS)
    recovery = FactorRecovery(refine_steps=2)
    with pytest.raises(RefitError, match="do not show what goes into each expert"):
        recover(model, batches(9), recovery=recovery, dense=make("qwen3"), progress=False)


def test_a_refit_that_is_left_to_the_model_is_not_done_and_it_is_said(caplog):
    options = {**OPTIONS, "refit": "auto", "progress": True}
    with caplog.at_level(logging.INFO):
        report = compress(make("qwen3"), batches(4), **options)
    assert report.refit is None
    assert "ot refitted (harmless): experts are compressed." in caplog.text


def test_magnitude_pruning_takes_experts_in_place():
    model = make("mixtral")
    result = prune_magnitude(model, keep=0.5)
    experts = fused(model)
    assert isinstance(experts.down_proj, torch.nn.Parameter)
    assert (experts.down_proj == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert result.zeros >= 0.49 * result.parameters_before
