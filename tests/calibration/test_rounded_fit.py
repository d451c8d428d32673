"""Fits that round: alone and on two processes, in several passes, after an interruption, refitted, and what fails."""

from __future__ import annotations

import json
import math

import pytest
import torch
from interrupted import Fits, plain
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from processes import run_script
from tiny import Classifier, causal_model, causal_module, feature_loader, made_once, mlp, token_loader
from watching import assert_no_hooks, assert_untouched, state

from fasc_lightning import FascCallback, apply_plan, compress, load_compressed, plan, save_compressed, to_dense
from fasc_lightning.calibration import _finish, _passes
from fasc_lightning.compression import CompressionReport, measure_losses
from fasc_lightning.layers import compressed_layers, is_compressed, linear_weight, quantization_of, select_layers
from fasc_lightning.layers._quantized_layers import DenseLinear
from fasc_lightning.options import Quantize, _compression
from fasc_lightning.refit._shares import Change
from fasc_lightning.rounding import to_nearest

# Lightning's notice of a folder in which an interrupted fit has left its checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

IDS = torch.arange(3, 19)[None]
BUDGETS = [{"quantize": "int4"}, {"size": 0.4}]


def fit(make_trainer, module=None, trainer=None, loader=None, **options):
    module = module or causal_module()
    callback = FascCallback(**{"update_weights": False, **options})
    make_trainer(callback, **(trainer or {})).fit(module, loader or token_loader(samples=16))
    return module, callback.report


@made_once
def compressed(**options):
    """A model that one call compresses, its report, and what is counted of both."""
    model = causal_model().eval()
    return model, compress(model, token_loader(samples=16), progress=False, **options)


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.parametrize("update_weights", [True, False])
@pytest.mark.parametrize("options", BUDGETS)
def test_a_fit_rounds_its_layers_whether_it_trains_or_not(make_trainer, options, update_weights):
    module = causal_module()
    names, before = list(select_layers(module)), state(module)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    _, report = fit(make_trainer, module, update_weights=update_weights, **options)
    assert [row.name for row in report.layers] == names
    assert report.kept == 1
    for row in report.layers:
        layer = module.get_submodule(row.name)
        assert (row.bits is not None) is isinstance(layer, DenseLinear)
        assert row.layout == "dense"
        assert row.rank == min(row.shape)
    if "size" in options:
        assert sum(row.nbytes for row in report.layers) <= 0.4 * sum(2 * math.prod(row.shape) for row in report.layers)
    else:
        assert {row.bits for row in report.layers} == {4}
    # What is not rounded trains as before; codes and their scales do not.
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad is flags.get(name, False)
    trained = any(not torch.equal(before[name], value) for name, value in module.state_dict().items() if name in before)
    assert trained is update_weights
    assert_no_hooks(module)
    assert torch.isfinite(module.model(IDS).logits).all()


def test_the_trainer_and_one_call_round_alike(make_trainer):
    module, first = fit(make_trainer, size=0.4)
    model, second = compressed(size=0.4)
    assert same(module.model, model)
    assert [row.loss for row in first.layers] == [row.loss for row in second.layers]


@pytest.mark.parametrize("options", [{"quantize": "int3"}, {"size": 0.4}, {"size": 0.3, "token_fraction": 0.5}])
def test_several_passes_give_the_codes_of_one(options):
    (one, first), (three, second) = compressed(**options), compressed(passes=3, **options)
    assert same(one, three)
    assert [plain(row) for row in first.layers] == [plain(row) for row in second.layers]
    assert second.moments_bytes < 0.6 * first.moments_bytes


def test_a_budget_is_spent_where_the_model_loses_most():
    even, spent = compressed(size=0.36, allocation="uniform")[1], compressed(size=0.36, allocation="fisher")[1]
    assert len({row.bits for row in even.layers}) == 1
    assert len({row.bits for row in spent.layers}) > 1
    assert sum(row.loss for row in spent.layers) < sum(row.loss for row in even.layers)


def test_codes_do_not_depend_on_the_share_of_gradients_that_is_summed(monkeypatch):
    shared, report = compressed(quantize="int4")
    monkeypatch.setattr(_compression, "OUTPUT_SHARE", 1.0)
    whole = causal_model().eval()
    exact = compress(whole, token_loader(samples=16), progress=False, quantize="int4")
    assert same(shared, whole)
    losses = [(a.loss, b.loss) for a, b in zip(report.layers, exact.layers, strict=True)]
    assert any(a != b for a, b in losses)
    assert all(a == pytest.approx(b, rel=0.5) for a, b in losses)


def test_a_batch_without_gradients_changes_no_layer(make_trainer):

    class Weighted(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (batch_idx != 1)

    weighted = Weighted(mlp().net)
    _, report = fit(make_trainer, weighted, quantize="int4", loader=feature_loader(samples=256, batch_size=64))
    assert all(row.loss > 0 for row in report.layers)


def test_only_a_size_needs_measured_losses(make_trainer, monkeypatch):
    calls = []

    def watch(model, layers, approximations, *others):
        found = measure_losses(model, layers, approximations, *others)
        calls.append((approximations, found))
        return found

    monkeypatch.setattr("fasc_lightning.calibration._replay.measure_losses", watch)
    fit(make_trainer, quantize="int4")
    fit(make_trainer, size=0.4, allocation="fisher")
    assert calls == []
    _, report = fit(make_trainer, size=0.4)
    ((approximations, found),) = calls
    predicted = {row.name: row.loss for row in report.layers}
    ratios = torch.tensor([found[name] / predicted[name] for name in approximations if predicted[name] > 0])
    assert 0.2 < ratios.median() < 5


def test_the_same_seed_gives_the_same_codes_and_another_one_others():
    options = {"quantize": "int3", "token_fraction": 0.3}
    first, again, other = (compressed(seed=seed, **options)[0] for seed in (0, 0, 1))
    fresh = causal_model().eval()
    compress(fresh, token_loader(samples=16), progress=False, seed=0, **options)
    assert same(first, again)
    assert same(first, fresh)
    assert not same(first, other)


def test_nearest_numbers_are_what_they_say_and_calibrated_ones_lose_less():
    dense = dict(causal_model().named_modules())
    model, nearest = compressed(quantize=Quantize(3, 16, rounding="nearest"))
    for name, layer in compressed_layers(model).items():
        grid = quantization_of(layer)
        assert torch.equal(layer.to_weight(), to_nearest(dense[name].weight.detach(), grid).dequantize())
    _, calibrated = compressed(quantize=Quantize(3, 16))
    assert all(a.loss <= b.loss for a, b in zip(calibrated.layers, nearest.layers, strict=True))
    assert sum(row.loss for row in calibrated.layers) < 0.8 * sum(row.loss for row in nearest.layers)


@pytest.mark.parametrize("options", [{"size": 0.4}, {"quantize": "int8", "refit": True}])
def test_two_processes_end_with_the_same_model(tmp_path, options):
    def run(devices):
        run_script("ddp_rounded.py", devices, devices, tmp_path, json.dumps(options), processes=devices)
        return [torch.load(tmp_path / f"{devices}-{rank}.pt", weights_only=True) for rank in range(devices)]

    first, second = run(2)
    assert list(first["state"]) == list(second["state"])
    assert all(torch.equal(first["state"][name], value) for name, value in second["state"].items())
    assert first["bits"] == second["bits"]
    if "refit" in options:
        assert first["refit"]["batches"] == {"fit": 2, "held": 2}
        assert second["refit"] is None
        return
    (one,) = run(1)
    # Sums in another order may decide a tie in another way.
    assert sum(first["bits"][name] != bits for name, bits in one["bits"].items()) <= 2
    assert sum(first["losses"].values()) == pytest.approx(sum(one["losses"].values()), rel=0.1)


@pytest.mark.parametrize("options", [{"size": 0.4}, {"quantize": "int3", "update_weights": True}])
def test_a_fit_that_was_killed_and_goes_on_ends_with_the_same_codes(make_trainer, tmp_path, options):
    fits = Fits(make_trainer, tmp_path, keep=None, **options)
    module, callback = fits.straight(5)
    resumed, again = fits.resumed()
    assert same(module, resumed)
    assert again.batches < callback.batches
    assert [plain(row) for row in callback.report.layers] == [plain(row) for row in again.report.layers]


def test_a_checkpoint_of_a_compressed_fit_is_not_compressed_again(make_trainer, tmp_path):
    callback, module = FascCallback(size=0.4, update_weights=False), causal_module()
    trainer = make_trainer(callback, enable_checkpointing=True)
    trainer.fit(module, token_loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    other, restored = causal_module(), FascCallback(size=0.4, update_weights=False)
    again = make_trainer(restored, max_epochs=2, enable_checkpointing=True)
    again.fit(other, token_loader(), ckpt_path=tmp_path / "end.ckpt")
    assert [plain(row) for row in restored.report.layers] == [plain(row) for row in callback.report.layers]
    assert {name for name in module.state_dict() if "packed" in name} <= set(other.state_dict())
    for name, layer in compressed_layers(module).items():
        assert torch.equal(layer.to_weight(), other.get_submodule(name).to_weight())


@pytest.mark.parametrize(("options", "accepted"), [({"quantize": "int2"}, True), ({"size": 0.3}, False)])
def test_a_refit_lowers_the_loss_of_rounded_layers_or_is_put_back(make_trainer, monkeypatch, options, accepted):
    if accepted:
        monkeypatch.setattr(Change, "is_gain", True)  # random weights have little to gain
    layers = {}
    replace = _finish.swap_modules

    def swapped(module, replacements):
        found = replace(module, replacements)
        layers.update(replacements)
        return found

    monkeypatch.setattr(_finish, "swap_modules", swapped)
    refitted, report = fit(make_trainer, refit=True, **options)
    plain_one, without = fit(make_trainer, refit=False, **options)
    assert without.refit is None
    assert report.refit["batches"] == {"fit": 6, "held": 2}
    assert [row.bits for row in report.layers] == [row.bits for row in without.layers]
    for name, layer in compressed_layers(refitted).items():
        other = plain_one.get_submodule(name)
        assert quantization_of(layer) == quantization_of(other)
        assert {k: v.dtype for k, v in layer.state_dict().items()} == {
            k: v.dtype for k, v in other.state_dict().items()
        }
        flags = {name: p.requires_grad for name, p in layer.named_parameters()}
        assert flags == {name: p.requires_grad for name, p in other.named_parameters()}
    if accepted:
        assert report.refit["layers"] > 0
        assert not same(refitted, plain_one)
    elif report.refit["reverted"] or report.refit["layers"] == 0:
        assert same(refitted, plain_one)
    else:
        assert report.refit["loss"]["after"] < report.refit["loss"]["before"]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("options", "refits"),
    [
        ({"quantize": "int4"}, False),
        ({"quantize": "int8"}, False),
        ({"quantize": "int2"}, True),
        ({"quantize": Quantize(2, rounding="nearest")}, False),
        ({"quantize": "int2", "passes": 2}, False),
        ({"size": 0.3}, False),
        ({"size": 0.24}, True),
        ({"size": "20KB"}, False),
        ({"size": "16KB"}, True),
    ],
    ids=str,
)
def test_few_bits_are_refitted_by_default(make_trainer, options, refits):
    _, report = fit(make_trainer, trainer={"max_epochs": options.get("passes", 1)}, **options)
    assert (report.refit is not None) is refits


def test_a_refit_keeps_the_layers_themselves(monkeypatch):
    from refit_cases import compressed_case

    from fasc_lightning.layers import rounded_layer, swap_modules
    from fasc_lightning.refit import RefitOptions, refit
    from fasc_lightning.refit._shares import Change

    monkeypatch.setattr(Change, "is_gain", True)  # two batches check, too few to tell this gain from noise
    case = compressed_case()
    grid = Quantize(3, 16).grid
    swap_modules(case.model, case.dense)
    rounded = {
        name: rounded_layer(layer, to_nearest(linear_weight(layer).detach(), grid))
        for name, layer in case.dense.items()
    }
    dense = swap_modules(case.model, rounded)
    report = refit(case.model, dense, case.gradients, case.batches, options=RefitOptions(anchors=(1.0,)))
    # Calibrated codes in the place of the nearest numbers: there is much to gain.
    assert not report.reverted
    assert report.loss_after < report.loss_before
    assert report.accepted > 7
    for name, layer in rounded.items():
        assert case.model.get_submodule(name) is layer
        assert quantization_of(layer) == grid
    changed = [name for name, layer in rounded.items() if not torch.equal(
        layer.to_weight(), to_nearest(linear_weight(dense[name]).detach(), grid).dequantize()
    )]  # fmt: skip
    assert len(changed) == report.accepted


FAILING = [
    ("fasc_lightning.calibration._passes.round_layers", {}),
    ("fasc_lightning.calibration._finish.build_rounded", {}),
    ("fasc_lightning.compression._rounding.rounded_layer", {}),
    ("fasc_lightning.calibration._replay.measure_losses", {}),
    ("fasc_lightning.calibration._finish.attach_config", {}),
    ("fasc_lightning.refit._in_fit.refit", {"refit": True}),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("place", "options"), FAILING)
def test_an_exception_in_the_middle_leaves_the_module_as_it_was(make_trainer, monkeypatch, place, options):
    def fail(*args, **kwargs):
        raise OSError("no")

    module = causal_module()
    before, flags = state(module), {name: p.requires_grad for name, p in module.named_parameters()}
    monkeypatch.setattr(place, fail)
    with pytest.raises(OSError, match="no"):
        fit(make_trainer, module, size=0.4, **options)
    assert_untouched(module, before, flags)
    monkeypatch.undo()
    fit(make_trainer, module, quantize="int8")
    assert is_compressed(module)


def test_an_exception_between_two_passes_leaves_the_module_as_it_was(make_trainer, monkeypatch):
    left, once = [2], _passes.round_layers

    def twice(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise OSError("no")
        return once(*args, **kwargs)

    monkeypatch.setattr(_passes, "round_layers", twice)
    module = causal_module()
    before = state(module)
    with pytest.raises(OSError, match="no"):
        fit(make_trainer, module, {"max_epochs": 3}, size=0.4, passes=3)
    assert_untouched(module, before)


@pytest.mark.parametrize("options", [*BUDGETS, {"quantize": "int8"}, {"keep": 0.8, "quantize": "int8"}])
def test_a_report_survives_json_and_its_plan_makes_the_same_layers(options):
    model, report = compressed(**options)
    content = report.to_dict()
    again = CompressionReport.from_dict(json.loads(json.dumps(content)))
    assert again.to_dict() == content
    assert [plain(row) for row in again.layers] == [plain(row) for row in report.layers]
    assert again.plan == report.plan
    assert str(again) == str(report)
    fresh = causal_model().eval()
    apply_plan(fresh, json.loads(json.dumps(again.plan)))
    for name, layer in compressed_layers(model).items():
        other = fresh.get_submodule(name)
        assert type(other) is type(layer)
        assert quantization_of(other) == quantization_of(layer)
    assert compressed_layers(fresh).keys() == compressed_layers(model).keys()
    fresh.load_state_dict(model.state_dict())  # strictly
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    given = causal_model().eval()
    apply_plan(given, report.plan, model.state_dict())
    assert torch.equal(given(IDS).logits, model(IDS).logits)


def test_damaged_bits_of_a_report_are_refused():
    content = compressed(size=0.4)[1].to_dict()
    row = next(row for row in content["layers"] if isinstance(row.get("quantize"), dict))
    row["quantize"]["bits"] = 5
    with pytest.raises(ValueError, match="a quantisation"):
        CompressionReport.from_dict(content)


def test_reports_are_printed_with_bits_and_bytes():
    text = str(compressed(size=0.4)[1])
    assert " of the targeted layers' bytes in 16 bits kept" in text
    assert "bits" in text
    assert "rank / full" not in text
    assert " x " in text
    _, uniform = compressed(quantize="int3")
    lines = [line for line in str(uniform).splitlines() if line.startswith("│ q_proj")]
    assert lines[0].split("│")[4].strip() == "3"
    assert {row.bits for row in uniform.layers} == {3}
    assert {row.bits for row in compressed(quantize="int8")[1].layers} == {8}
    ranked = compressed(keep=0.8)[1]
    assert "rank / full" in str(ranked)
    assert {row.bits for row in ranked.layers} == {None}


def test_compressing_twice_is_refused_as_with_ranks(make_trainer):
    model, _ = compressed(quantize="int4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for options in ({"quantize": "int3"}, {"size": 0.2}, {"keep": 0.5}):
        with pytest.raises(MisconfigurationException, match="already, and compressing twice loses quality"):
            compress(model, token_loader(), progress=False, **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_rounded_model_generates_is_made_dense_and_is_saved(tmp_path):
    model, _ = compressed(size=0.4)
    expected, ids = model(IDS).logits, model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert ids.shape[1] > IDS.shape[1]
    save_compressed(model, tmp_path)
    torch.testing.assert_close(load_compressed(tmp_path).eval()(IDS).logits, expected)
    to_dense(model)
    assert not is_compressed(model)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), ids)


def test_rho_is_monitored_beside_a_size(make_trainer):
    module, callback = causal_module(), FascCallback(size=0.4, monitor_every_n_steps=2, monitor_tokens=64)
    make_trainer(callback).fit(module, token_loader(samples=16))
    assert callback.rho_history.steps
    assert is_compressed(module)
    assert all(row.rho == row.rho for row in callback.report.layers if "layers.0" in row.name and "up" in row.name)


def test_modules_that_are_not_of_transformers_are_rounded(make_trainer):
    module = mlp()
    callback = FascCallback(size=0.6, update_weights=False, targets="all-linear")
    make_trainer(callback).fit(module, feature_loader())
    assert is_compressed(module)
    assert torch.isfinite(module(torch.randn(4, 12))).all()
    assert sum(row.nbytes for row in callback.report.layers) <= 0.6 * sum(
        2 * math.prod(row.shape) for row in callback.report.layers
    )


@pytest.mark.parametrize(
    ("options", "bits"),
    [({"size": 0.43}, 4), ({"size": 1.0}, None), ({"size": "1MB"}, None), ({"quantize": "int3"}, 3)],
)
def test_a_plan_and_a_dry_run_forecast_the_bits_of_a_uniform_allocation(options, bits):
    model = causal_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forecasts = [
        plan(model, memory="1GB", probed=False, update_weights=False, **options),
        compress(model, token_loader(), dry_run=True, progress=False, **options),
    ]
    for found in forecasts:
        assert {layer.bits for layer in found.layers} == {bits}
        assert ("bits are those of a uniform" in str(found)) is (bits is not None)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    _, report = compressed(allocation="uniform", **options)
    assert {row.bits for row in report.layers} == {bits}
    assert {found.whole["compressed"].bytes for found in forecasts} == {report.whole["compressed"].bytes}
    with pytest.raises(ValueError, match="Expected a `size` of at least"):
        plan(model, memory="1GB", probed=False, size=0.01)
