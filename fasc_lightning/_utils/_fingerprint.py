"""Fingerprints of settings and data, used as keys of stored results."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def fingerprint(*parts: Any) -> str:
    """Return a hash of plain values (as JSON writes them) and tensors (shape, dtype and every number).

    Raises:
        TypeError: If a part is neither.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"tensor {tuple(part.shape)} {part.dtype}".encode())
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary and special tokens."""
    return fingerprint(tokenizer.get_vocab(), [str(token) for token in tokenizer.all_special_tokens])


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return a cheap hash of a model: of its configuration and evenly spaced entries of its tensors."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        flat = tensor.detach().reshape(-1)
        entries = flat[:: max(1, flat.numel() // 256)][:257].double().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(entries.numpy().tobytes())
    return digest.hexdigest()
