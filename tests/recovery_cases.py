"""A small module that is compressed hard, so that there is something to recover, and data for it."""

from __future__ import annotations

import torch
from tiny import Tokens, causal_module
from torch.utils.data import DataLoader

from fasc_lightning import CausalLMModule, FascCallback
from fasc_lightning.layers import compressed_layers

#: Options of a compression that is fast and loses much.
FAST = {"rank": 0.25, "allocation": "uniform", "refit": False, "update_weights": False}


def training_loader(samples: int = 32, **settings) -> DataLoader:
    return DataLoader(Tokens(samples=samples, length=16, **settings), batch_size=4)


def compressed(
    make_trainer, recovery=None, learning_rate: float = 3e-3, **options
) -> tuple[CausalLMModule, FascCallback]:
    """Return a trained module after the first fit, and its callback."""
    module = causal_module()
    module.learning_rate = 1e-2
    make_trainer(max_epochs=6).fit(module, training_loader())
    module.learning_rate = learning_rate
    callback = FascCallback(**{**FAST, **options}, recovery=recovery)
    make_trainer(callback).fit(module, training_loader())
    return module, callback


def values(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def factor_keys(module) -> set[str]:
    return {key for name in compressed_layers(module) for key in module.state_dict() if key.startswith(f"{name}.")}


def ranks(module) -> dict[str, int]:
    return {name: layer.rank for name, layer in compressed_layers(module).items()}
