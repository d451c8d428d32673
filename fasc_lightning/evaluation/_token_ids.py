"""Token ids of texts, prompts and continuations."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, without special tokens."""
    # verbose=False: callers cut texts that are too long for the model, so no warning is needed.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the ids of the prompt, after the beginning token if the tokenizer adds one by itself."""
    return [*beginning_ids(tokenizer), *text_ids(tokenizer, prompt)]


def beginning_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning token if the tokenizer adds one by itself, else nothing."""
    start = tokenizer("")["input_ids"][:1]
    return start if start == [tokenizer.bos_token_id] else []


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a word after a space, in the middle of a text.

    SentencePiece tokenizers add a space before a text's first word, so " Paris" alone would get two spaces. After
    another word it gets one.
    """
    before = text_ids(tokenizer, "a")
    both = text_ids(tokenizer, f"a {text}")
    if both[: len(before)] == before and len(both) > len(before):
        return both[len(before) :]
    return text_ids(tokenizer, f" {text}")
