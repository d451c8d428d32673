"""The quantizer of the file format "fasc", which puts empty compressed layers into a model.

transformers builds a model from its configuration, lets a quantizer change its layers, and then reads the weights by
name. A compressed model is saved with a :class:`FascConfig` that names its layers and their ranks. The quantizer puts
empty layers of these shapes into the model. "Quantizer" is the name of transformers' only hook at that point: most
compressed models are not quantised, and the others hold plain tensors of integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from typing_extensions import override

from fasc_lightning._utils import naming, some_names
from fasc_lightning.layers import (
    SCALE_DTYPE,
    CompressedLinear,
    compressed_layers,
    empty_layer,
    expect_guards,
    guards,
    packed_matrices,
    saved_guards,
    swap_modules,
    swap_to_dense,
    unfuse,
)
from fasc_lightning.models._config import QUANT_METHOD, FascConfig
from fasc_lightning.models._file_names import (
    converted_names,
    holds_module_names,
    name_forms,
    save_converted_names,
    save_module_names,
)
from fasc_lightning.models._folder_checks import FILES, check_weight_files
from fasc_lightning.models._initialisation import spare_compressed, spare_no_more
from fasc_lightning.models._layer_state import check_layer_state
from fasc_lightning.models._tags import set_tags


class FascQuantizer(HfQuantizer):
    """Puts empty compressed layers into a model before ``from_pretrained`` reads their weights."""

    requires_calibration = True
    quantization_config: FascConfig
    _reads_module_names: bool = False

    #: The result of ``save_module_names``.
    dense_conversions: list[Any] | None

    @override
    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files") or ()
        forms = name_forms(model, self.quantization_config.layers)
        unfuse(model, {form for every in forms.values() for form in every})
        layers = _resolve_names(model, self.quantization_config.layers, forms)
        empty: dict[str, nn.Module] = {
            name: empty_layer(name, model.get_submodule(name), spec) for name, spec in layers.items()
        }
        swap_modules(model, empty)
        keys, guarded = saved_guards(files)
        self._reads_module_names = holds_module_names(model, keys)
        found = {key: (key,) for key in guarded} if self._reads_module_names else converted_names(model, guarded)
        expect_guards(model, found, {form for every in forms.values() for form in every})
        check_weight_files(model, files, vars(self.quantization_config).pop(FILES, None))
        # The model must be saved with its own names.
        self.quantization_config.layers = layers
        untie(model)
        spare_compressed(model)

    @override
    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        if not self._reads_module_names:
            return weight_conversions
        from transformers.conversion_mapping import get_model_conversion_mapping

        # The rest is the user's `key_mapping` of `from_pretrained`, which comes first.
        return weight_conversions[: len(weight_conversions) - len(get_model_conversion_mapping(model))]

    @override
    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        spare_no_more(model)
        # A model read without conversions takes the default ones when it becomes dense.
        self.dense_conversions = vars(model).pop("_weight_conversions", None) or None
        save_module_names(model)
        set_tags(model)
        # The weights are plain floats; with the flag set transformers would refuse `.half()` and `.float()`.
        model.is_quantized = False  # type: ignore[assignment]
        with naming(f"The folder {getattr(model, 'name_or_path', '')!r}"):
            for name, layer in compressed_layers(model).items():
                check_layer_state(name, layer.state_dict())
                _restore_scales(layer)
        return model

    @override
    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return {**model.state_dict(), **guards(compressed_layers(model))}, {}

    @override
    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Make the model dense; without ``dtype`` it keeps its present dtype, not the configuration's."""
        self._dequantize(model, dtype)
        detach(model)
        return model

    @override
    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        swap_to_dense(model)
        return model if dtype is None else model.to(dtype)

    @override
    def is_serializable(self) -> bool:
        return True

    @property
    @override
    def is_trainable(self) -> bool:
        return True

    @property
    @override
    def is_compileable(self) -> bool:
        return True


def _restore_scales(layer: CompressedLinear) -> None:
    """Give the scales of a layer's grid their stored type; transformers keeps some modules in float32."""
    for matrix in packed_matrices(layer):
        if matrix.weight_scale.dtype != SCALE_DTYPE:
            matrix.narrow_scales()
        matrix.weight_scale.requires_grad_(False)


def _resolve_names(
    model: Any, layers: Mapping[str, dict[str, Any]], forms: Mapping[str, Iterable[str]]
) -> dict[str, dict[str, Any]]:
    """Return descriptions by this model's names, each one of the possible forms of the folder's names.

    Raises:
        ValueError: If the model lacks layers. A model of another class than the saved one may lack some (a head).
    """
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    resolved, missing = {}, []
    for name, spec in layers.items():
        found = next((form for form in forms[name] if form in modules), None)
        if found is None:
            missing.append(name)
        else:
            resolved[found] = spec
    saved_class = (model.config.architectures or [None])[0]
    if missing and (not resolved or type(model).__name__ == saved_class):
        raise ValueError(
            f"The configuration names compressed layers that {type(model).__name__} does not have: "
            f"{some_names(missing)}. Was the folder's config.json edited, or is this another model's?"
        )
    return resolved


def untie(model: Any) -> None:
    """Remove from transformers the ties of weights that compressed layers do not have.

    Weights that were tied to such a layer stay tied to one another.
    """
    layers = compressed_layers(model)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    heirs: dict[str, str] = {}
    for key, source in list(tied.items()):
        if key.rpartition(".")[0] in layers:
            del tied[key]
        elif source.rpartition(".")[0] in layers:
            if (heir := heirs.setdefault(source, key)) == key:
                del tied[key]
            else:
                tied[key] = heir


def detach(model: Any) -> None:
    save_converted_names(model)
    set_tags(model)
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)
    output = model.get_output_embeddings()
    if output is not None and getattr(model.config, "tie_word_embeddings", False):
        # Compressed layers are not tied, and the dense ones made from them differ, too.
        model.config.tie_word_embeddings = output.weight is model.get_input_embeddings().weight
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _register() -> None:
    """Register the format with transformers; it replaces the classes of an earlier import."""
    for registry, ours in (
        (AUTO_QUANTIZATION_CONFIG_MAPPING, FascConfig),
        (AUTO_QUANTIZER_MAPPING, FascQuantizer),
    ):
        if getattr(registry.get(QUANT_METHOD), "__module__", None) == ours.__module__:
            del registry[QUANT_METHOD]
    register_quantization_config(QUANT_METHOD)(FascConfig)
    register_quantizer(QUANT_METHOD)(FascQuantizer)


_register()
