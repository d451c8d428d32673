"""Folders in the format "pack-quantized" of compressed-tensors, which transformers and vLLM read without this package.

A model can be written in it if each compressed layer is a dense one with a matrix of few bits. Its packed codes, scales
and zero points are the same tensors as in this package, under other names.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fasc_lightning._utils import undoing, whole_file
from fasc_lightning.layers import (
    INT8_ROWS,
    CompressedLinear,
    ExpertLinear,
    Grid,
    check_in_memory,
    compressed_layers,
    named_layers,
    quantization_of,
    split_name,
)
from fasc_lightning.models._attach import provenance_of
from fasc_lightning.models._config import method_of
from fasc_lightning.models._file_names import converted_names
from fasc_lightning.models._quantizer import FascQuantizer

#: Name of the format's library in ``quantization_config``, and of the format itself.
LIBRARY, FORMAT = "compressed-tensors", "pack-quantized"

#: Entry of ``quantization_config`` with the model's provenance; other libraries skip it.
PROVENANCE = "provenance"

#: What weights have in the format and here, besides bits, symmetry, strategy and group.
WEIGHTS = {"type": "int", "dynamic": False, "actorder": None, "block_structure": None}


def obstacle(model: Any) -> str | None:
    """Return why the format cannot hold a model, None if it can.

    Args:
        model: A transformers model with compressed layers.
    """
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    tied = {key.rpartition(".")[0] for pair in model.get_expanded_tied_weights_keys(True).items() for key in pair}
    for name, layer in compressed_layers(model).items():
        reason = _layer_obstacle(name, layer)
        if names[id(layer)] > 1:
            reason = "has several names"
        elif name in tied:
            reason = "is tied to other weights in the model's configuration"
        if reason is not None:
            return f"layer {name!r} {reason}"
    weights = [f"{name.removesuffix('.matrix')}.weight" for name, _ in model.named_modules()]
    renamed = {key: new for key, new in converted_names(model, weights).items() if new != (key,)}
    if renamed:
        key = next(iter(renamed))
        return f"transformers renames weights when it loads them ({key!r} to {', '.join(map(repr, renamed[key]))})"
    try:
        check_in_memory(compressed_layers(model))
    except ValueError as error:
        return str(error)
    return None


def _layer_obstacle(name: str, layer: CompressedLinear) -> str | None:
    """Return what the format cannot hold of a layer, None if it can hold all of it."""
    grid = _grid_of(layer)
    if layer.layout != "dense":
        return f"is of low rank (layout {layer.layout!r})"
    if grid is None:
        return f"is quantised as {quantization_of(layer)!r}, which rounds inputs, too"
    if split_name(name) is not None:
        return "is a projection of an expert"
    if layer.from_conv1d:
        return "was a Conv1D, whose weight is transposed"
    if layer.shell is not None:
        return f"was a {type(layer.shell).__name__}, a class of its own"
    if grid.group is not None and layer.in_features % grid.group:
        return f"has groups of {grid.group} inputs, which do not divide its {layer.in_features}"
    return None


def _grid_of(layer: nn.Module) -> Grid | None:
    """Return the grid of a layer's matrices; None for layers without one, and for layers that round inputs, too."""
    form = quantization_of(layer)
    return INT8_ROWS if form == "int8" else form if isinstance(form, Grid) else None


def is_read_elsewhere(model: nn.Module) -> bool:
    """Return whether transformers (5.23) with compressed-tensors (0.20.1) reads a model in this format.

    Its layers for compressed weights expect zero points that are not packed. It can make weights dense while it reads
    them, but takes one grid for all layers then.
    """
    grids = _grids(model)
    return len(grids) == 1 or all(grid.symmetric for grid in grids)


def _grids(model: nn.Module) -> dict[Grid, list[str]]:
    """Return the names of the compressed layers on each grid."""
    grids: dict[Grid, list[str]] = {}
    for name, layer in compressed_layers(model).items():
        grid = _grid_of(layer)
        assert grid is not None
        grids.setdefault(grid, []).append(name)
    return grids


def library_config(model: Any) -> dict[str, Any]:
    """Return ``quantization_config`` of a model, as compressed-tensors documents it."""
    grids, layers = _grids(model), compressed_layers(model)
    # A class of layers would name experts, too: some libraries split them into linear layers.
    by_class = len(grids) == 1 and not any(isinstance(layer, ExpertLinear) for layer in named_layers(model).values())
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if by_class else names,
            "weights": {
                **WEIGHTS,
                "num_bits": grid.bits,
                "symmetric": grid.symmetric,
                "strategy": "channel" if grid.group is None else "group",
                "group_size": grid.group,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for i, (grid, names) in enumerate(grids.items())
    }
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    config: dict[str, Any] = {
        "quant_method": LIBRARY,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": linear,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        PROVENANCE: provenance_of(model),
    }
    if not all(grid.symmetric for grid in grids) and is_read_elsewhere(model):
        config["dequantize"] = True  # an entry of transformers; see is_read_elsewhere
    return config


def save_packed(model: Any, folder: Path, **sharding: Any) -> None:
    """Write a model's configuration and weights in the format, as ``save_pretrained`` writes others.

    Args:
        model: A model that the format can hold; see :func:`obstacle`.
        folder: The folder.
        **sharding: Arguments of ``save_pretrained``.
    """
    config = library_config(model)
    with undoing() as undo:  # it always ends with the model's own quantizer
        undo.add(setattr, model, "hf_quantizer", model.hf_quantizer)
        model.hf_quantizer = _Writer(model.config.quantization_config, pre_quantized=True)
        model.save_pretrained(folder, **sharding)
    path = folder / "config.json"
    written = {**json.loads(path.read_text(encoding="utf-8")), "quantization_config": config}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _Writer(FascQuantizer):
    """Gives ``save_pretrained`` the weights in the format."""

    @override
    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        layers = compressed_layers(model)
        state: dict[str, Tensor] = {}
        for key, value in model.state_dict().items():
            name, _, end = key.rpartition(".")
            layer = layers.get(name.removesuffix(".matrix")) if name.endswith(".matrix") else None
            if layer is None:
                state[key] = value
            else:
                end, value = _in_library(end, value, layer)
                state[f"{name.removesuffix('.matrix')}.{end}"] = value.contiguous()
        for name, layer in layers.items():
            state[f"{name}.weight_shape"] = torch.tensor([layer.out_features, layer.in_features])
        return state, {}


def _in_library(end: str, value: Tensor, layer: CompressedLinear) -> tuple[str, Tensor]:
    """Return name and value of an entry of a layer in the format."""
    if end == "weight":  # the code of an int8 number has the same bits, but for the first
        codes = F.pad(value.view(torch.uint8) ^ 128, (0, -value.shape[1] % 4))
        return "weight_packed", codes.contiguous().view(torch.int32)
    if end == "scale":
        return "weight_scale", value[:, None]
    if end == "weight_scale":  # other libraries compute weights in the type of the scales
        converted = value.to(layer.weight.dtype)
        return end, converted if torch.equal(converted.float(), value.float()) else value
    return end, value


def how_to_load(model: nn.Module, auto_class: str) -> str:
    """Return the section of a model card on loading.

    Args:
        model: The model.
        auto_class: Class of transformers that loads it.
    """
    load = f"""from transformers import {auto_class}  # and: pip install compressed-tensors

model = {auto_class}.from_pretrained("...")  # this folder, or its hub id"""
    told = "transformers makes the weights dense in memory."
    if not is_read_elsewhere(model):
        load = """from fasc_lightning import load_compressed  # pip install fasc-lightning

model = load_compressed("...")  # this folder, or its hub id"""
        told = "transformers 5.23 with compressed-tensors 0.20.1 does not read several grids with zero points."
    return f"""## How to load it

```python
{load}
```

The folder has the format "pack-quantized" of compressed-tensors, which vLLM reads, too. {told}
`fasc_lightning.load_compressed(...)` keeps them rounded in memory, needs no compressed-tensors, and refuses a folder
that lacks weights or has others. Nothing in the folder is pickled, and no code is loaded from it."""


def is_library_config(config: Any) -> bool:
    return method_of(config) == LIBRARY
