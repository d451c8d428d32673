"""Evaluations of a model before and after compression: perplexity, facts, grammar, choices and short answers."""

from fasc_lightning.evaluation._builtin import builtin_facts, builtin_text, check_builtin_facts
from fasc_lightning.evaluation._divergence import log_probabilities, window_divergences
from fasc_lightning.evaluation._facts import (
    Fact,
    FactsResult,
    FactualRecall,
    factual_recall,
    load_facts,
    recalled_facts,
    relation_candidates,
)
from fasc_lightning.evaluation._grouped import GroupedPercent
from fasc_lightning.evaluation._intervals import PairedInterval, paired_interval
from fasc_lightning.evaluation._minimal_pairs import (
    MinimalPair,
    PairsResult,
    correct_pairs,
    load_minimal_pairs,
    minimal_pairs,
)
from fasc_lightning.evaluation._multilingual import (
    MultilingualResult,
    load_multilingual_facts,
    multilingual_recall,
    recalled_multilingual,
)
from fasc_lightning.evaluation._multiple_choice import (
    AnsweredQuestions,
    ChoiceQuestion,
    ChoicesResult,
    answered_questions,
    load_choice_questions,
    multiple_choice,
)
from fasc_lightning.evaluation._numbers import NumberFact, load_number_facts, number_recall, recalled_numbers
from fasc_lightning.evaluation._perplexity import MeanTokenLoss, perplexity, token_losses
from fasc_lightning.evaluation._retention import (
    BUILTIN_TEXT,
    HELD_OUT,
    Quality,
    Questions,
    compare_divergence,
    compare_facts,
    compare_heldout,
    compare_pairs,
    compare_perplexity,
    retention,
)
from fasc_lightning.evaluation._short_answers import (
    GivenAnswers,
    ShortAnswerItem,
    ShortAnswersResult,
    given_answers,
    load_short_answers,
    short_answers,
)
from fasc_lightning.evaluation.harness import HarnessResult, HarnessScore, harness_model, run_harness

__all__ = [
    # tasks of lm-eval
    "HarnessResult",
    "HarnessScore",
    "harness_model",
    "run_harness",
    # perplexity
    "MeanTokenLoss",
    "perplexity",
    "token_losses",
    "builtin_text",
    # divergence from the dense model
    "log_probabilities",
    "window_divergences",
    # facts
    "Fact",
    "FactsResult",
    "FactualRecall",
    "factual_recall",
    "recalled_facts",
    "load_facts",
    "builtin_facts",
    "check_builtin_facts",
    # numerical facts
    "NumberFact",
    "number_recall",
    "recalled_numbers",
    "load_number_facts",
    # facts in several languages
    "MultilingualResult",
    "multilingual_recall",
    "recalled_multilingual",
    "load_multilingual_facts",
    # grammar
    "MinimalPair",
    "PairsResult",
    "minimal_pairs",
    "correct_pairs",
    "load_minimal_pairs",
    # multiple choice
    "ChoiceQuestion",
    "ChoicesResult",
    "AnsweredQuestions",
    "multiple_choice",
    "answered_questions",
    "load_choice_questions",
    # short answers
    "ShortAnswerItem",
    "ShortAnswersResult",
    "GivenAnswers",
    "short_answers",
    "given_answers",
    "load_short_answers",
    # comparison
    "GroupedPercent",
    "PairedInterval",
    "paired_interval",
    "BUILTIN_TEXT",
    "HELD_OUT",
    "Quality",
    "Questions",
    "compare_divergence",
    "compare_facts",
    "compare_heldout",
    "compare_pairs",
    "compare_perplexity",
    "relation_candidates",
    "retention",
]
