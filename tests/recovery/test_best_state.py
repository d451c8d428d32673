from __future__ import annotations

import math

import torch

from fasc_lightning.recovery._best_state import BestState


def value(x: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([x])}


def test_the_lowest_loss_is_kept_as_a_copy():
    best, weight = BestState(), torch.zeros(1)
    for step, loss in enumerate([3.0, 2.0, 2.5, 1.0, 1.0, math.nan, 4.0]):
        weight.fill_(step)
        best.look(step, loss, {"w": weight})
    assert (best.step, best.loss, best.first) == (3, 1.0, 3.0)
    assert best.values["w"].item() == 3
    assert best.improved


def test_the_first_state_is_not_copied_and_counts_as_no_improvement():
    best = BestState()
    assert not best.begun
    best.look(5, 1.0, value(0))
    best.look(6, 1.5, value(1))
    assert not best.improved
    assert best.step == 5
    assert best.values == {}


def test_patience_counts_looks_since_the_best():
    best = BestState(patience=2)
    found = []
    for step, loss in enumerate([3.0, 2.0, 2.5, 1.9, 2.0, 2.0]):
        best.look(step, loss, value(step))
        found.append(best.exhausted)
    assert found == [False, False, False, False, False, True]
    patient = BestState()
    for step in range(9):
        patient.look(step, float(step), value(step))
    assert not patient.exhausted


def test_a_loss_that_is_not_finite_ends_it():
    best = BestState()
    best.look(0, 1.0, value(0))
    best.look(1, math.nan, value(1))
    assert best.exhausted
    assert best.loss == 1.0


def test_state_goes_through_plain_data():
    best, again = BestState(), BestState()
    best.look(0, 2.0, value(0))
    best.look(3, 1.0, value(3))
    again.load_state_dict(best.state_dict())
    assert again.losses == best.losses
    assert (again.step, again.loss, again.improved) == (3, 1.0, True)
    assert torch.equal(again.values["w"], best.values["w"])
