"""Preparation for decoding."""

from __future__ import annotations

import pytest
import torch
from tiny import causal_model

from fasc_lightning.layers import packed_matrices
from fasc_lightning.models import prepare_decoding, quantize
from fasc_lightning.options import Quantize

IDS = torch.arange(12)[None]


def rounded(bits, group, dtype):
    model = causal_model(hidden_size=64, intermediate_size=128).to(dtype).eval()
    quantize(model, Quantize(bits, group, rounding="nearest"))
    return model


def test_layers_of_4_bits_are_prepared_and_the_state_and_answers_stay():
    model = rounded(4, 32, torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(IDS).logits
    prepared = prepare_decoding(model)
    if prepared == 0:
        pytest.skip("this processor has no such kernel")
    assert prepared == len(packed_matrices(model))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0.1, atol=0.05)
    assert prepare_decoding(model) == prepared


@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 24), (8, 32)])
def test_other_grids_are_left_as_they_are(bits, group):
    model = rounded(bits, group, torch.bfloat16)
    assert prepare_decoding(model) == 0
