"""Factual recall in several languages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasc_lightning.evaluation._facts import Fact, parse_fact, recalled_facts, relation_candidates
from fasc_lightning.evaluation._grouped import ByGroup, grouped_percent, plain_groups
from fasc_lightning.evaluation._items import load_items, text_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class MultilingualResult:
    """Outcome of :func:`multilingual_recall`.

    Attributes:
        percent: Facts recalled, in percent.
        chance: Recall by guessing, in percent: the mean of 1 / candidates.
        count: Number of facts.
        by_language: Percent recalled and number of facts of each language.
        by_kind: Percent recalled and number of facts of each kind, over all languages.
    """

    percent: float
    chance: float
    count: int
    by_language: ByGroup
    by_kind: ByGroup

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain dicts and numbers."""
        groups = {"by_language": plain_groups(self.by_language), "by_kind": plain_groups(self.by_kind)}
        return {**asdict(self), **groups}


def load_multilingual_facts(path: str | Path) -> dict[str, list[Fact]]:
    """Read facts of several languages from a jsonl file (also ``.xz``), one object a line, by language.

    Each needs the text field ``lang`` and the fields of :func:`~fasc_lightning.evaluation.load_facts`; the format is
    mLAMA's (Kassner et al. 2021, "Multilingual LAMA").

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line is malformed (the message names it), or if the file has no facts.
    """
    languages: dict[str, list[Fact]] = {}
    for language, fact in load_items(path, _parse, "facts"):
        languages.setdefault(language, []).append(fact)
    return languages


def _parse(row: dict[str, Any]) -> tuple[str, Fact]:
    return text_fields(row, ("lang",))["lang"], parse_fact(row)


def multilingual_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Mapping[str, Sequence[Fact]],
    batch_size: int = 64,
) -> MultilingualResult:
    """Return the percentage of facts whose object outranks the other objects of its relation in its language.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        facts: The facts of each language.
        batch_size: Prompts per forward pass.

    Returns:
        Percentages, overall, by language and by kind.

    Raises:
        FloatingPointError: If a score is not finite.
        ValueError: If there is no language, or a language without facts.
    """
    recalled = recalled_multilingual(model, tokenizer, facts, batch_size)
    candidates = {language: relation_candidates(group) for language, group in facts.items()}
    everything = [(language, fact) for language, group in facts.items() for fact in group]
    chance = torch.tensor(
        [1 / len(candidates[language][fact.relation]) for language, fact in everything], dtype=torch.float64
    )
    by_language = grouped_percent(recalled, [language for language, _ in everything], chance)
    by_kind = grouped_percent(recalled, [fact.kind for _, fact in everything], chance)
    values = by_language.compute()
    return MultilingualResult(
        percent=values["percent"].item(),
        chance=values["chance"].item(),
        count=int(values["count"]),
        by_language=by_language.by_group(),
        by_kind=by_kind.by_group(),
    )


def recalled_multilingual(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Mapping[str, Sequence[Fact]],
    batch_size: int = 64,
) -> Tensor:
    """Return which facts are recalled, language after language, for paired comparisons of two models.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        facts: The facts of each language.
        batch_size: Prompts per forward pass.

    Returns:
        Bool tensor of shape (facts of all languages,), on the CPU.

    Raises:
        FloatingPointError: If a score is not finite.
        ValueError: If there is no language, or a language without facts.
    """
    if not facts:
        raise ValueError("Expected the facts of at least one language, but got none.")
    return torch.cat([recalled_facts(model, tokenizer, group, batch_size) for group in facts.values()])
