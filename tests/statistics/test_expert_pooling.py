"""Experts that borrow, against moments of tokens that are really there."""

from __future__ import annotations

import warnings

import pytest
import torch
from layer_moments import full_moments
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from fasc_lightning.calibration._checks import warn_few_tokens
from fasc_lightning.compression import compress_layers
from fasc_lightning.layers._fused_experts import expert_views
from fasc_lightning.statistics import BorrowedMoments, CalibrationMoments, LayerSketches, Sketch, borrows, tokens_behind
from fasc_lightning.statistics._expert_pooling import tokens_needed
from fasc_lightning.statistics._layer_moments import NEEDS
from fasc_lightning.statistics._nystrom import NystromMoment

M, N = 6, 10
NEED = tokens_needed((M, N))
COUNTS = {0: NEED + 5, 1: 5, 2: 0, 3: 10}
NAMES = [f"m.experts.{e}.w_down" for e in COUNTS]
EXPERTS = MixtralExperts(MixtralConfig(hidden_size=M, intermediate_size=N, num_local_experts=len(COUNTS))).double()
LAYERS = {name: view for name, view in expert_views("m.experts", EXPERTS).items() if name in NAMES}
W = torch.ones(M, N, dtype=torch.float64)
FIELDS = ("A", "G", "mean_x", "mean_h", "C", "abs_x", "saliency")
SIDES = LayerSketches(Sketch(N, 7, 1), Sketch(M, 4, 1))


def rows(expert: int, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x and h of an expert's tokens; of one rank for all experts, if one is given."""
    generator = torch.Generator().manual_seed(expert)
    x, h = (torch.randn(COUNTS[expert], d, dtype=torch.float64, generator=generator) for d in (N, M))
    if rank is not None:
        x[:, rank:], h[:, rank:] = 0, 0
    return x, h


def gathered(needs, sketches=None, rank=None) -> CalibrationMoments:
    moments = CalibrationMoments(dict.fromkeys(NAMES, (M, N)), torch.float64, needs=needs, sketches=sketches)
    for expert, name in enumerate(NAMES):
        x, h = rows(expert, rank)
        if len(x):
            moments.add_inputs([name], x)
            moments.add_gradients(name, h)
            if moments.takes_pairs:
                moments.add_pairs(name, x, h, g=h @ W)
    return moments


def borrowing(moments: CalibrationMoments) -> BorrowedMoments:
    return BorrowedMoments(moments, LAYERS)


def filled_up(expert: int, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The expert's tokens and those that it is lent, so often that all experts' tokens count equally in the latter."""
    pool = [torch.cat([rows(e, rank)[side] for e in COUNTS]) for side in (0, 1)]
    # NEED - COUNTS[expert] tokens of the pool's make-up: everything in the smallest whole numbers.
    missing, seen = NEED - COUNTS[expert], len(pool[0])
    x, h = (
        torch.cat([mine.repeat(seen, 1), others.repeat(missing, 1)])
        for mine, others in zip(rows(expert, rank), pool, strict=True)
    )
    assert len(x) == seen * NEED
    return x, h


@pytest.mark.parametrize("expert", [1, 3])
def test_an_expert_with_few_tokens_has_the_moments_of_its_tokens_and_of_lent_ones(expert):
    borrowed = borrowing(gathered(NEEDS))
    found, expected = borrowed.layer(NAMES[expert]), full_moments(*filled_up(expert), W)
    assert found.tokens == NEED
    for field in FIELDS:
        torch.testing.assert_close(getattr(found, field), getattr(expected, field))
    for side, right in zip(found.require("coupled"), expected.require("coupled"), strict=True):
        torch.testing.assert_close(side, right)


def test_statistics_of_sequences_stay_the_experts_own():
    moments = gathered(NEEDS)
    found, own = borrowing(moments).layer(NAMES[1]), moments.layer(NAMES[1])
    assert torch.equal(found.require("fisher_rows"), own.require("fisher_rows"))
    assert all(torch.equal(a, b) for a, b in zip(found.require("kronecker"), own.require("kronecker"), strict=True))


def test_an_expert_with_enough_tokens_stands_on_its_own_and_one_without_gets_none():
    moments = gathered({"plain"})
    borrowed = borrowing(moments)
    assert set(borrowed.short) == {NAMES[1], NAMES[3]}
    assert "2 of 4 expert layers" in (borrowed.describe() or "")
    assert torch.equal(borrowed.layer(NAMES[0]).A, moments.layer(NAMES[0]).A)
    with pytest.raises(ValueError, match="no gradient reached"):
        borrowed.layer(NAMES[2])


@pytest.mark.parametrize("sides", [SIDES, LayerSketches(inputs=SIDES.inputs), LayerSketches(outputs=SIDES.outputs)])
@pytest.mark.parametrize("needs", [{"plain", "coupled"}, {"coupled"}, {"plain"}])
def test_sketches_are_filled_up_without_a_matrix_and_to_the_same_moments_where_they_hold_all(needs, sides, monkeypatch):
    rank = 3
    moments = gathered(needs, dict.fromkeys(NAMES, sides), rank)
    with monkeypatch.context() as patched:
        patched.setattr(NystromMoment, "dense", lambda form: pytest.fail("a sketch was made a matrix"))
        found = borrowing(moments).layer(NAMES[1])
    expected = full_moments(*filled_up(1, rank), W)
    assert found.tokens == NEED
    close = {"rtol": 1e-6, "atol": 1e-7}
    if "plain" in needs:
        torch.testing.assert_close(found.A, expected.A, **close)
        torch.testing.assert_close(found.G, expected.G, **close)
    if "coupled" in needs:
        for side, right in zip(found.require("coupled"), expected.require("coupled"), strict=True):
            torch.testing.assert_close(side, right, **close)
    for field in ("mean_x", "mean_h"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field))


def test_a_sketch_that_cannot_hold_all_has_the_exact_diagonal_of_the_filled_up_moment():
    found = borrowing(gathered({"plain"}, dict.fromkeys(NAMES, SIDES))).layer(NAMES[1])
    expected = full_moments(*filled_up(1), W)
    torch.testing.assert_close(found.plain_moments()[0].diagonal(), expected.A.diagonal())
    torch.testing.assert_close(found.plain_moments()[1].diagonal(), expected.G.diagonal())


def test_experts_that_are_sketched_in_different_ways_do_not_pool():
    sketches = {name: LayerSketches(Sketch(N, 7, seed)) for seed, name in enumerate(NAMES)}
    moments = CalibrationMoments(dict.fromkeys(NAMES, (M, N)), torch.float64, needs={"coupled"}, sketches=sketches)
    x, h = rows(1)
    moments.add_inputs([NAMES[1]], x)
    moments.add_gradients(NAMES[1], h)
    with pytest.raises(ValueError, match="with the same sketches"):
        borrowing(moments).layer(NAMES[1])


def test_a_pool_without_released_experts_is_refused():
    moments = gathered({"plain"})
    borrowed = borrowing(moments)
    moments.release(NAMES[0])
    with pytest.raises(ValueError, match=r"those of 'm.experts.0.w_down' are released"):
        borrowed.layer(NAMES[1])


def test_pools_are_made_before_a_compression_releases_what_they_hold():
    torch.nn.init.normal_(EXPERTS.down_proj, generator=torch.Generator().manual_seed(0))
    layers = {name: layer for name, layer in LAYERS.items() if name != NAMES[2]}
    kept, used = (
        compress_layers(layers, gathered({"coupled"}), rank=0.5, allocation="fisher", consume=consume)
        for consume in (False, True)
    )
    assert [plan.loss for plan in kept.layers] == [plan.loss for plan in used.layers]


def test_moments_of_experts_are_borrowed_from_and_not_changed():
    moments = gathered({"coupled"})
    before = [value.clone() for stream in moments._streams() for value in stream.sums.values()]
    borrowing(moments).layer(NAMES[1])
    after = [value for stream in moments._streams() for value in stream.sums.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_warning_of_few_tokens_counts_those_that_an_expert_borrows():
    shapes = {**dict.fromkeys(NAMES, (M, N)), "q": (M, N)}
    counts = {**{name: COUNTS[e] for e, name in enumerate(NAMES)}, "q": 50}
    assert borrows(NAMES[1], COUNTS[1], (M, N))
    assert not borrows("q", 5, (M, N))
    assert tokens_behind(counts, shapes) == {**counts, NAMES[1]: NEED + 20, NAMES[3]: NEED + 20}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_few_tokens(counts, shapes)
    with pytest.warns(UserWarning, match=r"2 of 5 layers .* saw 9 together with all experts of its block"):
        warn_few_tokens({**counts, NAMES[0]: 0, NAMES[3]: 4}, shapes)
    with pytest.warns(UserWarning, match=r"1 of 5 layers .* 'q' \(6, 10\) saw 5, which"):
        warn_few_tokens({**counts, "q": 5}, shapes)


def test_layers_that_are_only_named_like_experts_do_not_borrow():
    layers = {name: torch.nn.Linear(N, M) for name in NAMES}
    assert BorrowedMoments(gathered({"plain"}), layers).describe() is None


@pytest.mark.parametrize(("tokens", "spreads"), [((200, 200), "evenly"), ((200, 20), "to the busier")])
def test_the_loss_of_an_expert_weighs_by_its_share_of_the_tokens(tokens, spreads):
    generator = torch.Generator().manual_seed(0)
    x, h = (torch.randn(20, d, dtype=torch.float64, generator=generator) for d in (N, M))
    weight = torch.randn(M, N, dtype=torch.float64, generator=generator)
    names, ranks = NAMES[:2], []
    moments = CalibrationMoments(dict.fromkeys(names, (M, N)), torch.float64, needs={"coupled"})
    for name, count in zip(names, tokens, strict=True):
        for _ in range(count // len(x)):  # the same moments, whatever the number of tokens
            moments.add_inputs([name], x)
            moments.add_gradients(name, h)
            moments.add_pairs(name, x, h)
    EXPERTS.down_proj.data[:2] = weight
    layers = {name: LAYERS[name] for name in names}
    result = compress_layers(layers, moments, rank=0.5, allocation="fisher", layout="pivot")
    ranks = [plan.rank for plan in result.layers]
    if spreads == "evenly":
        assert abs(ranks[0] - ranks[1]) <= 1
    else:
        assert ranks[0] > ranks[1] + 1
