"""Batches of a language model in the usual forms, converted to tensors of shape (samples, length) or refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fasc_lightning._utils import some_names


def as_token_batch(batch: Any, label: str = "a batch") -> Mapping[str, Any]:
    """Return a batch as a mapping of tensors; the batch itself if it already is one.

    Lists of numbers and NumPy arrays become tensors. A sequence without a dimension of samples becomes a batch of one.
    Text and None are left out.

    Args:
        batch: Batch as a loader made it.
        label: Name of the batch, for messages.

    Returns:
        A mapping with "input_ids" of shape (samples, length).

    Raises:
        TypeError: If the batch has no token ids, or their form is ambiguous.
        ValueError: If sequences have unequal lengths, or shapes disagree.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise TypeError(
            f"Expected batches that are mappings with 'input_ids' but got {type(batch).__name__}"
            f"{f' of {some_names(map(str, batch))}' if isinstance(batch, Mapping) else ''} ({label}). {_remedy(batch)}"
        )
    kept = {key: value for key, value in batch.items() if key == "input_ids" or not (value is None or _is_text(value))}
    found = {key: _as_tensor(value, key, label) for key, value in kept.items()}
    ids = found["input_ids"]
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool or ids.is_complex():
        what = f"{ids.dtype}" if isinstance(ids, Tensor) else f"{type(ids).__name__}"
        raise TypeError(
            f"Expected 'input_ids' of integers, of shape (samples, length), but got {what} ({label}). HINT: tokenise "
            "text first, tokenizer(text, return_tensors='pt')."
        )
    if ids.ndim == 1 and ids.numel():
        found = {key: _one_sample(value, len(ids)) for key, value in found.items()}
        ids = found["input_ids"]
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(
            f"Expected 'input_ids' of shape (samples, length) but got {tuple(ids.shape)} ({label}). HINT: one batch "
            "has two dimensions and at least one token."
        )
    for key in ("attention_mask", "labels"):
        other = found.get(key)
        flat = isinstance(other, Tensor) and (
            key == "labels" or other.ndim < 3
        )  # masks of four dimensions have other shapes
        if other is not None and (not isinstance(other, Tensor) or (flat and other.shape != ids.shape)):
            got = tuple(other.shape) if isinstance(other, Tensor) else f"a {type(other).__name__}"
            raise ValueError(
                f"Expected {key!r} of the shape of 'input_ids', {tuple(ids.shape)}, but got {got} ({label}). HINT: "
                "labels are not shifted by the loader; the model does it."
            )
    same = len(found) == len(batch) and all(found[key] is batch[key] for key in found)
    return batch if same else found


def _remedy(batch: Any) -> str:
    """Return a hint for a batch without token ids."""
    if _is_text(batch) or (isinstance(batch, Mapping) and any(map(_is_text, batch.values()))):
        return "HINT: tokenise text first, tokenizer(text, return_tensors='pt')."
    if isinstance(batch, Mapping):
        return "HINT: wrap the model in a LightningModule of your own, whose `training_step` takes such batches."
    return "HINT: collate them as {'input_ids': ids}, of shape (samples, length), one mapping a batch."


def _as_tensor(value: Any, key: str, label: str) -> Any:
    """Return numbers as a tensor and other values unchanged."""
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        raise TypeError(
            f"Expected {key!r} as a tensor but got a list of {len(value)} tensors ({label}): sequences, or, as "
            "PyTorch's default collation makes of lists, tokens? HINT: stack them; with the datasets library, "
            "dataset.set_format('torch') before the DataLoader, or a collate_fn of transformers."
        )
    if not isinstance(value, np.ndarray | list | tuple) or _is_text(value):
        return value
    try:
        array = np.array(value)
    except ValueError:  # of unequal lengths
        array = np.array(None)
    if array.dtype == object:
        raise ValueError(
            f"Expected {key!r} of shape (samples, length) but got sequences of unequal lengths, or no numbers "
            f"({label}). HINT: pad them, tokenizer.pad(..., return_tensors='pt'), or give one sequence a batch."
        )
    # Token files are often unsigned, for which torch has few operations.
    return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array)


def _is_text(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, str | bytes)


def _one_sample(value: Any, length: int) -> Any:
    return value[None] if isinstance(value, Tensor) and value.ndim == 1 and len(value) == length else value


def is_hf_dataset(data: Any) -> bool:
    """Return whether data is a data set of the datasets library, or a mapping of its splits."""
    return type(data).__module__.partition(".")[0] == "datasets"


class TokenSamples(Dataset[Mapping[str, Any]]):
    """The rows of a tokenised data set of the datasets library, each a batch of one sequence.

    Args:
        rows: The data set, in any format.
        model: Model whose forward's parameters choose the columns.

    Raises:
        TypeError: If the data set has no token ids.
    """

    def __init__(self, rows: Any, model: nn.Module) -> None:
        taken = set(inspect.signature(model.forward).parameters) | {"labels"}
        columns = list(rows.column_names)
        if "input_ids" not in columns:
            raise TypeError(
                f"Expected a tokenised data set, with a column 'input_ids', but got one of {some_names(columns)}. "
                "HINT: dataset.map(lambda row: tokenizer(row['text'], truncation=True))."
            )
        self._model = model
        self.rows = rows.select_columns([column for column in columns if column in taken])
        if len(self.rows):
            self[0]  # an unreadable row is an error before anything runs

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return _checked_batch(self.rows[index], self._model, f"row {index}")


def check_token_ids(batch: Mapping[str, Any], model: nn.Module, label: str = "a batch") -> None:
    """Refuse token ids that a language model has no embedding for.

    Models of more than text are not checked: some replace the ids of images and sounds before they look them up.

    Args:
        batch: Mapping with "input_ids" of shape (samples, length).
        model: The language model.
        label: Name of the batch, for messages.

    Raises:
        ValueError: If an id is negative or not below the number of embeddings.
    """
    rows = _vocabulary(model)
    if rows is None:
        return
    ids = batch["input_ids"]
    outside = ids[(ids < 0) | (ids >= rows)]
    if outside.numel():
        raise ValueError(
            f"Expected 'input_ids' from 0 to {rows - 1}, because the model has embeddings of {rows} tokens, but got "
            f"{int(outside[0])} ({label}). HINT: tokenise with the model's own tokenizer, and pad with one of "
            "its tokens; -100 is for labels alone."
        )


def _vocabulary(model: nn.Module) -> int | None:
    """Return the number of a language model's token embeddings; None if it is unknown."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is not config:
        return None
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def token_batches(data: Iterable[Any], model: nn.Module) -> Any:
    """Return data as batches of a language model, each checked before anything runs.

    Args:
        data: Batches of any form, or a data set of the datasets library.
        model: The language model.

    Raises:
        TypeError: If a batch has no token ids, or their form is ambiguous.
        ValueError: If sequences have unequal lengths, if shapes disagree, or if a token is not in the vocabulary.
    """
    if is_hf_dataset(data) and hasattr(data, "select_columns") and hasattr(data, "__len__"):
        return TokenSamples(data, model)
    taken = set(inspect.signature(model.forward).parameters) | {"labels"}
    if is_hf_dataset(data):  # a stream
        data = [{key: value for key, value in row.items() if key in taken} for row in data]
    return [_checked_batch(batch, model, f"batch {i}") for i, batch in enumerate(data)]


def _checked_batch(batch: Any, model: nn.Module, label: str) -> Mapping[str, Any]:
    found = as_token_batch(batch, label)
    check_token_ids(found, model, label)
    return found
