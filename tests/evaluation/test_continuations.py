from __future__ import annotations

import math
import random

import pytest
import torch
from evaluation_cases import random_model

from fasc_lightning.evaluation._continuations import (
    ContinuationTrie,
    _score_batch,
    check_finite,
    continuation_scores,
    ranks_first,
)
from fasc_lightning.evaluation._token_ids import continuation_ids, prompt_ids

CONTINUATIONS = [[5, 6, 7], [5, 6], [5, 9, 7, 8], [11], [5], [11]]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt"])
@pytest.mark.parametrize("alike", [False, True])
def test_scores_equal_those_of_plain_forward_passes(family, alike, reference):
    model = random_model(family, **({"sliding_window": 4} if family == "mistral" else {}))
    prompts = [[3, 4, 5, 6, 7, 8, end] for end in (20, 21, 20)] + [[3, 4, 5, 9], [3, 4, 5, 6, 7, 1, 2, 3, 8], [12, 13]]
    keys = ["one", "one", "one", "one", "one", "two"] if alike else None
    tries = [ContinuationTrie.of(CONTINUATIONS)] * len(prompts)
    scores = continuation_scores(model, prompts, tries, batch_size=2, alike=keys)
    for prompt, score in zip(prompts, scores, strict=True):
        expected = [reference(model, prompt, ids) for ids in CONTINUATIONS]
        assert score.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert score.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ranks_of_true_continuations_are_those_of_all_scores(family):
    model = random_model(family)
    generator = random.Random(0)
    prompts = [[generator.randrange(3, 40) for _ in range(generator.randint(1, 5))] for _ in range(30)]
    lists = [[[generator.randrange(3, 40) for _ in range(generator.randint(1, 4))] for _ in range(9)] for _ in prompts]
    tries = [ContinuationTrie.of(continuations) for continuations in lists]
    everything = continuation_scores(model, prompts, tries)
    true = [int(scores.argsort(descending=True)[i % 3]) for i, scores in enumerate(everything)]
    bounded = continuation_scores(model, prompts, tries, true=true)
    for scores, bounds, entry in zip(everything, bounded, true, strict=True):
        torch.testing.assert_close(bounds[entry], scores[entry])
        assert torch.equal(bounds > bounds[entry], scores > scores[entry])
        read = torch.isclose(bounds, scores, rtol=1e-5)
        assert (read | (bounds < bounds[entry])).all()
        assert (bounds[~read] > scores[~read]).all()
    assert sum(int((~torch.isclose(a, b, rtol=1e-5)).sum()) for a, b in zip(everything, bounded, strict=True)) > 0


def test_continuations_that_cannot_come_first_are_not_read(model):
    with torch.no_grad():
        best, worst = model(torch.tensor([[3, 4, 5]])).logits[0, -1].argsort(descending=True)[[0, -1]].tolist()
    read = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append((args[0] if args else kwargs["input_ids"]).tolist()), with_kwargs=True
    )
    trie = ContinuationTrie.of([[best], [worst, 8], [best, 9, 7]])
    continuation_scores(model, [[3, 4, 5]], [trie], true=[0])
    assert read[0] == [[3, 4, 5]]
    assert all([worst] not in rows for rows in read)


def test_a_broken_rival_is_seen():
    class Broken:
        model, ids = None, None

        def follow(self, rows, more, keep=None):
            return torch.full((len(rows), len(more[0]), 64), math.nan), self

    trie = ContinuationTrie.of([[5], [5, 6]])
    last = torch.zeros(1, 1, 64)
    scores = _score_batch(last, Broken(), [trie], [0])[0]
    assert scores[1].isnan()


def test_what_alike_prompts_share_is_read_once(model):
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple((args[0] if args else kwargs["input_ids"]).shape)), with_kwargs=True
    )
    prompts = [[*range(3, 43), end] for end in (50, 51, 52)]
    continuation_scores(model, prompts, [ContinuationTrie.of([[7], [8]])] * 3, alike=["a"] * 3)
    assert seen == [(1, 40), (3, 1)]


def test_an_alike_prompt_may_be_the_beginning_of_another(model, reference):
    prompts = [[3, 4, 5], [3, 4, 5, 6], [3, 4, 5]]
    scores = continuation_scores(model, prompts, [ContinuationTrie.of([[7, 8]])] * 3, alike=["a"] * 3)
    for prompt, score in zip(prompts, scores, strict=True):
        assert score.item() == pytest.approx(reference(model, prompt, [7, 8]), rel=1e-5)


def test_half_precision_models_are_normalised_in_float32(model):
    model.bfloat16()
    prompt, ids = [3, 4, 5], [7, 8, 9]
    score = continuation_scores(model, [prompt], [ContinuationTrie.of([ids])])[0]
    with torch.no_grad():
        log_prob = model(torch.tensor([prompt + ids])).logits[0].float().log_softmax(-1)
    expected = sum(log_prob[2 + i, token].item() for i, token in enumerate(ids))
    assert score.dtype == torch.float32
    assert score.item() == pytest.approx(expected, rel=0.02)


def test_a_trie_feeds_shared_beginnings_once():
    trie = ContinuationTrie.of(CONTINUATIONS)
    assert trie.first.tolist() == [5, 5, 5, 11, 5, 11]
    assert sorted(trie.prefixes) == [(5, 6), (5, 9, 7)]
    assert trie.width == 3
    assert ContinuationTrie.of([[1], [2]]).width == 0


@pytest.mark.parametrize("continuations", [[], [[1], []]])
def test_empty_continuations_are_refused(continuations):
    with pytest.raises(ValueError, match="at least one token each"):
        ContinuationTrie.of(continuations)


def test_ranks_first_refuses_ties():
    scores = torch.tensor([1.0, 3.0, 3.0, -2.0])
    assert [ranks_first(scores, i) for i in range(4)] == [False] * 4
    assert ranks_first(scores[:2], 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_check_finite_names_the_item(bad):
    check_finite(torch.zeros(3), "This")
    with pytest.raises(FloatingPointError, match="This is not finite"):
        check_finite(torch.tensor([0.0, bad]), "This")


def test_a_continuation_follows_a_space(tokenizer):
    assert tokenizer.decode(prompt_ids(tokenizer, "Say") + continuation_ids(tokenizer, "it now")) == "Say it now"
