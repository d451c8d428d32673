"""Fits that are killed while a checkpoint is written go on from the one before as if nothing had been."""

from __future__ import annotations

import pytest
import torch
from interrupted import Fits, assert_same, sidecars, stateful_loader
from processes import run_script
from torn_fit import TORN

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes ends with."""
    folder = tmp_path_factory.mktemp("torn")
    run_script("torn_fit.py", folder, processes=2)
    assert all((folder / str(write) / "last.ckpt").exists() for write in TORN)
    assert len(sidecars(folder / "16")) == 2  # that of the checkpoint that is there, and that of the next
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("write", TORN)
def test_two_processes_end_as_if_no_write_had_been_torn(two, write):
    for ends in two:
        found, straight = ends[str(write)], ends["straight"]
        assert found["seen"] == straight["seen"][write - 1 :]  # Lightning's own order would be another
        assert found["batches"] == min(8, 17 - write)
        assert repr(found["rows"]) == repr(straight["rows"])
        assert list(found["state"]) == list(straight["state"])
        assert all(torch.equal(value, straight["state"][name]) for name, value in found["state"].items())
    assert two[0]["straight"]["seen"] != two[1]["straight"]["seen"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("endless", [False, True])
@pytest.mark.parametrize("batch", [0, 5])
def test_a_fit_killed_before_its_calibration_ends_as_if_not(make_trainer, tmp_path, batch, endless):
    options = {"trainer": {"max_epochs": 3}, "loader": lambda: stateful_loader(endless), "update_weights": True}
    fits = Fits(make_trainer, tmp_path, **options)
    straight = fits.straight(batch, epoch=1)
    resumed = fits.resumed()
    assert_same(resumed, straight)
    assert resumed[1].batches == straight[1].batches
