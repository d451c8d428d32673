"""Fine-tuning data: sources read as records, encoded as token ids and labels, and batched by loaders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fasc_lightning.batches import ResumableLoader
from fasc_lightning.data._finetune_encoding import OVERLONG, Overlong, encode_instruction, example_of, fit_example
from fasc_lightning.data._finetune_examples import Example, collate, pack_examples, split_examples
from fasc_lightning.data._finetune_records import Document, read_records
from fasc_lightning.data._overlap import shares_passage
from fasc_lightning.data._pretrained import cache_folder
from fasc_lightning.data._sampling import sample_windows
from fasc_lightning.data._sources import SELF, check_sources
from fasc_lightning.data._windows import check_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The treatment of instructions with an empty answer.
Empty = Literal["error", "skip"]
EMPTY: tuple[Empty, ...] = ("error", "skip")


@dataclass
class DataSummary:
    """Counts of the data that was read; ``str()`` is a line for people.

    Attributes:
        examples: Examples kept: instructions, and windows of plain text.
        heldout: Number of them that are held out.
        calibrated: Number of held-out examples that are calibration windows.
        tokens: Number of their tokens.
        learnt: Number of tokens in the loss.
        cut: Examples whose answer was cut off at the end of the window.
        skipped: Examples left out because they are longer than the window.
        empty: Examples left out because their answer is empty.
        evaluated: Examples left out because they share a passage with an evaluation text.
        windows: Rows of the training batches.
    """

    examples: int = 0
    heldout: int = 0
    calibrated: int = 0
    tokens: int = 0
    learnt: int = 0
    cut: int = 0
    skipped: int = 0
    empty: int = 0
    evaluated: int = 0
    windows: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.examples:,} examples, {self.heldout:,} of them held out: {self.tokens:,} tokens, {self.learnt:,} "
            f"of them learnt, in {self.windows:,} rows to train on"
        ]
        if self.calibrated:
            lines.append(f"{self.calibrated:,} of those held out were calibrated on")
        if self.cut:
            lines.append(f"{self.cut:,} answers were cut at the end of the window")
        if self.skipped:
            lines.append(f"{self.skipped:,} examples were left out, as they do not fit into the window")
        if self.empty:
            lines.append(f"{self.empty:,} examples were left out, as their answer is empty")
        if self.evaluated:
            lines.append(f"{self.evaluated:,} examples were left out, as they share a passage with an evaluation text")
        return "; ".join(lines)


@dataclass(frozen=True)
class FinetuneData:
    """Batches of "input_ids", "attention_mask" and "labels", each (samples, length).

    Attributes:
        train: Training batches, in a shuffled order that is the same in each epoch; a resumed fit continues in its
            middle.
        heldout: Held-out batches; none of their examples, nor a copy, is in ``train``. None if nothing is held out.
        summary: Counts.
    """

    train: DataLoader[Any]
    heldout: DataLoader[Any] | None
    summary: DataSummary


def finetune_data(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    tokens: int | None = None,
    heldout: float = 0.1,
    batch_size: int = 1,
    pack: bool = True,
    answers_only: bool = True,
    overlong: Overlong = "cut",
    empty: Empty = "error",
    streaming: bool = True,
    seed: int = 0,
    model: PreTrainedModel | None = None,
    cache: bool = True,
    calibrated: Tensor | None = None,
    weights: Sequence[float] | None = None,
    evaluated: Iterable[Tensor] = (),
) -> FinetuneData:
    """Read fine-tuning data and batch it.

    Instructions are written with the tokenizer's chat template, or with plain headings without one
    (:func:`prompt_texts`). Plain texts are cut into consecutive windows without special tokens, as they are for
    calibration.

    Args:
        sources: Files and hub data sets (``read_records``), or ``"self"``: text
            sampled from ``model``.
        tokenizer: The model's tokenizer.
        window: Most tokens of an example, and of a row.
        tokens: Number of tokens to read from the starts of the sources; None for everything.
        heldout: Share of the examples that is held out; 0 for none.
        batch_size: Rows per batch.
        pack: Whether several examples share a row, as in pre-training. A token then sees the examples before its own,
            but the first token of an example is not learnt from them. Otherwise every example is padded on its own.
        answers_only: Whether the loss leaves out the question; plain texts are learnt as a whole either way.
        overlong: For instructions of more than ``window`` tokens: "cut" the end of the answer (or skip the instruction
            if its answer begins after the window), "skip" them, or raise an "error". The summary counts them.
        empty: For instructions with an empty answer: raise an "error", or "skip" and count them.
        streaming: Whether hub data sets are read row by row; otherwise they are downloaded whole.
        seed: Seed of the sampled text, the held-out choice and the order.
        model: The model to sample from, and whose context limits the window; ``"self"`` needs it.
        cache: Whether the cache folder keeps sampled text.
        calibrated: Calibration windows of the compression, (windows, window). Examples among them are held out only if
            there are too few others; the summary counts them.
        weights: The mixture: each source's part of ``tokens``, in any unit; None for equal parts.
        evaluated: Windows of evaluation texts, each (windows, window). Examples that share a passage with them are left
            out; the summary counts them.

    Raises:
        FileNotFoundError: If a source looks like a file and does not exist.
        ValueError: If an option is out of range, the window is longer than the model's context, a row has an unknown
            kind or an empty answer (the message names file and line), or too few examples remain for training.
    """
    check_data_options(sources, tokens, heldout, batch_size, overlong, empty, weights)
    check_window(window, tokenizer, model)
    check_sources(sources)
    parts = [1.0] * len(sources) if weights is None else list(weights)
    summary = DataSummary()
    examples: list[Example] = []
    for source, part in zip(sources, parts, strict=True):
        share = None if tokens is None else math.ceil(tokens * part / sum(parts))
        if source == SELF:
            examples += _sampled(model, tokenizer, share, window, seed, cache)
            continue
        found = list(_encoded(source, tokenizer, window, share, answers_only, overlong, empty, streaming, summary))
        if not found:
            raise ValueError(
                f"Expected examples in {source} but none was left: {summary.skipped} are too long, {summary.empty} "
                "have an empty answer."
            )
        examples += found
    shared = shares_passage([example.ids for example in examples], evaluated)
    summary.evaluated = sum(shared)
    examples = [example for example, is_shared in zip(examples, shared, strict=True) if not is_shared]
    summary.examples, summary.tokens = len(examples), sum(map(len, examples))
    summary.learnt = sum(example.learnt for example in examples)
    seen = () if calibrated is None else list(calibrated.cpu())
    train, held = split_examples(examples, heldout, seed, seen)
    summary.heldout = len(held)
    known = {tuple(ids.tolist()) for ids in seen}
    summary.calibrated = sum(tuple(example.ids.tolist()) in known for example in held)
    if pack:
        train, held = pack_examples(train, window), pack_examples(held, window)
    summary.windows = len(train)
    loader = partial(_loader, batch_size=batch_size, padding=_padding(tokenizer))
    return FinetuneData(loader(_shuffled(train, seed)), loader(held) if held else None, summary)


# Examples of each source.


def _encoded(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    tokens: int | None,
    answers_only: bool,
    overlong: Overlong,
    empty: Empty,
    streaming: bool,
    summary: DataSummary,
) -> Iterator[Example]:
    """Yield the examples of a source up to ``tokens`` tokens; documents are joined and cut into windows."""
    joined: list[int] = []
    seen = 0
    # No tokenizer in use spends more than a dozen characters on a token over a whole text.
    characters = None if tokens is None else 12 * tokens + 1000
    for record in read_records(source, streaming, characters):
        if tokens is not None and seen + len(joined) >= tokens:
            break
        if isinstance(record, Document):
            joined += tokenizer(record.text[:characters] + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
            if tokens is not None:
                joined = joined[: tokens - seen]
            whole = len(joined) // window * window
            for start in range(0, whole, window):
                yield example_of(joined[start : start + window])
            joined, seen = joined[whole:], seen + whole
            continue
        if not record.answer.strip():
            if empty == "error":
                raise ValueError(
                    f"{record.where}: expected an answer but it is empty. Leave the row out of the data, or skip empty "
                    'answers: empty="skip" (--empty skip).'
                )
            summary.empty += 1
            continue
        example = encode_instruction(record, tokenizer, answers_only)
        if (fitting := fit_example(example, window, overlong, record.where)) is None:
            summary.skipped += 1
            continue
        summary.cut += fitting is not example
        seen += len(fitting)
        yield fitting
    if len(joined) > 1:
        yield example_of(joined)


def _sampled(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int | None,
    window: int,
    seed: int,
    cache: bool,
) -> list[Example]:
    if model is None or tokens is None:
        raise ValueError(
            f"Expected `model=` and `tokens=` for the source {SELF!r}, which samples so many tokens from the model."
        )
    windows = sample_windows(
        model,
        tokenizer,
        windows=-(-tokens // window),
        window=window,
        seed=seed,
        cache_dir=cache_folder() if cache else None,
    )
    return [example_of(ids) for ids in windows.tolist()]


# Examples put into batches.


def _shuffled(examples: list[Example], seed: int) -> list[Example]:
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return [examples[i] for i in order.tolist()]


def _loader(examples: list[Example], batch_size: int, padding: int) -> DataLoader[Any]:
    # A list has all that a loader needs from an indexed data set.
    dataset: Any = examples
    return ResumableLoader(dataset, batch_size=batch_size, collate_fn=partial(collate, padding=padding))


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id for padding; any id works, because padding is masked and not learnt."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None), 0)


def check_data_options(
    sources: Sequence[str],
    tokens: int | None,
    heldout: float,
    batch_size: int = 1,
    overlong: str = "cut",
    empty: str = "error",
    weights: Sequence[float] | None = None,
) -> None:
    """Refuse options of :func:`finetune_data` that are out of range.

    Raises:
        ValueError: If an option is out of range; the message names it.
    """
    if not sources or isinstance(sources, str) or len(set(sources)) < len(sources):
        raise ValueError(f"Expected a list of one or more distinct sources but got {sources!r}.")
    if tokens is not None and tokens < 1:
        raise ValueError(f"Expected at least 1 token but got {tokens=}.")
    if weights is not None:
        if len(weights) != len(sources) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"Expected a positive weight for each of {len(sources)} sources but got {list(weights)}.")
        if tokens is None:
            raise ValueError("Expected `tokens` beside `weights`, which divide them among the sources, but got None.")
    if not 0 <= heldout < 1:
        raise ValueError(f"Expected `heldout` to be a share in [0, 1) but got {heldout}.")
    if batch_size < 1:
        raise ValueError(f"Expected at least 1 row a batch but got {batch_size=}.")
    if overlong not in OVERLONG:
        raise ValueError(f"Expected `overlong` to be one of {OVERLONG} but got {overlong!r}.")
    if empty not in EMPTY:
        raise ValueError(f"Expected `empty` to be one of {EMPTY} but got {empty!r}.")
