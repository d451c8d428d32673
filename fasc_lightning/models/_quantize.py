"""Rounding of a model's layers without a calibration: to int8, the last step of a compression, or to the nearest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fasc_lightning._utils import undoing
from fasc_lightning.layers import (
    QUANTIZATIONS,
    CompressedLinear,
    ExpertLinear,
    Quantization,
    check_in_memory,
    check_quantization,
    compressed_layers,
    is_plain_linear,
    linear_weight,
    quantized_layer,
    rounded_layer,
    select_layers,
    set_trainable,
    trains_weight,
    unfuse,
)
from fasc_lightning.models._attach import swap_layers
from fasc_lightning.options import QUANTIZE_WORDS, Quantize, checks_options
from fasc_lightning.rounding import to_nearest


@checks_options
def quantize(
    model: nn.Module,
    quantization: Quantization | Quantize = "int8",
    *,
    targets: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
) -> list[str]:
    """Round the weights of a model's linear layers, in place: all of them, or none if anything fails.

    In int8 a weight takes one byte and a row one float. No data is needed. Factors and pivoted layers keep their form
    and rank. Targeted dense layers become int8 too, because the aim is to save bytes; so do the projections of experts,
    and each expert gets its own layers. Output embeddings, tied weights, embeddings, routers and norms stay as they
    are: they are small, shared, or matter most for logits.

    int8 weights do not train, so quantise last: after recovery, and after adapters are merged. As with other int8
    layers, torch raises an error on ``model.requires_grad_(True)`` afterwards.

    Args:
        model: Any module; a compressed one gains most.
        quantization: "int8" keeps activations as they are. "int8-dynamic" also rounds the inputs of layers, token by
            token: products are then faster on processors with int8 instructions, and less exact. A
            :class:`~fasc_lightning.options.Quantize` with ``rounding="nearest"`` rounds dense layers to other grids, to
            compare with: at 4 bits and fewer, ``compress(model, batches, quantize="int4")`` loses much less.
        targets: Patterns of layers as for FascCallback; by default every linear layer, compressed or dense, except
            output embeddings and tied weights.
        exclude: Patterns of layers to leave alone.

    Returns:
        Names of the quantised layers.

    Raises:
        ValueError: If the option is unknown or asks for a calibration, nothing is selected, or a layer is quantised
            already, not finite or offloaded.
        TypeError: If a layer is low-rank and the grid is not int8's, or if it carries adapters or another library's
            quantisation.

    Example:
        >>> from fasc_lightning.layers import LowRankLinear
        >>> model = nn.Sequential(LowRankLinear(8, 6, 2))
        >>> quantize(model)
        ['0']
        >>> model[0].factor_in.weight.dtype
        torch.int8
    """
    _check(quantization)
    inside = {id(child) for layer in compressed_layers(model).values() for child in layer.modules() if child != layer}

    def eligible(module: nn.Module) -> bool:
        if isinstance(module, CompressedLinear | ExpertLinear):
            return True
        return is_plain_linear(module) and id(module) not in inside

    layers = select_layers(model, targets, exclude, eligible)
    with undoing() as undo:
        undo.keep(model, attributes=True)
        unfuse(model, layers)
        quantize_layers(model, layers, quantization)
        undo.forget()
    return list(layers)


def _check(quantization: Any) -> None:
    """Refuse an unknown quantisation, and one that needs a calibration.

    Raises:
        ValueError: If it is one of these.
    """
    few = isinstance(quantization, Quantize) and quantization.rounding == "calibrated"
    if few or (quantization in QUANTIZE_WORDS and quantization not in QUANTIZATIONS):
        raise ValueError(
            f"Expected 'int8' or Quantize(..., rounding='nearest') without calibration batches but got "
            f"{quantization!r}. HINT: compress(model, batches, quantize=...) rounds by the calibration."
        )
    if not isinstance(quantization, Quantize):
        check_quantization(quantization)


def quantize_layers(
    model: nn.Module, names: Iterable[str], quantization: Quantization | Quantize
) -> dict[str, nn.Module]:
    """Quantise layers by name, in place, and update the configurations of transformers models.

    Returns:
        The layers that were replaced, for :func:`~fasc_lightning.layers.swap_modules`.

    Raises:
        ValueError: If a layer is quantised already, not finite or not in memory. The model is unchanged.
        TypeError: If a layer carries adapters or another library's quantisation. The model is unchanged.
    """
    layers = {name: model.get_submodule(name) for name in names}
    check_in_memory(layers)
    new: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        try:
            new[name] = _rounded(layer, quantization)
        except (TypeError, ValueError) as error:
            raise type(error)(f"Layer {name!r} cannot be quantised. {error}") from error
    return swap_layers(model, new)


def _rounded(layer: nn.Module, quantization: Quantization | Quantize) -> CompressedLinear:
    if not isinstance(quantization, Quantize):
        return quantized_layer(layer, quantization)
    if isinstance(layer, CompressedLinear):
        raise TypeError(
            f"Expected a dense layer to round to {quantization} but got {type(layer).__name__}: only int8 rounds "
            "factors."
        )
    rounded = to_nearest(linear_weight(layer).detach().float(), quantization.grid)
    return set_trainable(rounded_layer(layer, rounded).train(layer.training), trains_weight(layer))
