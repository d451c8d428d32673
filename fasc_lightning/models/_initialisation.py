"""The initialisation by transformers, which must skip compressed layers while weights load.

After loading, transformers visits all modules and initialises the weights that no file held. The code of some models
reaches from a module into its inner layers and expects the attributes of dense layers: a bias in every ``nn.Linear``,
the fused weights of experts. Compressed layers have loaded all their weights and need no initialisation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fasc_lightning.layers import CompressedLinear, UnfusedExperts


def spare_compressed(model: nn.Module) -> None:
    """Make the initialisation of modules skip the compressed layers in them, until :func:`spare_no_more`."""
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
        # The error comes from a missing bias or fused weight; without compressed layers it is the model's own.
        if not any(isinstance(inner, CompressedLinear | UnfusedExperts) for inner in module.modules()):
            raise


def _models(model: nn.Module) -> list[Any]:
    return [part for part in model.modules() if hasattr(type(part), "_init_weights")]
