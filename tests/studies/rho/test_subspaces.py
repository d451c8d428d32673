from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasc_lightning.compression import fisher_losses, fisher_metric
from fasc_lightning.solvers import fasc, svd
from fasc_lightning.statistics import LayerMoments
from fasc_lightning.studies.rho import compare_layer, log_ratio
from fasc_lightning.studies.rho._subspaces import input_subspace, principal_angles, random_angles


def random_moments(m: int, n: int, tokens: int = 200) -> LayerMoments:
    x = torch.randn(tokens, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64)
    h = torch.randn(tokens, m, dtype=torch.float64) @ torch.randn(m, m, dtype=torch.float64)
    by_h, by_x = h.norm(dim=1, keepdim=True), x.norm(dim=1, keepdim=True)
    coupled = (x * by_h).T @ x / by_h.sum(), (h * by_x).T @ h / by_x.sum()
    return LayerMoments(x.T @ x / tokens, h.T @ h / tokens, x.mean(0), h.mean(0), tokens, coupled=coupled)


def orthonormal(n: int, k: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64))[0]


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 12), k=st.integers(1, 12), tilt=st.floats(-16, 1), seed=st.integers(0, 99))
def test_angles_agree_with_scipy(n, k, tilt, seed):
    torch.manual_seed(seed)
    k = min(n, k)
    Q1 = orthonormal(n, k)
    Q2 = torch.linalg.qr(Q1 + 10**tilt * torch.randn(n, k, dtype=torch.float64))[0]
    expected = np.rad2deg(scipy.linalg.subspace_angles(Q1.numpy(), Q2.numpy()))[::-1]
    # scipy takes an angle of zero from its cosine at times, which is exact to 1e-6 degrees only.
    np.testing.assert_allclose(principal_angles(Q1, Q2).numpy(), expected, rtol=1e-6, atol=3e-6)


def test_angles_of_planes_made_by_hand():
    degrees = torch.tensor([1e-9, 1e-4, 30.0, 89.9999, 90.0], dtype=torch.float64)
    radians = torch.deg2rad(degrees)
    eye = torch.eye(10, dtype=torch.float64)
    Q1, Q2 = eye[:, :5], eye[:, :5] * radians.cos() + eye[:, 5:] * radians.sin()
    torch.testing.assert_close(principal_angles(Q1, Q2), degrees, rtol=1e-9, atol=0)


def test_bases_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="bases of one shape"):
        principal_angles(torch.eye(3)[:, :2], torch.eye(3)[:, :1])


@pytest.mark.parametrize("method", [fasc, svd])
def test_an_input_subspace_is_the_row_space_of_the_approximation(method):
    W, moments = torch.randn(6, 9, dtype=torch.float64), random_moments(6, 9)
    found = method(W, moments)
    Q = input_subspace(found, 3)
    assert Q.shape == (9, 3)
    torch.testing.assert_close(Q.T @ Q, torch.eye(3, dtype=torch.float64))
    B, C = found.truncate(3)
    torch.testing.assert_close(B @ C @ Q @ Q.T, B @ C)


def test_random_subspaces_of_half_the_dimension_are_at_45_degrees():
    angles = random_angles(200, 100)
    assert angles.median().item() == pytest.approx(45, abs=2)
    assert torch.equal(angles, random_angles(200, 100))
    assert not torch.equal(angles, random_angles(200, 100, seed=1))


def test_a_comparison_holds_both_solvers_at_one_rank():
    W, moments = torch.randn(7, 5), random_moments(7, 5)
    compared = compare_layer(W, moments, 2)
    assert set(compared.losses) == set(compared.approximations) == {"fasc", "svd"}
    for name, solver in (("fasc", fasc), ("svd", svd)):
        found = solver(W, moments)
        B, C = found.truncate(2)
        torch.testing.assert_close(compared.approximations[name], (B @ C).float())
        expected = fisher_losses(W, *fisher_metric(moments), found)[2].item()
        assert compared.losses[name] == pytest.approx(expected)
    assert compared.gain == pytest.approx(math.log10(compared.losses["svd"] / compared.losses["fasc"]))
    bases = [np.linalg.svd(compared.approximations[name].numpy())[2][:2].T for name in ("fasc", "svd")]
    expected_angles = np.rad2deg(scipy.linalg.subspace_angles(*bases))[::-1]
    np.testing.assert_allclose(compared.angles.numpy(), expected_angles, rtol=1e-3)


def test_the_gain_is_never_negative_in_the_metric_that_fasc_minimises():
    for seed in range(5):
        torch.manual_seed(seed)
        assert compare_layer(torch.randn(8, 8), random_moments(8, 8), 1 + seed, "fasc", "svd").gain >= 0


def test_one_solver_compared_with_itself_gains_nothing():
    W, moments = torch.randn(6, 8), random_moments(6, 8)
    compared = compare_layer(W, moments, 3, method="svd-llm", baseline="svd-llm")
    assert compared.gain == 0
    assert compared.angles.max() < 1e-5


def test_full_rank_keeps_every_direction():
    compared = compare_layer(torch.randn(9, 4), random_moments(9, 4), 4)
    assert compared.angles.max() < 1e-5


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_that_cannot_be_is_refused(rank):
    with pytest.raises(ValueError, match=rf"from 1 to min\(m, n\) = 5 but got {rank}"):
        compare_layer(torch.randn(7, 5), random_moments(7, 5), rank)


def test_ratios_of_nothing():
    assert log_ratio(10.0, 0.1) == pytest.approx(2)
    assert log_ratio(1e-300, 1e300) == pytest.approx(-600)
    assert log_ratio(1.0, 0.0) == math.inf
    assert log_ratio(0.0, 1.0) == -math.inf
    assert math.isnan(log_ratio(0.0, 0.0))
    assert math.isnan(log_ratio(math.nan, 1.0))
