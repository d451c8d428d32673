from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from dependence_cases import autocorrelated, scored
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasc_lightning import DependenceScore
from fasc_lightning.batches import TokenRows, sample_seeds
from fasc_lightning.dependence import LayerScores
from fasc_lightning.hooks import Taps

LENGTH = 128


def fed(batches, tokens=512, seed=0, **layers):
    """Scores of batches of (x, h), each (sequences, tokens, features), as the taps would hand them over."""
    layers = layers or {"layer": nn.Linear(batches[0][0].shape[2], batches[0][1].shape[2])}
    scores = LayerScores(layers, tokens, gradient="output", seed=seed)
    for number, (x, h) in enumerate(batches):
        seeds = sample_seeds(x, seed)
        rows = TokenRows(f"batch {number}", sample_seeds=seeds)
        for name in layers:
            scores(name, x.flatten(0, 1), h.flatten(0, 1), rows, [x.shape[1]] * len(x))
    return scores


def only(scores):
    (row,) = scores.rows()
    return row


def test_an_attention_sink_weighs_no_more_in_a_sample_than_in_all_tokens():
    generator = torch.Generator().manual_seed(0)
    x, h = (autocorrelated(24, LENGTH, 8, generator) for _ in "xh")
    # The first token is much the same in all texts, with large activations and gradients of 100 times the others' size.
    direction = torch.randn(2, 8, generator=generator)
    x[:, 0] = 4 * direction[0] + 0.1 * x[:, 0]
    h[:, 0] = 100 * direction[1] + h[:, 0]
    h[:, -1] = 0  # by construction
    everything = scored((x[:, :-1], h[:, :-1])).debiased.item()
    both_ends = torch.linspace(0, LENGTH - 1, 32).long()
    biased = scored((x[:, both_ends], h[:, both_ends])).debiased.item()
    assert biased > everything + 0.15
    values = [only(fed([(x, h)], tokens=24 * 32, seed=seed))["debiased"] for seed in range(12)]
    assert abs(np.mean(values) - everything) < 0.25 * (biased - everything)


def test_samples_of_an_ordinary_sequence_have_the_rho_of_all_tokens():
    generator = torch.Generator().manual_seed(1)
    x = autocorrelated(24, LENGTH, 8, generator)
    h = 0.4 * x + autocorrelated(24, LENGTH, 8, generator)
    everything = scored((x, h)).debiased.item()
    values = [only(fed([(x, h)], tokens=240, seed=seed))["debiased"] for seed in range(20)]
    assert np.mean(values) == pytest.approx(everything, abs=3 * np.std(values) / math.sqrt(20) + 0.01)


def test_tokens_without_a_gradient_are_left_out():
    x, h = torch.randn(8, 20, 4), torch.randn(8, 20, 4)
    h[:, -1] = 0
    h[:, 0] = 1e-7 * torch.randn(8, 4)  # what rounding leaves of zero
    row = only(fed([(x, h)]))
    expected = scored((x[:, 1:-1], h[:, 1:-1]))
    assert row["tokens"] == 8 * 18
    assert row["rho"] == pytest.approx(expected.compute().item(), abs=1e-5)
    assert row["debiased"] == pytest.approx(expected.debiased.item(), abs=1e-4)
    assert only(fed([(x, torch.zeros_like(h))]))["reason"] == "constant gradients"
    broken = h.clone()
    broken[3, 5, 1] = math.nan
    assert only(fed([(x, broken)]))["reason"] == "activations or gradients that are not finite"


def test_layers_that_lose_different_tokens_are_scored_on_their_own():
    x, h = torch.randn(8, 20, 4), torch.randn(8, 20, 4)
    scores = LayerScores({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}, 512, gradient="output")
    rows, flat = TokenRows(sample_seeds=sample_seeds(x, 0)), x.flatten(0, 1)
    scores("a", flat, h.flatten(0, 1), rows, [20] * 8)
    fewer = h.clone()
    fewer[:, :5] = 0
    scores("b", flat, fewer.flatten(0, 1), rows, [20] * 8)
    found = {row["layer"]: row["rho"] for row in scores.rows()}
    assert found["a"] == pytest.approx(scored((x, h)).compute().item(), abs=1e-5)
    assert found["b"] == pytest.approx(scored((x[:, 5:], h[:, 5:])).compute().item(), abs=1e-5)


def test_many_layers_together_have_the_scores_of_each_alone():
    generator = torch.Generator().manual_seed(8)
    widths = {"a": (6, 4), "b": (6, 4), "c": (6, 9), "d": (40, 4), "routed": (6, 4), "few": (6, 4), "broken": (6, 4)}
    scores = LayerScores({name: nn.Linear(n, m) for name, (n, m) in widths.items()}, 512, gradient="output")
    alone = {name: DependenceScore() for name in widths}
    for number in range(2):
        shared = torch.randn(16, 20, 6, generator=generator) + 1
        rows = TokenRows(sample_seeds=sample_seeds(shared, 0), scale=3 + number)
        flat = {6: shared.flatten(0, 1)}
        for name, (n, m) in widths.items():
            flat.setdefault(n, torch.randn(16 * 20, n, generator=generator))
            sequences = {"routed": 9, "few": 2}.get(name, 16)
            x = flat[n][: sequences * 20]
            x = flat[n] if len(x) == len(flat[n]) else x
            h = 1e-5 * (torch.randn(len(x), m, generator=generator) + x[:, :1])
            if name == "b":
                h.view(sequences, 20, m)[:, -1] = 0
            if name == "broken" and number:
                h[7, 2] = math.inf
            scores(name, x, h, rows, [20] * sequences)
            if name == "few":
                continue
            kept = [v.view(sequences, 20, -1)[:, : 19 if name == "b" else 20] for v in (x, h * rows.scale)]
            alone[name].update(*kept)
    x, h = (torch.cat(values) for values in zip(*scores.waiting["few"], strict=True))
    alone["few"].update(x, h)
    for row in scores.rows(7):
        score = alone[row["layer"]]
        low, high = score.interval.tolist()
        expected = [score.compute(), score.null, score.debiased, low, high, score.iid_floor]
        found = [row[key] for key in ("rho", "null", "debiased", "low", "high", "iid_floor")]
        assert found == pytest.approx([float(value) for value in expected], abs=1e-6, nan_ok=True)
        assert (row["step"], row["tokens"], row["reason"]) == (7, score.observed, score.reason)


class Waits(TorchDispatchMode):
    """Counts the operations that make a host wait for a device."""

    OPERATIONS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "bincount")

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = Counter()
        for name in ("tolist", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))

    def counted(self, name, call):
        def count(*args, **settings):
            self.found[name] += 1
            return call(*args, **settings)

        return count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        on_host = name == "nonzero"  # of the choice of tokens, from a mask that the host has
        if name in self.OPERATIONS and not on_host:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def test_an_observation_waits_for_the_device_as_often_for_many_layers_as_for_few(monkeypatch):
    found = []
    for depth in (2, 12):
        layers = {str(i): nn.Linear(6, 6) for i in range(depth)}
        scores = LayerScores(layers, 512)
        taps = Taps(layers, pairs=scores, anchor=False, inputs=True)
        taps.install()
        rows = TokenRows(sample_seeds=sample_seeds(torch.randn(8, 20), 0), sample=128)
        taps.begin_batch(rows)
        with monkeypatch.context() as patches, Waits(patches) as waits:
            x = torch.randn(8, 20, 6)
            for layer in layers.values():
                x = torch.tanh(layer(x))
            x.square().sum().backward()
            taps.end_batch()
            assert [row["reason"] for row in scores.rows()] == [""] * depth
        taps.remove()
        found.append(waits.found)
    assert found[0] == found[1]
    assert sum(found[0].values()) <= 8


def test_held_tokens_are_those_of_the_call():
    x, h = torch.randn(8, 30, 4), torch.randn(8, 30, 4)
    expected = only(fed([(x, h)], tokens=240))
    layers = {"layer": nn.Linear(4, 4)}
    scores = LayerScores(layers, 240, gradient="output")
    taken = x.clone().flatten(0, 1), h.clone().flatten(0, 1)
    scores("layer", *taken, TokenRows(sample_seeds=sample_seeds(x, 0)), [30] * 8)
    assert scores.held == {"layer"}
    for values in taken:
        values.zero_()  # a model may write into its activations, autograd into gradients
    assert repr(only(scores)) == repr(expected)
    assert not scores.held


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_small_batches_are_scored_together(size):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, 30, 4, generator=generator)
    h = torch.randn(16, 30, 4, generator=generator) + x
    scores = fed(list(zip(x.split(size), h.split(size), strict=True)))
    row = only(scores)
    assert (row["tokens"], row["reason"]) == (480, "")
    assert row["null"] < row["rho"]
    assert row["debiased"] == pytest.approx(scored((x, h)).debiased.item(), abs=0.05)
    assert row["low"] < row["debiased"] < row["high"]
    assert repr(only(scores)) == repr(row)  # looking changes nothing
    scores.reset()
    assert only(scores)["reason"] == "no tokens"


def test_layers_that_share_an_input_share_what_waits():
    x, h = torch.randn(6, 30, 4), torch.randn(6, 30, 4)
    layers = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    scores = LayerScores(layers, 512, gradient="output")
    for sample, gradient in zip(x, h, strict=True):
        rows = TokenRows(sample_seeds=sample_seeds(sample[None], 0))
        for name in layers:
            scores(name, sample, gradient, rows, [30])
    (first, _), (second, _) = scores.waiting["a"][0], scores.waiting["b"][0]
    assert first.data_ptr() == second.data_ptr()
    a, b = ({**row, "layer": ""} for row in scores.rows())
    assert repr(a) == repr(b)


@pytest.mark.parametrize(
    ("sequences", "reason"),
    [(1, "fewer than 4 sequences"), (3, "fewer than 4 sequences"), (7, "fewer than 8 sequences"), (8, "")],
)
def test_what_too_few_sequences_leave_undefined_is_nan_with_a_reason(sequences, reason):
    batches = [(torch.randn(1, 30, 4), torch.randn(1, 30, 4)) for _ in range(sequences)]
    row = only(fed(batches))
    assert row["reason"].startswith(reason)
    assert bool(row["reason"]) == bool(reason)
    assert math.isfinite(row["rho"])
    assert math.isnan(row["null"]) == math.isnan(row["debiased"]) == (sequences < 4)
    assert math.isnan(row["low"]) == math.isnan(row["high"]) == (sequences < 8)


def test_batches_of_uneven_sequences_wait_for_each_other():
    lengths = [40, 3, 50, 45, 60, 41, 44, 70]
    row = only(fed([(torch.randn(1, n, 4), torch.randn(1, n, 4)) for n in lengths]))
    assert row["tokens"] == 7 * 40
    assert row["reason"] == "fewer than 8 sequences, too few for an interval"


@pytest.mark.parametrize("size", [1, 8])
def test_unrelated_texts_exceed_the_null_as_often_as_it_says(size):
    generator = torch.Generator().manual_seed(6)
    above, squares = 0, []
    for _ in range(100):
        x, h = (autocorrelated(8, 48, 4, generator) for _ in "xh")
        h[:, -1] = 0
        row = only(fed(list(zip(x.split(size), h.split(size), strict=True)), tokens=128))
        above += row["rho"] > row["null"]
        squares.append(math.copysign(row["debiased"] ** 2, row["debiased"]))
    assert above <= 13  # 5 expected
    assert abs(np.mean(squares)) < 4 * np.std(squares) / math.sqrt(100)


def test_samples_of_one_token_are_independent():
    x, h = torch.randn(64, 4), torch.randn(64, 4)
    layer = nn.Linear(4, 4)
    scores = LayerScores({"layer": layer}, 512, gradient="output")
    rows = TokenRows(sample_seeds=sample_seeds(x, 0))
    rows.index((64,), torch.device("cpu"))
    scores("layer", x, h, rows, rows.lengths((64,)))
    row, expected = only(scores), scored((x, h))
    assert (row["tokens"], row["reason"]) == (64, "")
    assert row["debiased"] == pytest.approx(expected.debiased.item(), abs=1e-5)


@pytest.mark.parametrize("sample", [None, 64])
def test_taps_feed_layers_of_sequence_first_models(sample):
    torch.manual_seed(3)
    ids = torch.randint(50, (8, 20))
    embed, layer, head = nn.Embedding(50, 6), nn.Linear(6, 5), nn.Linear(5, 3)
    scores = LayerScores({"layer": layer}, 64, gradient="output")
    taps = Taps({"layer": layer}, pairs=scores)
    found = []
    for turned in (False, True):
        scores.reset()
        rows = TokenRows(sample_seeds=sample_seeds(ids, 0), sample=sample)
        rows.note(ids)
        taps.install()
        taps.begin_batch(rows)
        x = embed(ids.T if turned else ids)
        head(torch.relu(layer(x))).square().sum().backward()
        taps.end_batch()
        taps.remove()
        found.append(only(scores))
    assert found[0]["reason"] == found[1]["reason"] == ""
    for column in ("rho", "null", "debiased", "low", "high", "tokens"):
        assert found[0][column] == pytest.approx(found[1][column], rel=1e-3)
