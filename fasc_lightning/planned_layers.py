"""The layers of a model that may not exist yet: of a module on any device, or of a transformers config alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fasc_lightning.taps import matches, select_layers

#: Names of the three-dimensional expert weights of transformers, and into how many matrices each is cut: gate and up
#: are one parameter there.
FUSED_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class PlannedLayers:
    """What is to be compressed.

    Attributes:
        layers: Linear layers by name; experts are stand-ins on the meta device, one for each matrix.
        shares: Share of the tokens that each of them sees if a router spreads them evenly; 1 for what is no expert.
    """

    layers: dict[str, nn.Module]
    shares: dict[str, float]


def model_on_meta(model_or_config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a module as it is, or the causal language model of a config, without weights.

    Args:
        model_or_config: Any module, on any device; or a transformers config.
        dtype: Of the weights that a config's model would have; None for the config's own, else float32.

    Raises:
        TypeError: If it is neither.
        ValueError: If the config lacks shapes, has shapes that no model can have, or is not of a causal language model.
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
            f"Expected the config of a causal language model but got {name}, which says nothing of layers and their "
            "shapes. HINT: AutoConfig.from_pretrained(folder), or one like LlamaConfig(hidden_size=..., ...)."
        )
    dtype = dtype or getattr(model_or_config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_or_config, dtype=dtype)
    except Exception as error:  # each family fails in its own way: None times a number, a division by no heads, ...
        raise ValueError(
            f"Expected a {name} with the shapes of a model but no model can be made of it: {error}. HINT: check "
            "hidden_size, intermediate_size, num_hidden_layers and the numbers of heads."
        ) from error


def planned_layers(
    model: nn.Module, targets: str | list[str] | None = None, exclude: str | list[str] | None = None
) -> PlannedLayers:
    """Return what a compression of a model takes: its linear layers, and the matrices of its experts.

    Args:
        model: Any module; no weight is read.
        targets: See :func:`~fasc_lightning.taps.select_layers`; experts are named ``<module>.<number>.gate_proj`` and
            so on.
        exclude: Likewise. A router of experts is always left alone.

    Raises:
        ValueError: If nothing is selected.
    """
    experts: dict[str, nn.Module] = {}
    shares: dict[str, float] = {}
    routers: set[int] = set()
    for name, module in model.named_modules():
        if not is_fused_experts(module):
            continue
        share = experts_share(model, module)
        for matrix, stand_in in _matrices(name, module).items():
            if _selected(matrix, targets, exclude):
                experts[matrix], shares[matrix] = stand_in, share
        neighbours = model.get_submodule(name.rpartition(".")[0]).children()
        routers.update(id(near) for near in neighbours if _routes(near, _count(module)))
    try:
        linear = select_layers(model, targets, exclude)
    except ValueError:
        if not experts:  # patterns that name experts alone are fine
            raise
        linear = {}
    linear = {name: layer for name, layer in linear.items() if id(layer) not in routers}
    return PlannedLayers({**linear, **experts}, {**dict.fromkeys(linear, 1.0), **shares})


def is_fused_experts(module: nn.Module) -> bool:
    """Tell whether a module holds the weights of all its experts as Mixtral and Qwen's do in transformers.

    That is (experts, 2 i, h) for gate and up, and (experts, h, i) for down. Families that keep them transposed, or with
    biases, are of another kind.
    """
    own = dict(module.named_parameters(recurse=False))
    if own.keys() != FUSED_EXPERTS.keys() or any(weight.dim() != 3 for weight in own.values()):
        return False
    experts, h, i = own["down_proj"].shape
    return own["gate_up_proj"].shape == (experts, 2 * i, h)


def experts_share(model: nn.Module, experts: nn.Module) -> float:
    """Return the share of the tokens that one expert sees on average: experts a token over experts.

    Args:
        model: Its config says how many experts serve a token; 1 where there is none that does.
        experts: The module of all experts.
    """
    config = getattr(model, "config", None)
    per_token = getattr(config, "num_experts_per_tok", None) or 1
    return min(1.0, per_token / _count(experts))


def _count(experts: nn.Module) -> int:
    return len(experts.get_parameter("down_proj"))


def _matrices(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """Return a stand-in for every matrix of every expert."""
    matrices: dict[str, nn.Module] = {}
    for fused, parts in FUSED_EXPERTS.items():
        weight = module.get_parameter(fused)
        count, m, n = weight.shape
        for expert in range(count):
            for part in parts:
                matrices[f"{name}.{expert}.{part}"] = nn.Linear(
                    n, m // len(parts), bias=False, device="meta", dtype=weight.dtype
                )
    return matrices


def _selected(name: str, targets: str | list[str] | None, exclude: str | list[str] | None) -> bool:
    wanted = targets is None or targets == "all-linear" or matches(name, targets)
    return wanted and not (exclude is not None and matches(name, exclude))


def _routes(module: nn.Module, experts: int) -> bool:
    """Tell whether a neighbour of experts is their router: a linear layer with one output for each."""
    return isinstance(module, nn.Linear) and module.out_features == experts
