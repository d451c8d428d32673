"""The module without weights that a transformers config describes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def model_on_meta(model_or_config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a module unchanged, or the causal language model of a config, without weights.

    Args:
        model_or_config: Any module, on any device; or a transformers config.
        dtype: Dtype of the config's model; None for the config's own, else float32.

    Raises:
        TypeError: If the argument is neither.
        ValueError: If the config lacks shapes, if its shapes are impossible, or if it is not of a causal language
            model.
    """
    if isinstance(model_or_config, nn.Module):
        return model_or_config
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    if not isinstance(model_or_config, PreTrainedConfig):
        raise TypeError(
            "Expected a module or a transformers config but got "
            f"{type(model_or_config).__name__}. HINT: AutoConfig.from_pretrained(folder) reads a folder's config."
        )
    name = type(model_or_config).__name__
    if type(model_or_config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"Expected the config of a causal language model but got {name}, of which AutoModelForCausalLM makes none. "
            "HINT: AutoConfig.from_pretrained(folder), or one like LlamaConfig(hidden_size=..., ...). Give a model of "
            "another kind itself, made under torch.device('meta')."
        )
    dtype = dtype or getattr(model_or_config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_or_config, dtype=dtype)
        _check_shapes(model)
    except Exception as error:  # each family fails in its own way: None times a number, a division by 0 heads, ...
        raise ValueError(
            f"Expected a {name} with the shapes of a model but no model can be made of it: {error}. HINT: check "
            "hidden_size, intermediate_size, num_hidden_layers and the numbers of heads and experts."
        ) from error
    return model


def _check_shapes(model: nn.Module) -> None:
    """Refuse a model with sizes of zero, which can be built but not used.

    Raises:
        ValueError: If a weight is empty, or if there is no block.
    """
    empty = [f"{name!r} is of shape {tuple(p.shape)}" for name, p in model.named_parameters() if p.numel() == 0]
    if empty:
        raise ValueError(empty[0])
    config: Any = model.config
    if getattr(config.get_text_config(decoder=True), "num_hidden_layers", 1) < 1:
        raise ValueError("it has no layers")
