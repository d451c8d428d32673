"""Checkpoints of dense and compressed modules, each loaded over the other: the layers follow the weights.

A Lightning checkpoint holds weights by name and no structure, so the module must have the layers of the checkpoint
before its weights load. In a Trainer with a FascCallback the callback's hook swaps the layers. Elsewhere the module's
own ``on_load_checkpoint`` does, which a Trainer and ``load_from_checkpoint`` call before the weights load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from fasc_lightning._utils import anything, check, mapping, naming, some_names, undoing
from fasc_lightning.layers import (
    DENSE_FORM,
    INT8_ROWS,
    CompressedLinear,
    DenseForm,
    Grid,
    UnfusedExperts,
    describe_layer,
    empty_dense,
    empty_layer,
    form_to_plain,
    is_compressed,
    is_conv1d,
    is_guard,
    linear_shape,
    named_layers,
    place,
    quantization_of,
    set_trainable,
    words,
)
from fasc_lightning.models._attach import swap_layers
from fasc_lightning.models._layer_plan import REMEMBERED, compression_plan
from fasc_lightning.models._layer_state import check_fit, check_state


def match_checkpoint(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a module the layers of a checkpoint, compressed or dense, so that its weights load strictly.

    :class:`~fasc_lightning.CausalLMModule` and any fit, validation or test with a :class:`~fasc_lightning.FascCallback`
    call it themselves. For ``load_from_checkpoint`` of your own LightningModule, and for Trainers without the callback,
    call it from the module. Without it the load fails: torch misses "layer.weight" and finds "layer.factor_in.weight"
    or the like unexpected::

        def on_load_checkpoint(self, checkpoint):
            match_checkpoint(self, checkpoint)

    A compressed module that loads a dense checkpoint becomes dense, with a warning. It keeps its plan, so
    ``apply_plan(module, module.fasc_plan)`` compresses it again.

    Args:
        module: Any module.
        checkpoint: A Lightning checkpoint.

    Raises:
        ValueError: If the checkpoint's compressed layers do not fit the module. The module is unchanged.
    """
    check(checkpoint, mapping(anything), "The checkpoint")
    match_state_dict(module, checkpoint.get("state_dict", {}))


def say_loading(module: Any) -> bool:
    """Log how a checkpoint of a compressed module loads elsewhere, if the module's own class does not know it.

    Args:
        module: The LightningModule whose checkpoint is being saved.

    Returns:
        Whether a message was logged.
    """
    if not is_compressed(module) or is_overridden("on_load_checkpoint", module):
        return False
    kind = type(module).__name__
    rank_zero_info(
        f"FascCallback: this checkpoint holds compressed layers. A Trainer with a FascCallback loads it. For "
        f"{kind}.load_from_checkpoint and for other Trainers, {kind} needs a method: def on_load_checkpoint(self, "
        "checkpoint): fasc_lightning.match_checkpoint(self, checkpoint). It may be added after the fit."
    )
    return True


def match_state_dict(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
    """Give a module's linear layers the form of a state dict's; layers that change form also get their values.

    Args:
        module: Any module.
        state_dict: Weights by name.
        prefix: Prefix of the module's names in the state dict.

    Raises:
        ValueError: If the state's compressed layers or its other weights do not fit the module. (A module with
            ``strict_loading = False`` may lack weights.) Or if a compressed layer's tensors are invalid: integers
            instead of floats, NaN, an index that is no permutation. The module is unchanged.
    """
    check(state_dict, mapping(anything), "The entry 'state_dict' of the checkpoint")
    compressed = _compressed_names(state_dict, prefix)
    every = named_layers(module)
    if missing := compressed - every.keys():
        raise ValueError(
            f"Expected a checkpoint of {type(module).__name__} but it holds compressed layers that are not there: "
            f"{some_names(missing)}. Is it another model's? The module is unchanged."
        )
    with naming("The entry 'state_dict' of the checkpoint"):
        check_state(module, state_dict, prefix, compressed)
    before = compression_plan(module)
    new: dict[str, nn.Module] = {}
    once = {id(layer): name for name, layer in reversed(every.items())}
    for name, layer in every.items():
        if once[id(layer)] != name:
            continue
        replacement: nn.Module | None = None
        form = vars(layer).get(DENSE_FORM)
        if name in compressed and (isinstance(layer, CompressedLinear | nn.Linear) or is_conv1d(layer)):
            replacement = _compressed_layer(name, layer, _part(state_dict, f"{prefix}{name}."))
        elif form is not None and form.fits(part := _part(state_dict, f"{prefix}{name}.")):
            replacement = _reparametrised_layer(name, layer, form, part)
        elif isinstance(layer, CompressedLinear) and f"{prefix}{name}.weight" in state_dict:
            replacement = _dense_layer(name, layer, _part(state_dict, f"{prefix}{name}."))
        elif isinstance(layer, UnfusedExperts) and f"{prefix}{name}.gate_up_proj" in state_dict:
            parameter = next(p for p in layer.parameters() if p.is_floating_point())
            replacement = set_trainable(place(layer.empty(), parameter.device), parameter.requires_grad)
        if replacement is not None:
            new[name] = replacement
    if not new:
        return
    with undoing() as undo:
        undo.keep(module, attributes=True)
        swap_layers(module, new)
        if getattr(module, "strict_loading", True):
            check_fit(module, state_dict, prefix)
        undo.forget()
    vars(module).pop(REMEMBERED, None)
    if before and not compressed:
        setattr(module, REMEMBERED, before)
        rank_zero_warn(
            f"{type(module).__name__} had {len(before)} compressed layers and is dense now, because the loaded weights "
            "are dense. HINT: load a compressed checkpoint to have the factors again; "
            f"`apply_plan(module, module.{REMEMBERED})` gives the dense weights the same ranks."
        )


def match_on_load(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *unused: Any) -> None:
    """A ``register_load_state_dict_pre_hook``; a module-level function, so hooked modules can be deep-copied."""
    del unused
    match_state_dict(module, state_dict, prefix)


def _compressed_names(state_dict: Mapping[str, Tensor], prefix: str) -> set[str]:
    """Return the names of the layers that a state dict holds in a compressed form."""
    forms = (
        (".factor_in.weight", (".factor_out.weight",)),
        (".basis.weight", (".coefficients.weight", ".permutation")),
        (".matrix.weight", (".matrix.scale",)),
        (".matrix.weight_packed", (".matrix.weight_scale",)),
    )
    names = set()
    for first, others in forms:
        for key in state_dict:
            name = key.removesuffix(first)
            if key.endswith(first) and key.startswith(prefix) and all(name + other in state_dict for other in others):
                names.add(name.removeprefix(prefix))
    return names


def _part(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    here = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    return {key: value for key, value in here.items() if not is_guard(value)}


def _compressed_layer(name: str, layer: nn.Module, state: Mapping[str, Tensor]) -> nn.Module | None:
    """Return the compressed layer that a part of a state dict describes; None if the module has it already.

    Raises:
        ValueError: If the layer to replace has another shape.
    """
    m, n = linear_shape(layer)
    packed = "matrix.weight_packed" in state
    spec = _describe_packed(name, layer, state, m, n) if packed else _describe(state, m, n)
    if spec is None:
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        raise ValueError(
            f"Expected the checkpoint's layer {name!r} to be compressed from a weight of shape ({m}, {n}), as the "
            f"module's is, but it holds {shapes}. Is it another model's? The module is unchanged."
        )
    if isinstance(layer, CompressedLinear) and describe_layer(layer) == spec:
        return None
    new = empty_layer(name, layer, spec)
    new.from_conv1d = is_conv1d(layer) or getattr(layer, "from_conv1d", False)
    return _filled(name, place(new, _device(layer)), layer, state)


def _describe(state: Mapping[str, Tensor], m: int, n: int) -> dict[str, Any] | None:
    """Return the description of a compressed (m, n) layer by its parts' names and shapes; None if there is none."""
    spec = _describe_form(state, m, n)
    if spec is not None and any(key.endswith(".scale") for key in state):
        spec["quantize"] = "int8-dynamic" if any(key.endswith(".rounds_inputs") for key in state) else "int8"
    return spec


def _describe_packed(name: str, layer: nn.Module, state: Mapping[str, Tensor], m: int, n: int) -> dict[str, Any] | None:
    """Return the description of a compressed (m, n) layer with a matrix of few bits; None if the state has another one.

    A state dict has no sizes of groups. They are the layer's own if it has such a matrix already. Otherwise they follow
    from the number of groups: all of one size, or the last one smaller and the others a power of two.

    Raises:
        ValueError: If groups of two such sizes fit.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    grid = quantization_of(layer)
    if not isinstance(grid, Grid) or not _fits(grid, shapes, m, n):
        fitting = _fitting_grids(shapes, m, n)
        if not fitting:
            return None
        if len(fitting) > 1:
            raise ValueError(
                f"Expected a checkpoint whose layer {name!r} fits one grid but it fits {fitting}. Give the module the "
                "layers of the checkpoint first: apply_plan(module, plan, state_dict). The module is unchanged."
            )
        grid = fitting[0]
    kept: dict[str, Any] = {"bias": "matrix.bias" in state, "quantize": form_to_plain(grid)}
    if "factor_in.weight" not in shapes:
        return {"rank": min(m, n), "layout": "dense", **kept}
    k = shapes["factor_in.weight"][0]
    if (shapes["factor_in.weight"], shapes.get("factor_out.weight")) != ((k, n), (m, k)):
        return None
    return {"rank": k, "layout": "residual", **kept}


def _fitting_grids(shapes: Mapping[str, tuple[int, ...]], m: int, n: int) -> list[Grid]:
    """Return the grids of a matrix (m, n) of few bits whose tensors have these shapes."""
    groups, symmetric = shapes["matrix.weight_scale"][1], "matrix.weight_zero_point" not in shapes
    sizes: list[int | None] = [None, 8 * -(-n // 8)]  # both are one group; 8 bits in rows have another layer
    if groups > 1:
        sizes = [*sorted({1 << i for i in range(3, 31)} | ({n // groups} if n % (8 * groups) == 0 else set()))]
    grids = [Grid(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in sizes]
    fitting = [grid for grid in grids if grid != INT8_ROWS and _fits(grid, shapes, m, n)]
    return fitting[:1] if groups == 1 and len({grid.bits for grid in fitting}) == 1 else fitting


def _fits(grid: Grid, shapes: Mapping[str, tuple[int, ...]], m: int, n: int) -> bool:
    """Return whether the tensors of a matrix of few bits have the shapes of an (m, n) matrix on a grid."""
    groups = grid.groups(n)
    wanted = {"matrix.weight_packed": (m, words(n, grid.bits)), "matrix.weight_scale": (m, groups)}
    if not grid.symmetric:
        wanted["matrix.weight_zero_point"] = (words(m, grid.bits), groups)
    held = {k: shape for k, shape in shapes.items() if k != "matrix.bias" and not k.startswith("factor_")}
    return held == wanted


def _describe_form(state: Mapping[str, Tensor], m: int, n: int) -> dict[str, Any] | None:
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    if "matrix.weight" in state:
        if shapes["matrix.weight"] != (m, n):
            return None
        return {"rank": min(m, n), "layout": "dense", "bias": "matrix.bias" in state}
    if "factor_in.weight" in state:
        k = shapes["factor_in.weight"][0]
        if (shapes["factor_in.weight"], shapes["factor_out.weight"]) != ((k, n), (m, k)):
            return None
        return {"rank": k, "layout": "factors", "bias": "factor_out.bias" in state}
    basis, coefficients = shapes["basis.weight"], shapes["coefficients.weight"]
    if basis[1] == n and coefficients == (m - basis[0], basis[0]):
        return {"rank": basis[0], "layout": "pivot", "bias": "pivot_bias" in state, "side": "out"}
    if basis[0] == m and coefficients == (basis[1], n - basis[1]):
        return {"rank": basis[1], "layout": "pivot", "bias": "basis.bias" in state, "side": "in"}
    return None


def _dense_layer(name: str, layer: CompressedLinear, state: Mapping[str, Tensor]) -> nn.Module:
    """Return the dense layer of a part of a state dict, which replaces a compressed layer."""
    new = empty_dense(layer, "bias" in state, layer.weight.dtype)
    device = _device(layer)
    for key, parameter in new.named_parameters():  # buffers have their values already
        new._parameters[key] = nn.Parameter(torch.zeros_like(parameter, device=device))
    return _filled(name, new, layer, state)


def _reparametrised_layer(name: str, layer: nn.Module, form: DenseForm, state: Mapping[str, Tensor]) -> nn.Module:
    """Return the layer whose weight is computed from other tensors in a part of a state dict.

    Raises:
        ValueError: If the state is not the layer's.
    """
    try:
        new = form.filled(state, _device(layer), layer.weight.dtype)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise ValueError(_others(name, error)) from error
    return new if _trains(layer) else new.requires_grad_(False)


def _filled(name: str, new: nn.Module, old: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Fill a new layer with its values at once, so that a module never holds unset values.

    Raises:
        ValueError: If the state is not the layer's.
    """
    if _device(old).type != "meta":
        try:
            new.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(_others(name, error)) from error
    return set_trainable(new, _trains(old))


def _others(name: str, error: RuntimeError) -> str:
    return f"Expected the weights of layer {name!r} but the checkpoint's differ: {error}. The module is unchanged."


def _trains(layer: nn.Module) -> bool:
    # int8 weights never train, so they do not show whether the layer would.
    return quantization_of(layer) is not None or any(p.requires_grad for p in layer.parameters())


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device
