from __future__ import annotations

import pytest
import torch
from tiny import causal_module, token_loader
from watching import RecordingCallback, state

from fasc_lightning import FascCallback
from fasc_lightning.swap import is_compressed


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
