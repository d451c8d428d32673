"""Compressed tiny models with all that a refit needs, for tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tiny import causal_model, made_once, token_loader
from torch import Tensor, nn

from fasc_lightning.compression import compress_layers
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes, select_layers, swap_modules
from fasc_lightning.refit import causal_loss
from fasc_lightning.solvers import solver_needs
from fasc_lightning.statistics import CalibrationMoments
from fasc_lightning.studies.rho import backward_windows


@dataclass
class Case:
    """A compressed model, its dense layers by name, their G, and batches."""

    model: nn.Module
    dense: dict[str, nn.Module]
    gradients: dict[str, Tensor]
    batches: list[dict[str, Tensor]]

    def refit_arguments(self):
        return self.model, self.dense, self.gradients, self.batches


@made_once
def compressed_case(family: str = "llama", rank: float = 0.4, layout: str = "auto", steps: int = 60) -> Case:
    """A model that has learned something, compressed on 12 windows."""
    model = causal_model(family)
    batches = list(token_loader(samples=24, length=24, batch_size=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    layers = select_layers(model)
    moments = CalibrationMoments(layer_shapes(layers), needs=solver_needs("fasc"))
    for _ in backward_windows(model, Taps(layers, moments), torch.cat([batch["input_ids"] for batch in batches])):
        pass
    gradients = {name: moments.layer(name).G for name in layers}
    result = compress_layers(layers, moments, rank=rank, layout=layout)
    dense = swap_modules(model, result.replacements)
    return Case(model, dense, {name: gradients[name] for name in dense}, batches)


def interrupted_loss(calls: int):
    """The loss of a causal model, interrupted when it is asked for after so many calls."""
    left = [calls]

    def loss(model, batch):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return causal_loss(model, batch)

    return loss


class Block(nn.Module):
    """A residual block of one linear layer: h + W h."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(hidden)


class Stack(nn.Module):
    """Linear blocks, called one after the other unless ``between`` puts something in."""

    def __init__(self, width: int = 6, blocks: int = 2, between: float = 1.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.between = between

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = self.between * block(hidden)
        return hidden


def stack_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Squared error against the batch's targets."""
    return (model(batch["x"]) - batch["y"]).square().mean()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def arguments(case):
    return case.model, case.dense, case.batches
