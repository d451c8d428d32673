"""Models by name, dense or compressed by this or by another program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from fasc_lightning.data import load_config, load_model, load_tokenizer, model_folder
from fasc_lightning.models import is_compressed_config, load_compressed

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Types of a model's weights.
Dtype = Literal["float32", "bfloat16", "float16"]


def add_dtype_option(parser: ArgumentParser, default: Dtype | None = "float32") -> None:
    """Add the option for the type of the weights.

    Args:
        parser: Parser of a program.
        default: The default; None for the type that the model's configuration names.
    """
    text = "" if default is not None else "; default: what the model's config.json names"
    parser.add_argument("--dtype", choices=get_args(Dtype), default=default, help=f"type of the model's weights{text}")


def dtype_of(word: Dtype) -> torch.dtype:
    """Return the type that an option names."""
    dtype: torch.dtype = getattr(torch, word)
    return dtype


def device_of(word: str | None) -> torch.device:
    """Return the device that the option ``--device`` names; by default a GPU if there is one.

    Raises:
        ValueError: If the device is unknown or is not on this machine.
    """
    try:
        device = torch.device(word or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # a PyTorch without CUDA asserts
        raise ValueError(f"Expected --device to be a device of this machine but got {word!r}: {error}") from error
    return device


def load_any(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model that this package compressed strictly, and any other as transformers does.

    Args:
        name: As for :func:`~fasc_lightning.data.load_model`.
        dtype: Type of the weights.

    Returns:
        The model in eval mode on the CPU, and its tokenizer with a padding token.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If a compressed model is damaged.
    """
    if not is_compressed_config(load_config(name)):
        return load_model(name, dtype)
    folder = model_folder(name)
    tokenizer = load_tokenizer(folder)
    model: Any = load_compressed(folder, dtype=dtype)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer
