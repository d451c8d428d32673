"""Multiple choice: the share of questions whose right answer is the likeliest, by letter or by whole text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from fasc_lightning.evaluation._continuations import (
    ContinuationTrie,
    check_finite,
    continuation_scores,
    ranks_first,
)
from fasc_lightning.evaluation._grouped import ByGroup, grouped_percent, plain_groups
from fasc_lightning.evaluation._items import load_items, text_fields
from fasc_lightning.evaluation._prompts import context_length, count_shortened, fit_prompt
from fasc_lightning.evaluation._token_ids import continuation_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

By = Literal["letter", "answer"]
# The wording of MMLU's own evaluation and, without the letters, of the cloze form that is usual for small models.
_HEADS = {
    "letter": "The following are multiple choice questions (with answers) about {}.",
    "answer": "The following are questions (with answers) about {}.",
}


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with its choices (MMLU; Hendrycks et al. 2021, "Measuring Massive Multitask ...").

    Attributes:
        subject: Group in the report; a question's examples come from its subject.
        question: The question.
        choices: The answers to choose from, 2 to 26.
        answer: Index of the right one.
    """

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if not 2 <= len(self.choices) <= len(ascii_uppercase):
            raise ValueError(f"Expected 2 to {len(ascii_uppercase)} choices, but got {len(self.choices)}.")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(
                f"Expected the answer to be an index of the {len(self.choices)} choices, but got {self.answer}."
            )

    def text(self, by: By) -> str:
        """Return the question as it stands in a prompt, up to the answer."""
        if by == "answer":
            return f"Question: {self.question.strip()}\nAnswer:"
        choices = "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, self.choices, strict=False))
        return f"{self.question.strip()}\n{choices}\nAnswer:"

    def answers(self, by: By) -> list[str]:
        """Return the scored texts: the letters or the choices."""
        return list(ascii_uppercase[: len(self.choices)] if by == "letter" else self.choices)

    def solved(self, by: By) -> str:
        """Return the question with its answer, as an example."""
        return f"{self.text(by)} {self.answers(by)[self.answer]}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dict."""
        return {**asdict(self), "choices": list(self.choices)}


@dataclass(frozen=True)
class ChoicesResult:
    """Outcome of :func:`multiple_choice`.

    Attributes:
        percent: Questions answered right, in percent, by the log-probability of an answer.
        percent_per_byte: The same by the log-probability divided by the answer's bytes, so that long answers have no
            handicap. It changes nothing for letters, which all have one length.
        chance: Right answers by guessing, in percent: the mean of 1 / choices.
        count: Number of questions.
        by_subject: Percent and number of questions of each subject.
        by_subject_per_byte: As ``by_subject``, per byte.
        fewer_shots: Questions with fewer examples than asked for, because the context is too short.
        cut: Questions without their beginning, because the context is too short.
    """

    percent: float
    percent_per_byte: float
    chance: float
    count: int
    by_subject: ByGroup
    by_subject_per_byte: ByGroup
    fewer_shots: int
    cut: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain dicts and numbers."""
        groups = {
            "by_subject": plain_groups(self.by_subject),
            "by_subject_per_byte": plain_groups(self.by_subject_per_byte),
        }
        return {**asdict(self), **groups}


@dataclass(frozen=True)
class AnsweredQuestions:
    """Outcome of each question, for paired comparisons of two models.

    Attributes:
        correct: Whether the right answer is the likeliest, bool of shape (questions,).
        correct_per_byte: Whether it is the likeliest per byte.
        fewer_shots: Questions with fewer examples than asked for.
        cut: Questions without their beginning.
    """

    correct: Tensor
    correct_per_byte: Tensor
    fewer_shots: int
    cut: int


def load_choice_questions(path: str | Path) -> list[ChoiceQuestion]:
    """Read questions from a jsonl file (also ``.xz``), one object a line.

    Each needs the texts ``subject`` and ``question``, the list of texts ``choices``, and the index ``answer`` of
    the right one, counted from 0.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line is malformed (the message names it), or if the file has no questions.
    """
    return load_items(path, _parse, "questions")


def _parse(row: dict[str, Any]) -> ChoiceQuestion:
    texts = text_fields(row, ("subject", "question"))
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"expected choices to be a list of texts, but got {choices!r}.")
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise ValueError(f"expected answer to be the index of the right choice, but got {answer!r}.")
    return ChoiceQuestion(**texts, choices=tuple(choice.strip() for choice in choices), answer=answer)


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ChoiceQuestion],
    dev: Sequence[ChoiceQuestion] = (),
    n_shots: int = 5,
    by: By = "letter",
    batch_size: int = 8,
) -> ChoicesResult:
    """Return the percentage of questions whose right answer is the likeliest one.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        questions: The questions.
        dev: Questions that serve as examples: the first ones of the same subject.
        n_shots: Examples before a question; 5 is MMLU's standard. Examples beyond the model's context are dropped with
            a warning.
        by: ``"letter"``: the choices stand in the prompt and their letters are scored. ``"answer"``: the prompt lacks
            the choices and their whole texts are scored; this suits models that cannot answer by letter.
        batch_size: Questions per forward pass.

    Returns:
        Percentages, overall and by subject.

    Raises:
        FloatingPointError: If a score is not finite.
        ValueError: If there are no questions, or too few examples of a subject.
    """
    outcome = answered_questions(model, tokenizer, questions, dev, n_shots, by, batch_size)
    subjects = [question.subject for question in questions]
    chance = torch.tensor([1 / len(question.choices) for question in questions], dtype=torch.float64)
    raw = grouped_percent(outcome.correct, subjects, chance)
    per_byte = grouped_percent(outcome.correct_per_byte, subjects, chance)
    values = raw.compute()
    return ChoicesResult(
        percent=values["percent"].item(),
        percent_per_byte=per_byte.compute()["percent"].item(),
        chance=values["chance"].item(),
        count=int(values["count"]),
        by_subject=raw.by_group(),
        by_subject_per_byte=per_byte.by_group(),
        fewer_shots=outcome.fewer_shots,
        cut=outcome.cut,
    )


def answered_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ChoiceQuestion],
    dev: Sequence[ChoiceQuestion] = (),
    n_shots: int = 5,
    by: By = "letter",
    batch_size: int = 8,
) -> AnsweredQuestions:
    """Return which questions are answered right; a tie counts as wrong.

    The examples of a subject, which its prompts share, are read once.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        questions: The questions.
        dev: Questions that serve as examples.
        n_shots: Examples before a question.
        by: The scored texts; see :func:`multiple_choice`.
        batch_size: Questions per forward pass.

    Returns:
        Outcomes on the CPU.

    Raises:
        FloatingPointError: If a score is not finite.
        ValueError: If there are no questions, or too few examples of a subject.
    """
    if not questions:
        raise ValueError("Expected at least one question, but got none.")
    if by not in get_args(By):
        raise ValueError(f"Expected by to be one of {', '.join(get_args(By))}, but got {by!r}.")
    shots = _shots(questions, dev, n_shots, by)
    context = context_length(model)
    prompts, tries = [], []
    for question in questions:
        answers = [continuation_ids(tokenizer, answer) for answer in question.answers(by)]
        room = None if context is None else context - max(map(len, answers))
        head = _HEADS[by].format(question.subject.replace("_", " "))
        prompts.append(fit_prompt(tokenizer, shots[question.subject], question.text(by), room, head=head))
        tries.append(ContinuationTrie.of(answers))
    fewer, cut = count_shortened(prompts, n_shots)
    alike = [(question.subject, prompt.shots) for question, prompt in zip(questions, prompts, strict=True)]
    scores = continuation_scores(
        model, [prompt.ids for prompt in prompts], tries, batch_size, alike=alike if n_shots else None
    )
    correct, per_byte = [], []
    for question, score in zip(questions, scores, strict=True):
        check_finite(score, f"The score of an answer to {question.question!r}")
        sizes = torch.tensor([len(answer.encode()) for answer in question.answers(by)])
        correct.append(ranks_first(score, question.answer))
        per_byte.append(ranks_first(score.double() / sizes, question.answer))
    return AnsweredQuestions(torch.tensor(correct), torch.tensor(per_byte), fewer, cut)


def _shots(
    questions: Sequence[ChoiceQuestion], dev: Sequence[ChoiceQuestion], n_shots: int, by: By
) -> dict[str, list[str]]:
    """Return the examples of each subject, as texts."""
    if n_shots < 0:
        raise ValueError(f"Expected n_shots to be at least 0, but got {n_shots}.")
    shots: dict[str, list[str]] = {question.subject: [] for question in questions}
    for example in dev:
        if len(shots.get(example.subject, ())) < n_shots and example.subject in shots:
            shots[example.subject].append(example.solved(by))
    for subject, texts in shots.items():
        if len(texts) < n_shots:
            raise ValueError(
                f"Expected {n_shots} examples of {subject!r} in dev, but got {len(texts)}. Pass the questions that "
                "examples are taken from as dev, or ask for fewer with n_shots."
            )
    return shots
