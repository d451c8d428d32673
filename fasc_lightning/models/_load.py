"""Loading of a compressed model from a folder, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fasc_lightning._utils import check_json_files, checked_model_name, checked_model_path, naming, some_names
from fasc_lightning.layers import align_weights, compressed_layers
from fasc_lightning.models._attach import attach_config
from fasc_lightning.models._compressed_tensors import LIBRARY, PROVENANCE, is_library_config
from fasc_lightning.models._compressed_tensors_reader import is_readable, reading_arguments
from fasc_lightning.models._config import QUANT_METHOD, FascConfig, is_fasc
from fasc_lightning.models._folder_checks import check_json_contents, of_folder
from fasc_lightning.models._layer_state import check_state

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Files of a saved model besides its weights.
JSON_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")


def load_compressed(path: str | PathLike[str], model_class: Any = None, **kwargs: Any) -> Any:
    """Load a compressed model as ``from_pretrained`` does, but whole or not at all.

    ``from_pretrained`` itself only warns about weights that a folder lacks and fills them with random numbers. This
    function reads safetensors and JSON only: no pickle, and no code from the folder without ``trust_remote_code=True``.

    A folder in the format of compressed-tensors becomes a model with this package's layers, whose matrices stay rounded
    in memory. That library need not be installed. ``from_pretrained`` needs it, and gives the library's own layers or
    dense ones.

    Args:
        path: A folder that :func:`save_compressed` or ``save_pretrained`` wrote, or its id on the hub.
        model_class: A model or auto class of transformers; None for the class that was saved.
        **kwargs: Passed on to ``from_pretrained``: ``dtype``, ``device_map``, ``revision``, ...

    Returns:
        The ``PreTrainedModel``, in eval mode.

    Raises:
        ValueError: If the folder holds no compressed model, was written in a newer format, is damaged, or does not hold
            exactly the model's weights. Also if an argument would prevent these checks.
        OSError: If the folder or one of its files cannot be found. A FileNotFoundError names a missing folder before
            any download.

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
    path = _checked_path(path, kwargs)
    # transformers skips a damaged generation_config.json, and its errors do not name an index.
    folder = Path(path, kwargs.get("subfolder") or "")
    with of_folder(path):
        check_json_files(folder / name for name in JSON_FILES)
        check_json_contents(folder, JSON_FILES)
        config = _read_config(path, kwargs)
        model_class = model_class or _saved_class(path, config)
        strict = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        packed = is_library_config(config["quantization_config"])
        arguments = reading_arguments(path, kwargs) if packed else kwargs
        model, info = model_class.from_pretrained(path, **{**arguments, **strict})
        _check_loaded(path, model, info)
        align_weights(model)
        if packed:
            attach_config(model)  # of this package's own quantizer
    return model


def is_compressed_config(config: PreTrainedConfig) -> bool:
    """Tell whether :func:`load_compressed` loads the models of a configuration, by its ``quantization_config``.

    Folders in the format of compressed-tensors that this package has no layers for are not among them.
    """
    described = getattr(config, "quantization_config", None)
    described = described if isinstance(described, dict | None) else described.to_dict()
    if described is None or not is_library_config(described):
        return described is not None and is_fasc(described)
    return PROVENANCE in described or is_readable(described)


def _checked_path(path: str | PathLike[str], kwargs: Mapping[str, Any]) -> str:
    """Return a folder that exists, or a hub id. The hub is asked whether it has the model, unless files are local only.

    Raises:
        FileNotFoundError: If there is no such folder and no such id.
    """
    expected = "a folder that save_compressed(model, folder) wrote, or its hub id"
    if kwargs.get("local_files_only"):
        return checked_model_path(path, expected)
    asked = {name: kwargs.get(name) for name in ("revision", "cache_dir", "token")}
    file = "/".join(filter(None, (kwargs.get("subfolder"), "config.json")))
    return checked_model_name(path, expected, file=file, **asked)


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
    if is_library_config(described):
        return config
    if not isinstance(described, dict) or not is_fasc(described):
        found = f"that of {described.get('quant_method')!r}" if isinstance(described, dict) else "none"
        raise ValueError(
            f"Expected a folder with a compressed model, whose config.json has a quantization_config of "
            f"{QUANT_METHOD!r} or {LIBRARY!r}, got {found} in {str(path)!r}. Load dense models with transformers; of a "
            "model compressed in memory, attach_config(model) lets save_pretrained write it."
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
