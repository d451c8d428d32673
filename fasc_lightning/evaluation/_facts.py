"""Factual recall: the share of facts whose true object outranks the relation's other objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasc_lightning.evaluation._continuations import (
    ContinuationTrie,
    continuation_scores,
    each_ranks_first,
)
from fasc_lightning.evaluation._grouped import GroupedPercent, plain_groups
from fasc_lightning.evaluation._items import load_items, text_fields
from fasc_lightning.evaluation._token_ids import continuation_ids, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FIELDS = ("subject", "relation", "template", "object", "kind")


@dataclass(frozen=True)
class Fact:
    """One fact in the form of LAMA (Petroni et al. 2019, "Language Models as Knowledge Bases?").

    Attributes:
        subject: The subject of the fact.
        relation: Facts of one relation share their candidates.
        template: Sentence with ``[X]`` for the subject and, after it, ``[Y]`` for the object.
        object: The true object.
        kind: Group in the report, for example ``"geographic"``.
    """

    subject: str
    relation: str
    template: str
    object: str
    kind: str

    def __post_init__(self) -> None:
        before, y, _ = self.template.partition("[Y]")
        if not y or "[X]" not in before:
            raise ValueError(f"Expected a template with [X] before [Y], but got {self.template!r}.")

    @property
    def prompt(self) -> str:
        """The text before the object, without the space that belongs to the object."""
        return self.template.partition("[Y]")[0].replace("[X]", self.subject).rstrip()

    def to_dict(self) -> dict[str, str]:
        """Return the fields as a plain dict."""
        return asdict(self)


@dataclass(frozen=True)
class FactsResult:
    """Outcome of :func:`factual_recall`.

    Attributes:
        percent: Facts recalled, in percent.
        chance: Recall by guessing, in percent: the mean of 1 / candidates.
        count: Number of facts.
        by_kind: Percent recalled and number of facts of each kind.
    """

    percent: float
    chance: float
    count: int
    by_kind: dict[str, tuple[float, int]]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain dicts, lists and numbers."""
        return {**asdict(self), "by_kind": plain_groups(self.by_kind)}


class FactualRecall(GroupedPercent):
    """Percentage of facts recalled, overall and by kind, with the percentage by guessing.

    Args:
        kinds: All kinds that may occur, fixed beforehand so that the states of several processes match.
    """

    called = "kinds"

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__(kinds)
        self.kinds = self.groups

    def update(self, recalled: Tensor, kinds: Sequence[str], candidates: Tensor) -> None:
        """Add some facts.

        Args:
            recalled: Whether each fact was recalled, bool of shape (facts,).
            kinds: Kind of each fact.
            candidates: Number of candidates of each fact, of shape (facts,).

        Raises:
            ValueError: If the lengths differ or a kind is not among ``kinds``.
        """
        if not len(recalled) == len(kinds) == len(candidates):
            raise ValueError(
                f"Expected one entry a fact, but got {len(recalled)} outcomes, {len(kinds)} kinds and "
                f"{len(candidates)} candidate counts."
            )
        super().update(recalled, kinds, candidates.double().reciprocal())

    def result(self) -> FactsResult:
        """Return the outcome as plain numbers."""
        values = self.compute()
        return FactsResult(
            percent=values["percent"].item(),
            chance=values["chance"].item(),
            count=int(values["count"]),
            by_kind=self.by_group(),
        )


def recall_result(recalled: Tensor, kinds: Sequence[str], candidates: Sequence[int]) -> FactsResult:
    """Return the result of some facts, from a metric with their kinds.

    Args:
        recalled: Whether each fact was recalled, bool of shape (facts,).
        kinds: Kind of each fact.
        candidates: Number of candidates of each fact.
    """
    metric = FactualRecall(sorted(set(kinds)))
    metric.update(recalled, kinds, torch.tensor(candidates))
    return metric.result()


def load_facts(path: str | Path) -> list[Fact]:
    """Read facts from a jsonl file (also ``.xz``), one object a line.

    Each needs the string fields ``subject``, ``relation``, ``template``, ``object`` and ``kind`` (see
    :class:`Fact`); others are ignored.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line is no JSON object, a field is missing or a template lacks ``[X]`` or ``[Y]`` (the message
            names the line), or if the file has no facts.
    """
    return load_items(path, parse_fact, "facts")


def parse_fact(row: dict[str, Any]) -> Fact:
    """Turn a row of a jsonl file into a fact; other fields are ignored.

    Raises:
        ValueError: If a field is missing or the template lacks ``[X]`` or ``[Y]``.
    """
    return Fact(**text_fields(row, _FIELDS))


def relation_candidates(facts: Sequence[Fact]) -> dict[str, list[str]]:
    """Return the distinct objects of each relation, in the order of their first fact."""
    candidates: dict[str, dict[str, None]] = {}
    for fact in facts:
        candidates.setdefault(fact.relation, {})[fact.object] = None
    return {relation: list(objects) for relation, objects in candidates.items()}


def factual_recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], batch_size: int = 64
) -> FactsResult:
    """Return the percentage of facts whose object outranks the other objects of its relation.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        facts: The facts; their objects are also each other's candidates.
        batch_size: Prompts per forward pass.

    Returns:
        Percentages, overall and by kind.

    Raises:
        FloatingPointError: If a score is not finite.
        ValueError: If there are no facts.
    """
    recalled = recalled_facts(model, tokenizer, facts, batch_size)
    candidates = relation_candidates(facts)
    return recall_result(recalled, [fact.kind for fact in facts], [len(candidates[fact.relation]) for fact in facts])


def recalled_facts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], batch_size: int = 64
) -> Tensor:
    """Return which facts are recalled, for paired comparisons of two models.

    A fact is recalled if its whole object, given the prompt, has a higher log-probability than every other candidate. A
    tie is not a recall.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        facts: The facts; their objects are also each other's candidates.
        batch_size: Prompts per forward pass.

    Returns:
        Bool tensor of shape (facts,), on the CPU.

    Raises:
        FloatingPointError: If a score is not finite.
        ValueError: If there are no facts.
    """
    if not facts:
        raise ValueError("Expected at least one fact, but got none.")
    candidates = relation_candidates(facts)
    true = [candidates[fact.relation].index(fact.object) for fact in facts]
    return each_ranks_first(
        candidate_scores(model, tokenizer, facts, candidates, batch_size, true),
        true,
        [f"The score of a candidate for {fact.prompt!r}" for fact in facts],
    )


def candidate_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    candidates: dict[str, list[str]],
    batch_size: int = 64,
    true: Sequence[int] | None = None,
) -> list[Tensor]:
    """Return the log-probability of every candidate of every fact, given the prompt.

    :func:`~fasc_lightning.evaluation._continuations.continuation_scores` describes the scoring.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        facts: The facts.
        candidates: Candidates of each relation.
        batch_size: Prompts per forward pass.
        true: Index of each fact's true candidate, if only its rank is needed.

    Returns:
        For each fact a float tensor of shape (candidates of its relation,), on the CPU, in nats.
    """
    tries = {
        relation: ContinuationTrie.of([continuation_ids(tokenizer, text) for text in texts])
        for relation, texts in candidates.items()
    }
    prompts = [prompt_ids(tokenizer, fact.prompt) for fact in facts]
    return continuation_scores(model, prompts, [tries[fact.relation] for fact in facts], batch_size, true=true)
