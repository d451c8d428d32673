from __future__ import annotations

import logging

import pytest
from tiny import causal_module, token_loader

from fasc_lightning import FascCallback
from fasc_lightning.dependence import other_targets

EXCLUDED = ["up_proj"]


def key(**options):
    return FascCallback(**options).state_key


def test_the_saved_callback_with_other_targets_is_found():
    saved, looking = key(monitor=2), key(monitor=5, exclude=EXCLUDED)
    assert other_targets({saved: {}, "ModelCheckpoint{'monitor': None}": {}}, looking, [looking]) == saved
    assert other_targets({saved: {}, looking: {}}, looking, [looking]) is None  # its own state is there
    assert other_targets({saved: {}}, looking, [looking, saved]) is None  # another callback of the fit claims it
    assert other_targets({saved: {}, key(monitor=2, targets=["q_proj"]): {}}, looking, [looking]) is None  # which one?
    assert other_targets({key(monitor=2, rho_gradient="output"): {}}, looking, []) is None
    assert other_targets({key(rank=0.5): {}}, looking, []) is None  # it observed nothing
    assert other_targets({"EarlyStopping": {}, 3: {}}, looking, []) is None


@pytest.mark.parametrize(
    ("before", "after"), [({}, {"exclude": EXCLUDED}), ({"exclude": EXCLUDED}, {"targets": ["q_proj", "up_proj"]})]
)
def test_a_fit_with_other_targets_goes_on_with_the_layers_in_common(make_trainer, tmp_path, caplog, before, after):
    first = FascCallback(monitor=2, **before)
    trainer = make_trainer(first, max_epochs=1)
    trainer.fit(causal_module(), token_loader(samples=32, batch_size=8))
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = FascCallback(monitor=2, **after)
    caplog.set_level(logging.INFO)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):  # Lightning compares keys alone
        make_trainer(second, max_epochs=2).fit(
            causal_module(), token_loader(samples=32, batch_size=8), ckpt_path=tmp_path / "first.ckpt"
        )
    assert second.rho_history.steps == [0, 2, 4, 6]
    now = set(second.rho_history.at(6))
    assert not any("up_proj" in layer for layer in now) or "targets" in after
    common = set(first.rho_history.layers) & now
    assert common
    for step in (0, 2):
        assert second.rho_history.at(step) == {k: v for k, v in first.rho_history.at(step).items() if k in common}
    assert "goes on for the layers that are still observed" in caplog.text


def test_a_checkpoint_with_the_same_targets_loads_as_ever(make_trainer, tmp_path):
    first = FascCallback(monitor=2, exclude=EXCLUDED)
    trainer = make_trainer(first, max_epochs=1)
    trainer.fit(causal_module(), token_loader(samples=32, batch_size=8))
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = FascCallback(monitor=2, exclude=EXCLUDED)
    make_trainer(second, max_epochs=2).fit(
        causal_module(), token_loader(samples=32, batch_size=8), ckpt_path=tmp_path / "first.ckpt"
    )
    assert second.rho_history.steps == [0, 2, 4, 6]
    assert second.rho_history.at(2) == first.rho_history.at(2)
