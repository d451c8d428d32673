"""Quantisation of a model's layers to int8, the last step of a compression."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fasc_lightning._utils import undoing
from fasc_lightning.layers import (
    CompressedLinear,
    ExpertLinear,
    Quantization,
    check_in_memory,
    check_quantization,
    compressed_layers,
    is_plain_linear,
    quantized_layer,
    select_layers,
    unfuse,
)
from fasc_lightning.models._attach import swap_layers
from fasc_lightning.options import checks_options


@checks_options
def quantize(
    model: nn.Module,
    quantization: Quantization = "int8",
    *,
    targets: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
) -> list[str]:
    """Round the weights of a model's linear layers to int8, in place: all of them, or none if anything fails.

    A weight takes one byte and a row one float. No data is needed. Factors and pivoted layers keep their form and rank.
    Targeted dense layers become int8 too, because the aim is to save bytes; so do the projections of experts, and each
    expert gets its own layers. Output embeddings, tied weights, embeddings, routers and norms stay as they are: they
    are small, shared, or matter most for logits.

    int8 weights do not train, so quantise last: after recovery, and after adapters are merged. As with other int8
    layers, torch raises an error on ``model.requires_grad_(True)`` afterwards.

    Args:
        model: Any module; a compressed one gains most.
        quantization: "int8" keeps activations as they are. "int8-dynamic" also rounds the inputs of layers, token by
            token: products are then faster on processors with int8 instructions, and less exact.
        targets: Patterns of layers as for FascCallback; by default every linear layer, compressed or dense, except
            output embeddings and tied weights.
        exclude: Patterns of layers to leave alone.

    Returns:
        Names of the quantised layers.

    Raises:
        ValueError: If the option is unknown, nothing is selected, or a layer is quantised already, not finite or
            offloaded.
        TypeError: If a layer carries adapters or another library's quantisation.

    Example:
        >>> from fasc_lightning.layers import LowRankLinear
        >>> model = nn.Sequential(LowRankLinear(8, 6, 2))
        >>> quantize(model)
        ['0']
        >>> model[0].factor_in.weight.dtype
        torch.int8
    """
    check_quantization(quantization)
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


def quantize_layers(model: nn.Module, names: Iterable[str], quantization: Quantization) -> dict[str, nn.Module]:
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
            new[name] = quantized_layer(layer, quantization)
        except (TypeError, ValueError) as error:
            raise type(error)(f"Layer {name!r} cannot be quantised. {error}") from error
    return swap_layers(model, new)
