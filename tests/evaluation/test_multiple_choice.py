from __future__ import annotations

import json
import lzma

import pytest
import torch
from evaluation_cases import QUESTIONS, random_model

from fasc_lightning.evaluation import ChoiceQuestion, answered_questions, load_choice_questions, multiple_choice

ROW = {"subject": "sea", "question": "Wet?", "choices": ["no", "yes"], "answer": 1}
DEV = [
    ChoiceQuestion("sea", "Wet?", ("no", "yes"), 1),
    ChoiceQuestion("sky_lore", "Up?", ("no", "yes", "so so"), 1),
    ChoiceQuestion("sky_lore", "Dark?", ("at night", "no"), 0),
    ChoiceQuestion("sea", "Old?", ("yes", "no"), 0),
    ChoiceQuestion("law", "Just?", ("yes", "no"), 0),
]
LETTERS = """\
The following are multiple choice questions (with answers) about sky lore.

Up?
A. no
B. yes
C. so so
Answer: B

Colour?
A. red
B. blue
C. green
Answer:"""
ANSWERS = """\
The following are questions (with answers) about sky lore.

Question: Up?
Answer: yes

Question: Colour?
Answer:"""


def long_model(**settings):
    return random_model(max_position_embeddings=1024, **settings)


@pytest.mark.parametrize(
    ("by", "prompt", "answers"),
    [("letter", LETTERS, [" A", " B", " C"]), ("answer", ANSWERS, [" red", " blue", " green"])],
)
def test_the_likeliest_answer_after_the_written_prompt_is_chosen(tokenizer, reference, by, prompt, answers):
    model = long_model()
    ids = tokenizer(prompt)["input_ids"]
    scores = [reference(model, ids, tokenizer(answer)["input_ids"]) for answer in answers]
    per_byte = [score / (len(answer) - 1) for score, answer in zip(scores, answers, strict=True)]
    for right in range(3):
        question = ChoiceQuestion("sky_lore", "Colour?", ("red", "blue", "green"), right)
        outcome = answered_questions(model, tokenizer, [question], DEV, n_shots=1, by=by)
        assert outcome.correct.tolist() == [scores[right] == max(scores)]
        assert outcome.correct_per_byte.tolist() == [per_byte[right] == max(per_byte)]


def test_length_decides_between_raw_and_per_byte(tokenizer):
    model = long_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    # Every byte is as likely as any other: the shortest answer wins, and per byte " b" costs two for one.
    question = ChoiceQuestion("s", "Q?", ("bbbb", "b"), 1)
    outcome = answered_questions(model, tokenizer, [question], n_shots=0, by="answer")
    assert (outcome.correct.item(), outcome.correct_per_byte.item()) == (True, False)
    long = ChoiceQuestion("s", "Q?", ("bbbb", "b"), 0)
    outcome = answered_questions(model, tokenizer, [long], n_shots=0, by="answer")
    assert (outcome.correct.item(), outcome.correct_per_byte.item()) == (False, True)


def test_outcomes_depend_neither_on_the_order_nor_on_the_batch(tokenizer):
    model = long_model()
    questions = [*QUESTIONS, *DEV[:4]]
    expected = answered_questions(model, tokenizer, questions, DEV, n_shots=2, by="answer", batch_size=1)
    turned = answered_questions(model, tokenizer, questions[::-1], DEV, n_shots=2, by="answer")
    assert turned.correct.tolist()[::-1] == expected.correct.tolist()
    assert turned.correct_per_byte.tolist()[::-1] == expected.correct_per_byte.tolist()


def test_a_model_that_knows_the_answers_gives_them(knowing_model, tokenizer):
    result = multiple_choice(knowing_model, tokenizer, QUESTIONS, n_shots=0, by="answer")
    assert (result.percent, result.percent_per_byte, result.count) == (100, 100, 3)
    assert result.chance == pytest.approx(100 * (1 / 3 + 1 / 2 + 1 / 3) / 3)
    assert result.by_subject == {"sea": (100, 1), "sky_lore": (100, 2)}
    assert result.by_subject_per_byte == result.by_subject
    assert (result.fewer_shots, result.cut) == (0, 0)
    assert json.loads(json.dumps(result.to_dict()))["by_subject"]["sea"] == {"percent": 100, "count": 1}


def test_a_tie_counts_as_wrong(tokenizer):
    model = long_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = multiple_choice(model, tokenizer, QUESTIONS, n_shots=0)
    assert (result.percent, result.percent_per_byte) == (0, 0)


def test_examples_beyond_the_context_are_dropped_and_said(tokenizer, reference):
    model = random_model(max_position_embeddings=len(LETTERS) + 2)
    question = QUESTIONS[0]
    with pytest.warns(UserWarning, match="1 were given fewer than 2 examples, 0 lost"):
        result = multiple_choice(model, tokenizer, [question], DEV, n_shots=2)
    assert (result.fewer_shots, result.cut) == (1, 0)
    ids = tokenizer(LETTERS)["input_ids"]
    scores = [reference(model, ids, tokenizer(answer)["input_ids"]) for answer in (" A", " B", " C")]
    assert result.percent == 100 * (scores[1] == max(scores))


def test_a_question_beyond_the_context_keeps_its_end(tokenizer, reference):
    model = random_model("gpt2", n_positions=24)
    with pytest.warns(UserWarning, match="1 lost the beginning"):
        outcome = answered_questions(model, tokenizer, [QUESTIONS[0]], n_shots=0)
    assert (outcome.fewer_shots, outcome.cut) == (0, 1)
    ids = tokenizer(LETTERS)["input_ids"][-22:]
    scores = [reference(model, ids, tokenizer(answer)["input_ids"]) for answer in (" A", " B", " C")]
    assert outcome.correct.tolist() == [scores[1] == max(scores)]


def test_broken_weights_fail_and_the_mode_is_restored(tokenizer):
    model = long_model().train()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="The score of an answer to 'Colour\\?' is not finite"):
        multiple_choice(model, tokenizer, QUESTIONS, n_shots=0)
    assert model.training


@pytest.mark.parametrize(
    ("questions", "options", "message"),
    [
        ([], {}, "at least one question"),
        (QUESTIONS, {"by": "letters"}, "one of letter, answer, but got 'letters'"),
        (QUESTIONS, {"n_shots": -1}, "at least 0, but got -1"),
        (QUESTIONS, {}, "Expected 5 examples of 'sky_lore' in dev, but got 0"),
        (QUESTIONS, {"dev": DEV, "n_shots": 3}, "Expected 3 examples of 'sky_lore' in dev, but got 2"),
    ],
)
def test_wrong_options_are_refused(model, tokenizer, questions, options, message):
    with pytest.raises(ValueError, match=message):
        multiple_choice(model, tokenizer, questions, **options)


def test_questions_are_read_from_jsonl_and_xz(tmp_path):
    text = f"{json.dumps(ROW)}\n\n{json.dumps({**ROW, 'choices': [' a', 'b', 'c'], 'more': 1})}\n"
    (tmp_path / "q.jsonl").write_text(text)
    (tmp_path / "q.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    questions = load_choice_questions(tmp_path / "q.jsonl")
    assert questions == load_choice_questions(tmp_path / "q.jsonl.xz")
    assert [question.to_dict() for question in questions] == [ROW, {**ROW, "choices": ["a", "b", "c"]}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "answer": 2}, "index of the 2 choices, but got 2"),
        ({**ROW, "answer": "B"}, "index of the right choice, but got 'B'"),
        ({**ROW, "answer": True}, "index of the right choice, but got True"),
        ({**ROW, "choices": ["a"]}, "Expected 2 to 26 choices, but got 1"),
        ({**ROW, "choices": ["a", ""]}, "expected choices to be a list of texts"),
        ({**ROW, "choices": "ab"}, "expected choices to be a list of texts"),
        ({**ROW, "question": None}, "but question is missing"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, row, message):
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(row)}")
    with pytest.raises(ValueError, match=f"q.jsonl, line 2: .*{message}"):
        load_choice_questions(tmp_path / "q.jsonl")
