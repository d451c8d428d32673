"""Encoding of instructions as training examples: prompt, answer, tokens and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from fasc_lightning.data._finetune_examples import IGNORED, Example
from fasc_lightning.data._finetune_records import Instruction

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The treatment of instructions that are longer than a window.
Overlong = Literal["cut", "skip", "error"]

OVERLONG: tuple[Overlong, ...] = ("cut", "skip", "error")


def prompt_texts(record: Instruction, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the prompt, and the prompt with the answer and its end token.

    A chat template gives a turn of the user and one of the assistant; without a template Alpaca's headings are used.

    Raises:
        ValueError: If the template does not put the answer after the question.
    """
    if not getattr(tokenizer, "chat_template", None):
        parts = [f"### Instruction:\n{record.instruction}"]
        parts += [f"### Input:\n{record.input}"] if record.input else []
        prompt = _beginning(tokenizer) + "\n\n".join([*parts, "### Response:\n"])
        return prompt, prompt + record.answer + (tokenizer.eos_token or "")
    question = [{"role": "user", "content": record.request}]
    answer = [{"role": "assistant", "content": record.answer}]
    asked = str(tokenizer.apply_chat_template(question, tokenize=False))
    prompt = str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template(question + answer, tokenize=False))
    if not whole.startswith(asked):
        raise ValueError(
            f"{record.where}: expected a chat template that puts the assistant's turn after the user's, but its text "
            f"of both does not begin with its text of the user's turn. Set `tokenizer.chat_template` to another, or to "
            "None for plain headings."
        )
    return prompt, whole


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that the tokenizer puts before every text, or "" if it puts none."""
    first = tokenizer("")["input_ids"][:1]
    return tokenizer.bos_token if tokenizer.bos_token is not None and first == [tokenizer.bos_token_id] else ""


def encode_instruction(record: Instruction, tokenizer: PreTrainedTokenizerBase, answers_only: bool = True) -> Example:
    """Return an instruction as tokens; the answer and its end token are labels.

    The whole text is tokenised at once, as a model reads it. The answer begins at the first token that differs from the
    tokens of the prompt alone. So a token that spans the end of the prompt and the beginning of the answer is learnt.

    Raises:
        ValueError: If the chat template does not put the answer after the question, or leaves it out.
    """
    prompt, whole = prompt_texts(record, tokenizer)
    given, ids = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (prompt, whole))
    pairs = zip(given, ids, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(given), len(ids)))
    example = example_of(ids, shared if answers_only else 0)
    if not example.learnt:  # its mean loss would be undefined
        raise ValueError(
            f"{record.where}: expected a chat template that writes the answer but nothing of it is left. Set "
            "`tokenizer.chat_template` to another, or to None for plain headings."
        )
    return example


def fit_example(example: Example, window: int, overlong: Overlong, where: str) -> Example | None:
    """Return an example unchanged if it fits into the window; otherwise cut, or None to leave it out.

    Raises:
        ValueError: If it does not fit and ``overlong`` is "error"; the message begins with ``where``.
    """
    if len(example) <= window:
        return example
    if overlong == "error":
        raise ValueError(
            f"{where}: expected at most {window} tokens but got {len(example)}. Use a longer window, "
            'or overlong="cut" or "skip".'
        )
    cut = Example(example.ids[:window], example.labels[:window])
    return cut if overlong == "cut" and cut.learnt else None


def example_of(ids: Sequence[int], given: int = 0) -> Example:
    """Return ids as an example; the first ``given`` ids, and always the first one, are not learnt."""
    tokens = torch.tensor(ids, dtype=torch.long)
    labels = tokens.clone()
    labels[: max(1, given)] = IGNORED
    return Example(tokens, labels)
