"""Retention of quality in a model's states (dense, compressed, recovered), on the data's domain and on others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fasc_lightning._utils import evaluating
from fasc_lightning.data import file_windows, text_windows
from fasc_lightning.evaluation._builtin import builtin_facts, builtin_text
from fasc_lightning.evaluation._divergence import log_probabilities, window_divergences
from fasc_lightning.evaluation._facts import Fact, FactsResult, factual_recall, load_facts
from fasc_lightning.evaluation._grouped import ByGroup
from fasc_lightning.evaluation._minimal_pairs import MinimalPair, PairsResult, minimal_pairs
from fasc_lightning.evaluation._perplexity import MeanTokenLoss, perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Name in reports of the data that is not trained on.
HELD_OUT = "held-out"
#: Name of the built-in text.
BUILTIN_TEXT = "python-reference"


@dataclass(frozen=True)
class Quality:
    """The quality of a model in one of its states.

    Attributes:
        perplexity: Perplexity by text.
        facts: Factual recall; None if no facts were asked for.
        heldout: Perplexity of the learnt tokens in held-out batches; None if there are none.
        divergence: KL(first state || this one) by text, in nats a token; None if it was not asked for.
        pairs: Minimal pairs in the right order; None if none were asked for.
    """

    perplexity: dict[str, float]
    facts: FactsResult | None = None
    heldout: float | None = None
    divergence: dict[str, float] | None = None
    pairs: PairsResult | None = None


@dataclass(frozen=True)
class Questions:
    """The evaluation data for each of a model's states.

    Attributes:
        texts: Windows of token ids by name, each (windows, window).
        facts: The facts; may be empty.
        heldout: Batches of the data's own domain, with labels; may be empty.
        pairs: Minimal pairs; may be empty.
        compared: Number of windows of each text on which states are compared with the first one.
        predictions: Log-probabilities of the first state by text, two bytes for each of these positions and token of
            the vocabulary; empty before :meth:`compared_with`.
    """

    texts: Mapping[str, Tensor]
    facts: Sequence[Fact] = ()
    heldout: Iterable[Mapping[str, Tensor]] = field(default=())
    pairs: Sequence[MinimalPair] = ()
    compared: int = 0
    predictions: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls,
        texts: Mapping[str, str],
        facts: str | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        windows: int,
        window: int,
        seed: int = 0,
    ) -> Questions:
        """Read texts and facts, or take the built-in ones if neither is given.

        Args:
            texts: Files by name.
            facts: File of facts, if any.
            tokenizer: The model's tokenizer.
            windows: Number of windows per text.
            window: Tokens per window.
            seed: Seed for the choice of built-in facts.
        """
        if texts or facts:
            asked = load_facts(facts) if facts else []
            return cls({name: file_windows(path, tokenizer, windows, window) for name, path in texts.items()}, asked)
        return cls({BUILTIN_TEXT: text_windows(builtin_text(), tokenizer, windows, window)}, builtin_facts(seed))

    def compared_with(self, model: PreTrainedModel) -> Questions:
        """Return the same questions with a model's predictions, from which later states diverge.

        Raises:
            FloatingPointError: If a prediction is NaN.
        """
        windows = {name: windows[: self.compared] for name, windows in self.texts.items() if self.compared}
        return replace(self, predictions={name: log_probabilities(model, ids) for name, ids in windows.items()})

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Quality:
        """Measure a model; its training mode is restored.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        divergence = {
            name: float(window_divergences(model, self.texts[name][: self.compared], kept).mean())
            for name, kept in self.predictions.items()
        }
        return Quality(
            perplexity={name: perplexity(model, windows, batch_size=2) for name, windows in self.texts.items()},
            facts=factual_recall(model, tokenizer, self.facts) if self.facts else None,
            heldout=batch_perplexity(model, self.heldout),
            divergence=divergence or None,
            pairs=minimal_pairs(model, tokenizer, self.pairs) if self.pairs else None,
        )


@torch.no_grad()
def batch_perplexity(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> float | None:
    """Return exp of the mean loss over the learnt tokens of batches; None if there are none.

    Args:
        model: A causal language model.
        batches: Batches with ``input_ids``, ``attention_mask`` and ``labels`` (-100 for tokens that are not learnt).

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    metric = MeanTokenLoss()
    for number, batch in enumerate(batches):
        with evaluating(model):
            ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        labels = batch["labels"][:, 1:].to(model.device)
        losses = F.cross_entropy(logits[:, :-1][labels != -100].float(), labels[labels != -100], reduction="none")
        if not losses.isfinite().all():
            raise FloatingPointError(f"The loss of held-out batch {number} is not finite.")
        metric.update(losses.cpu())
    return float(metric.compute().exp()) if metric.tokens else None


# Comparisons for reports. All other states are compared with the first one.


def compare_perplexity(states: Mapping[str, Quality]) -> dict[str, dict[str, float]]:
    """Return the perplexity of each text by state."""
    texts = next(iter(states.values())).perplexity
    return {name: {state: measured.perplexity[name] for state, measured in states.items()} for name in texts}


def compare_heldout(states: Mapping[str, Quality]) -> dict[str, float] | None:
    """Return the perplexity of held-out data by state; None if nothing was held out."""
    values = {state: measured.heldout for state, measured in states.items() if measured.heldout is not None}
    return values or None


def compare_divergence(states: Mapping[str, Quality]) -> dict[str, dict[str, float]] | None:
    """Return the divergence from the first state by text and state, in nats a token; None if none was measured."""
    found = {state: measured.divergence for state, measured in states.items() if measured.divergence is not None}
    texts = next(iter(found.values()), {})
    return {name: {state: values[name] for state, values in found.items()} for name in texts} or None


def compare_pairs(states: Mapping[str, Quality]) -> dict[str, Any] | None:
    """Return minimal pairs in the right order by state in percent, overall and by phenomenon; None without pairs."""
    return _percentages({state: measured.pairs for state, measured in states.items()}, "by_phenomenon")


def compare_facts(states: Mapping[str, Quality]) -> dict[str, Any] | None:
    """Return factual recall by state in percent, overall and by kind; None if no facts were asked for."""
    return _percentages({state: measured.facts for state, measured in states.items()}, "by_kind")


def _percentages(found: Mapping[str, FactsResult | PairsResult | None], groups: str) -> dict[str, Any] | None:
    """Return percentages by state, overall and by group (the name of the results' attribute); None if none is there."""
    results = {state: result for state, result in found.items() if result is not None}
    if not results:
        return None
    first = next(iter(results.values()))
    by_group: dict[str, ByGroup] = {state: getattr(result, groups) for state, result in results.items()}
    return {
        **{state: result.percent for state, result in results.items()},
        "chance": first.chance,
        "count": first.count,
        groups: {
            name: {**{state: values[name][0] for state, values in by_group.items()}, "count": count}
            for name, (_, count) in getattr(first, groups).items()
        },
    }


def retention(states: Mapping[str, Quality], in_domain: Sequence[str] = ()) -> dict[str, Any]:
    """Return the quality of each state relative to the dense one, on the data's domain and on others.

    Args:
        states: The dense state first, then the others.
        in_domain: Texts of the data's domain, which always includes the held-out data.

    Returns:
        ``in_domain`` and ``other_domain``: perplexity over the dense model's, by text and state. ``facts``: recall in
        percent of the dense model's, by state (None if the dense model recalls nothing).
    """
    heldout = compare_heldout(states)
    own = {HELD_OUT: heldout} if heldout else {}
    perplexities = compare_perplexity(states)
    own |= {name: values for name, values in perplexities.items() if name in in_domain}
    others = {name: values for name, values in perplexities.items() if name not in in_domain}
    facts = {state: measured.facts.percent for state, measured in states.items() if measured.facts is not None}
    return {
        "in_domain": {name: _times_first(values) for name, values in own.items()},
        "other_domain": {name: _times_first(values) for name, values in others.items()},
        "facts": {state: 100 * share for state, share in _times_first(facts).items()}
        if next(iter(facts.values()), 0)
        else None,
    }


def _times_first(values: Mapping[str, float]) -> dict[str, float]:
    """Return all values except the first, each divided by the first."""
    (_, first), *others = values.items()
    return {state: value / first for state, value in others}
