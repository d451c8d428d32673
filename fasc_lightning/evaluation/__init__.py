"""What a compressed model still does: perplexity and factual recall."""

from fasc_lightning.evaluation.builtin import builtin_facts, builtin_text
from fasc_lightning.evaluation.facts import (
    Fact,
    FactsResult,
    FactualRecall,
    factual_recall,
    load_facts,
    recalled_facts,
)
from fasc_lightning.evaluation.perplexity import MeanTokenLoss, perplexity, token_losses

__all__ = [
    "Fact",
    "FactsResult",
    "FactualRecall",
    "MeanTokenLoss",
    "builtin_facts",
    "builtin_text",
    "factual_recall",
    "load_facts",
    "perplexity",
    "recalled_facts",
    "token_losses",
]
