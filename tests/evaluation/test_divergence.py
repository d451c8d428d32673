from __future__ import annotations

import copy

import pytest
import torch
from evaluation_cases import random_model

from fasc_lightning.evaluation import log_probabilities, window_divergences


@pytest.fixture
def models():
    """A dense model and one with other weights, in float32."""
    dense = random_model().float()
    other = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return dense, other


@pytest.fixture
def windows():
    return torch.randint(3, 259, (5, 12), generator=torch.Generator().manual_seed(0))


def in_float64(dense, other, windows):
    """The divergence of each window by its definition, token by token of the vocabulary."""
    found = []
    for window in windows:
        with torch.no_grad():
            p, q = (copy.deepcopy(m).double().eval()(window[None]).logits[0, :-1].softmax(-1) for m in (dense, other))
        found.append(sum(float((row_p * (row_p / row_q).log()).sum()) for row_p, row_q in zip(p, q, strict=True)))
    return torch.tensor(found, dtype=torch.float64) / (windows.shape[1] - 1)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_divergences_equal_their_definition_in_float64(models, windows, batch_size):
    kept = log_probabilities(models[0], windows, batch_size)
    assert (kept.dtype, kept.device.type, tuple(kept.shape)) == (torch.float16, "cpu", (5, 11, 259))
    found = window_divergences(models[1], windows, kept, batch_size)
    expected = in_float64(*models, windows)
    assert float(expected.min()) > 0.01
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)


def test_small_divergences_survive_the_rounding_of_what_is_kept(models, windows):
    dense, other = models
    with torch.no_grad():
        for p, q in zip(dense.parameters(), other.parameters(), strict=True):
            q.copy_(p + (q - p) / 20)
    found = window_divergences(other, windows, log_probabilities(dense, windows))
    expected = in_float64(dense, other, windows)
    assert float(expected.max()) < 2e-3
    torch.testing.assert_close(found.mean(), expected.mean(), rtol=0.05, atol=1e-6)


def test_a_model_diverges_from_itself_by_nothing(models, windows):
    found = window_divergences(models[0], windows, log_probabilities(models[0], windows))
    assert found.dtype == torch.float64
    assert 0 <= float(found.min()) <= float(found.max()) < 1e-6


def test_a_uniform_model_diverges_by_the_missing_entropy(models, windows):
    dense, other = models
    with torch.no_grad():
        other.lm_head.weight.zero_()
        p = dense(windows).logits[:, :-1].double().softmax(-1)
    missing = torch.tensor(259.0).log() + (p * p.log()).sum(-1).mean(1)
    found = window_divergences(other, windows, log_probabilities(dense, windows))
    torch.testing.assert_close(found, missing, rtol=1e-3, atol=1e-4)


def test_tokens_that_a_model_never_predicts_count_nothing(models, windows):
    dense, other = models
    for model in models:
        model.lm_head.register_forward_hook(
            lambda _, inputs, logits: logits.index_fill(-1, torch.tensor([0]), -torch.inf)
        )
    found = window_divergences(other, windows, log_probabilities(dense, windows))
    assert bool(found.isfinite().all())
    assert float(found.min()) > 0.01


def test_modes_are_left_as_they_were(models, windows):
    for model in models:
        model.train()
    window_divergences(models[1], windows, log_probabilities(models[0], windows))
    assert all(module.training for model in models for module in model.modules())


def test_numbers_that_overflow_name_their_window(models, windows):
    dense, other = models
    kept = log_probabilities(dense, windows)
    hidden = torch.zeros(1, dtype=torch.long)
    other.lm_head.register_forward_hook(lambda _, inputs, logits: logits.index_fill(-1, hidden, -torch.inf))
    with pytest.raises(FloatingPointError, match="divergence of window 0 is not finite"):
        window_divergences(other, windows, kept)
    with torch.no_grad():
        dense.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="window 0 hold NaN"):
        log_probabilities(dense, windows)


def test_other_windows_and_vocabularies_are_refused(models, windows):
    kept = log_probabilities(models[0], windows)
    for wrong in (kept[:2], kept[:, :3], kept[..., :50]):
        with pytest.raises(ValueError, match="same windows and the same vocabulary"):
            window_divergences(models[1], windows, wrong)


@pytest.mark.parametrize("shape", [(0, 5), (2, 1), (6,)])
def test_empty_windows_are_refused(models, shape):
    with pytest.raises(ValueError, match="Expected at least one window of at least 2 tokens"):
        log_probabilities(models[0], torch.zeros(shape, dtype=torch.long))
