"""Models and workloads of `inference.py`: decoders of given shapes with random weights, dense and compressed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from fasc_lightning.cli import return_freed_memory
from fasc_lightning.compression import Candidate, allocate_uniform
from fasc_lightning.layers import (
    CompressedLinear,
    Grid,
    LowRankLinear,
    PivotedLinear,
    Stored,
    linear_shape,
    linear_weight,
    model_size,
    rounded_layer,
    swap_modules,
    swap_to_dense,
)
from fasc_lightning.models import prepare_decoding
from fasc_lightning.rounding import to_nearest


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like decoder."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int = 1

    def config(self, vocabulary: int) -> LlamaConfig:
        """Return the decoder's config."""
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096,
        )

    def build(self, dtype: torch.dtype) -> LlamaModel:
        """Return the decoder with random weights, in eval mode; its vocabulary is tiny because it is not timed."""
        model: Any = LlamaModel(self.config(32))
        return model.to(dtype).eval().requires_grad_(False)


#: All decoder layers of the small model, one block of the large ones; Mistral-7B's blocks have Llama-3-8B's shapes.
SHAPES = {
    "SmolLM2-135M": Shape(576, 1536, 9, 3, layers=30),
    "Llama-3.2-1B block": Shape(2048, 8192, 32, 8),
    "Llama-3.2-3B block": Shape(3072, 8192, 24, 8),
    "Llama-3-8B block": Shape(4096, 14336, 32, 8),
}

KINDS: dict[Stored, type[CompressedLinear]] = {"pivot": PivotedLinear, "factors": LowRankLinear}


@dataclass(frozen=True)
class Workload:
    """One run of a model: new tokens of each sequence, after the tokens in its cache."""

    batch: int
    tokens: int
    past: int

    @property
    def new_tokens(self) -> int:
        """Number of tokens that one run reads or generates."""
        return self.batch * self.tokens


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a decoder, dense and compressed, in the order of their registration."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in list(found)[-1:])
        if isinstance(module, nn.Linear | CompressedLinear) and not inside:
            found[name] = module
    return found


def uniform_ranks(layers: Mapping[str, nn.Module], keep: float, layout: Stored, align: int) -> dict[str, int | None]:
    """Return the rank of each layer, None for dense: the highest that keeps at most a share of its parameters."""
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    candidates = [Candidate(name, m, n, np.zeros(min(m, n) + 1)) for name, (m, n) in shapes.items()]
    ranks = allocate_uniform(candidates, [int(keep * c.m * c.n) for c in candidates], KINDS[layout].cost, align)
    return {c.name: k for c, k in zip(candidates, ranks, strict=True)}


def compressed_twin(dense: nn.Module, keep: float, layout: Stored, align: int) -> nn.Module:
    """Return a compressed decoder that shares the modules that stay dense with the dense one."""
    layers = linear_layers(dense)
    twin = copy.deepcopy(dense, {id(layer): layer for layer in layers.values()})
    new: dict[str, nn.Module] = {}
    for name, rank in uniform_ranks(layers, keep, layout, align).items():
        if rank is not None:
            m, n = linear_shape(layers[name])
            new[name] = random_layer(layout, m, n, rank, linear_weight(layers[name]).dtype)
    swap_modules(twin, new)
    return twin.requires_grad_(False)


def rounded_twin(dense: nn.Module, grid: Grid) -> nn.Module:
    """Return a decoder of full rank with rounded layers, prepared for decoding."""
    layers = linear_layers(dense)
    twin = copy.deepcopy(dense, {id(layer): layer for layer in layers.values()})
    rounded = {name: to_nearest(linear_weight(layer).float(), grid) for name, layer in layers.items()}
    swap_modules(twin, {name: rounded_layer(layers[name], found) for name, found in rounded.items()})
    prepare_decoding(twin)
    return twin.eval().requires_grad_(False)


def random_layer(layout: Stored, m: int, n: int, rank: int, dtype: torch.dtype) -> CompressedLinear:
    """Return a layer with random weights and pivots spread over all features, as in a real layer."""
    layer = KINDS[layout](n, m, rank, bias=False, dtype=dtype)  # type: ignore[call-arg]
    if isinstance(layer, PivotedLinear):
        layer.permutation = torch.randperm(len(layer.permutation)).to(torch.int32)
    return layer.eval()


def load_pair(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Return the decoder of a compressed folder, as a dense and as a compressed model."""
    from fasc_lightning import load_compressed

    compressed = load_compressed(folder, dtype=dtype).base_model.eval().requires_grad_(False)
    dense = copy.deepcopy(compressed)
    swap_to_dense(dense)
    return dense.requires_grad_(False), compressed


def compiled_action(model: Any, workload: Workload) -> Callable[[], Any]:
    """Return :func:`decoder_action` by torch.compile, which fails if the model is more than one graph."""
    action = decoder_action(model, workload, torch.compile(model, fullgraph=True, dynamic=False))
    for _ in range(2):  # the cache has other strides after the first run, which takes a second graph
        action()
    return action


def decoder_action(model: Any, workload: Workload, forward: Callable[..., Any] | None = None) -> Callable[[], Any]:
    """Return a run of all decoder layers with attention and norms; each run restores the cache.

    Args:
        model: The decoder; it fills the cache.
        workload: Tokens to run, after the tokens in the cache.
        forward: The model in the form that is timed, if that is another one.
    """
    forward = model if forward is None else forward
    generator = torch.Generator().manual_seed(0)
    like = next(p for p in model.parameters() if p.is_floating_point())

    def embedded(tokens: int) -> torch.Tensor:
        size = (workload.batch, tokens, model.config.hidden_size)
        return torch.randn(size, generator=generator).to(like)

    x = embedded(workload.tokens)
    if not workload.past:
        return lambda: forward(inputs_embeds=x, use_cache=True)
    cache = DynamicCache(config=model.config)
    model(inputs_embeds=embedded(workload.past), past_key_values=cache, use_cache=True)

    def step() -> None:
        forward(inputs_embeds=x, past_key_values=cache, use_cache=True)
        cache.crop(-workload.tokens)

    return step


def layers_action(model: nn.Module, workload: Workload) -> Callable[[], Any]:
    """Return a run of the linear layers alone, one after the other, each on an input of its shape."""
    layers = list(linear_layers(model).values())
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    inputs = {
        n: torch.randn((workload.batch, workload.tokens, n), generator=generator).to(dtype)
        for n in sorted({linear_shape(layer)[1] for layer in layers})
    }
    pairs = [(layer, inputs[linear_shape(layer)[1]]) for layer in layers]

    def run() -> None:
        for layer, x in pairs:
            layer(x)

    return run


def weight_bytes(model: nn.Module) -> int:
    """Return the memory of a model's parameters and buffers."""
    return model_size(model).bytes


def growth(action: Callable[[], Any]) -> int | None:
    """Return how many bytes the memory of the process grows while an action runs; None if that is not known.

    Linux records the largest memory of a process and allows to reset it.
    """
    return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    action()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
