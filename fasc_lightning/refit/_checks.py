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
    """Check that a model's layers can be refitted block by block, without running the model.

    Args:
        model: The model, dense or compressed.
        layers: Names of the layers that are or will be compressed.
        remedy: Last sentence of the error.

    Raises:
        RefitError: If experts are compressed, there is no stack of blocks that holds all layers, or a layer is used in
            two places.
    """
    layers = list(layers)
    if groups := expert_groups(expert_layers(model, layers)):
        raise RefitError(
            f"The experts of {len({experts for experts, _ in groups})} modules are compressed, and blocks that run one "
            f"by one do not show what goes into each expert. {remedy} Or exclude the experts.",
            "experts are compressed.",
        )
    find_blocks(model, layers, remedy)
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, str] = {}
    wanted = {id(modules[name]): name for name in layers}
    for name, module in modules.items():
        if id(module) in wanted and places.setdefault(id(module), name) != name:
            raise RefitError(
                f"Expected layers of their own but {name!r} and {places[id(module)]!r} are one: new factors for "
                f"one place would change the other. {remedy} Or exclude it.",
                "one layer is used in two places.",
            )


def refittable_layers(
    model: nn.Module, dense: Mapping[str, nn.Module], G: Mapping[str, Tensor] | None, caller: str
) -> dict[str, CompressedLinear]:
    """Return the compressed layers by name, after checks of their shapes.

    Args:
        model: The compressed model.
        dense: The dense layer of each compressed one by name.
        G: G of each layer by name; None if no G is needed.
        caller: Name of the calling function, for the error.

    Raises:
        ValueError: If there are no layers, one is not compressed, or a dense layer or G has another shape.
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
        if G is not None:
            got = tuple(G[name].shape) if name in G else None
            if got != (m, m):
                raise ValueError(f"Expected G of shape ({m}, {m}) for {name!r} but got {got}.")
        layers[name] = layer
    if not layers:
        raise ValueError("Expected compressed layers but `dense` is empty.")
    return layers
