"""Short answers in the model's own words, compared with the right answers as in SQuAD's evaluation."""

from __future__ import annotations

import inspect
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasc_lightning._utils import evaluating
from fasc_lightning.evaluation._continuations import check_finite, is_key_value_cache, last_logits_only
from fasc_lightning.evaluation._grouped import ByGroup, grouped_percent, plain_groups
from fasc_lightning.evaluation._items import load_items, text_fields
from fasc_lightning.evaluation._prompts import context_length, count_shortened, fit_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The end of an answer: the end of the line, or a full stop or comma that is not inside "U.S." or "10,000".
STOP = r"\n|[.,;](?=\s)"
_ANSWER_FIELDS = ("answer", "answers", "object")


@dataclass(frozen=True)
class ShortAnswerItem:
    """A prompt with an answer of a few words.

    Attributes:
        prompt: The text that the model continues.
        answers: One or more right answers, each as good as the others.
        kind: Group in the report.
    """

    prompt: str
    answers: tuple[str, ...]
    kind: str = "all"

    def __post_init__(self) -> None:
        if not self.prompt.strip() or not self.answers or not all(answer.strip() for answer in self.answers):
            raise ValueError(
                f"Expected a prompt and one or more answers, none of them blank, but got {self.prompt!r} and "
                f"{list(self.answers)}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dict."""
        return {**asdict(self), "answers": list(self.answers)}


@dataclass(frozen=True)
class ShortAnswersResult:
    """Outcome of :func:`short_answers`.

    Attributes:
        percent: Answers that equal a right one up to case, articles, punctuation and white space, in percent.
        f1: Mean F1 between the words of an answer and of a right answer, in percent.
        chance: Percent right if every answer were the commonest right one.
        chance_f1: Mean F1 of that answer, in percent.
        commonest: That answer.
        count: Number of items.
        by_kind: Percent equal and number of items of each kind.
        by_kind_f1: Mean F1 and number of items of each kind.
        fewer_shots: Items with fewer examples than given, because the context is too short.
        cut: Items without the beginning of their prompt, because the context is too short.
    """

    percent: float
    f1: float
    chance: float
    chance_f1: float
    commonest: str
    count: int
    by_kind: ByGroup
    by_kind_f1: ByGroup
    fewer_shots: int
    cut: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain dicts and numbers."""
        return {**asdict(self), "by_kind": plain_groups(self.by_kind), "by_kind_f1": plain_groups(self.by_kind_f1)}


@dataclass(frozen=True)
class GivenAnswers:
    """A model's answers, for paired comparisons of two models.

    Attributes:
        answers: The answers.
        exact: Whether each equals a right answer, bool of shape (items,).
        f1: F1 of each with the closest right answer, float64 of shape (items,).
        fewer_shots: Items with fewer examples than given.
        cut: Items without the beginning of their prompt.
    """

    answers: list[str]
    exact: Tensor
    f1: Tensor
    fewer_shots: int
    cut: int


def load_short_answers(path: str | Path) -> list[ShortAnswerItem]:
    """Read items from a jsonl file (also ``.xz``), one object a line.

    Each needs a ``question``, which becomes "Q: ...?" and "A:" on two lines, or a ``prompt`` to continue. It also needs
    the right answers, one text or a list of them, as ``answer``, ``answers`` or ``object``. ``kind`` may name its
    group. So the formats of NQ-open, LAMA's SQuAD part and known_1000 need no conversion.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line is malformed (the message names it), or if the file has no items.
    """
    return load_items(path, _parse, "questions or prompts")


def _parse(row: dict[str, Any]) -> ShortAnswerItem:
    if "question" in row:
        question = text_fields(row, ("question",))["question"].strip()
        prompt = f"Q: {question}{'' if question.endswith('?') else '?'}\nA:"
    else:
        prompt = text_fields(row, ("prompt",))["prompt"].rstrip()
    field = next((field for field in _ANSWER_FIELDS if field in row), None)
    answers = row.get(field) if field else None
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError(
            f"expected one or more texts in one of the fields {', '.join(_ANSWER_FIELDS)}, but got {answers!r}."
        )
    kind = row.get("kind", "all")
    if not isinstance(kind, str) or not kind.strip():
        raise ValueError(f"expected kind to be a text, but got {kind!r}.")
    return ShortAnswerItem(prompt, tuple(answers), kind)


def normalise_answer(text: str) -> str:
    """Return a text in lower case, without ASCII punctuation, English articles and superfluous white space.

    The steps have the order of SQuAD's official evaluation (Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions ..."), so
    "the U.S." becomes "us".
    """
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(given: str, answers: Sequence[str]) -> bool:
    """Return whether an answer equals a right one after normalisation."""
    return any(normalise_answer(given) == normalise_answer(answer) for answer in answers)


def token_f1(given: str, answers: Sequence[str]) -> float:
    """Return the F1 between the normalised words of an answer and of the closest right answer.

    If one of them has no words left, F1 is 1 if both have none and else 0, as in the evaluation of SQuAD 2.0.
    """
    return max(_pair_f1(normalise_answer(given).split(), normalise_answer(answer).split()) for answer in answers)


def _pair_f1(given: list[str], right: list[str]) -> float:
    if not given or not right:
        return float(given == right)
    common = (Counter(given) & Counter(right)).total()
    return 2 * common / (len(given) + len(right))


def commonest_answer(items: Sequence[ShortAnswerItem]) -> str:
    """Return the normalised answer that is right for most items; the first of several."""
    counts = Counter(answer for item in items for answer in dict.fromkeys(map(normalise_answer, item.answers)))
    return max(counts, key=lambda answer: counts[answer])


def short_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ShortAnswerItem],
    shots: Sequence[ShortAnswerItem] = (),
    max_new_tokens: int = 16,
    stop: str = STOP,
    batch_size: int = 16,
) -> ShortAnswersResult:
    """Return exact match and F1 of a model's answers.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        items: The items.
        shots: Examples before each prompt, with their first answer, each on lines of its own. Examples beyond the
            model's context are dropped with a warning.
        max_new_tokens: Tokens of the longest answer.
        stop: Regular expression for the end of an answer.
        batch_size: Prompts per forward pass.

    Returns:
        Percentages, overall and by kind.

    Raises:
        FloatingPointError: If the model's output is not finite.
        ValueError: If there are no items.
    """
    given = given_answers(model, tokenizer, items, shots, max_new_tokens, stop, batch_size)
    kinds = [item.kind for item in items]
    constant = commonest_answer(items)
    equal = torch.tensor([exact_match(constant, item.answers) for item in items])
    overlap = torch.tensor([token_f1(constant, item.answers) for item in items], dtype=torch.float64)
    exact = grouped_percent(given.exact, kinds, equal)
    f1 = grouped_percent(given.f1, kinds, overlap)
    exact_values, f1_values = exact.compute(), f1.compute()
    return ShortAnswersResult(
        percent=exact_values["percent"].item(),
        f1=f1_values["percent"].item(),
        chance=exact_values["chance"].item(),
        chance_f1=f1_values["chance"].item(),
        commonest=constant,
        count=len(items),
        by_kind=exact.by_group(),
        by_kind_f1=f1.by_group(),
        fewer_shots=given.fewer_shots,
        cut=given.cut,
    )


def given_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ShortAnswerItem],
    shots: Sequence[ShortAnswerItem] = (),
    max_new_tokens: int = 16,
    stop: str = STOP,
    batch_size: int = 16,
) -> GivenAnswers:
    """Generate a model's answers greedily, and score each answer.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        items: The items.
        shots: Examples before each prompt.
        max_new_tokens: Tokens of the longest answer.
        stop: Regular expression for the end of an answer.
        batch_size: Prompts per forward pass; the answers change only by rounding.

    Returns:
        Answers and scores, on the CPU.

    Raises:
        FloatingPointError: If the model's output is not finite.
        ValueError: If there are no items or a size is not positive.
    """
    if not items:
        raise ValueError("Expected at least one question or prompt, but got none.")
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"Expected positive sizes, but got {max_new_tokens=} and {batch_size=}.")
    context = context_length(model)
    room = None if context is None else context - max_new_tokens
    examples = [f"{shot.prompt} {shot.answers[0]}" for shot in shots]
    prompts = [fit_prompt(tokenizer, examples, item.prompt, room, separator="\n") for item in items]
    fewer, cut = count_shortened(prompts, len(shots))

    ends = _end_ids(model, tokenizer)
    pattern = re.compile(stop)
    texts = [""] * len(items)

    def ended(ids: list[int]) -> bool:
        return ids[-1] in ends or pattern.search(_decoded(tokenizer, ids)) is not None

    # Prompts with similar lengths need little padding.
    order = sorted(range(len(items)), key=lambda i: len(prompts[i].ids))
    with evaluating(model), torch.inference_mode():
        for batch in (order[start : start + batch_size] for start in range(0, len(order), batch_size)):
            writing = [_Writing(prompts[i].ids, items[i].prompt, []) for i in batch]
            _write_greedily(model, writing, max_new_tokens, ended)
            for i, row in zip(batch, writing, strict=True):
                texts[i] = pattern.split(_decoded(tokenizer, row.answer), maxsplit=1)[0].strip()
    exact = torch.tensor([exact_match(text, item.answers) for text, item in zip(texts, items, strict=True)])
    f1 = [token_f1(text, item.answers) for text, item in zip(texts, items, strict=True)]
    return GivenAnswers(texts, exact, torch.tensor(f1, dtype=torch.float64), fewer, cut)


@dataclass(frozen=True)
class _Writing:
    """A prompt and the tokens generated after it so far."""

    prompt: list[int]
    name: str
    answer: list[int]


def _write_greedily(
    model: PreTrainedModel, writing: Sequence[_Writing], steps: int, ended: Callable[[list[int]], bool]
) -> None:
    """Append the likeliest tokens to the answers of a batch, until each has ended or has ``steps`` tokens.

    Prompts are padded on the left; the mask hides the padding, and positions count from the first token.
    ``model.generate`` is not used because it would apply the penalties of a model's generation settings.
    """
    width = max(len(row.prompt) for row in writing)
    ids = torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in writing], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in writing], device=model.device
    )
    placed = "position_ids" in inspect.signature(model.forward).parameters
    narrow = last_logits_only(model, 1)
    cache, unread = None, ids
    unfinished = set(range(len(writing)))
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -unread.shape[1] :]
        # The cache of keys and values is passed on; without one the whole text is read again.
        options: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
        if placed:
            options["position_ids"] = positions
        output = model(unread, attention_mask=mask, use_cache=True, **options, **narrow)
        best, tokens = output.logits[:, -1].float().max(-1)
        for row in sorted(unfinished):
            check_finite(best[row], f"The output after {writing[row].name!r}")
            writing[row].answer.append(int(tokens[row]))
            if ended(writing[row].answer):
                unfinished.discard(row)
        if not unfinished:
            return
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(writing), 1)], dim=1)
        held = getattr(output, "past_key_values", None)
        cache, unread = (held, tokens[:, None]) if is_key_value_cache(held) else (None, ids)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end a text, from the tokenizer and the model's generation settings."""
    settings = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [*(settings if isinstance(settings, list) else [settings]), tokenizer.eos_token_id]
    return frozenset(end for end in ends if end is not None)
