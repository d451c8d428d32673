"""Every evaluation file of the folder FASC_DATA is read and checked; no model is needed."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from fasc_lightning.data import open_text
from fasc_lightning.evaluation import (
    load_choice_questions,
    load_facts,
    load_minimal_pairs,
    load_multilingual_facts,
    load_number_facts,
    load_short_answers,
    relation_candidates,
)

NUMBERS = {"no", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"}
pytestmark = pytest.mark.skipif(
    "FASC_DATA" not in os.environ, reason="FASC_DATA does not name a folder of evaluation data"
)


def path_of(name):
    return Path(os.environ["FASC_DATA"]) / name


def rows(name):
    return sum(bool(line.strip()) for line in open_text(path_of(name)))


@pytest.mark.parametrize("name", ["facts_p1.jsonl", "lama_trex.jsonl.xz"])
def test_facts(name):
    facts = load_facts(path_of(name))
    assert len(facts) == rows(name)
    assert set(Counter(fact.kind for fact in facts)) == {"geographic", "other", "taxonomic", "temporal"}
    assert all(len(objects) > 1 for objects in relation_candidates(facts).values())


def test_numerical_facts():
    facts = load_number_facts(path_of("numersense.jsonl"))
    assert len(facts) == rows("numersense.jsonl")
    assert {fact.object for fact in facts} == NUMBERS
    assert {fact.kind for fact in facts} == {"numerical"}


def test_multilingual_facts():
    facts = load_multilingual_facts(path_of("mlama.jsonl.xz"))
    assert sum(map(len, facts.values())) == rows("mlama.jsonl.xz")
    assert set(facts) == {"de", "es", "fr", "it", "pt"}


def test_minimal_pairs():
    pairs = load_minimal_pairs(path_of("blimp_a.jsonl"))
    assert len(pairs) == rows("blimp_a.jsonl") == 6700
    assert set(Counter(pair.uid for pair in pairs).values()) == {100}
    assert len({pair.phenomenon for pair in pairs}) == 13


def test_multiple_choice():
    questions, dev = (load_choice_questions(path_of(name)) for name in ("mmlu.jsonl.xz", "mmlu_dev.jsonl"))
    assert len(questions) == rows("mmlu.jsonl.xz")
    assert {len(question.choices) for question in questions} == {4}
    examples = Counter(question.subject for question in dev)
    assert set(examples.values()) == {5}
    assert examples.keys() == {question.subject for question in questions}
    assert len(examples) == 57


@pytest.mark.parametrize("name", ["known_1000.jsonl", "lama_squad.jsonl"])
def test_short_answers(name):
    items = load_short_answers(path_of(name))
    assert len(items) == rows(name)
    assert {len(item.answers) for item in items} == {1}
