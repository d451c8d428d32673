"""Fingerprints of settings and data, used as keys of stored results."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
