from __future__ import annotations

import pytest
import torch

from fasc_lightning.data._finetune_examples import IGNORED, Example, collate, pack_examples, split_examples


def example(*ids, given=1):
    ids = torch.tensor(ids)
    return Example(ids, ids.masked_fill(torch.arange(len(ids)) < given, IGNORED))


@pytest.mark.parametrize("heldout", [0.1, 0.3, 0.01])
def test_a_split_keeps_every_example_and_never_parts_copies(heldout):
    examples = [example(i // 3, 7) for i in range(60)]  # three copies of each of twenty
    train, held = split_examples(examples, heldout, seed=0)
    assert len(held) == 3 * max(1, round(heldout * 20))
    first = [[int(e.ids[0]) for e in side] for side in (train, held)]
    assert set(first[0]) & set(first[1]) == set()
    assert sorted(first[0] + first[1]) == [i // 3 for i in range(60)]
    assert first[1] == sorted(first[1])
    assert [int(e.ids[0]) for e in split_examples(examples, heldout, seed=1)[1]] != first[1]


def test_a_split_of_nothing_and_of_too_little():
    examples = [example(1, 2), example(1, 2)]
    assert split_examples(examples, 0.0, 0) == (examples, [])
    with pytest.raises(ValueError, match=r"at least 2 distinct examples.* but got 1"):
        split_examples(examples, 0.1, 0)


@pytest.mark.parametrize(("count", "heldout"), [(2, 0.9), (3, 0.99), (2, 0.01)])
def test_a_split_leaves_something_on_both_sides(count, heldout):
    train, held = split_examples([example(i, 7) for i in range(count)], heldout, seed=0)
    assert len(train) >= 1
    assert len(held) >= 1


def test_what_was_seen_is_held_out_last():
    examples = [example(i, 7) for i in range(20)]
    seen = [e.ids for e in examples[:15]]
    train, held = split_examples(examples, 0.25, 0, seen)
    assert [int(e.ids[0]) for e in held] == [15, 16, 17, 18, 19]
    assert len(train) == 15
    held = split_examples(examples, 0.5, 0, seen)[1]
    assert {int(e.ids[0]) for e in held} > {15, 16, 17, 18, 19}
    assert len(held) == 10


def test_packing_splits_nothing_and_leaves_little_room():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 33, (300,), generator=generator).tolist()
    examples = [example(*range(1000 * i, 1000 * i + length)) for i, length in enumerate(lengths)]
    rows = pack_examples(examples, 32)
    assert max(map(len, rows)) <= 32
    assert len(rows) <= 1.1 * sum(lengths) / 32
    # Every example is found whole, its first token ignored and the others learnt.
    found = {}
    for row in rows:
        ids, labels = row.ids.tolist(), row.labels.tolist()
        for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
            assert label == (IGNORED if token % 1000 == 0 else token)
            assert token % 1000 == 0 or ids[i - 1] == token - 1
            found.setdefault(token // 1000, []).append(token % 1000)
    assert found == {i: list(range(length)) for i, length in enumerate(lengths)}


def test_best_fit_by_hand():
    rows = pack_examples([example(*[i] * n) for i, n in enumerate((5, 6, 2, 3, 8, 1))], 8)
    assert [row.ids.tolist() for row in rows] == [[0] * 5 + [3] * 3, [1] * 6 + [2] * 2, [4] * 8, [5]]


def test_a_batch_is_padded_to_its_longest():
    batch = collate([example(5, 6, 7), example(8, 9)], padding=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    assert {value.dtype for value in batch.values()} == {torch.long}
