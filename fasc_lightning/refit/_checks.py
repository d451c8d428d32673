"""Checks of models and layers before a refit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from fasc_lightning.layers import (
    CompressedLinear,
    expert_groups,
    expert_layers,
    linear_shape,
)
from fasc_lightning.refit._block_stack import WITHOUT_REFIT, RefitError, find_blocks


def check_refit(model: nn.Module, layers: Iterable[str], remedy: str = WITHOUT_REFIT) -> None:
    """Refuse models whose layers cannot be refitted block by block; changes nothing and computes nothing.

    Args:
        model: The model, dense or compressed.
        layers: Names of the layers that are or will be compressed.
        remedy: What to do then; ends the error.

    Raises:
        RefitError: Saying why.
    """
    layers = list(layers)
    if groups := expert_groups(expert_layers(model, layers)):
        raise RefitError(
            f"The experts of {len({experts for experts, _ in groups})} modules are compressed, and blocks that run one "
            f"by one do not show what goes into each expert. {remedy} Or exclude the experts."
        )
    find_blocks(model, layers, remedy)
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, str] = {}
    wanted = {id(modules[name]): name for name in layers}
    for name, module in modules.items():
        if id(module) in wanted and places.setdefault(id(module), name) != name:
            raise RefitError(
                f"Expected layers of their own but {name!r} and {places[id(module)]!r} are one: new factors for "
                f"one place would change the other. {remedy} Or exclude it."
            )


def refittable_layers(
    model: nn.Module, dense: Mapping[str, nn.Module], gradients: Mapping[str, Tensor] | None, caller: str
) -> dict[str, CompressedLinear]:
    """Return the compressed layers by name, once each has a dense layer and, if they are needed, a G of its shape.

    Raises:
        ValueError: If one does not, or there are none.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[str, CompressedLinear] = {}
    for name, original in dense.items():
        layer = modules.get(name)
        if not isinstance(layer, CompressedLinear):
            raise ValueError(
                f"Expected {name!r} to be a compressed layer of the model but it is "
                f"{'missing' if layer is None else type(layer).__name__}: call {caller} after the swap."
            )
        m, n = linear_shape(layer)
        if linear_shape(original) != (m, n):
            raise ValueError(
                f"Expected a dense layer of shape ({m}, {n}) for {name!r} but got {linear_shape(original)}."
            )
        if gradients is not None:
            got = tuple(gradients[name].shape) if name in gradients else None
            if got != (m, m):
                raise ValueError(f"Expected G of shape ({m}, {m}) for {name!r} but got {got}.")
        layers[name] = layer
    if not layers:
        raise ValueError("Expected compressed layers but `dense` is empty.")
    return layers
