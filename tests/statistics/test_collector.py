from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest
import torch
from layer_moments import full_moments

from fasc_lightning.statistics import CalibrationMoments, CoupledMoments, moments_bytes
from fasc_lightning.statistics._accumulators import systematic_sample
from fasc_lightning.statistics._layer_moments import NEEDS


def test_shared_inputs_hold_one_matrix_and_unequal_sharing_stays_exact():
    moments = CalibrationMoments({"q": (4, 3), "k": (2, 3)}, torch.float64)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    moments.add_inputs(["q", "k"], x)
    assert len(moments.inputs) == 1
    moments.add_inputs(["q"], y)
    moments.add_gradients("q", torch.ones(12, 4))
    moments.add_gradients("k", torch.ones(5, 2))
    both = torch.cat([x, y])
    torch.testing.assert_close(moments.layer("q").A, both.T @ both / 12)
    torch.testing.assert_close(moments.layer("k").A, x.T @ x / 5)


def test_moving_rows_takes_them_from_the_members_that_were_not_reached():
    moments = CalibrationMoments({"q": (2, 3), "k": (2, 3)}, torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    y = torch.randn(6, 3, dtype=torch.float64)
    for rows in (x, y):
        moments.add_inputs(["q", "k"], rows)
    moments.move_inputs(["q", "k"], ["q"], y)
    moments.add_gradients("q", torch.ones(11, 2))
    moments.add_gradients("k", torch.ones(5, 2))
    both = torch.cat([x, y])
    torch.testing.assert_close(moments.layer("q").A, both.T @ both / 11)
    torch.testing.assert_close(moments.layer("k").A, x.T @ x / 5)


def test_release_frees_a_shared_matrix_with_its_last_layer():
    moments = CalibrationMoments({"q": (4, 3), "k": (2, 3)})
    moments.add_inputs(["q", "k"], torch.randn(5, 3))
    moments.add_gradients("q", torch.randn(5, 4))
    moments.add_gradients("k", torch.randn(5, 2))
    moments.release("q")
    assert moments.layer("k").A.shape == (3, 3)
    moments.release("k")
    assert moments.nbytes < 100


def test_released_sums_are_freed_without_the_garbage_collector():
    """A cycle would keep the matrices until its next run, which thousands of new objects cause."""
    moments = CalibrationMoments({"q": (4, 3)}, needs={"coupled"})
    copies = copy.deepcopy(moments)  # copies and unpickled moments are built in another way
    gc.collect()
    gc.disable()
    try:
        for one in (moments, copies):
            one.add_inputs(["q"], torch.randn(5, 3))
            one.add_gradients("q", torch.randn(5, 4))
            one.add_pairs("q", torch.randn(5, 3), torch.randn(5, 4))
            sums = [weakref.ref(stream) for stream in one._streams()]
            one.release("q")
            assert len(sums) == 3
            assert all(ref() is None for ref in sums)
    finally:
        gc.enable()


def test_the_work_of_a_release_does_not_grow_with_the_number_of_layers(monkeypatch):
    names = [f"layer{i}" for i in range(20)]
    moments, made = CalibrationMoments(dict.fromkeys(names, (4, 3))), []
    for name in names:
        moments.add_inputs([name], torch.randn(5, 3))
        moments.add_gradients(name, torch.randn(5, 4))
    new = CalibrationMoments._new_input
    monkeypatch.setattr(CalibrationMoments, "_new_input", lambda *args: made.append(args) or new(*args))
    for name in names:
        moments.release(name)
    assert len(made) == len(names)


def test_layer_without_tokens_is_an_error():
    moments = CalibrationMoments({"q": (4, 3)})
    with pytest.raises(ValueError, match="no gradient reached it"):
        moments.layer("q")


def test_bytes_bound_what_is_allocated():
    shapes = {"q": (4, 3), "k": (2, 3)}
    moments = CalibrationMoments(shapes)
    for name, (m, n) in shapes.items():
        moments.add_inputs([name], torch.randn(5, n))
        moments.add_gradients(name, torch.randn(5, m))
    counters = 8 * 4
    assert moments.nbytes == moments_bytes(shapes.values()) + counters


def gathered(x, h, W, needs, split=(), lengths=(5, 0, 7)):
    """Moments of one layer, in as many updates as the splits make."""
    moments = CalibrationMoments({"q": tuple(W.shape)}, torch.float64, needs=needs)
    bounds = [0, *split, len(lengths)]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for a, b in itertools.pairwise(bounds):
        rows = slice(starts[a], starts[b])
        moments.add_inputs(["q"], x[rows])
        moments.add_gradients("q", h[rows])
        if moments.takes_pairs:
            moments.add_pairs("q", x[rows], h[rows], lengths[a:b], g=h[rows] @ W)
    return moments


@pytest.fixture
def tokens():
    W = torch.randn(4, 3, dtype=torch.float64)
    return torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64), W


def assert_field(found, expected):
    if isinstance(expected, tuple):
        assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    else:
        torch.testing.assert_close(found, expected)


#: Statistics that are a field of their own; "plain" is A and G.
FIELDS = tuple(need for need in NEEDS if need != "plain")


@pytest.mark.parametrize("needs", [(), *((need, "plain") for need in FIELDS), FIELDS])
def test_exactly_what_is_needed_is_gathered(tokens, needs):
    x, h, W = tokens
    found, expected = gathered(x, h, W, needs).layer("q"), full_moments(x, h, W, (5, 0, 7))
    for field in ("A", "G", "mean_x", "mean_h", *(set(needs) - {"plain"})):
        assert_field(getattr(found, field), getattr(expected, field))
    for field in set(FIELDS) - set(needs):
        assert getattr(found, field) is None
        with pytest.raises(ValueError, match=rf"with `{field}`.* was not gathered.*needs={{'{field}'}}"):
            found.require(field)


def test_every_statistic_merges(tokens):
    x, h, W = tokens
    whole = gathered(x, h, W, NEEDS).layer("q")
    parts = gathered(x[:5], h[:5], W, NEEDS, lengths=(5,))
    parts.add_(gathered(x[5:], h[5:], W, NEEDS, lengths=(0, 7)))
    for field, expected in vars(whole).items():
        if field != "tokens":
            assert_field(vars(parts.layer("q"))[field], expected)
            assert_field(vars(gathered(x, h, W, NEEDS, split=(1,)).layer("q"))[field], expected)
    with pytest.raises(ValueError, match=r"same statistics, .* but got \['plain'\]"):
        parts.add_(CalibrationMoments({"q": (4, 3)}))


def test_every_statistic_is_counted_bounded_and_released(tokens):
    x, h, W = tokens
    for needs in ([], *([need] for need in NEEDS), NEEDS):
        moments = gathered(x, h, W, needs)
        counters = 8 * sum(1 for _ in moments._streams())
        assert moments.nbytes == moments_bytes([(4, 3)], torch.float64, needs) + counters
        moments.release("q")
        assert moments.nbytes < 100


def test_coupled_moments_alone_stand_in_for_plain_ones_and_save_their_work(tokens):
    x, h, W = tokens
    alone, expected = gathered(x, h, W, ["coupled"]), full_moments(x, h, W)
    found = alone.layer("q")
    assert_field((found.A, found.G), expected.coupled)
    assert_field((found.mean_x, found.mean_h), (expected.mean_x, expected.mean_h))
    assert not any(hasattr(stream, "outer") for stream in (*alone.inputs.values(), *alone.gradients.values()))
    assert alone.gradients["q"].mean_square().item() == pytest.approx(h.square().sum(1).mean().item())
    assert CalibrationMoments({"q": (4, 3)}, needs=["coupled", "C"]).needs == {"plain", "coupled", "C"}


def test_a_token_that_no_gradient_comes_back_to_does_not_count_in_coupled_moments():
    x, h = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    sink, nothing = 1e3 * torch.ones(1, 3, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    stream = CoupledMoments(4, 3, torch.float64)
    stream.update(torch.cat([sink, x]), torch.cat([nothing, h]), scale=2.0)
    expected = full_moments(x, 2 * h, torch.zeros(4, 3, dtype=torch.float64)).coupled
    torch.testing.assert_close(stream.compute()[0], expected[0])
    blank = CoupledMoments(4, 3)
    blank.update(torch.zeros(2, 3), torch.zeros(2, 4))
    assert not any(S.any() for S in blank.compute())


def test_a_share_of_the_tokens_estimates_the_moment_of_gradients_and_leaves_that_of_inputs_exact():
    torch.manual_seed(0)
    mixing, n_tokens = torch.randn(4, 4, dtype=torch.float64), 4096
    x = torch.randn(n_tokens, 3, dtype=torch.float64)
    h = torch.randn(n_tokens, 4, dtype=torch.float64) @ mixing * torch.randn(n_tokens, 1, dtype=torch.float64).exp()
    x[::7], h[::5] = 0, 0  # tokens that do not count
    part, whole = (CoupledMoments(4, 3, torch.float64, output_share=share) for share in (0.25, 1.0))
    for stream in (part, whole):
        for rows in torch.arange(n_tokens).split(512):
            stream.update(x[rows], h[rows], scale=2.0)
    (A, G), (exact_A, exact_G) = part.compute(), whole.compute()
    assert torch.equal(A, exact_A)
    assert not torch.equal(G, exact_G)
    assert (G - exact_G).norm() < 0.05 * exact_G.norm()


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_systematic_sample_has_the_expectation_of_all_rows(share):
    """Over all starts of the line of rows, each row is picked as often as its size says."""
    torch.manual_seed(0)
    rows, sizes = torch.randn(20, 3, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    rows[3], sizes[3] = 0, 0
    sizes[5] *= 30  # picked several times
    sizes /= sizes.sum()
    half = torch.tensor(0.5, dtype=torch.float64)
    blank, total, starts = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64), 2000
    distance = 2 / -(-share * 22 // 1)  # of the points on a line of length 2: rows, and blanks before and after them
    for start in torch.arange(starts, dtype=torch.float64) * distance / starts:
        line = torch.cat([start.view(1), sizes, 1 - start.view(1)])
        found = systematic_sample(torch.cat([blank, rows, blank]), line, share, half)
        total += found.T @ found / starts
    torch.testing.assert_close(total, rows.T @ rows, rtol=0, atol=0.01 * float(rows.square().sum()))


@pytest.mark.parametrize("tokens", [1, 4, 13, 64])
@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_a_batch_without_gradients_leaves_the_moments_as_they_were(tokens, value):
    torch.manual_seed(0)
    stream = CoupledMoments(4, 3, output_share=0.25)
    stream.update(torch.randn(64, 3), torch.randn(64, 4))
    before = [S.clone() for S in stream.compute()]
    weight = stream.weights.clone()
    stream.update(torch.randn(tokens, 3), torch.full((tokens, 4), value))
    A, G = stream.compute()
    torch.testing.assert_close(A, before[0])
    torch.testing.assert_close(G * stream.weights[1], before[1] * weight[1])
    stream.update(torch.zeros(0, 3), torch.zeros(0, 4))
    assert torch.equal(stream.compute()[0], A)


def test_a_token_at_the_same_place_of_each_update_counts_as_often_as_others():
    torch.manual_seed(0)
    part, whole = (CoupledMoments(2, 3, torch.float64, output_share=share) for share in (0.25, 1.0))
    for _ in range(800):
        x, h = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
        h[1:, 0], h[0, 1] = 0, 0  # only the first token has a gradient at the first output
        for stream in (part, whole):
            stream.update(x, h)
    torch.testing.assert_close(part.compute()[1].diagonal(), whole.compute()[1].diagonal(), rtol=0.1, atol=0)


def test_magnitudes_follow_rows_that_move(tokens):
    x, h, _ = tokens
    moments = CalibrationMoments({"q": (4, 3), "k": (4, 3)}, torch.float64, needs=["abs_x"])
    for rows in (x[:5], x[5:]):
        moments.add_inputs(["q", "k"], rows)
    moments.move_inputs(["q", "k"], ["q"], x[5:])
    moments.add_gradients("q", h)
    moments.add_gradients("k", h[:5])
    torch.testing.assert_close(moments.layer("q").abs_x, x.abs().mean(0))
    torch.testing.assert_close(moments.layer("k").abs_x, x[:5].abs().mean(0))


def test_the_cross_moment_can_be_dropped_once_it_has_served(tokens):
    moments = gathered(*tokens, ["C", "abs_x"])
    moments.drop_cross()
    assert moments.needs == {"abs_x", "plain"}
    assert moments.layer("q").C is None


def test_unknown_statistics_and_a_saliency_without_gradients_are_refused(tokens):
    with pytest.raises(ValueError, match=r"among plain, coupled, C, .*, kronecker but got 'hessian'"):
        CalibrationMoments({"q": (4, 3)}, needs=["C", "hessian"])
    moments = CalibrationMoments({"q": (4, 3)}, torch.float64, needs=["saliency"])
    with pytest.raises(ValueError, match="input gradients g = W\\^T h of layer 'q'"):
        moments.add_pairs("q", *tokens[:2])
