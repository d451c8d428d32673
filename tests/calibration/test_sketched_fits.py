from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import causal_module, token_loader
from watching import RecordingCallback, state

from fasc_lightning import CompressionReport, FascCallback, compress
from fasc_lightning.layers import is_compressed


def fitted(make_trainer, **options):
    torch.manual_seed(0)
    module, callback = causal_module(), FascCallback(rank=0.25, **options)
    make_trainer(callback, max_epochs=1).fit(module, token_loader())
    return module, callback


@pytest.mark.parametrize("kind", ["range", "gaussian"])
def test_a_fit_with_sketched_moments_meets_the_same_budget(make_trainer, kind):
    _, exact = fitted(make_trainer)
    module, sketched = fitted(make_trainer, sketch=kind, sketch_size=4, sketch_above=0)
    assert is_compressed(module)
    parameters = [c.report.targeted["compressed"].parameters for c in (exact, sketched)]
    assert parameters[1] == pytest.approx(parameters[0], rel=0.05)
    assert sketched.report.options["sketch"] == kind
    assert "sketch" not in exact.report.options


def test_sides_no_wider_than_asked_for_stay_exact_bit_for_bit(make_trainer):
    (exact, _), (narrow, _) = (fitted(make_trainer, **o) for o in ({}, {"sketch": "range"}))
    for one, other in zip(state(exact).values(), state(narrow).values(), strict=True):
        assert torch.equal(one, other)


def test_a_sketch_larger_than_every_layer_is_refused_before_the_first_batch(make_trainer):
    callback = RecordingCallback(rank=0.25, sketch="range", sketch_size=10_000, sketch_above=0)
    with pytest.raises(ValueError, match="`sketch_size` that saves memory"):
        make_trainer(callback, max_epochs=1).fit(causal_module(), token_loader())
    assert callback.batches == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sketch": "srht"}, "`sketch` to be one of"),
        ({"sketch_size": 0}, "`sketch_size`"),
        ({"sketch_above": -1}, "wi"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FascCallback(rank=0.5, **options)


def sizes(callback):
    return {side["size"] for layer in callback.report.layers for side in layer.sketches.values()}


@pytest.mark.parametrize(
    ("threshold", "monitor", "expected"),
    [(1.0, 1, {6}), (0.0, 1, {12}), (1.0, None, {12})],  # k = 3: twice it where rho is low, four times where not known
)
def test_rho_that_the_same_fit_has_observed_decides_the_sizes(make_trainer, threshold, monitor, expected):
    torch.manual_seed(0)
    callback = FascCallback(
        rank=3, sketch="range", sketch_above=0, rho_threshold=threshold, monitor_every_n_steps=monitor, refit=False
    )
    make_trainer(callback, max_epochs=2).fit(causal_module(), token_loader())
    assert sizes(callback) == expected


def test_without_an_earlier_epoch_nothing_is_known_of_rho(make_trainer):
    torch.manual_seed(0)
    callback = FascCallback(rank=3, sketch="range", sketch_above=0, rho_threshold=1.0, monitor_every_n_steps=1)
    make_trainer(callback, max_epochs=1).fit(causal_module(), token_loader())
    assert sizes(callback) == {12}


@pytest.mark.parametrize("kind", ["range", "gaussian"])
def test_a_report_tells_of_sketches_and_comes_back_from_json(make_trainer, kind):
    _, callback = fitted(make_trainer, sketch=kind, sketch_size=8, sketch_above=20)
    report = callback.report
    assert {side for layer in report.layers for side in layer.sketches} == {"inputs", "outputs"}
    errors = [side["error"] for layer in report.layers for side in layer.sketches.values()]
    assert all(math.isnan(e) for e in errors) if kind == "gaussian" else all(0 < e < 1 for e in errors)
    line = f"sketched moments: {len(errors)} sides of {len(report.layers)} layers in 8 columns; estimated error"
    assert line in str(report)
    content = json.loads(json.dumps(report.to_dict()))
    again = CompressionReport.from_dict(content)
    assert str(again) == str(report)
    assert [repr(layer) for layer in again.layers] == [repr(layer) for layer in report.layers]


def test_a_report_of_exact_moments_is_as_it_was_before_there_were_sketches(make_trainer):
    _, callback = fitted(make_trainer)
    content = callback.report.to_dict()
    assert all("sketches" not in layer for layer in content["layers"])
    assert CompressionReport.from_dict(content).layers[0].sketches == {}
    assert "sketched" not in str(callback.report)


def test_a_size_that_is_too_large_for_some_sides_is_said_once_and_those_stay_exact(make_trainer):
    with pytest.warns(UserWarning, match=r"sketch_size=30\) would not be clearly smaller: .* of width 32 \(") as warned:
        _, callback = fitted(make_trainer, sketch="range", sketch_size=30, sketch_above=0)
    assert sum("sketch_size" in str(w.message) for w in warned) == 1
    sketched = {layer.name for layer in callback.report.layers if layer.sketches}
    assert sketched == {layer.name for layer in callback.report.layers if 48 in layer.shape}


def test_the_plan_of_a_fit_counts_its_sketches():
    with torch.device("meta"):
        module = causal_module()
    plans = [
        compress(module, list(token_loader()), rank=0.25, progress=False, dry_run=True, **options)
        for options in ({}, {"sketch": "range", "sketch_size": 4, "sketch_above": 40})
    ]
    exact, sketched = plans
    assert {layer.moments for layer in exact.layers} == {"exact"}
    assert {layer.name for layer in sketched.layers if layer.moments == "range"} == {
        layer.name for layer in exact.layers if 48 in layer.shape
    }
    assert sketched.moments_bytes < exact.moments_bytes
