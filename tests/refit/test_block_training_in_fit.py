"""The refinement as a phase of a fit: with whose batches, when not, and what is left behind."""

from __future__ import annotations

import pytest
import torch
from refine_cases import OPTIONS, Refining
from tiny import causal_module, token_loader

from fasc_lightning import FascCallback
from fasc_lightning.batches import KeptBatches, NoLossError
from fasc_lightning.refit import RefinePhase, RefitError, refine_figures
from fasc_lightning.refit._block_training import refine


def compressed(make_trainer):
    module = causal_module()
    callback = FascCallback(keep=0.5, update_weights=False)
    refining = Refining(callback)
    make_trainer(callback, refining).fit(module, token_loader(samples=16, batch_size=2))
    return module, refining


def test_it_is_the_refinement_of_the_kept_batches_by_hand(make_trainer, monkeypatch):
    module, refining = compressed(make_trainer)
    other, by_hand = compressed(make_trainer)
    make_trainer(refining, limit_train_batches=0).fit(module, token_loader(samples=16, batch_size=2))
    expected = refine(
        other,
        by_hand.dense,
        list(token_loader(samples=16, batch_size=2)),
        steps=OPTIONS.steps,
        lr=OPTIONS.lr,
        loss=lambda module, batch: module.model(**batch).loss,
    )
    figures = refine_figures(refining.report)
    assert figures == {**refine_figures(expected), "seconds": figures["seconds"]}
    assert figures["blocks"] == 2
    assert figures["batches"] == {"fit": 7, "held": 1}
    assert figures["tokens"] == 16 * 16
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in module.state_dict().items())
    assert not {"log", "log_dict"} & set(vars(module))


def test_nothing_is_done_where_nothing_is_compressed(make_trainer):
    module = causal_module()
    assert RefinePhase().run(make_trainer(), module, {}, KeptBatches()) is None


def test_modules_that_cannot_be_refined_are_refused_early():
    module = causal_module()
    with pytest.raises(RefitError, match="refine_steps=0"):
        RefinePhase.check(module, ["model.lm_head"])
    module.automatic_optimization = False
    with pytest.raises(NoLossError, match="refine_steps=0"):
        RefinePhase.check(module, [])
