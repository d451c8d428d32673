"""Models with matrices of few bits at random: to save and load them needs no calibration."""

from __future__ import annotations

import torch
from tiny import causal_model, made_once, token_loader
from torch import nn

from fasc_lightning import compress
from fasc_lightning.layers import (
    Grid,
    Rounded,
    linear_shape,
    named_layers,
    rounded_layer,
    select_layers,
    swap_modules,
)
from fasc_lightning.models import attach_config

FOUR, ROWS = Grid(4, 16), Grid(8, None, True)


def random_rounded(m: int, n: int, grid: Grid) -> Rounded:
    """Random codes, zero points and scales; the weights are about as large as those of a new model."""
    shape = m, grid.groups(n)
    scale = (torch.rand(shape) + 0.5) * 0.1 / grid.levels
    zero = torch.full(shape, grid.middle) if grid.symmetric else torch.randint(grid.levels, shape)
    codes = torch.randint(grid.levels, (m, n))
    return Rounded(grid, codes.to(torch.uint8), scale.bfloat16().float(), zero.to(torch.uint8))


def round_layers(model: nn.Module, names, grids) -> None:
    """Put random matrices in turn on some grids into layers of a model."""
    torch.manual_seed(1)
    layers = named_layers(model)
    new = {}
    for i, name in enumerate(names):
        rounded = random_rounded(*linear_shape(layers[name]), grids[i % len(grids)])
        new[name] = rounded_layer(layers[name], rounded)
    swap_modules(model, new)
    attach_config(model)


@made_once
def rounded_model(family="llama", grids=(FOUR,), dtype=torch.float32, targets=None, **settings):
    """A causal model whose linear layers are on grids."""
    model = causal_model(family, **settings).eval()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(dtype)
    for name, buffer in buffers.items():  # a load does not round the frequencies of rotary embeddings
        owner, _, end = name.rpartition(".")
        model.get_submodule(owner)._buffers[end] = buffer
    round_layers(model, select_layers(model, targets and list(targets), None), grids)
    return model


@made_once
def sized():
    """A model on several grids by its size, and its report."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = causal_model(**sizes).eval()
    report = compress(model, list(token_loader(samples=8)), size=0.4, refit=False, progress=False)
    return model, report
