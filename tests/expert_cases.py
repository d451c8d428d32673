"""Tiny mixtures of experts of three families."""

from __future__ import annotations

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

MIXTURES = ("mixtral", "qwen2", "qwen3")

E, K, H = 4, 2, 16
COMMON = {
    "vocab_size": 64,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": K,
    "pad_token_id": 0,
}


def make(family):
    torch.manual_seed(0)
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=E))
    elif family == "qwen2":
        sizes = {"num_experts": E, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**COMMON, **sizes))
    else:
        sizes = {"num_experts": E, "moe_intermediate_size": 12, "head_dim": 8}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # Qwen's routers begin as zeros
    model.set_experts_implementation("eager")
    return model.eval()


def fused(model):
    return model.model.layers[0].mlp.experts


PLACE = "model.layers.0.mlp.experts"


def batches(count=4):
    torch.manual_seed(2)
    return [{"input_ids": torch.randint(1, 64, (4, 24))} for _ in range(count)]
