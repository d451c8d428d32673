from __future__ import annotations

import pytest
import torch

from fasc_lightning.calibration import projected
from fasc_lightning.planning._time import Rates, estimate, model_work, moments_work, probe, solver_work
from fasc_lightning.statistics import LayerSketches, Sketch, packed_size


def test_seconds_are_operations_over_rates():
    rates = Rates(products=100.0, grams=10.0, solving=2.0)
    found = estimate(model=50, moments=20, solving=8, rates=rates, passes=3, tokens=40)
    assert found.per_1000_tokens == pytest.approx(1000 * (3 * 0.5 + 2))
    assert found.calibrate == pytest.approx(40 * 3.5)
    assert found.factorize == pytest.approx(4)
    assert estimate(50, 20, 8, rates).calibrate is None


def test_sketches_work_less_where_they_are_narrow():
    exact = moments_work(4096, 14336)
    assert exact == 2 * (packed_size(4096) + packed_size(14336))
    both = LayerSketches(inputs=Sketch(14336, 512), outputs=Sketch(4096, 512))
    assert moments_work(4096, 14336, sketches=both) == 2 * 512 * (4096 + 14336) < exact / 3
    assert moments_work(4096, 14336, copies=2) == 2 * exact
    seen = moments_work(4096, 14336, sketches=projected(4096, 14336))
    assert seen == 2 * 4096 * 14336 + 4 * packed_size(4096)
    assert model_work(3, 5) == 60


def test_a_solver_works_alike_on_a_layer_and_its_transpose():
    assert solver_work(64, 256) == solver_work(256, 64)
    assert solver_work(256, 256) / solver_work(128, 128) == 8


def test_a_probe_measures_this_machine_once():
    rates = probe(torch.device("cpu"), torch.float32)
    assert min(rates.products, rates.grams, rates.solving) > 1e6
    assert probe(torch.device("cpu"), torch.float32) is rates
