from __future__ import annotations

import pytest
from evaluation_cases import random_model

from fasc_lightning.evaluation._prompts import Prompt, context_length, count_shortened, fit_prompt


def texts(tokenizer, **options):
    prompt = fit_prompt(tokenizer, ["one", "two"], "which?", **options)
    return tokenizer.decode(prompt.ids), prompt.shots, prompt.cut


def test_examples_stand_between_head_and_question(tokenizer):
    assert texts(tokenizer, room=None, head="Head.") == ("Head.\n\none\n\ntwo\n\nwhich?", 2, 0)
    assert texts(tokenizer, room=None, separator="\n") == ("one\ntwo\nwhich?", 2, 0)


def test_examples_beyond_the_context_are_dropped_from_the_last(tokenizer):
    assert texts(tokenizer, room=16) == ("one\n\ntwo\n\nwhich?", 2, 0)
    assert texts(tokenizer, room=15) == ("one\n\nwhich?", 1, 0)
    assert texts(tokenizer, room=10) == ("which?", 0, 0)


def test_a_question_beyond_the_context_loses_its_beginning(tokenizer):
    assert texts(tokenizer, room=4, head="Head.") == ("ich?", 0, 9)
    with pytest.raises(ValueError, match="the answers leave 0 tokens"):
        texts(tokenizer, room=0)


def test_a_beginning_token_stays(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert texts(tokenizer, room=4) == ("<s>ch?", 0, 3)
    with pytest.raises(ValueError, match="leave 1 tokens"):
        texts(tokenizer, room=1)


def test_shortened_prompts_are_counted_and_said():
    prompts = [Prompt([1], 2, 0), Prompt([1], 1, 0), Prompt([1], 0, 3)]
    with pytest.warns(UserWarning, match="2 of 3 prompts: 2 were given fewer than 2 examples, 1 lost the beginning"):
        assert count_shortened(prompts, 2) == (2, 1)
    assert count_shortened(prompts[:1], 2) == (0, 0)


def test_the_context_is_that_of_the_configuration():
    assert context_length(random_model("gpt2", n_positions=32)) == 32
    assert context_length(random_model(max_position_embeddings=48)) == 48
