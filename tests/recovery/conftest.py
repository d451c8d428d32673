from __future__ import annotations

import copy

import pytest
from tiny import causal_module
from torch import nn

from fasc_lightning.models import apply_plan


@pytest.fixture
def pair():
    """A dense module, and a compressed one with the dense layers that were replaced."""
    dense = causal_module().eval()
    student = copy.deepcopy(dense)
    plan = {
        name: {"rank": 6, "layout": "pivot"}
        for name, layer in dense.named_modules()
        if isinstance(layer, nn.Linear) and "lm_head" not in name
    }
    return dense, student, apply_plan(student, plan)
