"""Numerical facts: the share of sentences that are likeliest with their true number word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fasc_lightning.evaluation._continuations import (
    ContinuationTrie,
    continuation_scores,
    each_ranks_first,
)
from fasc_lightning.evaluation._facts import FactsResult, recall_result
from fasc_lightning.evaluation._items import load_items, text_fields
from fasc_lightning.evaluation._token_ids import continuation_ids, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CLOSING = (".", ",", ";", ":", "!", "?", ")", "%")


@dataclass(frozen=True)
class NumberFact:
    """A sentence with a number word missing (Lin et al. 2020, "Birds have four legs?! NumerSense").

    Attributes:
        prompt: The text before the number.
        suffix: The text after it.
        object: The true number word; "no" counts as one.
        kind: Group in the report.
    """

    prompt: str
    suffix: str
    object: str
    kind: str = "numerical"

    def ending(self, number: str) -> str:
        """Return the rest of the sentence from the number on."""
        gap = "" if not self.suffix or self.suffix.startswith(_CLOSING) else " "
        return f"{number}{gap}{self.suffix}"

    def to_dict(self) -> dict[str, str]:
        """Return the fields as a plain dict."""
        return asdict(self)


def load_number_facts(path: str | Path) -> list[NumberFact]:
    """Read numerical facts from a jsonl file (also ``.xz``), one object a line.

    Each needs the texts ``prompt`` and ``object``; ``suffix`` and ``kind`` may be missing.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line is malformed (the message names it), or if the file has no facts.
    """
    return load_items(path, _parse, "numerical facts")


def _parse(row: dict[str, Any]) -> NumberFact:
    needed = text_fields(row, ("prompt", "object"))
    suffix, kind = row.get("suffix", ""), row.get("kind", "numerical")
    if not isinstance(suffix, str) or not isinstance(kind, str) or not kind.strip():
        raise ValueError(f"expected suffix and kind to be texts, but got {suffix!r} and {kind!r}.")
    return NumberFact(needed["prompt"].rstrip(), suffix.strip(), needed["object"].strip(), kind)


def number_recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[NumberFact], batch_size: int = 64
) -> FactsResult:
    """Return the percentage of sentences that are likeliest with their true number.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        facts: The facts; the number words of all of them are the candidates of each.
        batch_size: Prompts per forward pass.

    Returns:
        Percentages, overall and by kind.

    Raises:
        FloatingPointError: If a score is not finite.
        ValueError: If there are no facts.
    """
    recalled = recalled_numbers(model, tokenizer, facts, batch_size)
    numbers = {fact.object for fact in facts}
    return recall_result(recalled, [fact.kind for fact in facts], [len(numbers)] * len(facts))


def recalled_numbers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[NumberFact], batch_size: int = 64
) -> Tensor:
    """Return which facts are recalled, for paired comparisons of two models.

    A fact is recalled if the whole sentence has a higher log-probability with its number than with any other candidate.
    A tie is not a recall. The text before the number is the same for all candidates, so the rest decides.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        facts: The facts; the number words of all of them are the candidates of each.
        batch_size: Prompts per forward pass.

    Returns:
        Bool tensor of shape (facts,), on the CPU.

    Raises:
        FloatingPointError: If a score is not finite.
        ValueError: If there are no facts.
    """
    if not facts:
        raise ValueError("Expected at least one numerical fact, but got none.")
    numbers = list(dict.fromkeys(fact.object for fact in facts))
    prompts = [prompt_ids(tokenizer, fact.prompt) for fact in facts]
    tries = [
        ContinuationTrie.of([continuation_ids(tokenizer, fact.ending(number)) for number in numbers]) for fact in facts
    ]
    true = [numbers.index(fact.object) for fact in facts]
    return each_ranks_first(
        continuation_scores(model, prompts, tries, batch_size, true=true),
        true,
        [f"The score of a number after {fact.prompt!r}" for fact in facts],
    )
