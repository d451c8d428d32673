from __future__ import annotations

import pytest
import torch
from evaluation_cases import learned_model, random_model
from tiny import byte_tokenizer


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    return random_model()


@pytest.fixture(scope="session")
def knowing_model():
    """A model that learned a dozen texts by heart, in a few seconds."""
    return learned_model()


@pytest.fixture
def reference():
    """Log-probability of ids after a prompt, by one plain forward pass."""

    def score(model, prompt, ids):
        with torch.no_grad():
            log_prob = model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0].log_softmax(-1)
        return sum(log_prob[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))

    return score
