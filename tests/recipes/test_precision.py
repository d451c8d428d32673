from __future__ import annotations

import pytest
import torch
from torch import nn

from fasc_lightning.cli import calibration_precision
from fasc_lightning.cli._precision import multiplies_bfloat16


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16-mixed"), ({"amx_bf16": True}, "bf16-mixed"), ({"avx2": True}, None), ({}, None)],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    layer = nn.Linear(2, 2)
    assert calibration_precision("auto", layer) == expected
    assert calibration_precision("auto", layer.bfloat16()) is None  # a model's own type stays
    assert calibration_precision("32-true", layer) == "32-true"


def test_an_old_torch_tells_nothing(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not multiplies_bfloat16(torch.device("cpu"))
    assert not multiplies_bfloat16(torch.device("meta"))


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="--precision to be auto, 32-true, bf16-mixed, 16-mixed but got 'half'"):
        calibration_precision("half", nn.Linear(2, 2))
