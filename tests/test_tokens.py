from __future__ import annotations

import pytest
import torch

from fasc_lightning.tokens import TokenRows, batch_size, identifying_tensor, sample_seeds, sample_sequences

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


@pytest.mark.parametrize(
    ("lengths", "tokens", "shape"),
    [
        ([16] * 8, 512, (8, 16)),  # all of them
        ([16] * 8, 40, (8, 5)),
        ([512], 100, (1, 100)),
        ([16] * 100, 512, (24, 16)),  # no more sequences than permutations can bear
        ([2, 30, 40], 1000, (2, 30)),  # a short sequence would cost more than it gives
        ([20, 30, 40], 1000, (3, 20)),
        ([0, 0, 5], 512, (1, 5)),
        ([0], 512, (0, 0)),
        ([16] * 8, 4, (4, 1)),
    ],
)
def test_samples_are_equally_many_tokens_of_each_sequence(lengths, tokens, shape):
    chosen = sample_sequences(lengths, tokens)
    assert tuple(chosen.shape) == shape
    assert len(chosen.flatten().unique()) == chosen.numel()
    starts = torch.tensor([0, *lengths]).cumsum(0)
    for row in chosen:
        assert len(torch.bucketize(row, starts, right=True).unique()) == 1


def test_a_batch_can_be_sampled_and_knows_its_sequences():
    mask = torch.arange(8)[None] < torch.tensor([[8], [6], [1]])
    rows = TokenRows(mask=mask, sample=8)
    index = rows.index((3, 8), CPU)
    assert index.tolist() == [0, 2, 4, 7, 8, 9, 11, 13]
    assert rows.lengths((3, 8)) == [4, 4]
    counted = TokenRows(mask=mask)
    assert counted.index((3, 8), CPU).numel() == 15
    assert counted.lengths((3, 8)) == [8, 6, 1]


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
