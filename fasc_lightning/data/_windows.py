"""Token windows for calibration and evaluation, from files and hub data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasc_lightning.data._pretrained import cache_folder
from fasc_lightning.data._sampling import sample_windows
from fasc_lightning.data._sources import SELF, hub_rows, is_file
from fasc_lightning.data._text_files import MAX_TEXT, read_text, row_text, text_ending

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A tokenizer's `model_max_length` above this means "no limit".
_NO_LIMIT = 10**9


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, windows: int | None, window: int) -> Tensor:
    """Tokenise a text from its start, without special tokens, and cut it into consecutive windows.

    Args:
        text: The text; only the part that the windows need is tokenised.
        tokenizer: Its ``__call__`` gives the ids.
        windows: Number of windows wanted, or None for all whole windows.
        window: Tokens per window.

    Returns:
        Token ids of shape (windows, window).

    Raises:
        ValueError: If a size is not positive or the text has too few tokens.
    """
    _check_sizes(windows, window)
    return _windows(lambda length: text[:length], "the text", tokenizer, windows, window)


def file_windows(path: str | Path, tokenizer: PreTrainedTokenizerBase, windows: int | None, window: int) -> Tensor:
    """Return the windows of a file's text as :func:`text_windows` does; only the part that they need is read.

    Args:
        path: See :func:`~fasc_lightning.data.read_text`.
        tokenizer: Its ``__call__`` gives the ids.
        windows: Number of windows wanted, or None for all whole windows.
        window: Tokens per window.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a size is not positive, the text has too few tokens, or the file cannot be read.
    """
    _check_sizes(windows, window)
    text_ending(path)
    return _windows(lambda length: read_text(path, length), f"the text of {path}", tokenizer, windows, window)


def check_window(window: int, tokenizer: PreTrainedTokenizerBase, model: Any = None) -> None:
    """Refuse windows of fewer than 2 tokens, or longer than the model's context.

    Raises:
        ValueError: If the window is too short or too long.
    """
    if window < 2:
        raise ValueError(f"Expected windows of at least 2 tokens but got {window}.")
    config = getattr(model, "config", None)
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    context = min((limit for limit in limits if isinstance(limit, int) and limit < _NO_LIMIT), default=window)
    if window > context:
        raise ValueError(f"Expected windows of at most {context} tokens, the model's context, but got {window}.")


def _check_sizes(windows: int | None, window: int) -> None:
    if window < 2 or (windows is not None and windows < 1):
        raise ValueError(f"Expected at least 1 window of at least 2 tokens, but got {windows=} and {window=}.")


def _windows(
    read: Callable[[int | None], str], what: str, tokenizer: PreTrainedTokenizerBase, windows: int | None, window: int
) -> Tensor:
    needed = None if windows is None else windows * window
    ids = _leading_ids(read, what, tokenizer, needed)
    supported = len(ids) // window
    if supported < (windows or 1):
        raise ValueError(
            f"Expected {windows or 1} windows of {window} tokens, but {what} has {len(ids)} tokens, enough for "
            f"{supported}. Give a longer text, or ask for fewer or shorter windows."
        )
    kept = supported if windows is None else windows
    return torch.tensor(ids[: kept * window]).view(kept, window)


def _leading_ids(
    read: Callable[[int | None], str], what: str, tokenizer: PreTrainedTokenizerBase, needed: int | None
) -> list[int]:
    """Return the first ``needed`` token ids of a text (all of them if None or if there are fewer).

    Args:
        read: Returns a number of characters from the start of the text, or all of it.
        what: The text, for messages.
        tokenizer: Gives the ids.
        needed: Number of ids.
    """
    if needed is None:
        return _ids(read(None), tokenizer)
    # Byte-pair merges reach no further than a word or a line. So a cut changes only the last few tokens before it, and
    # the margin drops them.
    margin = 64
    length = 8 * needed + 1000
    while True:
        text = read(length)
        ids = _ids(text, tokenizer) if text else []
        if len(text) < length or len(ids) >= needed + margin:
            return ids[:needed]
        if length > max(MAX_TEXT, 64 * needed):
            raise ValueError(
                f"Expected {needed:,} tokens in the first {length:,} characters of {what} but got {len(ids):,}. Is it "
                "a text?"
            )
        length *= 2


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: the text is meant to be longer than the model's context.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def calibration_windows(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int,
    window: int,
    seed: int,
    model: PreTrainedModel | None = None,
    batch_size: int = 64,
    cache: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Collect calibration windows from several sources, as equally as possible, and shuffle them.

    Args:
        sources: Text or jsonl files (see :func:`read_text`); hub data sets as ``ID``, ``ID:CONFIG`` or
            ``ID:CONFIG:SPLIT`` (split ``train`` if not named); or ``"self"``, text sampled from ``model``. The
            earlier sources take the remainder: 64 windows of three are 22, 21 and 21.
        tokenizer: Tokenizer of the model.
        windows: Number of windows in all.
        window: Tokens per window.
        seed: Seed of the shuffle and of sampling from the model.
        model: The model to sample from; only ``"self"`` needs it.
        batch_size: Windows sampled from the model at a time.
        cache: Whether the cache folder keeps sampled windows.
        dtype: Type of the model's weights while text is sampled from it; None takes its own.

    Returns:
        Token ids of shape (windows, window).

    Raises:
        FileNotFoundError: If a source looks like a file and does not exist.
        ValueError: If there are no sources, a source twice, or more sources than windows; if one is too short; or if
            ``"self"`` comes without a model.
    """
    if not sources or len(set(sources)) < len(sources) or len(sources) > windows:
        raise ValueError(
            f"Expected between 1 and {windows} distinct calibration sources for {windows} windows, "
            f"but got {list(sources)}."
        )
    shares = [windows // len(sources) + (i < windows % len(sources)) for i in range(len(sources))]
    parts: list[Tensor] = []
    for source, share in zip(sources, shares, strict=True):
        if source == SELF:
            if model is None:
                raise ValueError("The calibration source 'self' samples from the model: pass `model=`.")
            cache_dir = cache_folder() if cache else None
            parts.append(
                sample_windows(
                    model,
                    tokenizer,
                    windows=share,
                    window=window,
                    seed=seed,
                    batch_size=batch_size,
                    cache_dir=cache_dir,
                    dtype=dtype,
                )
            )
            continue
        try:
            if is_file(source, "calibration"):
                parts.append(file_windows(source, tokenizer, share, window))
            else:
                parts.append(text_windows(_hub_text(source, share * window), tokenizer, share, window))
        except ValueError as error:
            raise ValueError(f"Calibration source {source!r}: {error}") from error
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))
    return torch.cat(parts)[order]


def _hub_text(source: str, tokens: int) -> str:
    """Return text of at least ``tokens`` tokens from the start of a hub data set."""
    documents: list[str] = []
    length = 0
    for where, row in hub_rows(source):
        documents.append(row_text(row, where))
        length += len(documents[-1])
        # No tokenizer in use spends more than a dozen characters on a token over a whole text.
        if length > 12 * tokens + 1000:
            break
    return "\n\n".join(documents)


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Windows as data for a causal language model: every token is an input and a label.

    Args:
        windows: Token ids of shape (windows, window).
    """

    def __init__(self, windows: Tensor) -> None:
        if windows.ndim != 2 or windows.dtype != torch.long:
            raise ValueError(
                f"Expected int64 windows of shape (windows, window), but got {windows.dtype} of shape "
                f"{tuple(windows.shape)}."
            )
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` (all ones) and ``labels``, each of shape (window,)."""
        ids = self.windows[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def window_loader(windows: Tensor, batch_size: int) -> DataLoader[dict[str, Tensor]]:
    """Return a loader over windows in their order.

    Args:
        windows: Token ids of shape (windows, window).
        batch_size: Windows per batch; the last batch may be smaller.

    Returns:
        A loader of dicts with ``input_ids``, ``attention_mask`` and ``labels`` of shape (batch, window).
    """
    return DataLoader(WindowDataset(windows), batch_size=batch_size, shuffle=False)
