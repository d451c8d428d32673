from __future__ import annotations

import json

import pytest
import torch
from evaluation_cases import SHORT, random_model
from torchmetrics.functional.text.squad import squad
from transformers import MambaConfig, MambaForCausalLM

from fasc_lightning.evaluation import ShortAnswerItem, given_answers, load_short_answers, short_answers
from fasc_lightning.evaluation._short_answers import commonest_answer, exact_match, normalise_answer, token_f1

ITEMS = [ShortAnswerItem("x" * (3 * i % 7 + 1) + "yz"[i % 2], ("abc",), "kz"[i % 2]) for i in range(7)]
TEXTS = ("The U.S.", "us", "Denver Broncos", "the Denver Broncos!", "Carolina", "a", "an", "", "10,000 men", "Ä b ä")


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Denver Broncos!", "denver broncos"),
        ("Saint Bernadette  Soubirous", "saint bernadette soubirous"),
        ("a copper statue of Christ", "copper statue of christ"),
        ("the Main Building", "main building"),
        ("U.S.", "us"),
        ("10,000", "10000"),
        ("theatre an a the", "theatre"),
        ("rock-n-roll's", "rocknrolls"),
        (" Österreich\n", "österreich"),
    ],
)
def test_answers_are_normalised_as_in_squad(text, normalised):
    assert normalise_answer(text) == normalised


@pytest.mark.parametrize("given", TEXTS)
def test_scores_are_those_of_torchmetrics(given):
    for right in ([text] for text in TEXTS):
        target = {"answers": {"answer_start": [0] * len(right), "text": right}, "id": "1"}
        expected = squad({"prediction_text": given, "id": "1"}, target)
        assert 100 * token_f1(given, right) == pytest.approx(expected["f1"].item(), rel=1e-6)
        assert 100 * exact_match(given, right) == expected["exact_match"].item()


def test_the_best_of_several_right_answers_counts():
    assert token_f1("the red house", ["blue", "red", "a house in red"]) == pytest.approx(4 / 5)
    assert exact_match("the U.S.", ["America", "US"])
    assert not exact_match("America", ["US"])
    assert token_f1("la la la", ["la la"]) == pytest.approx(4 / 5)


def test_the_chance_level_is_the_commonest_answer(knowing_model, tokenizer):
    items = [
        ShortAnswerItem("Q: who?\nA:", ("the king", "a queen")),
        ShortAnswerItem("Q: where?\nA:", ("Oslo",)),
        ShortAnswerItem("Q: when?\nA:", ("the Queen of May", "Queen")),
        ShortAnswerItem("Q: where?\nA:", ("a queen of Spain",)),
    ]
    assert commonest_answer(items) == "queen"
    result = short_answers(knowing_model, tokenizer, items)
    assert result.commonest == "queen"
    assert result.chance == 50
    assert result.chance_f1 == pytest.approx(100 * (1 + 0 + 1 + 1 / 2) / 4)
    # "may 3" has one word of four of "queen of may"; what was learned is right twice.
    assert result.percent == 50
    assert result.f1 == pytest.approx(100 * (1 + 1 + 2 / 5 + 0) / 4)


def greedy(model, tokenizer, prompt, steps):
    """Token by token, each from its own forward pass over the whole text, alone and without padding."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_padded_batches_write_what_single_prompts_write(tokenizer, family, batch_size):
    model = random_model(family, **({"sliding_window": 4} if family == "mistral" else {}))
    if family == "gemma2":
        # Its own attention takes the softmax in float32, where the float64 mask of padding is infinite.
        model.float()
    given = given_answers(model, tokenizer, ITEMS, max_new_tokens=6, stop="never", batch_size=batch_size)
    assert given.answers == [greedy(model, tokenizer, item.prompt, 6) for item in ITEMS]
    assert len(set(given.answers)) > 1


def test_models_without_a_key_value_cache_write_too(tokenizer):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.5)
    model = MambaForCausalLM(config).double().eval()
    given = given_answers(model, tokenizer, ITEMS[:3], max_new_tokens=4, stop="never", batch_size=2)
    assert given.answers == [greedy(model, tokenizer, item.prompt, 4) for item in ITEMS[:3]]


def test_a_model_that_knows_the_answers_gives_them(knowing_model, tokenizer):
    items = [ShortAnswerItem(prompt, (answer,), prompt[3:6]) for prompt, answer in SHORT]
    knowing_model.train()
    result = short_answers(knowing_model, tokenizer, items)
    assert knowing_model.training
    knowing_model.eval()
    assert (result.percent, result.f1, result.count) == (100, 100, 3)
    assert result.chance == pytest.approx(100 / 3)
    assert result.by_kind == result.by_kind_f1 == {"who": (100, 1), "whe": (100, 2)}
    assert json.loads(json.dumps(result.to_dict()))["by_kind"]["whe"]["count"] == 2


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the king\nQ", "the king"),
        ("may 3, or", "may 3"),
        ("U.S. now", "U.S"),
        ("10,000 or", "10,000 or"),
        ("a; b", "a"),
        (". ", ""),
    ],
)
def test_an_answer_ends_at_a_stop(text, answer, tokenizer, monkeypatch):
    model = random_model()
    ids = tokenizer(text)["input_ids"]
    calls = []
    forward = model.forward

    def scripted(input_ids, **options):
        output = forward(input_ids, **options)
        output.logits.zero_()[:, -1, ids[len(calls) % len(ids)]] = 1.0
        calls.append(input_ids.shape)
        return output

    monkeypatch.setattr(model, "forward", scripted)
    given = given_answers(model, tokenizer, ITEMS[:1], max_new_tokens=len(ids))
    assert given.answers == [answer]
    assert len(calls) <= len(ids)


def test_writing_stops_early_and_at_the_end_token(tokenizer, monkeypatch):
    model = random_model()
    calls = []
    forward = model.forward

    def scripted(input_ids, **options):
        output = forward(input_ids, **options)
        output.logits.zero_()[:, -1, 70 if len(calls) < 2 else 9] = 1.0
        calls.append(input_ids.shape)
        return output

    model.generation_config.eos_token_id = [2, 9]
    monkeypatch.setattr(model, "forward", scripted)
    given = given_answers(model, tokenizer, ITEMS[:2], max_new_tokens=10)
    assert len(calls) == 3
    assert given.answers == [tokenizer.decode([70, 70, 9])] * 2


def test_examples_stand_before_the_prompt(tokenizer):
    model = random_model()
    shots = [ShortAnswerItem("Q: a?\nA:", ("one", "two"))]
    given = given_answers(model, tokenizer, ITEMS[:1], shots, max_new_tokens=5, stop="never")
    assert given.answers == [greedy(model, tokenizer, f"Q: a?\nA: one\n{ITEMS[0].prompt}", 5)]
    short = random_model("gpt2", n_positions=8)
    with pytest.warns(UserWarning, match="1 were given fewer than 1 examples, 0 lost"):
        given = given_answers(short, tokenizer, ITEMS[:1], shots, max_new_tokens=5, stop="never")
    assert (given.fewer_shots, given.cut) == (1, 0)
    assert given.answers == [greedy(short, tokenizer, ITEMS[0].prompt, 5)]


def test_a_prompt_beyond_the_context_keeps_its_end(tokenizer):
    model = random_model("gpt2", n_positions=8)
    item = ShortAnswerItem("abcdefghij", ("k",))
    with pytest.warns(UserWarning, match="1 lost the beginning"):
        given = given_answers(model, tokenizer, [item], max_new_tokens=3, stop="never")
    assert given.cut == 1
    assert given.answers == [greedy(model, tokenizer, "fghij", 3)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_fail_and_the_mode_is_restored(tokenizer, bad):
    model = random_model().train()
    with torch.no_grad():
        model.lm_head.weight.fill_(bad)
    with pytest.raises(FloatingPointError, match="The output after 'xy' is not finite"):
        short_answers(model, tokenizer, ITEMS[:1])
    assert model.training


def test_wrong_options_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="at least one question or prompt"):
        short_answers(model, tokenizer, [])
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        short_answers(model, tokenizer, ITEMS, max_new_tokens=0)
    with pytest.raises(ValueError, match="one or more answers, none of them blank"):
        ShortAnswerItem("x", ())


def test_questions_and_prompts_are_read(tmp_path):
    path = tmp_path / "s.jsonl"
    rows = [
        {"question": "who is it", "answer": ["Ann", "Ann B."]},
        {"question": "Who?", "answers": "Ann"},
        {"prompt": "It is by ", "object": "Ann", "kind": "other", "relation": "P1"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert load_short_answers(path) == [
        ShortAnswerItem("Q: who is it?\nA:", ("Ann", "Ann B.")),
        ShortAnswerItem("Q: Who?\nA:", ("Ann",)),
        ShortAnswerItem("It is by", ("Ann",), "other"),
    ]
    assert load_short_answers(path)[0].to_dict()["answers"] == ["Ann", "Ann B."]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, "one of the fields answer, answers, object, but got None"),
        ({"question": "x", "answer": []}, r"but got \[\]"),
        ({"prompt": "x", "object": ["a", 3]}, r"but got \['a', 3\]"),
        ({"question": 3, "answer": "a"}, "question is missing"),
        ({"answer": "a"}, "prompt is missing"),
        ({"prompt": "x", "object": "a", "kind": ""}, "kind to be a text"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, row, message):
    path = tmp_path / "s.jsonl"
    path.write_text(f"\n{json.dumps(row)}")
    with pytest.raises(ValueError, match=f"s.jsonl, line 2: .*{message}"):
        load_short_answers(path)
