from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from fasc_lightning import DependenceScore, PooledDependenceScore, debiased_rho, iid_floor, rho
from fasc_lightning.dependence import pooled_rho
from fasc_lightning.dependence._hsic import hsic_unbiased
from fasc_lightning.layers import input_gradient
from fasc_lightning.statistics import CalibrationMoments


def rho_by_definition(x, g):
    """FASC's Eq. 2 with d x d moments in float64."""
    x, g = x.double() - x.double().mean(0), g.double() - g.double().mean(0)
    norm = torch.linalg.matrix_norm
    return (norm(x.T @ g) / torch.sqrt(norm(x.T @ x) * norm(g.T @ g))).item()


def linear_cka(x, g):
    """Kornblith et al. 2019, Eq. 3 with linear kernels, in numpy, from singular values."""
    x, g = x - x.mean(0), g - g.mean(0)
    own = [(np.linalg.svd(v, compute_uv=False) ** 4).sum() for v in (x, g)]
    return (np.linalg.svd(x.T @ g, compute_uv=False) ** 2).sum() / math.sqrt(own[0] * own[1])


shapes = {"s": st.integers(2, 40), "n": st.integers(1, 12), "m": st.integers(1, 12), "seed": st.integers(0, 99)}


def pair(s, n, m, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(s, n, generator=generator, dtype=dtype), torch.randn(s, m, generator=generator, dtype=dtype)


@settings(deadline=None, max_examples=40)
@given(**shapes)
def test_rho_is_eq_2_and_its_square_linear_cka(s, n, m, seed):
    x, g = pair(s, n, m, seed)
    assert rho(x, g).item() == pytest.approx(rho_by_definition(x, g), rel=1e-9)
    assert rho(x, g).item() ** 2 == pytest.approx(linear_cka(x.double().numpy(), g.double().numpy()), rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(a=st.floats(1e-10, 1e6), b=st.floats(1e-10, 1e6))
def test_scale_rotation_and_shift_do_not_matter(a, b):
    x, g = pair(20, 5, 5, dtype=torch.float64)
    Q = torch.linalg.qr(pair(5, 5, 1, dtype=torch.float64)[0])[0]
    for function in (rho, debiased_rho, iid_floor):
        assert function(a * x @ Q + a, b * g - b).item() == pytest.approx(function(x, g).item(), rel=1e-6)


def test_a_linear_image_is_fully_coupled_only_if_it_is_a_rotation():
    x, _ = pair(30, 5, 5)
    Q = torch.linalg.qr(pair(5, 5, 5)[0])[0]
    assert rho(x, x @ Q).item() == pytest.approx(1)
    assert rho(x, x @ torch.diag(torch.tensor([9.0, 1, 0.1, 0.1, 0]))).item() < 0.99


def test_iid_floor_is_the_mean_of_rho_squared_over_permutations():
    x, g = pair(50, 8, 6, dtype=torch.float64)
    squares = [rho(x, g[torch.randperm(50)]).item() ** 2 for _ in range(2000)]
    assert iid_floor(x, g).item() ** 2 == pytest.approx(np.mean(squares) * 49 / 50, rel=0.02)


@pytest.mark.parametrize("constant", ["x", "g"])
def test_a_constant_has_no_rho(constant):
    x, g = pair(20, 4, 4)
    x, g = (torch.full_like(x, 0.1), g) if constant == "x" else (x, torch.full_like(g, 1e-9))
    assert math.isnan(rho(x, g).item())
    assert math.isnan(debiased_rho(x, g).item())
    score = PooledDependenceScore()
    score.update(x, g)
    assert math.isnan(score.compute().item())
    assert math.isnan(score.debiased.item())


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"as many tokens but got \(5, 3\) and \(4, 3\)"):
        rho(torch.zeros(5, 3), torch.zeros(4, 3))


@settings(deadline=None, max_examples=20)
@given(**{**shapes, "s": st.integers(4, 40)})
def test_streamed_moments_give_the_same_rho_and_the_same_unbiased_hsic(s, n, m, seed):
    x, g = pair(s, n, m, seed, torch.float64)
    x, g = x + 3, g - 1
    score = PooledDependenceScore()
    for part_x, part_g in zip(x.split(7), g.split(7), strict=True):
        score.update(part_x, part_g)
    assert score.compute().item() == pytest.approx(rho_by_definition(x, g), rel=1e-8)
    grams = torch.stack([x @ x.T, g @ g.T])
    own, sums = grams.diagonal(dim1=1, dim2=2), grams.sum(2)
    xx, xg, gg = (
        hsic_unbiased((grams[i] * grams[j]).sum(), own[[i, j]], sums[[i, j]]) for i, j in ((0, 0), (0, 1), (1, 1))
    )
    if min(xx, gg) > 1e-3:
        ratio = (xg / (xx * gg).sqrt()).item()
        assert score.debiased.item() == pytest.approx(math.copysign(abs(ratio) ** 0.5, ratio), rel=1e-5, abs=1e-6)


def test_pooled_streams_merge():
    x, g = pair(30, 4, 3)
    whole, left, right = (PooledDependenceScore() for _ in range(3))
    whole.update(x, g)
    left.update(x[:10], g[:10])
    right.update(x[10:], g[10:])
    left.merge_state(right)
    assert left.compute().item() == pytest.approx(whole.compute().item())
    assert left.debiased.item() == pytest.approx(whole.debiased.item())


def coupled(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, 6, generator=generator, dtype=torch.float64) + 0.3
    return x, 0.5 * x[..., :5] + torch.randn(*shape, 5, generator=generator, dtype=torch.float64)


def between_by_definition(x, g):
    """|Sigma_uv|^2 by quadruples of different sequences (Song et al. 2012, Eq. 4), for x and x, x and g, g and g."""
    S = {u + v: torch.einsum("ali,alj->aij", a, b) / a.shape[1] for (u, a), (v, b) in product(
        (("x", x), ("g", g)), repeat=2)}  # fmt: skip
    means = {"x": x.mean(1), "g": g.mean(1)}
    found = {}
    for u, v in ("xx", "xg", "gg"):
        terms = []
        for a, b, c, d in permutations(range(len(x)), 4):
            p, q, T = means[u], means[v], S[u + v]
            crossed = (T[a] * torch.outer(p[b], q[c])).sum()
            terms.append((T[a] * T[b]).sum() - 2 * crossed + (p[a] @ p[c]) * (q[b] @ q[d]))
        found[u + v] = torch.stack(terms).mean()
    ratio = found["xg"] / (found["xx"] * found["gg"]).sqrt()
    return (ratio.sign() * ratio.abs().sqrt()).item()


def test_debiased_rho_of_sequences_is_that_of_its_definition():
    x, g = coupled(6, 5)
    assert debiased_rho(x, g).item() == pytest.approx(between_by_definition(x, g), rel=1e-9)
    x, g = coupled(6, 1)
    assert debiased_rho(x, g).item() == pytest.approx(between_by_definition(x, g), rel=1e-9)


def test_every_estimator_takes_tokens_and_sequences():
    x, g = coupled(8, 16)
    flat = x.flatten(0, 1), g.flatten(0, 1)
    for function in (rho, iid_floor):
        assert function(x, g).item() == pytest.approx(function(*flat).item(), rel=1e-12)
    assert debiased_rho(x[:, :1], g[:, :1]).item() == pytest.approx(debiased_rho(x[:, 0], g[:, 0]).item(), rel=1e-12)
    pooled, minibatch = PooledDependenceScore(), DependenceScore()
    for score in (pooled, minibatch):
        score.update(x, g)
    assert pooled.compute().item() == pytest.approx(rho(x, g).item(), rel=1e-9)
    assert pooled.debiased.item() == pytest.approx(debiased_rho(x, g).item(), rel=1e-9)
    # One minibatch of whole sequences: the same estimator from Gram matrices.
    assert minibatch.debiased.item() == pytest.approx(debiased_rho(x, g).item(), rel=1e-5)
    for function in (rho, debiased_rho, iid_floor, pooled.update, minibatch.update):
        with pytest.raises(ValueError, match=r"as many tokens but got \(8, 16, 6\) and \(128, 5\)"):
            function(x, flat[1])


def test_tokens_that_repeat_in_a_sequence_do_not_raise_the_debiased_rho():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 1, 8, generator=generator).expand(16, 12, 8)
    g = torch.randn(16, 1, 8, generator=generator).expand(16, 12, 8)
    as_tokens = debiased_rho(x.flatten(0, 1), g.flatten(0, 1)).item()
    assert abs(debiased_rho(x, g).item()) < 0.35 < 0.4 < as_tokens


def test_sequences_of_different_lengths_pool_and_a_shift_does_not_matter():
    parts = [coupled(4, 3, seed=1), coupled(5, 7, seed=2), coupled(6, seed=3)]
    whole, shifted, merged, rest = (PooledDependenceScore() for _ in range(4))
    for i, (x, g) in enumerate(parts):
        whole.update(x, g)
        shifted.update(x + 2, g - 1)
        (merged if i == 1 else rest).update(x, g)
    merged.merge_state(rest)
    assert whole.sequences == 15
    assert whole.tokens == 4 * 3 + 5 * 7 + 6
    assert shifted.debiased.item() == pytest.approx(whole.debiased.item(), rel=1e-6)
    assert merged.debiased.item() == pytest.approx(whole.debiased.item(), rel=1e-9)
    assert merged.compute().item() == pytest.approx(whole.compute().item(), rel=1e-9)


def test_scores_work_in_a_collection_and_draw():
    scores = MetricCollection(
        {"minibatch": DependenceScore(), "seeded": DependenceScore(1), "pooled": PooledDependenceScore()}
    )
    alone = {"minibatch": DependenceScore(), "seeded": DependenceScore(1), "pooled": PooledDependenceScore()}
    for seed in range(3):
        x, g = coupled(8, 16, seed=seed)
        values = scores(x, g)
        assert values["pooled"].item() == pytest.approx(rho(x, g).item())
        for score in alone.values():
            score.update(x, g)
    found = scores.compute()
    for name, score in alone.items():
        assert found[name].item() == pytest.approx(score.compute().item())
        assert scores[name].debiased.item() == pytest.approx(score.debiased.item())
    assert scores["seeded"].null.item() == pytest.approx(alone["seeded"].null.item())
    _, axes = scores["pooled"].plot()
    assert axes.get_ylim()[0] <= 0 < 1 <= axes.get_ylim()[1]
    _, axes = scores["minibatch"].plot([torch.tensor(v) for v in (0.1, 0.2, 0.3)])
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert len(scores.plot()) == 3
    scores.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert math.isnan(scores["pooled"].compute())


def test_pooled_and_minibatch_estimates_agree_only_without_bias():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator) / 8
    pooled, minibatch = PooledDependenceScore(), DependenceScore()
    for _ in range(100):
        x = torch.randn(32, 16, generator=generator)
        g = x @ mix + torch.randn(32, 16, generator=generator)
        pooled.update(x, g)
        minibatch.update(x, g)
    assert pooled.debiased.item() == pytest.approx(minibatch.debiased.item(), abs=0.01)
    assert minibatch.compute().item() > pooled.compute().item() + 0.1
    own = torch.linalg.matrix_norm(mix.T @ mix + torch.eye(16)).item()
    assert pooled.debiased.item() == pytest.approx(mix.norm().item() / math.sqrt(4 * own), abs=0.01)


def test_an_offset_does_not_cost_digits():
    x, g = pair(200, 6, 6, dtype=torch.float64)
    g = g + x
    assert debiased_rho(x + 1e6, g - 1e5).item() == pytest.approx(debiased_rho(x, g).item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_gradients_of_any_precision(dtype):
    h, W = torch.randn(5, 900), torch.randn(900, 7).to(dtype)
    torch.testing.assert_close(input_gradient(h.to(dtype), W), h.to(dtype).float() @ W.float(), rtol=1e-4, atol=1e-3)


def test_rho_of_calibration_moments_is_that_of_the_input_gradient():
    x, h = pair(40, 6, 5)
    W = torch.randn(5, 6)
    moments = CalibrationMoments({"layer": (5, 6)}, torch.float64, needs={"C"})
    moments.add_inputs(["layer"], x)
    moments.add_gradients("layer", h)
    moments.add_pairs("layer", x, h)
    assert pooled_rho(moments.layer("layer"), W).item() == pytest.approx(rho_by_definition(x, h @ W), rel=1e-6)
    assert abs(rho(x, h @ W) - rho(x, h)) > 1e-3  # the output gradient has another rho
    for x_, h_ in ((torch.full_like(x, 0.1), h), (x, torch.full_like(h, 1e-3))):
        constant = CalibrationMoments({"layer": (5, 6)}, needs={"C"})
        constant.add_inputs(["layer"], x_)
        constant.add_gradients("layer", h_)
        constant.add_pairs("layer", x_, h_)
        assert math.isnan(pooled_rho(constant.layer("layer"), W).item())
    plain = CalibrationMoments({"layer": (5, 6)}, torch.float64)
    plain.add_inputs(["layer"], x)
    plain.add_gradients("layer", h)
    with pytest.raises(ValueError, match=r"needs=\{'C'\}"):
        pooled_rho(plain.layer("layer"), W)
