"""Folders of saved models: whether their files are what was saved, before a model is made of them."""

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
from fasc_lightning.layers import GUARD_SHAPE

#: Entry of a folder's ``quantization_config``: SHA-256 of each file of weights. Only :func:`save_compressed` writes it;
#: whatever saves the model again writes a configuration without.
FILES = "files"

#: Names that configurations have for numbers of layers and of experts, each of which has a tensor at least.
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

_INDEX = record({"weight_map": mapping(text)}, extra=True)


#: What transformers raises in the middle of a configuration that makes no sense.
_INTERNAL = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError)


@contextmanager
def of_folder(path: str | PathLike[str]) -> Iterator[None]:
    """Let whatever is wrong with a compressed model that is being loaded be a ValueError that names its folder.

    Raises:
        ValueError: In place of those of safetensors and of transformers.
        OSError: As it was.
        torch.OutOfMemoryError: Likewise.
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


def add_checksums(folder: Path) -> None:
    """Write into a folder's configuration what its files of weights are; they must be there."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    sums = {file.name: file_checksum(file) for file in sorted(folder.glob("*.safetensors"))}
    config["quantization_config"][FILES] = sums
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_json_contents(folder: Path, names: Iterable[str]) -> None:
    """Refuse JSON files of a local folder that do not hold what they should; missing ones are passed over.

    Raises:
        ValueError: With the file and the entry.
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
    """Refuse numbers of layers that the weights beside a configuration cannot be of: making them could take forever."""
    found = sorted(path.parent.glob("*.safetensors"))
    if not found:
        return
    tensors = 0
    for file in found:
        try:
            with open_tensors(file, "file of weights") as (named, _):
                tensors += len(named.forms)
        except SchemaError:
            return  # which transformers meets, too, if it is one of the model's
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for part in parts:
        for name in _REPEATED:
            value = part.get(name)
            if isinstance(value, int | float) and not 0 <= value <= tensors:
                raise SchemaError(
                    f"Expected {name} of at most {tensors} in {path}, whose weights are that many, got {value!r:.40}."
                )


def check_weight_files(model: nn.Module, files: Iterable[str | PathLike[str]], sums: Mapping[str, str] | None) -> None:
    """Refuse files of weights that are not those that were saved, or that hold integers where the model has floats.

    Args:
        model: Made by the configuration, empty; its layers are compressed.
        files: The model's weights; others than safetensors are not looked at.
        sums: SHA-256 of each file by its name; None if the folder does not say.

    Raises:
        SchemaError: With the file and the tensor.
    """
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            continue
        if sums is not None:
            if file.name not in sums:
                raise SchemaError(f"{file} is none of the files that were saved, {', '.join(sorted(sums))}.")
            if file_checksum(file) != sums[file.name]:
                raise SchemaError(
                    f"{file} is truncated or damaged, or was altered since save_compressed wrote it: its checksum "
                    f"differs. Save or download it again. HINT: if it was meant, take {FILES!r} out of "
                    "'quantization_config' in config.json."
                )
        with open_tensors(file, "file of weights") as (named, _):
            for name, (dtype, shape) in named.forms.items():
                forms = (name, name.removeprefix(prefix), prefix + name)
                held = next((state[form] for form in forms if form in state), None)
                if held is None or shape == GUARD_SHAPE:
                    continue
                whole = dtype in (*INTEGERS, torch.bool)
                if whole and held.is_floating_point():
                    raise SchemaError(f"Expected floats as {name!r} in {file} but got {dtype} and shape {shape}.")
                if not whole and not held.is_floating_point():
                    raise SchemaError(f"Expected integers as {name!r} in {file} but got {dtype} and shape {shape}.")
