"""Token windows for calibration and evaluation, from files and hub data sets."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasc_lightning._utils import Entry, SchemaError, naming, open_tensors, tensor_checksum, undoing
from fasc_lightning.data._pretrained import cache_folder
from fasc_lightning.data._text_files import MAX_TEXT, read_text, row_text, text_ending
from fasc_lightning.data._text_files import open_text as open_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SELF = "self"
# Raised whenever a change of the sampling gives other windows for a seed.
_SAMPLER_VERSION = 1

#: Metadata entry of a file of sampled windows; older files lack it.
_CHECKSUM = "fasc_lightning.checksum"


def named_files(arguments: Iterable[str], option: str = "--eval-text") -> dict[str, str]:
    """Return the files of a command line's NAME=FILE arguments by name.

    Raises:
        ValueError: If an argument has another form.
        FileNotFoundError: If a file is missing.
    """
    files = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not (name and separator and path):
            raise ValueError(f"Expected {option} NAME=FILE but got {argument!r}.")
        check_file(path)
        files[name] = path
    return files


def check_file(path: str) -> None:
    """Refuse an evaluation file that does not exist.

    Raises:
        FileNotFoundError: If the file does not exist.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected a file to evaluate on but {path} is none.")


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, windows: int | None, window: int) -> Tensor:
    """Tokenise a text from its start, without special tokens, and cut it into consecutive windows.

    Args:
        text: The text; only the part that the windows need is tokenised.
        tokenizer: Its ``__call__`` gives the ids.
        windows: Number of windows wanted, or None for all whole windows.
        window: Tokens a window.

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
        window: Tokens a window.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a size is not positive, the text has too few tokens, or the file cannot be read.
    """
    _check_sizes(windows, window)
    text_ending(path)
    return _windows(lambda length: read_text(path, length), f"the text of {path}", tokenizer, windows, window)


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
) -> Tensor:
    """Collect calibration windows from several sources, as equally as possible, and shuffle them.

    Args:
        sources: Text or jsonl files (see :func:`read_text`); hub data sets as ``ID``, ``ID:CONFIG`` or
            ``ID:CONFIG:SPLIT`` (split ``train`` if not named); or ``"self"``, text sampled from ``model``. The
            earlier sources take the remainder: 64 windows of three are 22, 21 and 21.
        tokenizer: Tokenizer of the model.
        windows: Number of windows in all.
        window: Tokens a window.
        seed: Seed of the shuffle and of sampling from the model.
        model: The model to sample from; only ``"self"`` needs it.
        batch_size: Windows sampled from the model at a time.
        cache: Whether the cache folder keeps sampled windows.

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


def is_file(source: str, use: str = "data") -> bool:
    """Return whether a source is a file, and not a hub data set; ``use`` names it in the error.

    Raises:
        FileNotFoundError: If it looks like a file and does not exist.
    """
    path = Path(source)
    if not path.is_file() and path.suffix in (".txt", ".jsonl", ".xz"):
        raise FileNotFoundError(f"Expected a {use} file at {source}, but there is none.")
    return path.is_file()


def check_sources(sources: Iterable[str], use: str = "data") -> None:
    """Refuse missing files and unknown kinds of files before anything is loaded; ``use`` names them in the error.

    Raises:
        FileNotFoundError: If a source looks like a file and does not exist.
        ValueError: If a file name has an unknown ending.
    """
    for source in sources:
        if source != SELF and is_file(source, use):
            text_ending(source)


def hub_rows(source: str, streaming: bool = True) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a data set on the hub or in a local folder, each after its name for messages.

    Args:
        source: ``ID``, ``ID:CONFIG`` or ``ID:CONFIG:SPLIT``; the split is ``train`` if not named.
        streaming: Whether rows are yielded while they are read; otherwise the whole data set is first downloaded to the
            cache of ``datasets``.

    Raises:
        ModuleNotFoundError: If ``datasets`` is not installed.
        OSError: If the data set cannot be found or downloaded.
        ValueError: If it cannot be read; the message names the source.
    """
    name, config, split = [*source.split(":"), None, None][:3]
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{source!r} is no file, and reading a hub data set needs the extra `eval`. "
            "Run `pip install 'fasc-lightning[eval]'`."
        ) from None
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=streaming)
        for number, row in enumerate(rows):
            yield f"{source}, row {number}", row
    except OSError:
        raise  # the message names the missing data set
    except Exception as error:  # from the reader of the data set's format
        raise ValueError(f"{source}: the data set cannot be read: {type(error).__name__}: {error}") from error


def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int,
    window: int,
    seed: int,
    batch_size: int = 64,
    cache_dir: str | Path | None = None,
) -> Tensor:
    """Sample windows of text from the model itself, at temperature 1 and without truncation.

    Labels drawn from the model's own distribution give the true Fisher (Kunstner et al. 2019, "Limitations of the
    empirical Fisher approximation"), and no data is needed. Every window begins with the tokenizer's beginning token
    (else its end token). Among four starts on SmolLM2-135M-Instruct (beginning token, document separator, random token,
    a user turn), this one gave words closest to those of web pages and articles. An end token is an ordinary token
    here: the model continues after it, usually with a new document, so all windows are full.

    Args:
        model: A causal language model.
        tokenizer: Gives the first token.
        windows: Number of windows.
        window: Tokens a window, the first one included.
        seed: The same model and seed give the same windows, whatever the global random state.
        batch_size: Windows sampled at a time. Larger is faster; the result changes only by rounding.
        cache_dir: Folder that keeps the windows by model, tokenizer and settings; None keeps nothing.

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
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        path = Path(cache_dir) / f"samples-{windows}x{window}-{key}.safetensors"
        if path.is_file():
            return _kept_windows(path, windows, window, first, model)

    # All numbers are drawn beforehand, one row per window, so that the batch size does not change them.
    uniforms = torch.rand(windows, window - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with undoing() as undo:
        undo.keep_modes(model)
        model.eval()
        ids = torch.cat([_continue(model, first, part) for part in uniforms.split(batch_size)])
    if path is not None:
        _save_atomically(ids, path)
    return ids


@torch.inference_mode()
def _continue(model: PreTrainedModel, first: int, uniforms: Tensor) -> Tensor:
    """Sample one batch: the inverse distribution function turns each uniform number into a token.

    Args:
        model: Model in eval mode.
        first: First token of every row.
        uniforms: Numbers in [0, 1) of shape (batch, steps).

    Returns:
        Token ids of shape (batch, 1 + steps).
    """
    batch, steps = uniforms.shape
    ids = torch.full((batch, 1 + steps), first, device=model.device)
    uniforms = uniforms.to(model.device)
    cache = _preallocated_cache(model, capacity=steps)
    # Only the logits of the last position are needed; those of all positions take much memory.
    narrow = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for step in range(steps):
        start = 0 if cache is None else step
        output = model(ids[:, start : step + 1], past_key_values=cache, use_cache=cache is not None, **narrow)
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
        batch_size: Windows a batch; the last batch may be smaller.

    Returns:
        A loader of dicts with ``input_ids``, ``attention_mask`` and ``labels`` of shape (batch, window).
    """
    return DataLoader(WindowDataset(windows), batch_size=batch_size, shuffle=False)
