"""Minimal pairs: the share of pairs whose grammatical sentence outranks the other one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fasc_lightning.evaluation._continuations import ContinuationTrie, continuation_scores, each_ranks_first
from fasc_lightning.evaluation._grouped import ByGroup, grouped_percent, plain_groups
from fasc_lightning.evaluation._items import load_items, text_fields
from fasc_lightning.evaluation._token_ids import text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHANCE = 0.5


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences that differ in one point of grammar.

    The format is BLiMP's (Warstadt et al. 2020, "BLiMP: The Benchmark of Linguistic Minimal Pairs").

    Attributes:
        phenomenon: Field of grammar, for example ``"island_effects"``.
        uid: Paradigm within the phenomenon.
        good: The grammatical sentence.
        bad: The other one.
    """

    phenomenon: str
    uid: str
    good: str
    bad: str

    def to_dict(self) -> dict[str, str]:
        """Return the fields as a plain dict."""
        return asdict(self)


@dataclass(frozen=True)
class PairsResult:
    """Outcome of :func:`minimal_pairs`.

    Attributes:
        percent: Pairs in the right order, in percent.
        chance: Percentage by guessing: 50.
        count: Number of pairs.
        by_phenomenon: Percent and number of pairs of each phenomenon.
        by_paradigm: Percent and number of pairs of each paradigm.
    """

    percent: float
    chance: float
    count: int
    by_phenomenon: ByGroup
    by_paradigm: ByGroup

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain dicts and numbers."""
        groups = {"by_phenomenon": plain_groups(self.by_phenomenon), "by_paradigm": plain_groups(self.by_paradigm)}
        return {**asdict(self), **groups}


def load_minimal_pairs(path: str | Path) -> list[MinimalPair]:
    """Read minimal pairs from a jsonl file (also ``.xz``), one object a line.

    Each needs the texts ``phenomenon``, ``uid``, ``good`` and ``bad``, or their names in BLiMP's files:
    ``linguistics_term``, ``UID``, ``sentence_good`` and ``sentence_bad``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line is malformed (the message names it), or if the file has no pairs.
    """
    return load_items(path, _parse, "minimal pairs")


def _parse(row: dict[str, Any]) -> MinimalPair:
    if "sentence_good" in row:
        released = text_fields(row, ("linguistics_term", "UID", "sentence_good", "sentence_bad"))
        pair = MinimalPair(*released.values())
    else:
        pair = MinimalPair(**text_fields(row, ("phenomenon", "uid", "good", "bad")))
    if pair.good == pair.bad:
        raise ValueError(f"expected two sentences that differ, but got {pair.good!r} twice.")
    return pair


def minimal_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[MinimalPair], batch_size: int = 64
) -> PairsResult:
    """Return the percentage of pairs whose grammatical sentence has the higher log-probability.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer; needs a beginning or end token.
        pairs: The pairs.
        batch_size: Pairs scored together.

    Returns:
        Percentages, overall, by phenomenon and by paradigm.

    Raises:
        FloatingPointError: If a score is not finite.
        ValueError: If there are no pairs, or the tokenizer has neither beginning nor end token.
    """
    correct = correct_pairs(model, tokenizer, pairs, batch_size)
    by_phenomenon = grouped_percent(correct, [pair.phenomenon for pair in pairs], _CHANCE)
    by_paradigm = grouped_percent(correct, [pair.uid for pair in pairs], _CHANCE)
    values = by_phenomenon.compute()
    return PairsResult(
        percent=values["percent"].item(),
        chance=values["chance"].item(),
        count=int(values["count"]),
        by_phenomenon=by_phenomenon.by_group(),
        by_paradigm=by_paradigm.by_group(),
    )


def correct_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[MinimalPair], batch_size: int = 64
) -> Tensor:
    """Return which pairs are in the right order, for paired comparisons of two models.

    The log-probability is that of the whole sentence. Its first token is predicted after the tokenizer's beginning
    token (else its end token). A tie counts as wrong.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer; needs a beginning or end token.
        pairs: The pairs.
        batch_size: Pairs scored together.

    Returns:
        Bool tensor of shape (pairs,), on the CPU.

    Raises:
        FloatingPointError: If a score is not finite.
        ValueError: If there are no pairs, or the tokenizer has neither beginning nor end token.
    """
    if not pairs:
        raise ValueError("Expected at least one minimal pair, but got none.")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError(
            "Expected a tokenizer with a beginning or end token to predict a sentence's first word from, but it has "
            "neither. Set `tokenizer.bos_token`."
        )
    tries = [ContinuationTrie.of([text_ids(tokenizer, pair.good), text_ids(tokenizer, pair.bad)]) for pair in pairs]
    return each_ranks_first(
        continuation_scores(model, [[start]] * len(pairs), tries, batch_size),
        [0] * len(pairs),
        [f"The score of {pair.good!r} or of {pair.bad!r}" for pair in pairs],
    )
