from __future__ import annotations

import json
import lzma

import pytest
import torch
from evaluation_cases import PAIRS

from fasc_lightning.evaluation import MinimalPair, correct_pairs, load_minimal_pairs, minimal_pairs

ROW = {"phenomenon": "binding", "uid": "case", "good": "He saw himself.", "bad": "He saw herself."}
SENTENCES = [MinimalPair("a" if i % 2 else "b", f"u{i % 3}", "ab" * (i + 1), "ba" * (8 - i)) for i in range(8)]


def test_the_likelier_whole_sentence_wins(model, tokenizer, reference):
    expected = []
    for pair in SENTENCES:
        good, bad = (
            reference(model, [tokenizer.bos_token_id], tokenizer(text)["input_ids"]) for text in (pair.good, pair.bad)
        )
        expected.append(good > bad)
    assert set(expected) == {True, False}
    for batch_size in (1, 3, 64):
        assert correct_pairs(model, tokenizer, SENTENCES, batch_size).tolist() == expected

    result = minimal_pairs(model, tokenizer, SENTENCES)
    assert (result.percent, result.chance, result.count) == (pytest.approx(100 * sum(expected) / 8), 50, 8)
    assert result.by_phenomenon["a"] == (pytest.approx(100 * sum(expected[1::2]) / 4), 4)
    assert result.by_paradigm["u2"] == (pytest.approx(100 * sum(expected[2::3]) / 2), 2)
    assert json.loads(json.dumps(result.to_dict()))["by_paradigm"]["u2"]["count"] == 2


def test_a_model_that_knows_the_sentences_tells_all_apart(knowing_model, tokenizer):
    pairs = [MinimalPair("grammar", "agreement", good, bad) for good, bad in PAIRS]
    assert minimal_pairs(knowing_model, tokenizer, pairs).percent == 100
    turned = [MinimalPair("grammar", "agreement", bad, good) for good, bad in PAIRS]
    assert minimal_pairs(knowing_model, tokenizer, turned).percent == 0


def test_a_tie_counts_as_wrong(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not correct_pairs(model, tokenizer, [MinimalPair("p", "u", "ab", "ba")]).any()


def test_the_end_token_stands_in_for_a_missing_beginning_token(model, tokenizer, reference):
    tokenizer.bos_token = None
    pair = SENTENCES[3]
    start = [tokenizer.eos_token_id]
    good, bad = (reference(model, start, tokenizer(text)["input_ids"]) for text in (pair.good, pair.bad))
    assert correct_pairs(model, tokenizer, [pair]).item() == (good > bad)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer with a beginning or end token"):
        correct_pairs(model, tokenizer, [pair])


def test_broken_weights_fail_and_the_mode_is_restored(model, tokenizer):
    model.train()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="The score of 'ab' or of 'babababababababa' is not finite"):
        minimal_pairs(model, tokenizer, SENTENCES)
    assert model.training


def test_no_pairs_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="at least one minimal pair"):
        minimal_pairs(model, tokenizer, [])


def test_pairs_are_read_from_jsonl_and_xz_and_as_released(tmp_path):
    names = {"linguistics_term": "phenomenon", "UID": "uid", "sentence_good": "good", "sentence_bad": "bad"}
    released = {name: ROW[field] for name, field in names.items()}
    text = f"{json.dumps({**ROW, 'more': 1})}\n\n{json.dumps(released)}\n"
    (tmp_path / "p.jsonl").write_text(text)
    (tmp_path / "p.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    pairs = load_minimal_pairs(tmp_path / "p.jsonl")
    assert pairs == load_minimal_pairs(tmp_path / "p.jsonl.xz")
    assert [pair.to_dict() for pair in pairs] == [ROW, ROW]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "bad": ROW["good"]}, "p.jsonl, line 2: expected two sentences that differ"),
        ({**ROW, "uid": ""}, "p.jsonl, line 2: expected the text fields .*, but uid is missing"),
        ({"sentence_good": "a"}, "line 2: .*but linguistics_term, UID, sentence_bad is missing"),
        ("text", "line 2: expected a JSON object"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, row, message):
    (tmp_path / "p.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(row)}")
    with pytest.raises(ValueError, match=message):
        load_minimal_pairs(tmp_path / "p.jsonl")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"Expected minimal pairs in .*but it holds none"):
        load_minimal_pairs(tmp_path / "p.jsonl")
