from __future__ import annotations

import torch
from tiny import Tokens, causal_model

from fasc_lightning import CausalLMModule


def batch(padded=True):
    data = Tokens(samples=4, padded=padded)
    return {key: torch.stack([data[i][key] for i in range(4)]) for key in data[0]}


def test_loss_terms_are_the_losses_that_are_averaged():
    module = CausalLMModule(causal_model())
    inputs = batch()
    mean = module._loss(inputs)
    logits = module.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    log_probs = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    real = inputs["attention_mask"][:, 1:].bool()
    torch.testing.assert_close(mean * module.loss_terms(inputs), -log_probs[real].sum())


def test_labels_are_made_from_inputs_without_padding():
    module = CausalLMModule(causal_model())
    inputs = batch()
    labels = inputs.pop("labels")
    assert module.loss_terms(inputs) == int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(module._loss(inputs), module._loss({**inputs, "labels": labels}))


def test_the_mask_is_the_attention_mask():
    module = CausalLMModule(causal_model())
    inputs = batch()
    assert torch.equal(module.token_mask(inputs), inputs["attention_mask"].bool())
    assert module.token_mask({"input_ids": inputs["input_ids"]}) is None


def test_only_trainable_parameters_are_optimised():
    model = causal_model()
    model.model.layers[0].requires_grad_(False)
    optimizer = CausalLMModule(model, learning_rate=0.5).configure_optimizers()
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.5
    assert all(p.requires_grad for p in group["params"])
    assert len(group["params"]) == sum(p.requires_grad for p in model.parameters())
