"""Models small enough to fit in a blink, one for each architecture family, and data for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fasc_lightning import CausalLMModule

VOCABULARY = 64

_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

#: Configuration class, head class and settings of each causal family.
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA_LIKE),
    "mistral": ("MistralConfig", "MistralForCausalLM", _LLAMA_LIKE),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA_LIKE),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_LLAMA_LIKE, "head_dim": 8}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


def made_once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make a thing once for all tests; each caller gets a copy of its own, and the same random numbers after it."""
    kept: dict[Any, Any] = {}

    @wraps(make)
    def copied(*args: Any, **options: Any) -> Any:
        key = args, tuple(sorted(options.items()))
        if key not in kept:
            kept[key] = make(*args, **options), torch.get_rng_state()
        made, state = kept[key]
        torch.set_rng_state(state)
        return copy.deepcopy(made)

    return copied


def causal_model(family: str = "llama", **settings) -> transformers.PreTrainedModel:
    """A random causal model of a family."""
    config_class, model_class, defaults = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**defaults, **settings})
    return getattr(transformers, model_class)(config)


def aligned(model):
    """Copy a loaded model's weights off the file that they are mapped from, and return the model.

    A weight starts there at any byte, and on some processors the last bit of a product depends on where it starts.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


class Tokens(Dataset):
    """Random token sequences with structure to learn: each token follows from the one before."""

    def __init__(self, samples: int = 8, length: int = 16, padded: bool = False, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(3, VOCABULARY, (samples, 1), generator=generator)
        steps = torch.randint(1, 4, (samples, length), generator=generator).cumsum(1)
        self.input_ids = 3 + (start + steps) % (VOCABULARY - 3)
        lengths = torch.randint(4, length + 1, (samples,), generator=generator)
        real = torch.arange(length) < (lengths if padded else torch.full((samples,), length))[:, None]
        self.attention_mask = real.long()
        self.input_ids = self.input_ids.masked_fill(~real, 0)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids, mask = self.input_ids[i], self.attention_mask[i]
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def token_loader(batch_size: int = 2, **settings) -> DataLoader:
    """A loader of :class:`Tokens`."""
    return DataLoader(Tokens(**settings), batch_size=batch_size)


def causal_module(family: str = "llama", **settings) -> CausalLMModule:
    """A random causal model as a LightningModule."""
    return CausalLMModule(causal_model(family, **settings).train(), learning_rate=1e-3)


class Classifier(pl.LightningModule):
    """A plain LightningModule without anything of transformers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def mlp() -> Classifier:
    """An MLP with in-place activations, dropout and biases."""
    return Classifier(
        nn.Sequential(
            nn.Linear(12, 24), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)
        )
    )


class Patches(nn.Module):
    """A small vision model: patches, a mixing MLP, a running-statistics norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 4, stride=4)
        self.norm = nn.BatchNorm2d(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(images)).permute(0, 2, 3, 1)  # (samples, 4, 4, 16)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x.mean((1, 2)))


def feature_loader(shape: tuple[int, ...] = (12,), samples: int = 32, batch_size: int = 8) -> DataLoader:
    """Labelled Gaussian samples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, *shape, generator=generator)
    y = (x.flatten(1).mean(1) * 10).long().clamp(0, 2)
    return DataLoader(list(zip(x, y, strict=True)), batch_size=batch_size)


def save_model_folder(folder, positions: int = 256) -> None:
    """Write a random model with a byte tokenizer, as a recipe's --model takes it."""
    tokenizer = byte_tokenizer()
    causal_model("llama", vocab_size=len(tokenizer), max_position_embeddings=positions).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
