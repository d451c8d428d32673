from __future__ import annotations

import json

import pytest
import torch
from evaluation_cases import HOMES

from fasc_lightning.evaluation import (
    Fact,
    load_multilingual_facts,
    multilingual_recall,
    recalled_facts,
    recalled_multilingual,
)

ROW = {
    "lang": "de",
    "subject": "Rom",
    "relation": "P36",
    "template": "[X] ist in [Y] .",
    "object": "Italien",
    "kind": "geographic",
}


def facts_of(prefix, template):
    return [
        Fact(f"{prefix}{i}", "P1", template, name, "one" if i else "two") for i, name in enumerate(("ab", "b", "cab"))
    ]


def test_candidates_are_those_of_the_language(model, tokenizer):
    facts = {"de": facts_of("x", "[X] ist [Y] ."), "fr": facts_of("y", "[X] est [Y] .")[:2]}
    recalled = recalled_multilingual(model, tokenizer, facts)
    expected = [recalled_facts(model, tokenizer, facts[language]) for language in ("de", "fr")]
    assert recalled.tolist() == [*expected[0].tolist(), *expected[1].tolist()]
    result = multilingual_recall(model, tokenizer, facts)
    assert result.count == 5
    assert result.percent == pytest.approx(100 * recalled.double().mean().item())
    assert result.chance == pytest.approx(100 * (3 / 3 + 2 / 2) / 5)
    assert result.by_language["fr"] == (pytest.approx(50.0 * expected[1].sum().item()), 2)
    assert result.by_kind["two"] == (pytest.approx(50.0 * (expected[0][0] + expected[1][0]).item()), 2)
    assert result.to_dict()["by_language"]["de"]["count"] == 3


def test_a_model_that_knows_one_language_shows_it(knowing_model, tokenizer):
    facts = {
        "en": [Fact(name, "home", "[X] lives in [Y] .", home, "geographic") for name, home in HOMES.items()],
        "xx": [Fact(name, "home", "[X] lives in [Y] .", home, "geographic") for name, home in
               zip(HOMES, [*list(HOMES.values())[1:], "bern"], strict=True)],
    }  # fmt: skip
    result = multilingual_recall(knowing_model, tokenizer, facts)
    assert result.by_language["en"] == (100, 5)
    assert result.by_language["xx"][0] <= 20


def test_broken_weights_fail_and_no_facts_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="at least one language"):
        multilingual_recall(model, tokenizer, {})
    with pytest.raises(ValueError, match="at least one fact"):
        multilingual_recall(model, tokenizer, {"de": []})
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="'x0 ist' is not finite"):
        multilingual_recall(model, tokenizer, {"de": facts_of("x", "[X] ist [Y] .")})


def test_facts_are_read_by_language(tmp_path):
    path = tmp_path / "m.jsonl"
    rows = [ROW, {**ROW, "lang": "fr", "template": "[X] est en [Y] ."}, {**ROW, "subject": "Oslo"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    facts = load_multilingual_facts(path)
    assert list(facts) == ["de", "fr"]
    assert [fact.prompt for fact in facts["de"]] == ["Rom ist in", "Oslo ist in"]


def test_a_malformed_line_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps({**ROW, 'lang': None})}")
    with pytest.raises(ValueError, match=r"m.jsonl, line 2: expected the text fields lang, but lang is missing"):
        load_multilingual_facts(path)
