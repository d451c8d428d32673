"""Models of transformers' architectures, made small from their own configurations, and compressed without a fit."""

from __future__ import annotations

import copy
import json

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from fasc_lightning.layers import PivotedLinear, empty_layer, named_layers, place, swap_modules
from fasc_lightning.models import attach_config

WIDTH = 32

#: Sizes by parts of the names that configurations give them; the first that fits is taken.
_SIZES: tuple[tuple[tuple[str, ...], int], ...] = (
    (("vocab_size", "vocab_size_per_layer_input"), 64),
    (("num_experts_per_tok", "experts_per_token", "moe_topk", "top_k", "moe_k"), 2),
    (("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    (("moe_intermediate_size", "expert_ffn_hidden_size"), 24),
    (("intermediate_size", "ffn_dim", "ffn_hidden_size", "mlp_dim", "hidden_dim", "n_inner", "d_ff"), 48),
    (("num_key_value_heads", "kv_heads"), 2),
    (("num_attention_heads", "n_head", "attention_heads", "num_heads", "n_heads"), 4),
    (("num_hidden_layers", "n_layer", "_layers", "depth", "num_blocks"), 2),
    (("head_dim", "d_kv"), 8),
    (("hidden_size", "d_model", "embed_dim", "embed_dims", "n_embd", "width", "projection_dim", "output_dim"), WIDTH),
    (("image_size",), 32),
    (("patch_size",), 8),
)

_TOKENS = ("_token_id", "_token_index", "token_idx")


def _size(name: str, value: int) -> int:
    for parts, size in _SIZES:
        if any(name == part or name.endswith(part) for part in parts):
            return min(value, size)
    if name.endswith(_TOKENS):
        return min(value, 60)
    return value


def shrink(config: PreTrainedConfig, narrow: bool = True) -> PreTrainedConfig:
    """A copy of a configuration with few layers and, if narrow, few features."""
    config = copy.deepcopy(config)
    _shrink(config, narrow)
    return config


_DEEP = ("num_hidden_layers", "n_layer", "_layers", "depth", "num_blocks", "vocab_size")


def _shrink(config: PreTrainedConfig, narrow: bool) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _shrink(value, narrow)
        elif type(value) is int and (narrow or name.endswith((*_DEEP, *_TOKENS))):
            setattr(config, name, _size(name, value))
    layers = getattr(config, "num_hidden_layers", None)
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list) and isinstance(layers, int):
            setattr(config, name, kinds[:layers])
    if "_out_features" in vars(config) and len(config.stage_names) > (layers or 0) + 1 > 1:
        config.stage_names = config.stage_names[: layers + 1]
        config._out_features, config._out_indices = [config.stage_names[-1]], [layers]


def model_classes(kind: str) -> list[type[PreTrainedModel]]:
    """The base class of a model type and one with a head, where there is one."""
    names = []
    for mapping in (v for k, v in vars(modeling_auto).items() if k.endswith("_MAPPING_NAMES") and "MODEL" in k):
        name = mapping.get(kind)
        names.extend(name if isinstance(name, list | tuple) else [name] if name else [])
    classes = [getattr(transformers, name, None) for name in dict.fromkeys(names)]
    return [each for each in classes if isinstance(each, type) and issubclass(each, PreTrainedModel)]


def model_types() -> list[str]:
    """All model types of transformers."""
    return sorted(CONFIG_MAPPING_NAMES)


def _reread(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration as a folder gives it back: some values are computed when it is made, and some are refused."""
    return type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))


class NotSmallError(Exception):
    """That a model could not be built small."""


def small_model(model_class: type[PreTrainedModel], kind: str, limit: int = 40_000_000) -> PreTrainedModel:
    """A model of few parameters.

    Raises:
        NotSmallError: With the reasons.
    """
    reasons = []
    for narrow in (True, False):
        try:
            config = _reread(shrink(CONFIG_MAPPING[kind](), narrow))
            with torch.device("meta"):
                model = model_class(copy.deepcopy(config))
            if (size := sum(p.numel() for p in model.parameters())) > limit:
                raise ValueError(f"{size} parameters")
            if not any(isinstance(each, nn.Linear) for each in model.modules()):
                raise ValueError("no linear layers")
            torch.manual_seed(0)
            return model_class(copy.deepcopy(config)).float().eval()
        except Exception as error:  # whatever a configuration that was changed blindly leads to
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:90]}")
    raise NotSmallError("; ".join(dict.fromkeys(reasons)))


def converts(model: PreTrainedModel) -> bool:
    """Whether transformers converts weights of a model between file and modules."""
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def compress_at_random(model: PreTrainedModel, quantized: bool = True) -> list[str]:
    """Give a model compressed layers of every kind with random values, and leave every fifth layer dense.

    Returns:
        The names of the compressed layers.
    """
    generator = torch.Generator().manual_seed(0)
    kinds = [
        {"layout": "pivot", "side": "out"},
        {"layout": "factors"},
        {"layout": "pivot", "side": "in"},
        {"layout": "factors", "quantize": "int8"} if quantized else {"layout": "factors"},
    ]
    new: dict[str, nn.Module] = {}
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    layers = {name: layer for name, layer in named_layers(model).items() if _is_target(layer)}
    for i, (name, layer) in enumerate(layers.items()):
        m, n = layer.out_features, layer.in_features
        if i % 5 == 4 or min(m, n) < 4 or f"{name}.weight" in tied:
            continue
        rank = 1 + i % 3
        spec = {"rank": rank, "bias": layer.bias is not None, **kinds[i % 5]}
        compressed = place(empty_layer(name, layer, spec), torch.device("cpu"))
        for value in compressed.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
            elif value.dtype == torch.int8:
                value.copy_(torch.randint(-127, 127, value.shape, generator=generator))
        if isinstance(compressed, PivotedLinear):
            compressed.permutation.copy_(torch.randperm(len(compressed.permutation), generator=generator))
        new[name] = compressed
    swap_modules(model, new)
    attach_config(model)
    return list(new)


def _is_target(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or type(layer).__name__ == "ExpertLinear"
