"""Prompts of examples and a question, cut to a model's context."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning.fabric.utilities.rank_zero import rank_zero_warn

from fasc_lightning.evaluation._token_ids import beginning_ids, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens.

    Attributes:
        ids: Its tokens.
        shots: Number of examples in it.
        cut: Number of tokens missing at its beginning.
    """

    ids: list[int]
    shots: int
    cut: int


def context_length(model: PreTrainedModel) -> int | None:
    """Return a model's context length in tokens; None if its configuration names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def fit_prompt(
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[str],
    question: str,
    room: int | None,
    *,
    head: str = "",
    separator: str = "\n\n",
) -> Prompt:
    """Put examples before a question: as many of the first ones as fit.

    A question that is too long by itself loses its beginning.

    Args:
        tokenizer: The tokenizer; a beginning token that it adds is kept.
        parts: The examples.
        question: The end of the prompt.
        room: Most tokens of the prompt; None for any number.
        head: Text before the examples.
        separator: Text between head, examples and question.

    Raises:
        ValueError: If not even one token of the question fits.
    """
    start = beginning_ids(tokenizer)
    room = sys.maxsize if room is None else room
    if room <= len(start):
        raise ValueError(
            f"Expected room for the prompt in the model's context, but the answers leave {room} tokens. Use a model "
            "of a longer context, or leave the item out."
        )
    for shots in range(len(parts), -1, -1):
        ids = [*start, *text_ids(tokenizer, separator.join(filter(None, [head, *parts[:shots], question])))]
        if len(ids) <= room:
            return Prompt(ids, shots, 0)
    return Prompt([*start, *ids[len(start) - room :]], 0, len(ids) - room)


def count_shortened(prompts: Sequence[Prompt], shots: int) -> tuple[int, int]:
    """Count prompts with fewer examples than ``shots`` and prompts without their beginning; warns if there are any."""
    fewer = sum(prompt.shots < shots for prompt in prompts)
    cut = sum(prompt.cut > 0 for prompt in prompts)
    if fewer or cut:
        rank_zero_warn(
            f"The model's context is too short for {max(fewer, cut)} of {len(prompts)} prompts: {fewer} were given "
            f"fewer than {shots} examples, {cut} lost the beginning of the question."
        )
    return fewer, cut
