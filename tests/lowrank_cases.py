"""Small compressed layers with known answers."""

from __future__ import annotations

import torch
from torch import nn

from fasc_lightning.layers import make_lowrank


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def case(layout: str, m: int, n: int, k: int = 5, bias: bool = True, dtype: torch.dtype = torch.float64):
    B, C = random(m, k, seed=1), random(k, n, seed=2)
    b = random(m, seed=3) if bias else None
    return make_lowrank(B, C, b, layout, dtype=dtype), B @ C, b


def conv1d(outputs: int, inputs: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outputs, inputs)
