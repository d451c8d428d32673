"""Configurations of compressed models in memory, so that ``save_pretrained`` writes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fasc_lightning._utils import undoing
from fasc_lightning.layers import compressed_layers, describe_layer, swap_modules
from fasc_lightning.models._config import FascConfig, is_fasc, method_of
from fasc_lightning.models._file_names import save_module_names
from fasc_lightning.models._quantizer import FascQuantizer, detach, untie
from fasc_lightning.models._tags import set_tags


def attach_config(module: nn.Module, **provenance: Any) -> None:
    """Make ``save_pretrained`` of the transformers models in a module write folders that can be loaded.

    Sets ``config.quantization_config`` of every outermost transformers model (the module itself, or a part of a
    LightningModule) that has compressed layers, and removes it from a model that has none any more. Call it again after
    any change of the layers.

    Args:
        module: Any module; without transformers models nothing happens.
        **provenance: How the model was made (method, budget, ...), in JSON types. Without any, the provenance of an
            earlier call is kept.

    Raises:
        ValueError: If a compressed model already carries another quantiser's configuration. The module is unchanged.
        TypeError: If the provenance has other types than JSON's. The module is unchanged.
    """
    models = list(_outermost_models(module))
    configs = [_describe_model(model, provenance) for model in models]
    for model, config in zip(models, configs, strict=True):
        if config is not None:
            _attach(model, config)
        elif is_fasc(_attached(model)):
            detach(model)


def swap_layers(model: nn.Module, new: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Swap layers and update the configurations of the transformers models in the model, both or neither.

    Raises:
        ValueError: If a model carries another quantiser's configuration.
    """
    with undoing() as undo:
        undo.keep(model, attributes=True)
        replaced = swap_modules(model, new)
        attach_config(model)
        undo.forget()
    return replaced


def provenance_of(model: Any) -> dict[str, Any]:
    """Return how a compressed transformers model was made, from its configuration (:func:`attach_config`)."""
    config = _attached(model)
    return dict(dict(config).get("provenance", {})) if is_fasc(config) else {}


def _outermost_models(module: nn.Module) -> Iterator[Any]:
    # A model exists only if its class was imported; importing it here would take a second.
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if base is None:
        return
    if isinstance(module, base):
        yield module
        return
    for child in module.children():
        yield from _outermost_models(child)


def _describe_model(model: Any, provenance: Mapping[str, Any]) -> FascConfig | None:
    """Return the configuration of a model, or None if none of its layers is compressed."""
    layers = {name: describe_layer(layer) for name, layer in compressed_layers(model).items()}
    if not layers:
        return None
    earlier = _attached(model)
    if earlier is not None and not is_fasc(earlier):
        raise ValueError(
            f"{type(model).__name__} already carries the quantization_config of {method_of(earlier)!r}, and a saved "
            "folder can have only one. Dequantise the model before it is compressed."
        )
    if earlier is not None and not provenance:
        provenance = dict(earlier).get("provenance", {})
    elif earlier is None and (base := getattr(model.config, "_name_or_path", "")):
        # A folder's name alone, because its path means nothing on other machines.
        provenance = {"base_model": Path(base).name if Path(base).is_dir() else base, **provenance}
    return FascConfig(layers, provenance=provenance)


def _attach(model: Any, config: FascConfig) -> None:
    model.config.quantization_config = config
    # `save_pretrained` asks the quantizer for the state to write.
    quantizer = FascQuantizer(config, pre_quantized=True)
    quantizer.dense_conversions = save_module_names(model)
    model.hf_quantizer = quantizer
    set_tags(model)
    untie(model)


def _attached(model: Any) -> Any:
    return getattr(model.config, "quantization_config", None)
