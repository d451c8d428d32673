from __future__ import annotations

import json

import pytest
import torch
from evaluation_cases import NUMBERS

from fasc_lightning.evaluation import NumberFact, load_number_facts, number_recall, recalled_numbers

FACTS = [
    NumberFact("Cats have", "legs.", "four"),
    NumberFact("Birds have", "wings and a beak.", "two"),
    NumberFact("A hand's fingers are", ".", "five"),
    NumberFact("Snakes have", "legs", "no", "animals"),
]


def test_the_whole_sentence_decides(model, tokenizer, reference):
    numbers = ["four", "two", "five", "no"]
    expected = []
    for fact in FACTS:
        gap = "" if fact.suffix == "." else " "
        texts = [f"{fact.prompt} {number}{gap}{fact.suffix}" for number in numbers]
        # All of the text but its very first token, which nothing predicts.
        ids = [tokenizer(text)["input_ids"] for text in texts]
        scores = [reference(model, row[:1], row[1:]) for row in ids]
        expected.append(numbers[max(range(4), key=scores.__getitem__)] == fact.object)
    assert recalled_numbers(model, tokenizer, FACTS).tolist() == expected
    result = number_recall(model, tokenizer, FACTS)
    assert (result.percent, result.chance, result.count) == (pytest.approx(25 * sum(expected)), 25, 4)
    assert result.by_kind["animals"] == (100.0 * expected[3], 1)


def test_a_model_that_knows_the_numbers_recalls_them(knowing_model, tokenizer):
    facts = [NumberFact(before, after, number) for before, number, after in NUMBERS]
    assert number_recall(knowing_model, tokenizer, facts).percent == 100


def test_a_tie_is_no_recall_and_broken_weights_fail(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight.zero_()
        # The candidates of one length tie.
        facts = [NumberFact("Cats have", "legs.", "four"), NumberFact("Dogs have", "legs.", "five")]
        assert not recalled_numbers(model, tokenizer, facts).any()
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="The score of a number after 'Cats have' is not finite"):
        number_recall(model, tokenizer, FACTS)


def test_no_facts_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="at least one numerical fact"):
        number_recall(model, tokenizer, [])


def test_the_ending_has_a_space_before_words_only():
    assert NumberFact("x", "legs", "two").ending("ten") == "ten legs"
    assert NumberFact("x", "'feet' at once", "two").ending("ten") == "ten 'feet' at once"
    assert NumberFact("x", ".", "two").ending("ten") == "ten."
    assert NumberFact("x", "", "two").ending("ten") == "ten"


def test_number_facts_are_read_and_malformed_lines_named(tmp_path):
    path = tmp_path / "n.jsonl"
    path.write_text(f"{json.dumps(FACTS[0].to_dict())}\n" + '{"prompt": "Snakes have ", "object": "no"}\n')
    assert load_number_facts(path) == [FACTS[0], NumberFact("Snakes have", "", "no")]
    for row, message in (
        ({"prompt": "x"}, "n.jsonl, line 1: expected the text fields prompt, object, but object is missing"),
        ({"prompt": "x", "object": "two", "suffix": 3}, "n.jsonl, line 1: expected suffix and kind to be texts"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(ValueError, match=message):
            load_number_facts(path)
