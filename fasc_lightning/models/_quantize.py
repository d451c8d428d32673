"""quantize(): int8 for the layers of a compressed model, after everything else."""

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
from fasc_lightning.models._layer_plan import swap_layers
from fasc_lightning.options import checks_options


@checks_options
def quantize(
    model: nn.Module,
    quantization: Quantization = "int8",
    *,
    targets: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
) -> list[str]:
    """Round the weights of a model's linear layers to int8, in place: all of them or, if anything fails, none.

    One byte a weight and one float a row. It needs no data. Factors and pivoted layers keep their form and their rank;
    dense layers that are targeted become int8, too, since bytes are what is saved here, and so do the projections of
    experts, each of which is given layers of its own. Output embeddings, tied weights, embeddings, routers and norms
    stay as they are: they are small, shared, or what logits depend on most.

    What is int8 does not train. So quantise last: after recovery, and after adapters are merged. As with other int8
    layers, ``model.requires_grad_(True)`` is an error of torch afterwards.

    Args:
        model: Any module; most gain has one that was compressed.
        quantization: "int8" keeps activations as they are. "int8-dynamic" rounds the inputs of layers, too, token by
            token, which makes their products faster on processors with int8 instructions, and the result less exact.
        targets: Patterns of layers, as FascCallback's; by default every linear layer, compressed or dense, but output
            embeddings and tied weights.
        exclude: Patterns of layers to leave alone.

    Returns:
        Names of the layers.

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
    """Quantise layers by name, in place, and let a transformers model's configuration say so.

    Returns:
        The layers that were replaced, for :func:`~fasc_lightning.layers.swap_modules`.

    Raises:
        ValueError: If a layer is quantised already, not finite or not in memory. The model is what it was.
        TypeError: If one carries adapters or another library's quantisation. The model is what it was.
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
