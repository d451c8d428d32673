"""The questions to every cell of a comparison (texts, facts and minimal pairs), answered item by item.

Single answers are kept, not only their means, because two cells with the same questions are compared in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from random import Random
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fasc_lightning._utils import fingerprint, undoing
from fasc_lightning.evaluation import (
    Fact,
    MinimalPair,
    correct_pairs,
    log_probabilities,
    recalled_facts,
    relation_candidates,
    token_losses,
    window_divergences,
)
from fasc_lightning.studies.comparison._speed import speed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The names are torch's: "medium" multiplies float32 matrices in bfloat16 and sums in float32, if the device can.
Precision = Literal["highest", "high", "medium"]


@dataclass(frozen=True)
class Answers:
    """Answers of one model.

    Attributes:
        losses: Mean token loss of each window of each text, in nats.
        recalled: Whether each fact was recalled.
        preferred: Whether the good sentence of each minimal pair was preferred.
        divergence: Divergence of the dense model from this one on the first windows of each text, in nats a token.
        speed: Tokens per second of prefill and decode; empty if they were not measured.
    """

    losses: dict[str, list[float]]
    recalled: list[bool]
    preferred: list[bool] = field(default_factory=list)
    divergence: dict[str, list[float]] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)

    def perplexity(self, text: str) -> float:
        """Return the perplexity of a text: exp of the mean loss of its windows, which have one length."""
        losses = self.losses[text]
        return math.exp(sum(losses) / len(losses))


@dataclass(frozen=True)
class Evaluation:
    """The questions.

    Attributes:
        texts: Windows of token ids by name, each (windows, window).
        facts: The facts; may be empty.
        pairs: Minimal pairs; may be empty.
        precision: Precision of float32 matrix products on texts only. A fact has few tokens, so rounding every weight
            for it would not pay.
        compared: Number of windows of each text, the first ones, on which predictions are compared with the dense
            model's (:meth:`compared_with`); they take 2 bytes for each position and token of the vocabulary.
        prompt: Token ids, (1, tokens), to measure the speed with; None measures none.
        dense: Predictions of the dense model by text; empty before :meth:`compared_with`.
    """

    texts: Mapping[str, Tensor]
    facts: Sequence[Fact]
    pairs: Sequence[MinimalPair] = ()
    precision: Precision = "highest"
    compared: int = 0
    prompt: Tensor | None = None
    dense: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not (self.texts or self.facts or self.pairs or self.prompt is not None):
            raise ValueError("Expected texts, facts or minimal pairs to evaluate on but got none.")

    @property
    def kinds(self) -> list[str]:
        """The kind of each fact."""
        return [fact.kind for fact in self.facts]

    @property
    def chance(self) -> float:
        """Recall of facts by guessing, in percent; NaN without facts."""
        candidates = relation_candidates(self.facts)
        shares = [1 / len(candidates[fact.relation]) for fact in self.facts]
        return 100 * sum(shares) / len(shares) if shares else math.nan

    def fingerprint(self) -> str:
        """Return a hash of all questions."""
        facts, pairs = [fact.to_dict() for fact in self.facts], [pair.to_dict() for pair in self.pairs]
        # Questions without the later ones keep the hash that they had before, and so their kept answers.
        later = [*([self.compared] if self.compared else []), *([] if self.prompt is None else [self.prompt])]
        return fingerprint(list(self.texts), *self.texts.values(), facts, pairs, self.precision, *later)

    def compared_with(self, dense: PreTrainedModel) -> Evaluation:
        """Return the same questions with the dense model's predictions, which ``compared`` windows need.

        Raises:
            FloatingPointError: If a prediction is NaN.
        """
        if not self.compared or self.dense:
            return self
        with matmul_precision(self.precision):
            kept = {name: log_probabilities(dense, windows[: self.compared]) for name, windows in self.texts.items()}
        return replace(self, dense=kept)

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Answers:
        """Return the answers of a model.

        Raises:
            FloatingPointError: If a loss or a score is not finite, or a perplexity exceeds the largest float.
            RuntimeError: If there is ``compared`` but no dense model was given.
        """
        if self.compared and self.texts and not self.dense:
            raise RuntimeError("Expected the dense model's predictions (`compared_with`) but there are none.")
        with matmul_precision(self.precision):
            losses = {name: token_losses(model, windows, batch_size=2).tolist() for name, windows in self.texts.items()}
            divergence = {
                name: window_divergences(model, self.texts[name][: self.compared], kept).tolist()
                for name, kept in self.dense.items()
            }
        for name, values in losses.items():
            if not sum(values) / len(values) < math.log(1e300):
                raise FloatingPointError(f"The perplexity of {name} is beyond 1e300.")
        recalled = recalled_facts(model, tokenizer, self.facts).tolist() if self.facts else []
        preferred = correct_pairs(model, tokenizer, self.pairs).tolist() if self.pairs else []
        tokens_per_second = {} if self.prompt is None else speed(model, self.prompt)
        return Answers(losses, recalled, preferred, divergence, tokens_per_second)


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Multiply float32 matrices in a precision, and restore the earlier one afterwards."""
    with undoing() as undo:
        undo.add(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision(precision)
        yield


def some_facts(facts: Sequence[Fact], count: int, random: Random) -> list[Fact]:
    """Return the facts of whole relations, at least ``count`` or all; kinds of relations take turns.

    Relations stay whole because the objects of their facts are each other's candidates.

    Args:
        facts: All facts.
        count: Number of facts that are enough.
        random: Draws the order of relations.
    """
    by_kind: dict[str, dict[str, list[Fact]]] = {}
    for fact in facts:
        by_kind.setdefault(fact.kind, {}).setdefault(fact.relation, []).append(fact)
    waiting = [random.sample(sorted(relations), len(relations)) for _, relations in sorted(by_kind.items())]
    relations = [relation for turn in zip_longest(*waiting) for relation in turn if relation is not None]
    chosen: set[str] = set()
    for relation in relations:
        if sum(fact.relation in chosen for fact in facts) >= count:
            break
        chosen.add(relation)
    return [fact for fact in facts if fact.relation in chosen]
