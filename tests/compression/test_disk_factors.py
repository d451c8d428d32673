from __future__ import annotations

import tempfile

import pytest
import torch

from fasc_lightning.compression import offload_to_disk
from fasc_lightning.solvers import Factorization


def factorization(m=64, n=96, r=64):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)
    return Factorization(left, right, torch.arange(r + 1, 0, -1).double())


def test_factors_on_the_disk_are_the_same_and_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = factorization()
    after = offload_to_disk(before)
    assert not list(tmp_path.iterdir())
    for one, other in zip(before.truncate(5), after.truncate(5), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(before.losses, after.losses)


def test_a_full_disk_is_said_with_the_remedy(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="TMPDIR"):
        offload_to_disk(factorization())
