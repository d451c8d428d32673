"""Windows of text sampled from a model itself."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from fasc_lightning._utils import (
    Entry,
    SchemaError,
    model_fingerprint,
    naming,
    open_tensors,
    tensor_checksum,
    terminal_progress,
    undoing,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Raised whenever a change of the sampling gives other windows for a seed.
_SAMPLER_VERSION = 1

#: Metadata entry of a file of sampled windows; older files lack it.
_CHECKSUM = "fasc_lightning.checksum"


def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int,
    window: int,
    seed: int,
    batch_size: int = 64,
    cache_dir: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sample windows of text from the model itself, at temperature 1 and without truncation.

    Labels drawn from the model's own distribution give the true Fisher (Kunstner et al. 2019, "Limitations of the
    empirical Fisher approximation"), and no data is needed. Every window begins with the tokenizer's beginning token
    (else its end token). Among four starts on SmolLM2-135M-Instruct (beginning token, document separator, random token,
    a user turn), this one gave the words closest to web pages and articles. An end token is an ordinary token here: the
    model continues after it, usually with a new document, so all windows are full.

    Args:
        model: A causal language model.
        tokenizer: Gives the first token.
        windows: Number of windows.
        window: Tokens per window, the first one included.
        seed: The same model and seed give the same windows, whatever the global random state.
        batch_size: Windows sampled at a time. Larger is faster; the result changes only by rounding.
        cache_dir: Folder that keeps the windows by model, tokenizer and settings; None keeps nothing.
        dtype: Type of the weights while sampling; None takes the model's own. bfloat16 is faster on devices with
            instructions for it, and takes half as much memory again for its copy of float32 weights.

    Returns:
        Token ids of shape (windows, window), on the CPU.

    Raises:
        ValueError: If a size is not positive or the tokenizer has neither beginning nor end token.
        FloatingPointError: If the model's output is not finite.
    """
    if windows < 1 or window < 2 or batch_size < 1:
        raise ValueError(
            f"Expected positive sizes and at least 2 tokens a window, but got {windows=}, {window=}, {batch_size=}."
        )
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError("Expected a tokenizer with a beginning or end token to start sampling from, but it has none.")

    path = None
    if cache_dir is not None:
        settings = [_SAMPLER_VERSION, windows, window, seed, first, model_fingerprint(model)]
        settings += [] if dtype is None else [str(dtype)]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        path = Path(cache_dir) / f"samples-{windows}x{window}-{key}.safetensors"
        if path.is_file():
            return _kept_windows(path, windows, window, first, model)

    # All numbers are drawn beforehand, one row per window, so that the batch size does not change them.
    uniforms = torch.rand(windows, window - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with undoing() as undo:
        undo.keep_modes(model)
        model.eval()
        weights = {} if dtype is None else _floats(model, dtype)
        ids = torch.cat([_continue(model, first, part, weights) for part in uniforms.split(batch_size)])
    if path is not None:
        _save_atomically(ids, path)
    return ids


def _floats(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the floating parameters of a model in another type, by name."""
    return {name: p.detach().to(dtype) for name, p in model.named_parameters() if p.is_floating_point()}


@torch.inference_mode()
def _continue(model: PreTrainedModel, first: int, uniforms: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Sample one batch: the inverse distribution function turns each uniform number into a token.

    Args:
        model: Model in eval mode.
        first: First token of every row.
        uniforms: Numbers in [0, 1) of shape (batch, steps).
        weights: Parameters by name, in place of the model's own.

    Returns:
        Token ids of shape (batch, 1 + steps).
    """
    batch, steps = uniforms.shape
    ids = torch.full((batch, 1 + steps), first, device=model.device)
    uniforms = uniforms.to(model.device)
    cache = _preallocated_cache(model, capacity=steps)
    # Only the logits of the last position are needed; the logits of all positions take much memory.
    narrow = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for step in terminal_progress(range(steps), "Sampling text", unit="token"):
        start = 0 if cache is None else step
        keywords = {"past_key_values": cache, "use_cache": cache is not None, **narrow}
        output = functional_call(model, weights, (ids[:, start : step + 1],), keywords)
        if getattr(output, "past_key_values", None) is not cache:
            # A model that does not fill this cache (a recurrent one) reads its whole text at each step.
            cache = None
        # float32: a double cumulative sum over the vocabulary would cost as much as the layers.
        cumulative = output.logits[:, -1].float().softmax(-1).cumsum(-1)  # (batch, vocabulary)
        total = cumulative[:, -1:]
        if not total.isfinite().all():
            raise FloatingPointError(f"The model's output is not finite at token {step} of its own sample.")
        drawn = torch.searchsorted(cumulative, uniforms[:, step : step + 1].float() * total, right=True)
        # Rounding can put a draw at the very end of the last interval.
        ids[:, step + 1] = drawn.squeeze(1).clamp_max(cumulative.shape[1] - 1)
    return ids.cpu()


def _preallocated_cache(model: PreTrainedModel, capacity: int) -> Any:
    """Return a key/value cache that full-attention layers write in place; the stock cache is copied every step."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class PreallocatedLayer(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self._room = [s.new_empty(*s.shape[:2], capacity, s.shape[3]) for s in (key_states, value_states)]
                self._filled = 0
            start, self._filled = self._filled, self._filled + key_states.shape[2]
            for room, states in zip(self._room, (key_states, value_states), strict=True):
                room[:, :, start : self._filled] = states
            self.keys, self.values = (room[:, :, : self._filled] for room in self._room)
            return self.keys, self.values

    cache = DynamicCache(config=model.config)
    # Sliding-window and recurrent layers keep their own, already bounded, state.
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _kept_windows(path: Path, windows: int, window: int, first: int, model: PreTrainedModel) -> Tensor:
    """Return windows that an earlier run sampled.

    Raises:
        ValueError: If the file is damaged or was altered.
    """
    embeddings: Any = model.get_input_embeddings()
    last = len(embeddings.weight) - 1
    where = f"Delete {path} to sample again: the file"
    with open_tensors(path, "file of sampled windows") as (tensors, metadata), naming(where):
        saved = metadata.get(_CHECKSUM)
        entry = Entry((torch.int64,), ((windows, window),), 0, last)
        tensors.expect({"input_ids": entry}, None if saved is None else {"input_ids": saved})
        ids = tensors.read("input_ids")
        if not bool((ids[:, 0] == first).all()):
            raise SchemaError(f"Expected windows that begin with the token {first} but some do not.")
        return ids


def _save_atomically(ids: Tensor, path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    with undoing() as undo:
        undo.add(Path(scratch).unlink, missing_ok=True)
        save_file({"input_ids": ids.contiguous()}, scratch, metadata={_CHECKSUM: tensor_checksum(ids)})
        os.replace(scratch, path)
