"""Checkpoints of every kind, loaded into modules of every kind: strictly, or not at all."""

from __future__ import annotations

import copy
import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import Classifier, causal_model, causal_module, feature_loader, mlp, token_loader
from torch import nn
from watching import assert_untouched, state

from fasc_lightning import CausalLMModule, FascCallback, apply_plan, compression_plan, match_checkpoint, quantize
from fasc_lightning.layers import LowRankLinear, is_compressed, swap_to_dense
from fasc_lightning.models._checkpoints import match_state_dict

# Lightning's notice that a Trainer lacks callbacks of the one that saved a checkpoint, as most here do.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

BECAME_DENSE = "had 1[0-9] compressed layers and is dense now"


@pytest.fixture
def fitted(make_trainer, tmp_path):
    """A compressed module, its Trainer, and the paths of a dense and of a compressed checkpoint."""
    module = causal_module()
    best = ModelCheckpoint(tmp_path / "best", monitor="train_loss")
    trainer = make_trainer(FascCallback(keep=0.6, refit=False), best, enable_checkpointing=True)
    trainer.fit(module, token_loader())
    assert is_compressed(module)
    trainer.save_checkpoint(tmp_path / "compressed.ckpt")
    return module, trainer, best.best_model_path, str(tmp_path / "compressed.ckpt")


def saved(path):
    return torch.load(path, weights_only=True)["state_dict"]


def assert_holds(module, path):
    weights = saved(path)
    assert list(module.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("function", ["test", "validate"])
def test_the_dense_best_checkpoint_loads_over_the_compressed_module(fitted, function):
    module, trainer, dense, _ = fitted
    plan = compression_plan(module)
    module.test_step = module.validation_step
    with pytest.warns(UserWarning, match=BECAME_DENSE):
        getattr(trainer, function)(module, token_loader(), ckpt_path="best")
    assert not is_compressed(module)
    assert_holds(module, dense)
    assert module.fasc_plan == plan
    assert not hasattr(module.model.config, "quantization_config")
    apply_plan(module, module.fasc_plan)
    assert compression_plan(module) == plan
    assert not hasattr(module, "fasc_plan")
    assert not module._load_state_dict_pre_hooks


def test_a_compressed_checkpoint_brings_the_factors_back(fitted):
    module, trainer, dense, compressed = fitted
    with pytest.warns(UserWarning, match=BECAME_DENSE):
        trainer.validate(module, token_loader(), ckpt_path=dense)
    trainer.validate(module, token_loader(), ckpt_path=compressed)
    assert_holds(module, compressed)
    assert module.model.config.quantization_config.provenance["method"] == "fasc"
    assert not hasattr(module, "fasc_plan")


def test_a_compressed_checkpoint_loads_into_a_fresh_dense_module(fitted, make_trainer):
    module, _, _, compressed = fitted
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = module.eval()(input_ids=ids).logits
    fresh = causal_module()
    make_trainer().validate(fresh, token_loader(), ckpt_path=compressed)
    assert_holds(fresh, compressed)
    assert torch.equal(fresh.eval()(input_ids=ids).logits, expected)


def test_load_from_checkpoint(fitted):
    _, _, dense, compressed = fitted
    assert_holds(CausalLMModule.load_from_checkpoint(compressed, model=causal_model()), compressed)
    small = CausalLMModule.load_from_checkpoint(compressed, model=causal_model()).model
    with pytest.warns(UserWarning, match=BECAME_DENSE):
        assert_holds(CausalLMModule.load_from_checkpoint(dense, model=small), dense)


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_quantised_checkpoint_loads_into_modules_of_every_kind(make_trainer, tmp_path, kind, family):
    module = causal_module(family)
    trainer = make_trainer(FascCallback(keep=0.95, refit=False, quantize=kind), enable_checkpointing=True)
    trainer.fit(module, token_loader())
    trainer.save_checkpoint(tmp_path / "int8.ckpt")
    plan = compression_plan(module)
    assert {spec["layout"] for spec in plan.values()} == {"pivot", "dense"}
    assert {spec["quantize"] for spec in plan.values()} == {kind}
    other = {"int8": "int8-dynamic", "int8-dynamic": "int8"}[kind]
    factored, rounded = causal_module(family), causal_module(family)
    apply_plan(factored, {name: {"rank": 2, "layout": "factors"} for name in plan})
    apply_plan(rounded, {name: {**spec, "quantize": other} for name, spec in plan.items()})
    for fresh in (causal_module(family), factored, rounded):
        make_trainer().validate(fresh, token_loader(), ckpt_path=tmp_path / "int8.ckpt")
        assert_holds(fresh, tmp_path / "int8.ckpt")
        assert compression_plan(fresh) == plan


def test_floats_load_over_int8_and_are_trained_again(fitted, make_trainer):
    module, trainer, dense, compressed = fitted
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = module.eval()(input_ids=ids).logits
    quantize(module)
    trainer.validate(module, token_loader(), ckpt_path=compressed)
    assert_holds(module, compressed)
    assert torch.equal(module.eval()(input_ids=ids).logits, expected)
    assert all(p.requires_grad for p in module.parameters())
    quantize(module)
    with pytest.warns(UserWarning, match=BECAME_DENSE):
        trainer.validate(module, token_loader(), ckpt_path=dense)
    assert_holds(module, dense)
    assert all(p.requires_grad for p in module.parameters())


def test_checkpoints_of_a_training_of_the_factors_load(fitted, make_trainer, tmp_path):
    """Saved and resumed by Trainers that know nothing of compression."""
    module, _, _, compressed = fitted
    plan = compression_plan(module)
    trainer = make_trainer(ModelCheckpoint(tmp_path / "more", save_last=True), enable_checkpointing=True)
    trainer.fit(module, token_loader())
    assert compression_plan(module) == plan
    assert any(not torch.equal(value, saved(compressed)[name]) for name, value in module.state_dict().items())
    last = str(tmp_path / "more" / "last.ckpt")
    fresh = causal_module()
    resumed = make_trainer(max_epochs=2)
    resumed.fit(fresh, token_loader(), ckpt_path=last)
    assert resumed.global_step == 2 * trainer.global_step
    assert compression_plan(fresh) == plan
    assert len(resumed.optimizers[0].state) == len(list(fresh.parameters()))


def test_a_fit_that_was_compressed_is_not_compressed_again_when_it_is_resumed(fitted, make_trainer, caplog):
    module, trainer, _, compressed = fitted
    report = trainer.callbacks[0].report
    for epochs in (1, 2):
        callback = FascCallback(keep=0.6, refit=False, monitor_every_n_steps=None)
        again = make_trainer(callback, max_epochs=epochs)
        fresh = causal_module()
        with caplog.at_level("INFO"):
            again.fit(fresh, token_loader(), ckpt_path=compressed)
        assert "has been compressed already" in caplog.text
        assert compression_plan(fresh) == compression_plan(module)
        assert callback.report.to_dict() == report.to_dict()
        assert again.global_step == epochs * 4
        unchanged = all(torch.equal(v, module.state_dict()[name]) for name, v in fresh.state_dict().items())
        assert unchanged is (epochs == 1)


def test_a_compressed_module_is_still_refused_by_a_budget_and_taken_by_a_monitor(fitted, make_trainer):
    module, *_ = fitted
    with pytest.raises(MisconfigurationException, match="holds compressed layers already"):
        make_trainer(FascCallback(keep=0.6)).fit(module, token_loader())
    assert not module._load_state_dict_pre_hooks
    callback = FascCallback(monitor_every_n_steps=2)
    make_trainer(callback).fit(module, token_loader())
    assert len(callback.rho_history) > 0


def test_a_dense_checkpoint_lets_a_compressed_module_be_fitted_and_compressed_again(fitted, make_trainer):
    module, _, dense, _ = fitted
    callback = FascCallback(keep=0.5, refit=False)
    with pytest.warns(UserWarning, match=BECAME_DENSE):
        make_trainer(callback, max_epochs=2).fit(module, token_loader(), ckpt_path=dense)
    assert is_compressed(module)
    assert callback.report.kept <= 0.5


def test_a_report_without_compressed_weights_does_not_stop_a_compression(fitted, make_trainer, tmp_path):
    """A dense module may be saved by a Trainer whose callback has compressed it before."""
    module, trainer, *_ = fitted
    with pytest.warns(UserWarning, match=BECAME_DENSE):
        trainer.validate(module, token_loader(), ckpt_path="best")
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    callback = FascCallback(keep=0.6, refit=False)
    fresh = causal_module()
    make_trainer(callback, max_epochs=2).fit(fresh, token_loader(), ckpt_path=tmp_path / "dense.ckpt")
    assert is_compressed(fresh)


class Own(Classifier):
    """A LightningModule of one's own, with the line that the documentation asks for."""

    def __init__(self) -> None:
        super().__init__(mlp().net)

    def on_load_checkpoint(self, checkpoint):
        match_checkpoint(self, checkpoint)

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))


def test_modules_of_ones_own(make_trainer, tmp_path):
    module = Own()
    trainer = make_trainer(FascCallback(keep=0.6))
    trainer.fit(module, feature_loader())
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    assert_holds(Own.load_from_checkpoint(tmp_path / "own.ckpt"), tmp_path / "own.ckpt")
    fresh = Own()
    make_trainer().validate(fresh, feature_loader(), ckpt_path=tmp_path / "own.ckpt")
    assert_holds(fresh, tmp_path / "own.ckpt")


def test_modules_without_that_line_need_the_callback_or_the_plan(make_trainer, tmp_path, caplog):
    caplog.set_level(logging.INFO)

    class Plain(Own):
        on_load_checkpoint = pl.LightningModule.on_load_checkpoint

    trainer = make_trainer(FascCallback(keep=0.6))
    trainer.fit(Plain(), feature_loader())
    path = tmp_path / "plain.ckpt"
    for _ in range(2):
        trainer.save_checkpoint(path)
    hint = "Plain.load_from_checkpoint and for other Trainers, Plain needs a method: def on_load_checkpoint"
    assert caplog.text.count(hint) == 1
    with pytest.raises(RuntimeError, match="Missing key"):
        Plain.load_from_checkpoint(path)
    by_callback = Plain()
    make_trainer(FascCallback(keep=0.6)).validate(by_callback, feature_loader(), ckpt_path=path)
    assert_holds(by_callback, path)
    by_plan = Plain()
    apply_plan(by_plan, trainer.callbacks[0].report.plan, saved(path))
    assert_holds(by_plan, path)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("layout", ["pivot", "factors"])
def test_layers_of_all_kinds_go_there_and_back(family, layout):
    model = causal_model(family)
    linear = {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"}
    dense = state(model)
    small = copy.deepcopy(model)
    apply_plan(small, {name: {"rank": 5, "layout": layout} for name in linear})
    match_state_dict(model, small.state_dict())
    model.load_state_dict(small.state_dict())
    assert compression_plan(model) == compression_plan(small)
    with pytest.warns(UserWarning, match="is dense now"):
        match_state_dict(model, dense)
    model.load_state_dict(dense)
    assert {n: type(m) for n, m in model.named_modules() if n in linear} == {n: type(m) for n, m in linear.items()}
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (9, 5)])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_form_of_a_layer_is_read_from_its_weights(shape, side, bias):
    m, n = shape
    for rank in range(1, min(m, n)):
        small = nn.Sequential(nn.Linear(n, m, bias))
        apply_plan(small, {"0": {"rank": rank, "layout": "pivot", "side": side}})
        fresh = nn.Sequential(nn.Linear(n, m, bias))
        match_state_dict(fresh, small.state_dict())
        assert compression_plan(fresh) == compression_plan(small)
        assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in small.state_dict().items())


def test_another_compression_replaces_the_one_that_is_there():
    small, smaller = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))
    apply_plan(small, {"0": {"rank": 4, "layout": "pivot"}, "1": {"rank": 4, "layout": "factors"}})
    apply_plan(smaller, {"0": {"rank": 2, "layout": "factors"}})
    match_state_dict(small, smaller.state_dict())
    small.load_state_dict(smaller.state_dict())
    assert compression_plan(small) == compression_plan(smaller)


def test_a_layer_under_two_names_is_one_layer():
    def twice():
        layer = nn.Linear(6, 6)
        return nn.ModuleDict({"a": layer, "b": layer})

    small, fresh = twice(), twice()
    apply_plan(small, {"a": {"rank": 2, "layout": "pivot"}})
    match_state_dict(fresh, small.state_dict())
    fresh.load_state_dict(small.state_dict())
    assert fresh["a"] is fresh["b"]
    assert compression_plan(fresh) == compression_plan(small)


def test_types_and_flags_stay_those_of_the_module():
    small = nn.Sequential(nn.Linear(8, 8))
    apply_plan(small, {"0": {"rank": 2, "layout": "pivot"}})
    fresh = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16).requires_grad_(False).eval()
    match_state_dict(fresh, small.state_dict())
    fresh.load_state_dict(small.state_dict())
    assert {p.dtype for p in fresh.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in fresh.parameters())
    assert not fresh[0].training
    assert torch.equal(fresh[0].basis.weight, small[0].basis.weight.to(torch.bfloat16))


def test_modules_on_the_meta_device_get_their_layers_and_wait_for_the_weights():
    small = nn.Sequential(nn.Linear(8, 8))
    apply_plan(small, {"0": {"rank": 2, "layout": "pivot"}})
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(8, 8))
    match_state_dict(fresh, small.state_dict())
    assert all(p.is_meta for p in fresh.parameters())
    fresh.load_state_dict(small.state_dict(), assign=True)
    assert torch.equal(fresh[0].to_weight(), small[0].to_weight())


def edited(edit):
    small = causal_model()
    up = "model.layers.0.mlp.up_proj"
    apply_plan(small, {up: {"rank": 4, "layout": "pivot"}})
    weights = dict(small.state_dict())
    if edit == "another name":
        weights = {name.replace("layers.0", "layers.7"): value for name, value in weights.items()}
    elif edit == "another shape":
        weights[f"{up}.basis.weight"] = torch.zeros(4, 40)
    elif edit == "one part missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif edit == "one part too many":
        weights["model.layers.1.mlp.up_proj.bias"] = torch.zeros(48)
    elif edit == "another shape elsewhere":
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 31)
    elif edit == "not linear":
        weights |= {f"model.norm.{part}.weight": torch.zeros(4, 4) for part in ("factor_in", "factor_out")}
    return weights


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("another name", r"compressed layers that are not there: model\.layers\.7\.mlp\.up_proj"),
        ("another shape", r"compressed from a weight of shape \(48, 32\).*'basis.weight': \(4, 40\)"),
        ("one part missing", r"missing: model\.layers\.1\.mlp\.up_proj\.weight"),
        ("one part too many", r"unexpected: model\.layers\.1\.mlp\.up_proj\.bias"),
        ("another shape elsewhere", r"of another shape: model\.layers\.1\.mlp\.up_proj\.weight \(48, 31\) instead"),
        ("not linear", r"unexpected: model\.norm\.factor_in\.weight, model\.norm\.factor_out\.weight"),
    ],
)
def test_weights_of_another_model_change_nothing(edit, message):
    model = causal_model()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        match_checkpoint(model, {"state_dict": edited(edit)})
    assert_untouched(model, before)
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model, "fasc_plan")


def test_a_checkpoint_of_another_module_fails_a_trainer_and_leaves_the_module(make_trainer, tmp_path):
    trainer = make_trainer(FascCallback(keep=0.6, refit=False))
    trainer.fit(causal_module(num_hidden_layers=3), token_loader())
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    module = causal_module()
    before = state(module)
    with pytest.raises(ValueError, match="compressed layers that are not there"):
        make_trainer(FascCallback(keep=0.6)).fit(module, token_loader(), ckpt_path=tmp_path / "three.ckpt")
    assert_untouched(module, before)
    assert not module._load_state_dict_pre_hooks


def test_modules_that_load_parts_of_a_checkpoint_may_lack_others():
    module = causal_module()
    module.strict_loading = False
    weights = {f"model.{name}": value for name, value in edited("one part missing").items()}
    match_checkpoint(module, {"state_dict": weights})
    assert module.load_state_dict(weights, strict=False).missing_keys == ["model.model.layers.1.mlp.up_proj.weight"]
    assert list(compression_plan(module)) == ["model.model.layers.0.mlp.up_proj"]


def test_names_of_ones_own_are_left_alone():
    class Owned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor_in, self.factor_out = nn.Linear(4, 2), nn.Linear(2, 4)

    module = nn.ModuleDict({"own": Owned(), "small": LowRankLinear(4, 4, 2)})
    before = module["own"]
    dense = nn.ModuleDict({"own": Owned(), "small": nn.Linear(4, 4)})
    match_state_dict(dense, module.state_dict())
    dense.load_state_dict(module.state_dict())
    assert isinstance(dense["small"], LowRankLinear)
    assert type(before) is type(dense["own"])


def test_weight_averaging_loads_its_own_weights_besides(make_trainer, tmp_path):
    paths = ModelCheckpoint(tmp_path, save_last=True)
    module = causal_module()
    make_trainer(WeightAveraging(), FascCallback(keep=0.6, refit=False), paths, enable_checkpointing=True).fit(
        module, token_loader()
    )
    callback = FascCallback(keep=0.6, refit=False)
    fresh = causal_module()
    make_trainer(WeightAveraging(), callback, max_epochs=2).fit(fresh, token_loader(), ckpt_path=paths.last_model_path)
    assert is_compressed(fresh)


def test_to_dense_and_back_by_hand(fitted):
    module, _, _, compressed = fitted
    swap_to_dense(module)
    match_checkpoint(module, {"state_dict": saved(compressed)})
    module.load_state_dict(saved(compressed))
    assert_holds(module, compressed)
