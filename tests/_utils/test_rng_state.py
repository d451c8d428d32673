from __future__ import annotations

import random

import numpy as np
import torch

from fasc_lightning._utils import rng_state, set_rng_state


def drawn():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(2).tolist()  # noqa: NPY002


def test_the_same_numbers_are_drawn_again_after_a_file(tmp_path):
    drawn()
    torch.save(rng_state(), tmp_path / "state.pt")
    expected = drawn()
    drawn()
    set_rng_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert drawn() == expected
