"""Subclasses of linear layers, plain and not."""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


class Product(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Counting(nn.Linear):
    calls = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("seen", torch.zeros(()))
        self.shapes = []

    def forward(self, *args, **kwargs):
        self.seen += 1
        self.shapes.append(args[0].shape)
        Counting.calls += 1
        torch.rand(1), random.random()
        return super().forward(*args, **kwargs)


class Flat(nn.Linear):
    def forward(self, input):
        y = torch.addmm(self.bias, input.reshape(-1, self.in_features), self.weight.t())
        return y.view(*input.shape[:-1], self.out_features)


class Sequences(nn.Linear):
    def forward(self, x):
        b, t, _ = x.shape
        return torch.einsum("btn,mn->btm", x, self.weight) + self.bias.view(1, 1, -1).expand(b, t, -1)


class Upcast(nn.Linear):
    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, x):
        return self.scale * super().forward(x)


class OwnDropout(nn.Linear):
    def __init__(self, *args, p=0.1, **kwargs):
        super().__init__(*args, **kwargs)
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        return super().forward(self.dropout(x))


class Masked(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class Transposed(Conv1D):
    def forward(self, x):
        return x @ self.weight + self.bias


def variants():
    """Subclasses that compute something else."""

    class Tripled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    class Rounded(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)

    class Clipped(nn.Linear):
        def forward(self, x):
            return super().forward(x.clamp(-100, 100))

    class LowPrecision(nn.Linear):
        def forward(self, x):
            return super().forward(x.bfloat16().to(x.dtype))

    class Wide(nn.Linear):
        def forward(self, x):
            return super().forward(x).double()

    class Extra(nn.Linear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.lora = nn.Parameter(torch.zeros(self.out_features, self.in_features))

        def forward(self, x):
            return F.linear(x, self.weight + self.lora, self.bias)

    class Argument(nn.Linear):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    class Tuple(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    class Noisy(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y + torch.randn_like(y) if self.training else y

    class SequenceFirst(nn.Linear):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)) if x.ndim == 3 else super().forward(x)

    class NoBias(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight)

    class Broken(nn.Linear):
        def forward(self, x):
            raise OSError("no kernel")

    return [Tripled, Rounded, Clipped, LowPrecision, Wide, Extra, Argument, Tuple, Noisy, SequenceFirst, NoBias, Broken]
