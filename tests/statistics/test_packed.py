from __future__ import annotations

import pytest
import torch

from fasc_lightning.statistics import add_gram_, packed_size, unpack
from fasc_lightning.statistics._packed import packed_diagonal


@pytest.mark.parametrize("d", [1, 3, 64, 200, 500, 1200])
def test_blocked_gram_is_the_product(d):
    X = torch.randn(37, d, dtype=torch.float64)
    packed = torch.zeros(packed_size(d), dtype=torch.float64)
    add_gram_(packed, X, 2.0)
    torch.testing.assert_close(unpack(packed, d), 2 * X.T @ X)
    if d >= 500:
        assert packed_size(d) < 0.7 * d * d


@pytest.mark.parametrize("d", [3, 70, 400])
def test_a_symmetric_product_of_two_and_its_diagonal(d):
    X, S = torch.randn(20, d, dtype=torch.float64), torch.randn(20, 20, dtype=torch.float64)
    S = S + S.T
    packed = torch.zeros(packed_size(d), dtype=torch.float64)
    add_gram_(packed, X, -0.5, S @ X)
    expected = -0.5 * X.T @ S @ X
    torch.testing.assert_close(unpack(packed, d), expected)
    torch.testing.assert_close(packed_diagonal(packed, d), expected.diagonal())
