from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest
import torch
from packed_cases import round_layers
from tiny import Tokens, causal_model, causal_module, token_loader

from fasc_lightning import CausalLMModule, FascCallback
from fasc_lightning.layers import Grid, is_compressed, packed_matrices, select_layers


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


def test_scales_of_rounded_matrices_take_a_rate_of_their_own():
    model = causal_model()
    round_layers(model, select_layers(model), [Grid(4, 16)])
    matrices = packed_matrices(model)
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    for matrix in matrices:
        matrix.widen_scales()
    module = CausalLMModule(model, learning_rate=0.5, weight_decay=0.1)
    rest, scales = module.configure_optimizers().param_groups
    assert [id(p) for p in rest["params"]] == [id(model.model.norm.weight)]
    assert {id(p) for p in scales["params"]} == {id(matrix.weight_scale) for matrix in matrices}
    assert (rest["lr"], rest["weight_decay"]) == (0.5, 0.1)
    assert (scales["lr"], scales["weight_decay"]) == (2.0, 0.0)
    model.model.norm.requires_grad_(False)
    assert len(module.configure_optimizers().param_groups) == 1  # the scales alone


class Rates(pl.Callback):
    """The learning rate of each step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_a_cosine_warms_up_and_falls_to_a_tenth(make_trainer):
    module, rates = causal_module(), Rates()
    module.schedule = "cosine"
    # 100 batches in two epochs, two a step.
    make_trainer(rates, max_epochs=2, accumulate_grad_batches=2).fit(module, token_loader(batch_size=1, samples=100))
    shares = [rate / module.learning_rate for rate in rates.seen]
    assert len(shares) == 100
    assert shares[:10] == pytest.approx([i / 11 for i in range(1, 11)])
    after = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 90)) / 2 for i in range(90)]
    assert shares[10:] == pytest.approx(after)
    assert 0.1 < shares[-1] < 0.101


def test_a_cosine_needs_a_fit_of_known_length(make_trainer):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(token_loader().dataset)

    module = causal_module()
    module.schedule = "cosine"
    loader = torch.utils.data.DataLoader(Endless(), batch_size=2)
    for length in ({"max_epochs": 1}, {"max_epochs": -1}):
        with pytest.raises(ValueError, match=r"known length.* max_steps"):
            make_trainer(**length).fit(module, loader)
    make_trainer(max_epochs=-1, max_steps=2).fit(module, loader)


def test_schedules_there_are_not_are_refused():
    with pytest.raises(ValueError, match="'constant' or 'cosine' but got 'linear'"):
        CausalLMModule(causal_module().model, schedule="linear")


class Modes(pl.Callback):
    """The parts of the model in training mode at each step, and in validation."""

    def __init__(self):
        self.training, self.validation = [], []

    def on_before_backward(self, trainer, pl_module, loss):
        self.training.append({name for name, part in pl_module.model.named_modules() if part.training})

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self.validation.append(pl_module.model.training)


def dropping(**settings):
    """A model with dropout, as `from_pretrained` returns it."""
    return causal_model(attention_dropout=0.5, **settings).eval()


def test_a_model_in_eval_mode_trains_in_training_mode(make_trainer):
    model, modes = dropping(), Modes()
    module = CausalLMModule(model)
    make_trainer(modes, max_epochs=2, num_sanity_val_steps=0).fit(module, token_loader(), token_loader(samples=2))
    assert modes.training == [{name for name, _ in model.named_modules()}] * 8
    assert set(modes.validation) == {False}
    assert not any(part.training for part in model.modules())


def test_dropout_acts_on_a_model_in_eval_mode(make_trainer):
    losses = []

    class Watching(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            losses.append(loss.item())

    for seed in (1, 2):
        module = CausalLMModule(dropping())
        torch.manual_seed(seed)
        make_trainer(Watching(), max_steps=1).fit(module, token_loader())
    assert losses[0] != losses[1]


def test_parts_in_eval_mode_of_a_model_in_training_mode_stay_so(make_trainer):
    model, modes = dropping().train(), Modes()
    model.model.layers[0].eval()
    before = {name: part.training for name, part in model.named_modules()}
    make_trainer(modes).fit(CausalLMModule(model), token_loader())
    assert modes.training == [{name for name, training in before.items() if training}] * 4
    assert {name: part.training for name, part in model.named_modules()} == before


@pytest.mark.parametrize("update_weights", [True, False])
def test_a_compression_returns_the_mode_and_calibrates_in_its_own(make_trainer, update_weights):
    model, modes = dropping(), Modes()
    callback = FascCallback(keep=0.8, update_weights=update_weights)
    make_trainer(callback, modes).fit(CausalLMModule(model), token_loader())
    assert is_compressed(model)
    assert [bool(names) for names in modes.training] == [update_weights] * 4
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("callbacks", [lambda: [FascCallback(keep=0.8)], lambda: [FascCallback(monitor=1)]])
def test_a_fit_that_fails_returns_the_mode(make_trainer, callbacks):
    class Failing(pl.Callback):
        def on_train_batch_end(self, *args):
            raise InterruptedError

    model = dropping()
    with pytest.raises(InterruptedError):
        make_trainer(*callbacks(), Failing()).fit(CausalLMModule(model), token_loader())
    assert not any(part.training for part in model.modules())
