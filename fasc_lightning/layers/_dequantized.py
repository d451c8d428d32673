"""Dense stand-ins of quantised layers, for many short forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fasc_lightning._utils import undoing
from fasc_lightning.layers._quantized_layers import quantization_of
from fasc_lightning.layers._swap import compressed_layers, swap_modules


@contextmanager
def dequantized(model: nn.Module) -> Iterator[None]:
    """Put dense layers with the same numbers in the place of quantised ones of full rank, inside the context.

    A quantised layer makes its weight dense in each forward pass, which takes longer than the product of a few tokens.
    The dense layers take the memory of the dense model.

    Args:
        model: Any module.
    """
    layers = {
        name: layer
        for name, layer in compressed_layers(model).items()
        if layer.layout in ("dense", "residual") and quantization_of(layer) is not None
    }
    dense: dict[str, nn.Module] = {name: layer.to_linear().requires_grad_(False) for name, layer in layers.items()}
    with undoing() as undo:
        undo.keep(model)
        swap_modules(model, dense)
        yield
