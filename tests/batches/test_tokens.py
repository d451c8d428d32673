from __future__ import annotations

import numpy as np
import pytest
import torch

from fasc_lightning.batches import TokenRows, identifying_tensor, sample_seeds
from fasc_lightning.batches._contents import batch_size
from fasc_lightning.batches._sampling import sample_sequences, spread_tokens

CPU = torch.device("cpu")


def test_the_mask_applies_to_both_shapes_of_a_batch():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    rows = TokenRows(mask=mask)
    assert rows.index((2, 3), CPU).tolist() == [0, 1, 3]
    assert rows.index((6,), CPU).tolist() == [0, 1, 3]


def test_the_mask_follows_sequence_first_activations():
    rows = TokenRows(mask=torch.tensor([[1, 1, 0], [1, 0, 0]]).bool())
    assert rows.index((3, 2), CPU).tolist() == [0, 1, 2]


def test_the_mask_does_not_apply_to_pooled_activations():
    rows = TokenRows(mask=torch.tensor([[1, 1, 0], [1, 0, 0]]).bool())
    assert rows.index((2,), CPU) is None
    assert TokenRows(mask=torch.ones(2, 3)).index((2, 3), CPU) is None


def test_subsampling_depends_on_the_sample_alone():
    ids = torch.randint(100, (6, 200))
    together = TokenRows(fraction=0.3, sample_seeds=sample_seeds({"input_ids": ids}, seed=1))
    everything = torch.zeros(1200, dtype=torch.bool)
    everything[together.index((6, 200), CPU)] = True
    assert 0.25 < everything.float().mean() < 0.35
    order = [4, 1]
    apart = TokenRows(fraction=0.3, sample_seeds=sample_seeds({"input_ids": ids[order]}, seed=1))
    chosen = torch.zeros(400, dtype=torch.bool)
    chosen[apart.index((2, 200), CPU)] = True
    assert torch.equal(chosen.view(2, 200), everything.view(6, 200)[order])


def test_subsampling_does_not_depend_on_padding():
    ids = torch.randint(1, 100, (1, 50))
    padded = torch.cat([torch.zeros(1, 14, dtype=torch.long), ids], 1)
    mask = padded != 0
    plain = TokenRows(fraction=0.5, sample_seeds=sample_seeds({"input_ids": ids}, 0, ids != 0))
    left = TokenRows(mask=mask, fraction=0.5, sample_seeds=sample_seeds({"input_ids": padded}, 0, mask))
    assert (left.index((1, 64), CPU) - 14).tolist() == plain.index((1, 50), CPU).tolist()


def test_the_seed_matters():
    ids = torch.randint(100, (2, 64))
    assert sample_seeds(ids, 0) == sample_seeds(ids, 0)
    assert sample_seeds(ids, 0) != sample_seeds(ids, 1)


def test_tokens_that_do_not_divide_among_samples_are_refused():
    rows = TokenRows(fraction=0.5, sample_seeds=[1, 2])
    with pytest.raises(ValueError, match="2 samples"):
        rows.index((3,), CPU)


def test_samples_are_found_in_any_nesting():
    x, y = torch.randn(4, 2), torch.zeros(4)
    assert identifying_tensor((x, y)) is x
    assert identifying_tensor({"labels": y, "input_ids": x}) is x
    assert identifying_tensor({"a": [{"b": x}]}) is x
    assert identifying_tensor("text") is None
    assert batch_size([x, y]) == 4
    with pytest.raises(ValueError, match="loss_terms"):
        batch_size(["text"])


def everything(lengths):
    return torch.ones(sum(lengths), dtype=torch.bool)


@pytest.mark.parametrize(
    ("lengths", "tokens", "shape"),
    [
        ([16] * 8, 512, (8, 16)),  # all of them
        ([16] * 8, 40, (8, 5)),
        ([512], 100, (1, 25)),  # leaves room for other sequences
        ([512] * 3, 512, (3, 128)),
        ([16] * 100, 512, (24, 16)),  # no more sequences than permutations can bear
        ([1] * 100, 64, (64, 1)),  # samples of one token, though, are many
        ([2, 30, 40], 1000, (2, 30)),  # a short sequence would cost more than it gives
        ([20, 30, 40], 1000, (3, 20)),
        ([0, 0, 5], 512, (1, 5)),
        ([0], 512, (0, 0)),
        ([16] * 8, 4, (4, 1)),
    ],
)
def test_samples_are_equally_many_tokens_of_each_sequence(lengths, tokens, shape):
    chosen = sample_sequences(everything(lengths), lengths, tokens, range(len(lengths)))
    assert tuple(chosen.shape) == shape
    assert len(chosen.flatten().unique()) == chosen.numel()
    starts = torch.tensor([0, *lengths]).cumsum(0)
    for row in chosen:
        assert len(torch.bucketize(row, starts, right=True).unique()) == 1


@pytest.mark.parametrize(("length", "count"), [(1, 1), (7, 7), (64, 5), (511, 64), (47, 32)])
def test_tokens_of_a_sample_are_evenly_spaced(length, count):
    for seed in range(20):
        gaps = np.diff(spread_tokens(length, count, seed))
        assert len(gaps) == count - 1
        assert all(gaps >= length // count)
        assert all(gaps <= -(-length // count))


@pytest.mark.parametrize("count", [1, 5, 16, 39])
def test_every_position_is_as_likely_as_any_other(count):
    drawn = np.concatenate([spread_tokens(40, count, seed) for seed in range(4000)])
    assert drawn.min() == 0
    assert drawn.max() == 39
    frequencies = np.bincount(drawn, minlength=40) / 4000
    spread = np.sqrt(count / 40 * (1 - count / 40) / 4000)
    assert np.abs(frequencies - count / 40).max() < 4.5 * spread


def test_tokens_without_a_gradient_are_not_chosen():
    lengths = [20, 20]
    alive = everything(lengths)
    alive[torch.tensor([19, 39])] = False
    for seed in range(20):
        chosen = sample_sequences(alive, lengths, 76, [seed, seed + 1])
        assert chosen.shape == (2, 19)
        assert alive[chosen].all()
        assert alive[sample_sequences(alive, lengths, 30, [seed, seed + 1])].all()
    few = torch.zeros(40, dtype=torch.bool)
    few[torch.tensor([4, 7])] = True
    assert sample_sequences(few, lengths, 40, [0, 1]).tolist() == [[4, 7]]
    assert sample_sequences(few & False, lengths, 40, [0, 1]).numel() == 0


def chosen_tokens(ids, mask=None, sample=None, tokens=64, seed=0):
    """What is scored of each sample: the ids of its tokens."""
    rows = TokenRows(mask=mask, sample_seeds=sample_seeds({"input_ids": ids}, seed, mask), sample=sample)
    index = rows.index(tuple(ids.shape), CPU)
    index = torch.arange(ids.numel()) if index is None else index
    alive = torch.ones(len(index), dtype=torch.bool)
    return [ids.flatten()[index[row]].tolist() for row in rows.choose(alive, rows.lengths(tuple(ids.shape)), tokens)]


@pytest.mark.parametrize("sample", [None, 64])
def test_a_sample_has_the_same_tokens_in_any_batch(sample):
    ids = torch.arange(8 * 100).view(8, 100)[:, torch.randperm(100)]
    together = chosen_tokens(ids, sample=sample)
    assert [len(tokens) for tokens in together] == [8] * 8
    others = torch.arange(8000, 8600).view(6, 100)
    apart = chosen_tokens(torch.cat([ids[[5, 2]], others]), sample=sample)[:2]
    assert apart == [together[5], together[2]]
    padded = torch.cat([torch.full((8, 9), -1), ids], 1)
    assert chosen_tokens(padded, padded >= 0, sample) == together
    assert chosen_tokens(ids, sample=sample, seed=1) != together


def test_a_batch_can_be_sampled_and_knows_its_sequences():
    mask = torch.arange(8)[None] < torch.tensor([[8], [6], [1]])
    rows = TokenRows(mask=mask, sample=12)
    index = rows.index((3, 8), CPU)
    assert rows.lengths((3, 8)) == [4, 4, 0]  # three to score, and one in place of any without a gradient
    assert len(set(index.tolist())) == 8
    assert set(index[:4].tolist()) <= set(range(8))
    assert set(index[4:].tolist()) <= set(range(8, 14))
    assert rows.choose(torch.tensor([True, True, True, False] * 2), [4, 4, 0], 12).tolist() == [[0, 1, 2], [4, 5, 6]]
    counted = TokenRows(mask=mask)
    assert counted.index((3, 8), CPU).numel() == 15
    assert counted.lengths((3, 8)) == [8, 6, 1]


@pytest.mark.parametrize("sample", [None, 24])
@pytest.mark.parametrize("masked", [True, False])
def test_sequences_are_told_apart_where_they_come_last(sample, masked):
    ids = torch.arange(5 * 20).view(5, 20)
    mask = ids % 20 < torch.tensor([[20], [20], [15], [12], [20]]) if masked else None
    seeds = sample_seeds(ids, 0, mask)
    rows = TokenRows(mask=mask, sample_seeds=seeds, sample=sample)
    rows.note(ids)
    index = rows.index((20, 5), CPU)
    flat = ids.T.flatten() if index is None else ids.T.flatten()[index]  # what a layer sees, sequence first
    chosen = flat[rows.choose(torch.ones(len(flat)).bool(), rows.lengths((20, 5)), 24)]
    assert chosen.tolist() == chosen_tokens(ids, mask, sample, tokens=24)


@pytest.mark.parametrize("sample", [None, 16])
def test_samples_without_a_length_are_sequences_of_one(sample):
    rows = TokenRows(sample_seeds=sample_seeds(torch.randn(40, 3), 0), sample=sample)
    index = rows.index((40,), CPU)
    kept = 40 if index is None else len(index)
    assert rows.lengths((40,)) == [kept]
    assert rows.choose(torch.ones(kept).bool(), [kept], 16).shape == (16, 1)


@pytest.mark.parametrize("sample", [None, 24])
def test_rows_of_an_expert_are_sampled_within_its_sequences(sample):
    rows = TokenRows(sample_seeds=[11, 12, 13, 14], sample=sample)
    rows.note(torch.zeros(4, 30, dtype=torch.long))
    tokens = torch.arange(120)[torch.randperm(120)][:100]
    order, lengths = rows.routed(tokens, 120)
    counted = rows.index((120,), CPU)
    seen = tokens[order]
    assert set(seen.tolist()) == set(tokens.tolist()) & set(range(120) if counted is None else counted.tolist())
    assert lengths == (seen // 30).bincount(minlength=4).tolist()
    assert torch.equal(seen // 30, torch.arange(4).repeat_interleave(torch.tensor(lengths)))
    assert seen.tolist() == sorted(seen.tolist())
    chosen = seen[rows.choose(torch.ones(len(seen)).bool(), lengths, 24)]
    assert all(len(set((row // 30).tolist())) == 1 for row in chosen)


def test_lengths_go_by_shape_and_flattened_tokens_are_still_sequences():
    rows = TokenRows()
    shapes = ((64,), (4, 16), (64,), (16, 4), (5, 1), (0, 7), (2, 3, 4))
    for leading in shapes[1:]:
        assert rows.index(leading, CPU) is None
    assert rows.lengths((4, 16)) == [16] * 4
    assert rows.lengths((64,)) == [16] * 4  # as in the batch's own shape, seen before
    assert rows.lengths((16, 4)) == [4] * 16
    assert rows.lengths((5, 1)) == [5]  # samples of one token are one run
    assert rows.lengths((0, 7)) == [0]
    assert rows.lengths((2, 3, 4)) == [12, 12]
    masked = TokenRows(mask=torch.ones(0, 7).bool(), sample=8)
    assert masked.index((0, 7), CPU) is None
