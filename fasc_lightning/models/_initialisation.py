"""transformers' own initialisation of a model that holds compressed layers, while its weights are being loaded.

After loading, transformers walks through all modules and initialises what no file held. Some models' code reaches from
a module into the layers inside of it, and expects there what dense ones have: a bias in every ``nn.Linear``, the fused
weights of experts. What a compressed layer holds has been loaded, so that there is nothing to initialise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fasc_lightning.layers import CompressedLinear, UnfusedExperts


def spare_compressed(model: nn.Module) -> None:
    """Let the initialisation of modules pass over the compressed layers in them, until :func:`spare_no_more`."""
    for part in _models(model):
        vars(part)["_init_weights"] = partial(_initialise, part._init_weights)


def spare_no_more(model: nn.Module) -> None:
    """Undo :func:`spare_compressed`."""
    for part in _models(model):
        vars(part).pop("_init_weights", None)


def _initialise(initialise: Callable[[nn.Module], Any], module: nn.Module) -> None:
    try:
        initialise(module)
    except AttributeError:
        # Of None, or of a fused weight; anywhere else it is a fault of the model's.
        if not any(isinstance(inner, CompressedLinear | UnfusedExperts) for inner in module.modules()):
            raise


def _models(model: nn.Module) -> list[Any]:
    return [part for part in model.modules() if hasattr(type(part), "_init_weights")]
