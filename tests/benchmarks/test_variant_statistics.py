from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import Tokens, causal_model
from variant_statistics import (
    Statistics,
    WeightedMoments,
    mahalanobis_weights,
    nested_windows,
    power_weights,
    root_labels,
    sampled_labels,
)

from fasc_lightning.layers import select_layers
from fasc_lightning.statistics import CoupledMoments

WINDOWS = Tokens(samples=12, length=16).input_ids
NAMES = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"]


@pytest.fixture
def statistics(tmp_path):
    model = causal_model().eval().requires_grad_(False)
    layers = {name: module for name, module in select_layers(model).items() if name in NAMES}
    return Statistics(model, layers, WINDOWS[:6], WINDOWS, tmp_path, "source")


def rows_by_hand(model, name, windows, gradient=None):
    """x and h of one layer, window after window, with nothing of the taps; ``gradient`` is that at the logits."""
    caught = {}

    def keep(module, args, output):
        caught["x"], caught["y"] = args[0].detach(), output.detach().requires_grad_()
        return caught["y"]

    handle = model.get_submodule(name).register_forward_hook(keep)
    found = []
    for ids in windows.split(1):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        if gradient is None:
            torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        else:
            logits.backward(gradient(logits.detach()))
        found.append((caught["x"][0].double(), caught["y"].grad[0].double()))
    handle.remove()
    return found


def weighted(rows, weights):
    return torch.einsum("t,ti,tj->ij", weights, rows, rows) / weights.sum()


@pytest.mark.parametrize(
    ("name", "weigh"),
    [
        ("plain", torch.ones_like),
        ("weight-0.5", lambda norm: norm**0.5),
        ("coupled", lambda norm: norm),
        ("weight-2", lambda norm: norm**2),
        ("weight-2-clipped", lambda norm: torch.cat([(w**2).clamp(max=4 * (w**2).mean()) for w in norm.split(16)])),
    ],
)
def test_tokens_weigh_by_the_power_of_the_other_length(statistics, name, weigh):
    statistics.gather([name])
    for layer in NAMES:
        x, h = map(torch.cat, zip(*rows_by_hand(statistics.model, layer, WINDOWS[:6]), strict=True))
        A, G = statistics.pair(name, layer)
        torch.testing.assert_close(A.double(), weighted(x, weigh(h.norm(dim=1))), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(G.double(), weighted(h, weigh(x.norm(dim=1))), rtol=1e-3, atol=1e-12)


def test_the_first_power_is_the_coupling_of_the_package():
    generator = torch.Generator().manual_seed(0)
    x, h = torch.randn(50, 6, generator=generator), torch.randn(50, 4, generator=generator)
    ours, theirs = WeightedMoments(4, 6, power_weights(1.0)), CoupledMoments(4, 6)
    for stream in (ours, theirs):
        stream.update(x[:20], h[:20], scale=3.0)
        stream.update(x[20:], h[20:], scale=0.5)
    for mine, its in zip(ours.compute(), theirs.compute(), strict=True):
        torch.testing.assert_close(mine, its)


def test_mahalanobis_lengths_are_those_of_the_inverse(monkeypatch):
    monkeypatch.setattr("variant_statistics.MAHALANOBIS_SHRINK_A", 0.0)
    monkeypatch.setattr("variant_statistics.MAHALANOBIS_SHRINK_G", 0.0)
    generator = torch.Generator().manual_seed(0)
    x, h = (torch.randn(40, d, dtype=torch.float64, generator=generator) for d in (6, 4))
    A, G = x.T @ x / 40, h.T @ h / 40
    p, q = mahalanobis_weights(A, G)(x, h)
    for found, rows, S in ((p, h, G), (q, x, A)):
        expected = np.sqrt(np.einsum("ti,ij,tj->t", rows, np.linalg.inv(S.numpy()), rows))
        np.testing.assert_allclose(found, expected)


def test_mahalanobis_weights_gather_plain_moments_first(statistics):
    statistics.gather(["mahalanobis"])
    assert statistics.path("plain").is_file()
    x, h = map(torch.cat, zip(*rows_by_hand(statistics.model, NAMES[0], WINDOWS[:6]), strict=True))
    plain = [matrix.double() for matrix in statistics.pair("plain", NAMES[0])]
    p, _ = mahalanobis_weights(*plain)(x, h)
    torch.testing.assert_close(statistics.pair("mahalanobis", NAMES[0])[0].double(), weighted(x, p), rtol=1e-3, atol=0)


@pytest.mark.parametrize("draw", [sampled_labels, root_labels])
def test_drawn_labels_have_the_covariance_of_the_fisher(draw):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.5], dtype=torch.float64)
    u = draw(logits.expand(100_000, 4), torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    torch.testing.assert_close(u.T @ u / len(u), torch.diag(p) - torch.outer(p, p), rtol=0, atol=3e-3)
    assert u.mean(0).abs().max() < 5e-3
    assert u.sum(1).abs().max() < 1e-12  # the softmax does not see a constant


@pytest.mark.parametrize(("name", "draw"), [("sample", sampled_labels), ("root", root_labels)])
def test_statistics_of_drawn_labels_are_those_of_their_gradients(statistics, name, draw):
    statistics.gather([name])
    generator = torch.Generator().manual_seed(statistics.seed)
    rows = rows_by_hand(statistics.model, NAMES[1], WINDOWS[:6], lambda logits: draw(logits, generator))
    h = torch.cat([h for _, h in rows])
    torch.testing.assert_close(statistics.pair(name, NAMES[1])[1].double(), h.T @ h / len(h), rtol=1e-3, atol=1e-12)


def test_logits_that_are_not_finite_stop_the_pass_and_keep_nothing(statistics):
    statistics.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="finite logits but those of window 0"):
        statistics.gather(["sample"])
    assert not statistics.path("sample").exists()
    assert not any(layer._forward_hooks for layer in statistics.layers.values())


def test_sequences_are_whole_windows(statistics):
    statistics.gather(["sequence"])
    gradients = [h.T @ x for x, h in rows_by_hand(statistics.model, NAMES[0], WINDOWS[:6])]
    right, left = (sum(terms) for terms in zip(*((g.T @ g, g @ g.T) for g in gradients), strict=True))
    A, G = (matrix.double() for matrix in statistics.pair("sequence", NAMES[0]))
    torch.testing.assert_close(A / A.trace(), right / right.trace(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(G / G.trace(), left / left.trace(), rtol=1e-3, atol=1e-6)


def test_prefixes_of_one_pass_are_statistics_of_fewer_windows(statistics, tmp_path):
    statistics.gather(["windows-4", "windows-9"])
    for count in (4, 9):
        folder = tmp_path / str(count)
        alone = Statistics(statistics.model, statistics.layers, WINDOWS[:count], WINDOWS, folder, "source")
        alone.gather(["coupled"])
        for mine, its in zip(
            statistics.pair(f"windows-{count}", NAMES[0]), alone.pair("coupled", NAMES[0]), strict=True
        ):
            torch.testing.assert_close(mine, its)


def test_what_is_kept_is_not_gathered_again(statistics, monkeypatch):
    passes = []
    monkeypatch.setattr("variant_statistics.backward_windows", lambda *args: passes.append(1) or iter(()))
    monkeypatch.setattr("variant_statistics.PER_PASS", 3)
    statistics.gather(["plain", "coupled", "weight-2", "sequence"])
    assert len(passes) == 2
    statistics.gather(["plain", "coupled", "weight-2", "sequence"])
    assert len(passes) == 2
    statistics.gather(["coupled", "weight-1.5"])
    assert len(passes) == 3


def test_nested_windows_start_with_those_of_every_smaller_count():
    order = torch.tensor([2, 0, 1])

    def windows_of(count):
        return WINDOWS[:count][order] if count == 3 else WINDOWS[:count].flip(0)

    nested = nested_windows(windows_of, [6, 3, 10])
    assert len(nested) == 10
    for count in (3, 6, 10):
        assert sorted(nested[:count].tolist()) == sorted(WINDOWS[:count].tolist())


def test_a_window_that_comes_twice_is_refused():
    twice = torch.cat([WINDOWS[:3], WINDOWS[:1]])
    with pytest.raises(ValueError, match=r"4 different calibration windows.* got 3"):
        nested_windows(lambda count: twice[:count], [2, 4])
