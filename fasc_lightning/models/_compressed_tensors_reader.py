"""Reading of folders in the format "pack-quantized" of compressed-tensors, into this package's own layers.

The library need not be installed. While transformers reads weights, they have their names in the format: a compressed
layer holds the tensors of its matrix itself. Afterwards its matrix gets them back, and 8 bits with one scale an output
get their faster form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import override

from fasc_lightning._utils import (
    SchemaError,
    boolean,
    check,
    integer,
    listed,
    one_of,
    open_tensors,
    optional,
    record,
    some_names,
    text,
)
from fasc_lightning.layers import (
    INT8_ROWS,
    SCALE_DTYPE,
    CompressedLinear,
    Grid,
    check_in_memory,
    describe_layer,
    empty_layer,
    swap_modules,
)
from fasc_lightning.models._compressed_tensors import FORMAT, LIBRARY, PROVENANCE, WEIGHTS
from fasc_lightning.models._config import FascConfig
from fasc_lightning.models._folder_checks import FILES, check_weight_files
from fasc_lightning.models._initialisation import spare_compressed
from fasc_lightning.models._quantizer import FascQuantizer, untie

#: Name under which transformers finds this reader. No folder has it.
_READER = "fasc-pack-quantized"

ELSEWHERE = f"Load it with transformers and {LIBRARY} instead."

_GROUP = record(
    {
        "targets": listed(text),
        "weights": record(
            {"num_bits": integer(1), "strategy": one_of("group", "channel")},
            {"symmetric": boolean, "group_size": optional(integer(-1))},
            extra=True,
        ),
    },
    extra=True,
)


def reading_arguments(path: str | PathLike[str], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of ``from_pretrained`` with which transformers reads a folder in the format by this package.

    Args:
        path: The folder, or its id on the hub.
        kwargs: The user's arguments.

    Raises:
        ValueError: If ``config.json`` describes matrices that this package has no layers for.
    """
    from transformers import AutoConfig, PreTrainedConfig

    config, others = kwargs.get("config"), {key: value for key, value in kwargs.items() if key != "config"}
    passed_on = others
    if not isinstance(config, PreTrainedConfig):
        # "auto" would become an entry of the configuration.
        asked = {key: value for key, value in others.items() if key != "dtype" or value != "auto"}
        config, unused = AutoConfig.from_pretrained(config or path, return_unused_kwargs=True, **asked)
        hub = {key: others[key] for key in _HUB_ARGUMENTS if key in others}
        passed_on = {**{key: others[key] for key in ("dtype",) if key in others}, **hub, **unused}
    described = config.quantization_config
    described = described if isinstance(described, dict) else described.to_dict()
    config.quantization_config = {**described, "quant_method": _READER}
    PackedConfig(**config.quantization_config)
    return {**passed_on, "config": config}


def is_readable(described: Mapping[str, Any]) -> bool:
    """Tell whether this package has layers for all matrices that a ``quantization_config`` of the library describes."""
    try:
        PackedConfig(**{**described, "quant_method": _READER})
    except ValueError:
        return False
    return True


#: Arguments that the configuration and the weights are both found with.
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
    "code_revision",
)


class PackedConfig(QuantizationConfigMixin):
    """The grids of layers, from ``quantization_config`` of compressed-tensors.

    Raises:
        ValueError: If this package has no layers for an entry.
    """

    def __init__(
        self,
        config_groups: Mapping[str, Any] | None = None,
        format: str | None = None,
        ignore: list[str] | None = None,
        quant_method: str = _READER,
        **more: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment] # its own methods are an enum, others' are strings
        if format != FORMAT:
            raise ValueError(f"Expected the format {FORMAT!r} of {LIBRARY}, got {format!r}. {ELSEWHERE}")
        if not isinstance(config_groups, Mapping) or not config_groups:
            raise ValueError(f"Expected config_groups of {LIBRARY} but got {config_groups!r:.200}.")
        self.ignore = list(ignore or ())
        self.grids: dict[str, Grid] = {}
        for name, group in config_groups.items():
            grid = _grid_from_library(name, group)
            self.grids.update(dict.fromkeys(group["targets"], grid))
        self.files = more.get(FILES)
        self.provenance = dict(more.get(PROVENANCE) or {})

    def grid_of(self, name: str, module: nn.Module) -> Grid | None:
        """Return the grid of a module; names go before patterns, and patterns before classes."""
        if _matches(self.ignore, name, module):
            return None
        return next((self.grids[target] for target in _matches(self.grids, name, module)), None)


def _grid_from_library(name: str, group: Any) -> Grid:
    """Return the grid of a group in ``config_groups``.

    Raises:
        ValueError: If it has other numbers than a grid.
    """
    try:
        check(group, _GROUP, "The group")
        weights: Mapping[str, Any] = group["weights"]
        others = {key: weights[key] for key, value in WEIGHTS.items() if weights.get(key, value) != value}
        others |= {key: group[key] for key in ("input_activations", "output_activations") if group.get(key)}
        if others:
            raise ValueError(f"It has {others!r:.200}.")
        size = weights.get("group_size") if weights["strategy"] == "group" else None
        if size is None and weights["strategy"] == "group":
            raise ValueError("Its group_size is missing.")
        return Grid(weights["num_bits"], size, weights.get("symmetric", True))
    except ValueError as error:
        raise ValueError(
            f"Expected {name!r} of config_groups to name layers and weights of 2, 3, 4 or 8 bits, integers in groups "
            f"of a multiple of 8 inputs or one group an output, without rounded activations. {error} {ELSEWHERE}"
        ) from error


def _matches(targets: Any, name: str, module: nn.Module) -> list[str]:
    """Return the targets of compressed-tensors that mean a module, the most specific first."""
    classes = {kind.__name__ for kind in type(module).__mro__}
    patterns = [target for target in targets if target.startswith("re:") and re.match(target[3:], name)]
    return [*(t for t in targets if t == name), *patterns, *(t for t in targets if t in classes)]


class PackedQuantizer(FascQuantizer):
    """Puts empty layers into a model, under the names of the format until their weights are read."""

    quantization_config: Any
    _layers: dict[str, CompressedLinear]
    _matrices: dict[str, nn.Module]

    @override
    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config: PackedConfig = self.quantization_config
        files = [file for file in kwargs.get("checkpoint_files") or () if str(file).endswith(".safetensors")]
        specs = _specs(config, model, _packed_names(files))
        self._layers = {name: empty_layer(name, model.get_submodule(name), spec) for name, spec in specs.items()}
        swap_modules(model, dict(self._layers))
        untie(model)
        for layer in self._layers.values():
            _widen(layer.matrix)
        self._matrices = {name: _flatten(layer) for name, layer in self._layers.items()}
        check_weight_files(model, files, config.files)
        spare_compressed(model)

    @override
    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, layer in self._layers.items():
            _unflatten(layer, self._matrices[name])
        check_in_memory(self._layers)
        for name, layer in self._layers.items():
            _restore(name, layer)
        described = {name: describe_layer(layer) for name, layer in self._layers.items()}
        self.quantization_config = FascConfig(described, provenance=self.quantization_config.provenance)
        holder: Any = model
        holder.config.quantization_config = self.quantization_config
        return super()._process_model_after_weight_loading(model, **kwargs)


def _widen(matrix: Any) -> None:
    """Give an empty matrix what the format has besides: scales of any type, and a shape."""
    wide = torch.promote_types(matrix.like.dtype, torch.float32)
    matrix.weight_scale = nn.Parameter(matrix.weight_scale.to(wide), requires_grad=False)
    matrix.register_buffer("weight_shape", torch.zeros(2, dtype=torch.int64, device="meta"))


def _flatten(layer: CompressedLinear) -> nn.Module:
    """Move the tensors of a layer's matrix into the layer, and return the matrix without them."""
    matrix = layer._modules.pop("matrix")
    assert matrix is not None
    layer.grid = matrix.grid
    _move(matrix, layer)
    return matrix


def _unflatten(layer: CompressedLinear, matrix: nn.Module) -> None:
    """Undo :func:`_flatten`."""
    _move(layer, matrix)
    del layer.grid
    layer._modules["matrix"] = matrix


def _move(old: nn.Module, new: nn.Module) -> None:
    """Move all tensors of a module, though not of its children, to another one."""
    for kind in ("_parameters", "_buffers"):
        tensors = getattr(old, kind)
        getattr(new, kind).update(tensors)
        tensors.clear()
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set
    old._non_persistent_buffers_set.clear()


def _packed_names(files: list[Any]) -> set[str]:
    """Return the names of the layers with packed weights in files.

    Raises:
        SchemaError: If a layer's weight_shape is missing.
    """
    keys: set[str] = set()
    for file in files:
        with open_tensors(file, "file of weights") as (named, _):
            keys |= named.forms.keys()
    names = {key.removesuffix(".weight_packed") for key in keys if key.endswith(".weight_packed")}
    if missing := {name for name in names if f"{name}.weight_shape" not in keys}:
        raise SchemaError(f"Expected a weight_shape beside each weight_packed, but {some_names(missing)} have none.")
    return names


def _specs(config: PackedConfig, model: nn.Module, packed: set[str]) -> dict[str, dict[str, Any]]:
    """Return the description of each layer that a folder has packed.

    Raises:
        SchemaError: If the files have other layers packed than the configuration.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    grids = {name: grid for name, module in linear.items() if (grid := config.grid_of(name, module)) is not None}
    if different := sorted(grids.keys() ^ packed):
        where = "files of weights" if different[0] in grids else "config_groups, less ignore, for linear layers,"
        raise SchemaError(
            f"Expected the layers of config_groups to be those with packed weights, but {len(different)} differ: "
            f"{some_names(different)}. The first is missing in the {where} of the folder. Was config.json edited, or "
            "does the model hold other modules than linear layers of few bits?"
        )
    return {name: _spec(linear[name], grid) for name, grid in grids.items()}


def _spec(linear: nn.Linear, grid: Grid) -> dict[str, Any]:
    """Return the description of a layer as the format holds it: 8 bits with one scale an output are packed there."""
    quantize = {"bits": grid.bits, "group": grid.group, "symmetric": grid.symmetric}
    rank = min(linear.in_features, linear.out_features)
    return {"rank": rank, "layout": "dense", "bias": linear.bias is not None, "quantize": quantize}


def _restore(name: str, layer: CompressedLinear) -> None:
    """Give a layer that was read from the format its own form.

    Raises:
        SchemaError: If its tensors are of another shape than they state, or its scales are not of the stored type.
    """
    matrix: Any = layer.matrix
    shape, stated = [layer.out_features, layer.in_features], matrix.weight_shape.tolist()
    if stated != shape:
        raise SchemaError(f"Expected weight_shape {shape} of layer {name!r} but got {stated}. Is it another model's?")
    del matrix.weight_shape
    scale = matrix.weight_scale.detach()
    if matrix.grid == INT8_ROWS:
        int8: Any = empty_layer(name, layer, {**describe_layer(layer), "quantize": "int8"})
        int8.matrix.weight = nn.Parameter((matrix.rounded().codes ^ 128).view(torch.int8), requires_grad=False)
        int8.matrix.scale = scale[:, 0].to(matrix.like.dtype)
        int8.matrix.bias = matrix.bias
        layer.matrix = int8.matrix
    elif torch.equal(scale.to(SCALE_DTYPE).to(scale.dtype), scale):
        matrix.narrow_scales()
    else:
        raise SchemaError(
            f"Expected scales of layer {name!r} that are numbers of {SCALE_DTYPE}, which this package holds, but got "
            f"others: they would be rounded. {ELSEWHERE}"
        )


def _register() -> None:
    """Register the reader with transformers; it replaces the classes of an earlier import."""
    for registry in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        registry.pop(_READER, None)
    register_quantization_config(_READER)(PackedConfig)
    register_quantizer(_READER)(PackedQuantizer)


_register()
