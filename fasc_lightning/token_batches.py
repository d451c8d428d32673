"""Batches of a language model, in the forms that people have them in: made tensors of (samples, length), or refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

_WANTED = (
    "a mapping with 'input_ids', integers of shape (samples, length), and optionally 'attention_mask' and 'labels' of "
    "the same shape"
)


def as_token_batch(batch: Any, label: str = "a batch") -> Mapping[str, Any]:
    """Return a batch as a mapping of tensors; the batch itself if it is one.

    Token ids alone are "input_ids". Lists of numbers and NumPy arrays become tensors; one sequence without a dimension
    of samples is a batch of one. Text and None are left out.

    Args:
        batch: As a loader made it.
        label: Names it in messages.

    Returns:
        With "input_ids" of shape (samples, length).

    Raises:
        TypeError: If it does not hold token ids, or their meaning cannot be told.
        ValueError: If sequences are of unequal lengths, or shapes disagree.
    """
    if isinstance(batch, tuple | list) and len(batch) == 1 and isinstance(batch[0], Tensor | np.ndarray):
        batch = batch[0]  # as loaders over a TensorDataset make them
    given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    if "input_ids" not in given:
        text = [key for key, value in given.items() if _is_text(value)]
        raise TypeError(
            f"Expected {label} to be {_WANTED}, but got a {type(batch).__name__} with {', '.join(map(repr, given))}. "
            + (
                f"HINT: tokenise {text[0]!r} first, tokenizer(text, return_tensors='pt')."
                if text
                else "HINT: wrap the model in a LightningModule of your own, whose `training_step` takes such batches."
            )
        )
    kept = {key: value for key, value in given.items() if key == "input_ids" or not (value is None or _is_text(value))}
    found = {key: _as_tensor(value, key, label) for key, value in kept.items()}
    ids = found["input_ids"]
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool or ids.is_complex():
        what = f"{ids.dtype}" if isinstance(ids, Tensor) else f"{type(ids).__name__} ({ids!r:.60})"
        raise TypeError(
            f"Expected {label} to be {_WANTED}, but got {what} for the token ids. HINT: "
            f"{'tokenise text first' if _is_text(ids) else 'give integers'}."
        )
    if ids.ndim == 1 and ids.numel():
        found = {key: _one_sample(value, len(ids)) for key, value in found.items()}
        ids = found["input_ids"]
    if ids.ndim != 2 or not ids.numel():
        hint = " Give a list of batches, [[1, 2, 3]]." if not ids.ndim else ""
        raise ValueError(f"Expected {label} to be {_WANTED}, but got token ids of shape {tuple(ids.shape)}.{hint}")
    for key in ("attention_mask", "labels"):
        other = found.get(key)
        flat = isinstance(other, Tensor) and (key == "labels" or other.ndim < 3)  # masks of four dimensions are whole
        if other is not None and (not isinstance(other, Tensor) or (flat and other.shape != ids.shape)):
            got = tuple(other.shape) if isinstance(other, Tensor) else f"a {type(other).__name__}"
            raise ValueError(f"Expected {key!r} of {label} to be of shape {tuple(ids.shape)}, as its ids, but got {got}.")
    same = isinstance(batch, Mapping) and len(found) == len(batch) and all(found[key] is batch[key] for key in found)
    return batch if same else found


def _as_tensor(value: Any, key: str, label: str) -> Any:
    """Return numbers as a tensor; anything else as it is."""
    if isinstance(value, np.ndarray) or (isinstance(value, list | tuple) and not _is_text(value)):
        if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
            raise TypeError(
                f"Expected {label} to be {_WANTED}, but {key!r} is a list of {len(value)} tensors: sequences, or, as "
                "PyTorch's default collation makes of lists, tokens? HINT: stack them; with the datasets library, "
                "dataset.set_format('torch') before the DataLoader, or a collate_fn of transformers."
            )
        try:
            array = np.array(value)
        except ValueError:
            array = np.array(None)
        if array.dtype == object:
            raise ValueError(
                f"Expected {label} to be {_WANTED}, but {key!r} holds sequences of unequal lengths, or no numbers. "
                "HINT: pad them, tokenizer.pad(..., return_tensors='pt'), or give one sequence a batch."
            )
        # Of token files: torch has few operations on unsigned numbers.
        return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array)
    return value


def _is_text(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, str | bytes)


def _one_sample(value: Any, length: int) -> Any:
    return value[None] if isinstance(value, Tensor) and value.ndim == 1 and len(value) == length else value


def is_hf_dataset(data: Any) -> bool:
    """Tell whether data is a data set of the datasets library, or several by the names of their splits."""
    return type(data).__module__.partition(".")[0] == "datasets"


class TokenSamples(Dataset[Mapping[str, Any]]):
    """The rows of a tokenised data set of the datasets library, each a batch of one sequence.

    Args:
        rows: The data set; whichever format is set.
        model: Whose forward says which columns are for it.

    Raises:
        TypeError: If it holds no token ids.
    """

    def __init__(self, rows: Any, model: nn.Module) -> None:
        taken = set(inspect.signature(model.forward).parameters) | {"labels"}
        columns = list(rows.column_names)
        if "input_ids" not in columns:
            raise TypeError(
                f"Expected a tokenised data set, with a column 'input_ids', but got one with {', '.join(columns)}. HINT: "
                "dataset.map(lambda row: tokenizer(row['text'], truncation=True))."
            )
        self.rows = rows.select_columns([column for column in columns if column in taken])
        if len(self.rows):
            self[0]  # refuses rows that cannot be read before anything runs

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return as_token_batch(self.rows[index], f"row {index}")


def token_batches(data: Iterable[Any], model: nn.Module) -> Any:
    """Return data as batches of a language model, each checked before anything runs.

    Args:
        data: Batches of any form, or a data set of the datasets library.
        model: The language model.

    Raises:
        TypeError: As :func:`as_token_batch`.
        ValueError: Likewise.
    """
    if is_hf_dataset(data) and hasattr(data, "select_columns") and hasattr(data, "__len__"):
        return TokenSamples(data, model)
    taken = set(inspect.signature(model.forward).parameters) | {"labels"}
    if is_hf_dataset(data):  # a stream
        data = [{key: value for key, value in row.items() if key in taken} for row in data]
    return [as_token_batch(batch, f"batch {i}") for i, batch in enumerate(data)]
