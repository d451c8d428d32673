"""Checks of a saved model's files, before a model is built from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasc_lightning._utils import (
    INTEGERS,
    SchemaError,
    anything,
    check,
    file_checksum,
    mapping,
    open_tensors,
    record,
    text,
    whole_file,
)
from fasc_lightning.layers import GUARD_SHAPE, Grid, form_to_plain

#: Entry of a folder's ``quantization_config``: the SHA-256 of each file of weights. Only :func:`save_compressed` writes
#: it; other ways to save the model write a configuration without it.
FILES = "files"

#: Names in configurations for the number of layers or experts, each of which has at least one tensor.
_REPEATED = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)

#: Tensors of a matrix of few bits.
_OF_GRIDS = ("weight_packed", "weight_scale", "weight_zero_point")

_INDEX = record({"weight_map": mapping(text)}, extra=True)


#: Errors that transformers raises on invalid configurations.
_INTERNAL = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError)


@contextmanager
def of_folder(path: str | PathLike[str]) -> Iterator[None]:
    """Turn errors while a compressed model loads into a ValueError that names its folder.

    Raises:
        ValueError: Instead of the errors of safetensors and transformers.
        OSError: Passed on.
        torch.OutOfMemoryError: Passed on.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"A weights file of {str(path)!r} is truncated or damaged ({error}). Save or download it again."
        ) from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"The compressed model in {str(path)!r} cannot be loaded. {error}") from error
    except torch.OutOfMemoryError:
        raise
    except (*_INTERNAL, StrictDataclassError) as error:
        raise ValueError(
            f"Expected config.json of {str(path)!r} to describe a model, and the arguments to be those of "
            f"from_pretrained, but they do not: {type(error).__name__}: {error}"
        ) from error


def add_checksums(folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the checksums of a folder's files of weights, which must exist, into its configuration.

    Args:
        folder: The folder.
        dtype: The type in which the model is to be loaded; None for the type that transformers wrote, which is that of
            the first floating-point parameter, even if that holds the scales of a matrix of few bits.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    sums = {file.name: file_checksum(file) for file in sorted(folder.glob("*.safetensors"))}
    config["quantization_config"][FILES] = sums
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_json_contents(folder: Path, names: Iterable[str]) -> None:
    """Refuse JSON files of a local folder with invalid contents; missing files are skipped.

    Raises:
        ValueError: If a file is invalid; the message names the file and the entry.
    """
    for path in (folder / name for name in names):
        if not path.is_file():
            continue
        content = json.loads(path.read_bytes())
        index = path.name.endswith(".index.json")
        check(content, _INDEX if index else mapping(anything), str(path))
        for file in set(content["weight_map"].values()) if index else ():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise SchemaError(f"Expected names of safetensors files beside {path} but it names {file!r:.80}.")
        if path.name == "config.json":
            _check_counts(content, path)


def _check_counts(config: Mapping[str, Any], path: Path) -> None:
    """Refuse more layers than the weights beside a configuration have tensors: building them could take forever."""
    found = sorted(path.parent.glob("*.safetensors"))
    if not found:
        return
    tensors = 0
    for file in found:
        try:
            with open_tensors(file, "file of weights") as (named, _):
                tensors += len(named.forms)
        except SchemaError:
            return  # transformers reports it if the model has it
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for part in parts:
        for name in _REPEATED:
            value = part.get(name)
            if isinstance(value, int | float) and not 0 <= value <= tensors:
                raise SchemaError(
                    f"Expected {name} of at most {tensors} in {path}, the number of its weights, got {value!r:.40}."
                )


def check_weight_files(model: nn.Module, files: Iterable[str | PathLike[str]], sums: Mapping[str, str] | None) -> None:
    """Refuse files of weights that differ from the saved ones, or hold other kinds of numbers than the model does.

    Those are integers for floats or the reverse, and matrices of few bits on another grid.

    Args:
        model: The empty model built from the configuration, with compressed layers.
        files: The model's files of weights; only safetensors files are checked.
        sums: SHA-256 of each file by its name; None if the folder has none.

    Raises:
        SchemaError: If a file or tensor is wrong; the message names it.
    """
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    packed: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
    paths = [Path(file) for file in files]
    for file in paths:
        if file.suffix != ".safetensors":
            continue
        if sums is not None:
            if file.name not in sums:
                raise SchemaError(f"{file} is none of the files that were saved, {', '.join(sorted(sums))}.")
            if file_checksum(file) != sums[file.name]:
                raise SchemaError(
                    f"{file} is truncated or damaged, or was altered since save_compressed wrote it: its checksum "
                    f"differs. Save or download it again. HINT: if the change is intended, remove {FILES!r} "
                    "from 'quantization_config' in config.json."
                )
        with open_tensors(file, "file of weights") as (named, _):
            for name, (dtype, shape) in named.forms.items():
                forms = (name, name.removeprefix(prefix), prefix + name)
                packed.update((form, (dtype, tuple(shape))) for form in forms if name.endswith(_OF_GRIDS))
                held = next((state[form] for form in forms if form in state), None)
                if held is None or shape == GUARD_SHAPE:
                    continue
                whole = dtype in (*INTEGERS, torch.bool)
                if whole and held.is_floating_point():
                    raise SchemaError(f"Expected floats as {name!r} in {file} but got {dtype} and shape {shape}.")
                if not whole and not held.is_floating_point():
                    raise SchemaError(f"Expected integers as {name!r} in {file} but got {dtype} and shape {shape}.")
    if packed:
        _check_grids(model, packed, paths[0].parent)


def _check_grids(
    model: nn.Module, found: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]], folder: Path
) -> None:
    """Refuse matrices of few bits that are not on the grids of a model's layers.

    Args:
        model: The empty model.
        found: Type and shape of the packed tensors in its files, by all their possible names.
        folder: Folder of the files.

    Raises:
        SchemaError: If a tensor of a layer is missing, left over, or of another type or shape. A layer without any is
            not checked here.
    """
    for name, matrix in model.named_modules():
        grid = getattr(matrix, "grid", None)
        if not isinstance(grid, Grid):
            continue
        state = {key: value for key, value in matrix.state_dict().items() if key in _OF_GRIDS}
        wanted = {key: (_kind(value.dtype), tuple(value.shape)) for key, value in state.items()}
        kinds = {key: found[f"{name}.{key}"] for key in _OF_GRIDS if f"{name}.{key}" in found}
        held = {key: (_kind(dtype), shape) for key, (dtype, shape) in kinds.items()}
        if held and held != wanted:
            raise SchemaError(
                f"Expected a matrix on the grid {form_to_plain(grid)} in layer {name.removesuffix('.matrix')!r}, as "
                f"config.json describes it, of {_listed(wanted)}. The files of weights in {str(folder)!r} hold "
                f"{_listed(held)}. Was config.json edited, or is it another model's?"
            )


def _kind(dtype: torch.dtype | None) -> str:
    return "floats" if dtype is not None and dtype.is_floating_point else str(dtype)


def _listed(kinds: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{key} {shape} of {kind}" for key, (kind, shape) in kinds.items())
