"""The file format "fasc" of compressed transformers models: its configuration, its quantizer and a strict loader.

transformers builds a model from its configuration, lets a quantizer change its layers, and then reads the weights by
name. A compressed model is saved with a :class:`FascConfig` that names its layers and their ranks. The quantizer puts
empty layers of these shapes into the model. "Quantizer" is the name of transformers' only hook at that point: most
compressed models are not quantised, and the others hold plain int8 tensors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import override

from fasc_lightning._utils import check, check_json_files, mapping, naming, some_names, text
from fasc_lightning.layers import (
    check_layers,
    compressed_layers,
    describe_layer,
    empty_layer,
    expect_guards,
    guards,
    saved_guards,
    swap_modules,
    swap_to_dense,
    unfuse,
)
from fasc_lightning.models._file_names import (
    converted_names,
    holds_module_names,
    name_forms,
    save_converted_names,
    save_module_names,
)
from fasc_lightning.models._folder_checks import FILES, check_json_contents, check_weight_files, of_folder
from fasc_lightning.models._initialisation import spare_compressed, spare_no_more
from fasc_lightning.models._layer_state import check_layer_state, check_state

QUANT_METHOD = "fasc"

#: Files of a saved model besides its weights.
JSON_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")

#: The format of folders that this version writes, and the newest format that it reads.
FORMAT_VERSION = 1


class FascConfig(QuantizationConfigMixin):
    """The description of a compressed model in its ``config.json``, under ``quantization_config``.

    Args:
        layers: For each compressed layer, by its dotted name in the model: "rank" (int), "layout" ("pivot" or
            "factors"), "bias" (bool) and, for the pivot layout, "side" ("in" or "out"). A quantised layer also has
            "quantize" ("int8" or "int8-dynamic"); its layout can be "dense".
        format_version: The format of the folder.
        provenance: How the model was made (method, budget, ...), in JSON types. Loading does not use it.
        quant_method: "fasc".
        **more: More provenance; "files" holds the checksums of the weights that :func:`save_compressed` wrote.

    Raises:
        ValueError: If the folder was written by a newer format, or a layer's description is not valid.
        TypeError: If the provenance has other types than JSON's (a ValueError if it holds NaN or infinity).
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        provenance: Mapping[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        **more: Any,
    ) -> None:
        # First, because nothing else in a newer format can be checked.
        _check_version(format_version)
        if quant_method != QUANT_METHOD:
            raise ValueError(f"Expected quant_method {QUANT_METHOD!r}, got {quant_method!r}.")
        self.quant_method = quant_method  # type: ignore[assignment] # its own methods are an enum, others' are strings
        self.format_version = format_version
        self.layers = check_layers(layers)
        # Through JSON, so that it is the same now as after a reload.
        if (files := more.pop(FILES, None)) is not None:
            check(files, mapping(text), "The entry 'files' of quantization_config")
            self.files = dict(files)  # they hold for the folder that is read alone
        self.provenance: dict[str, Any] = json.loads(json.dumps({**(provenance or {}), **more}, allow_nan=False))


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
        _untie(model)
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
        # The weights are plain floats; with the flag set transformers would refuse `.half()` and `.float()`.
        model.is_quantized = False  # type: ignore[assignment]
        with naming(f"The folder {getattr(model, 'name_or_path', '')!r}"):
            for name, layer in compressed_layers(model).items():
                check_layer_state(name, layer.state_dict())
        return model

    @override
    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return {**model.state_dict(), **guards(compressed_layers(model))}, {}

    @override
    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Make the model dense; without ``dtype`` it keeps its present dtype, not the configuration's."""
        self._dequantize(model, dtype)
        _detach(model)
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
        elif _is_fasc(_attached(model)):
            _detach(model)


def provenance_of(model: Any) -> dict[str, Any]:
    """Return how a compressed transformers model was made, from its configuration (:func:`attach_config`)."""
    config = _attached(model)
    return dict(dict(config).get("provenance", {})) if _is_fasc(config) else {}


def load_compressed(path: str | PathLike[str], model_class: Any = None, **kwargs: Any) -> Any:
    """Load a compressed model as ``from_pretrained`` does, but whole or not at all.

    ``from_pretrained`` itself only warns about weights that a folder lacks and fills them with random numbers. This
    function reads safetensors and JSON only: no pickle, and no code from the folder without ``trust_remote_code=True``.

    Args:
        path: A folder that ``save_pretrained`` wrote, or its id on the hub.
        model_class: A model or auto class of transformers; None for the class that was saved.
        **kwargs: Passed on to ``from_pretrained``: ``dtype``, ``device_map``, ``revision``, ...

    Returns:
        The ``PreTrainedModel``, in eval mode.

    Raises:
        ValueError: If the folder holds no compressed model, was written in a newer format, is damaged, or does not hold
            exactly the model's weights. Also if an argument would prevent these checks.
        OSError: If the folder or one of its files cannot be found.

    Example:
        >>> model = load_compressed("compressed/")  # doctest: +SKIP
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError("Expected use_safetensors=True: load_compressed reads no pickled weights.")
    if "output_loading_info" in kwargs or "ignore_mismatched_sizes" in kwargs:
        raise ValueError(
            "output_loading_info and ignore_mismatched_sizes are not options of load_compressed, which fails where "
            "they would report. Use from_pretrained of a transformers class for a partial load."
        )
    kwargs.setdefault("trust_remote_code", False)
    # transformers skips a damaged generation_config.json, and its errors do not name an index.
    folder = Path(path, kwargs.get("subfolder") or "")
    with of_folder(path):
        check_json_files(folder / name for name in JSON_FILES)
        check_json_contents(folder, JSON_FILES)
        config = _read_config(path, kwargs)
        model_class = model_class or _saved_class(path, config)
        strict = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = model_class.from_pretrained(path, **{**kwargs, **strict})
        _check_loaded(path, model, info)
    return model


def _check_version(version: Any) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"Expected format_version to be an integer from 1 to {FORMAT_VERSION}, got {version!r}.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"Expected format_version {FORMAT_VERSION} or older, got {version}: the model was saved by a newer "
            "fasc-lightning. Upgrade it to load this model."
        )


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


def _untie(model: Any) -> None:
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
    if earlier is not None and not _is_fasc(earlier):
        raise ValueError(
            f"{type(model).__name__} already carries the quantization_config of {_method(earlier)!r}, and a saved "
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
    _untie(model)


def _detach(model: Any) -> None:
    save_converted_names(model)
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


def _attached(model: Any) -> Any:
    return getattr(model.config, "quantization_config", None)


def _method(config: Any) -> Any:
    """Return quant_method of a configuration, which is an object or JSON."""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return getattr(method, "value", method)


def _is_fasc(config: Any) -> bool:
    return _method(config) == QUANT_METHOD


def _read_config(path: str | PathLike[str], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the folder's config.json after the check that it describes a compressed model in a known format.

    Raises:
        ValueError: If it is not.
        OSError: If there is none.
    """
    from transformers import PreTrainedConfig

    config, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
    if not config:  # transformers would fail later, in the model
        raise FileNotFoundError(
            f"Expected a folder or hub id with a compressed model, found no config.json in {path!s}."
        )
    described = config.get("quantization_config")
    if not isinstance(described, dict) or not _is_fasc(described):
        found = f"that of {described.get('quant_method')!r}" if isinstance(described, dict) else "none"
        raise ValueError(
            f"Expected a folder with a compressed model, whose config.json has a quantization_config of "
            f"{QUANT_METHOD!r}, got {found} in {str(path)!r}. Load dense models with transformers; of a model "
            "compressed in memory, attach_config(model) lets save_pretrained write it."
        )
    FascConfig(**described)
    return config


def _saved_class(path: str | PathLike[str], config: Mapping[str, Any]) -> Any:
    """Return the transformers class that the folder was saved from.

    Raises:
        ValueError: If config.json names no class of transformers.
    """
    import transformers

    found = config.get("architectures")
    names = found if isinstance(found, list) and found else [None]
    saved = getattr(transformers, str(names[0]), None)
    if not isinstance(saved, type) or not issubclass(saved, transformers.PreTrainedModel):
        raise ValueError(
            f"Expected config.json of {str(path)!r} to name a model class of transformers {transformers.__version__} "
            f"as its architecture, got {names[0]!r}. Give the class as model_class."
        )
    return saved


def _check_loaded(path: str | PathLike[str], model: nn.Module, info: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are not exactly those in the folder.

    Raises:
        ValueError: If a weight is missing, left over, of another shape, or not finite.
    """
    mismatched = [f"{key} {tuple(saved)} instead of {tuple(want)}" for key, saved, want in info["mismatched_keys"]]
    problems = {
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "of another shape": mismatched,
        "errors": info["error_msgs"],
    }
    found = [f"{problem}: {some_names(keys)}" for problem, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"The weights in {str(path)!r} are not those of {type(model).__name__} with the layers that its "
            f"config.json describes ({'; '.join(found)}). The folder was edited or is incomplete, or model_class is "
            "not the class that was saved."
        )
    with naming(f"The folder {str(path)!r}"):
        check_state(model, model.state_dict(), "", compressed_layers(model))


def _register() -> None:
    """Register the format with transformers; it replaces this module's classes of an earlier import."""
    for registry in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        if getattr(registry.get(QUANT_METHOD), "__module__", None) == __name__:
            del registry[QUANT_METHOD]
    register_quantization_config(QUANT_METHOD)(FascConfig)
    register_quantizer(QUANT_METHOD)(FascQuantizer)


_register()
