from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fasc_lightning._utils import evaluating
from fasc_lightning.evaluation._perplexity import MeanTokenLoss, perplexity, token_losses


@pytest.fixture
def model():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.5,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def windows():
    return torch.randint(0, 13, (5, 9), generator=torch.Generator().manual_seed(0))


def reference_losses(model, windows):
    """Token by token, each from its own forward pass over what comes before it, in float64."""
    model = model.double().eval()
    losses = torch.zeros(len(windows), windows.shape[1] - 1, dtype=torch.float64)
    for i, window in enumerate(windows):
        for t in range(1, len(window)):
            with torch.no_grad():
                logits = model(window[None, :t]).logits[0, -1]
            losses[i, t - 1] = -logits.log_softmax(-1)[window[t]]
    model.float()
    return losses


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity_equals_a_token_by_token_reference(model, windows, batch_size):
    expected = reference_losses(model, windows)
    assert perplexity(model, windows, batch_size) == pytest.approx(float(expected.mean().exp()), rel=1e-5)
    losses = token_losses(model, windows, batch_size)
    torch.testing.assert_close(losses, expected.mean(1), rtol=1e-5, atol=1e-6)
    assert losses.dtype == torch.float64


def test_chance_is_the_size_of_the_vocabulary(model, windows):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, windows) == pytest.approx(13.0, rel=1e-6)


def test_the_loss_of_transformers_agrees(model, windows):
    model.eval()
    with torch.no_grad():
        loss = model(windows, labels=windows).loss
    assert perplexity(model, windows) == pytest.approx(math.exp(loss), rel=1e-5)


def test_modes_gradients_and_caches_are_left_as_they_were(model, windows):
    model.train()
    model.model.layers[0].eval()  # a frozen part of a model in training
    modes = [module.training for module in model.modules()]
    first = perplexity(model, windows)
    assert first == perplexity(model, windows)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_after_an_error(model):
    model.train()
    seen = []

    def fail():
        with evaluating(model):
            seen.append(model.training)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert seen == [False]
    assert model.training


def test_a_non_finite_loss_names_its_window(model, windows):
    with torch.no_grad():
        model.model.embed_tokens.weight[12] = float("inf")
    windows = windows.clamp_max(11)
    windows[3, 4] = 12
    model.train()
    with pytest.raises(FloatingPointError, match="loss of window 3 is not finite"):
        perplexity(model, windows, batch_size=2)
    with pytest.raises(FloatingPointError, match="window 3"):
        token_losses(model, windows, batch_size=5)
    assert model.training


@pytest.mark.parametrize("shape", [(0, 5), (2, 1), (6,)])
def test_empty_windows_are_refused(model, shape):
    with pytest.raises(ValueError, match="Expected at least one window of at least 2 tokens"):
        perplexity(model, torch.zeros(shape, dtype=torch.long))


def test_mean_token_loss_merges_and_resets():
    losses = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    whole, first, second = MeanTokenLoss(), MeanTokenLoss(), MeanTokenLoss()
    whole.update(losses)
    first.update(losses[:1])
    second.update(losses[1:])
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), losses.double().mean())
    torch.testing.assert_close(whole.compute(), first.compute())
    whole.reset()
    whole.update(losses[2])
    torch.testing.assert_close(whole.compute(), losses[2].double().mean())


def test_mean_token_loss_keeps_small_differences_over_many_tokens():
    metric = MeanTokenLoss()
    metric.update(torch.tensor([1e8]))
    for _ in range(50):
        metric.update(torch.ones(1))
    # float32 would lose every one of the ones.
    assert metric.loss_sum.item() == 1e8 + 50


def test_losses_are_computed_in_float32_for_half_precision_models(model, windows):
    model.eval().bfloat16()
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].float()
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert perplexity(model, windows) == pytest.approx(float(expected.exp()), rel=1e-3)
