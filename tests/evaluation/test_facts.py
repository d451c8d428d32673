from __future__ import annotations

import json
import lzma

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from fasc_lightning.evaluation import relation_candidates
from fasc_lightning.evaluation._facts import (
    Fact,
    FactualRecall,
    candidate_scores,
    factual_recall,
    load_facts,
    recalled_facts,
)

OBJECTS = ("a", "ab", "abc", "abd", "bcd", "cc", "dab cab", "abcabd")
ROW = {"subject": "bad", "relation": "P1", "template": "[X] is [Y] .", "object": "cab", "kind": "other"}


@pytest.fixture
def tokenizer():
    """A byte-level tokenizer with few merges, so that words take several tokens and share beginnings."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("a", "b"), ("c", "d")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    inner = Tokenizer(BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def make_model(family, vocabulary=259):
    torch.manual_seed(3)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
        )  # fmt: skip
        return LlamaForCausalLM(config).double()
    if family == "gpt2":
        config = GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=16, n_layer=2, n_head=2,
                            initializer_range=0.5, bos_token_id=0, eos_token_id=0)  # fmt: skip
        return GPT2LMHeadModel(config).double()
    if family == "sliding":
        config = MistralConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, sliding_window=4,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
        )  # fmt: skip
        return MistralForCausalLM(config).double()
    config = MambaConfig(vocab_size=vocabulary, hidden_size=16, num_hidden_layers=2, state_size=4)
    return MambaForCausalLM(config).double()


@pytest.fixture
def model():
    return make_model("llama")


@pytest.fixture
def facts():
    """Two relations, subjects of several lengths."""
    first = [
        Fact("x" * (i % 3 + 1) + "y", "R1", "The word of [X] is [Y] .", name, "one") for i, name in enumerate(OBJECTS)
    ]
    second = [
        Fact("z" * (i % 2 + 1), "R2", "[X] has [Y] in it .", name, "two") for i, name in enumerate(("a", "b", "ca"))
    ]
    return first + second


def reference_scores(model, tokenizer, fact, candidates):
    """Log-probability of each candidate by one full forward pass over prompt and candidate."""
    prompt = tokenizer(fact.prompt)["input_ids"]
    scores = []
    for text in candidates:
        ids = tokenizer(f" {text}")["input_ids"]
        with torch.no_grad():
            log_prob = model(torch.tensor([prompt + ids]), use_cache=False).logits[0].log_softmax(-1)
        scores.append(sum(log_prob[len(prompt) - 1 + i, token] for i, token in enumerate(ids)))
    return torch.stack(scores)


@pytest.mark.parametrize("family", ["llama", "gpt2", "sliding"])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_candidate_scores_equal_full_sequence_scores(tokenizer, facts, family, batch_size):
    model = make_model(family).eval()
    candidates = relation_candidates(facts)
    scores = candidate_scores(model, tokenizer, facts, candidates, batch_size)
    for fact, score in zip(facts, scores, strict=True):
        expected = reference_scores(model, tokenizer, fact, candidates[fact.relation])
        # The scores themselves are float32.
        torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-5)


def test_candidate_scores_do_not_depend_on_the_size_of_a_pass(model, tokenizer, facts, monkeypatch):
    candidates = relation_candidates(facts)
    expected = candidate_scores(model, tokenizer, facts, candidates)
    monkeypatch.setattr("fasc_lightning.evaluation._continuations._CONTINUATION_TOKENS", 3)
    for got, want in zip(candidate_scores(model, tokenizer, facts, candidates), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_models_without_a_key_value_cache_are_scored_too(tokenizer, facts):
    model = make_model("mamba").eval()
    candidates = relation_candidates(facts)
    for fact, score in zip(facts, candidate_scores(model, tokenizer, facts, candidates), strict=True):
        expected = reference_scores(model, tokenizer, fact, candidates[fact.relation])
        torch.testing.assert_close(score, expected.float(), rtol=1e-4, atol=1e-4)


def test_a_fact_is_recalled_if_its_object_ranks_first(model, tokenizer, facts):
    model.eval()
    candidates = relation_candidates(facts)
    expected = []
    for fact in facts:
        scores = reference_scores(model, tokenizer, fact, candidates[fact.relation])
        expected.append(candidates[fact.relation][int(scores.argmax())] == fact.object)
    # Turn some misses into hits, so that both outcomes occur.
    best = [
        candidates[f.relation][int(reference_scores(model, tokenizer, f, candidates[f.relation]).argmax())]
        for f in facts
    ]
    easy = [Fact(f.subject, f.relation, f.template, o, f.kind) for f, o in zip(facts[:4], best[:4], strict=True)]
    assert recalled_facts(model, tokenizer, [*facts, *easy]).tolist() == [*expected, True, True, True, True]

    result = factual_recall(model, tokenizer, [*facts, *easy])
    outcome = [*expected, True, True, True, True]
    assert result.count == 15
    assert result.percent == pytest.approx(100 * sum(outcome) / 15)
    assert result.chance == pytest.approx(100 * (12 / 8 + 3 / 3) / 15)
    first = outcome[:8] + outcome[11:]
    assert result.by_kind["one"] == (pytest.approx(100 * sum(first) / 12), 12)
    assert result.by_kind["two"] == (pytest.approx(100 * sum(outcome[8:11]) / 3), 3)
    assert json.loads(json.dumps(result.to_dict()))["by_kind"]["two"]["count"] == 3


def test_a_tie_is_not_a_recall(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    facts = [Fact("x", "R", "[X] is [Y] .", name, "k") for name in "pqr"]
    assert recalled_facts(model, tokenizer, facts).tolist() == [False, False, False]


def test_scores_that_are_not_finite_fail(model, tokenizer, facts):
    model.train()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="'The word of xy is' is not finite"):
        recalled_facts(model, tokenizer, facts)
    assert model.training


def test_no_facts_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="at least one fact"):
        factual_recall(model, tokenizer, [])


def test_a_beginning_token_is_kept_where_the_tokenizer_adds_one(model, tokenizer):
    from tokenizers.processors import TemplateProcessing

    facts = [Fact("x", "R", "[X] is [Y] .", name, "k") for name in ("ab", "cd")]
    tokenizer.bos_token = "!"
    without = candidate_scores(model, tokenizer, facts, {"R": ["ab", "cd"]})
    bos = ("!", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[bos])
    with_bos = candidate_scores(model, tokenizer, facts, {"R": ["ab", "cd"]})
    assert not torch.allclose(with_bos[0], without[0])
    prompt = [tokenizer.bos_token_id, *tokenizer("x is", add_special_tokens=False)["input_ids"]]
    ids = tokenizer(" ab", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_prob = model.eval()(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    expected = sum(log_prob[len(prompt) - 1 + i, token] for i, token in enumerate(ids))
    assert with_bos[0][0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_prompt_is_the_template_up_to_the_object():
    assert Fact("Rome", "P", "The land of [X] is [Y] .", "Italy", "k").prompt == "The land of Rome is"
    assert Fact("Rome", "P", "[X] lies in [Y] since long.", "Italy", "k").prompt == "Rome lies in"
    with pytest.raises(ValueError, match=r"Expected a template with \[X\] before \[Y\], but got '\[Y\] has \[X\]'"):
        Fact("Rome", "P", "[Y] has [X]", "Italy", "k")


def test_load_facts_reads_jsonl_and_xz(tmp_path):
    text = json.dumps({**ROW, "src": "ignored"}) + "\n\n" + json.dumps({**ROW, "object": "dad"}) + "\n"
    (tmp_path / "f.jsonl").write_text(text)
    (tmp_path / "f.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    facts = load_facts(tmp_path / "f.jsonl")
    assert facts == load_facts(tmp_path / "f.jsonl.xz")
    assert [fact.to_dict() for fact in facts] == [ROW, {**ROW, "object": "dad"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({key: ROW[key] for key in ("subject", "template", "kind")}, "line 2: .*but relation, object is missing"),
        ({**ROW, "kind": 3}, "line 2: .*but kind is missing"),
        ({**ROW, "object": " "}, "line 2: .*but object is missing"),
        ({**ROW, "template": "[X] is it"}, r"line 2: Expected a template with \[X\] before \[Y\]"),
        ([1], "line 2: expected a JSON object"),
    ],
)
def test_load_facts_names_the_bad_line(tmp_path, row, message):
    (tmp_path / "f.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=message):
        load_facts(tmp_path / "f.jsonl")


def test_load_facts_refuses_an_empty_file(tmp_path):
    (tmp_path / "f.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="but it holds none"):
        load_facts(tmp_path / "f.jsonl")


def test_factual_recall_metric_merges():
    recalled = torch.tensor([True, False, True, True])
    kinds = ["a", "b", "b", "a"]
    candidates = torch.tensor([2, 4, 5, 10])
    whole, first, second = (FactualRecall(["a", "b", "c"]) for _ in range(3))
    whole.update(recalled, kinds, candidates)
    first.update(recalled[:1], kinds[:1], candidates[:1])
    second.update(recalled[1:], kinds[1:], candidates[1:])
    first.merge_state(second)
    values = {name: value.item() for name, value in whole.compute().items()}
    for name, value in first.compute().items():
        torch.testing.assert_close(value, whole.compute()[name], equal_nan=True)
    assert values["percent"] == 75
    assert values["chance"] == pytest.approx(100 * (0.5 + 0.25 + 0.2 + 0.1) / 4)
    assert (values["percent/a"], values["count/a"], values["percent/b"], values["count/b"]) == (100, 2, 50, 2)
    assert values["count/c"] == 0


def test_factual_recall_metric_refuses_unknown_kinds_and_lengths():
    metric = FactualRecall(["a"])
    with pytest.raises(ValueError, match=r"Expected kinds among \['a'\], but got \['z'\]"):
        metric.update(torch.tensor([True]), ["z"], torch.tensor([2]))
    with pytest.raises(ValueError, match="1 outcomes, 2 kinds and 1 candidate counts"):
        metric.update(torch.tensor([True]), ["a", "a"], torch.tensor([2]))
