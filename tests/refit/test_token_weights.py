from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from refit_cases import Stack, compressed_case, stack_loss
from torch import nn

from fasc_lightning.layers import compressed_layers, make_lowrank, swap_modules
from fasc_lightning.refit import RefitOptions, causal_loss, refit
from fasc_lightning.refit import _anchored as refit_module
from fasc_lightning.refit._blocks import BlockRunner
from fasc_lightning.refit._drift import TargetMoments
from fasc_lightning.refit._shares import shares
from fasc_lightning.refit._solve import Factors
from fasc_lightning.refit._token_weights import gradient_lengths, token_weights
from fasc_lightning.solvers import two_sided


def dense_twin(case):
    """The dense model of a case, in float64 and of its own."""
    twin = copy.deepcopy(case.model)
    swap_modules(twin, copy.deepcopy(case.dense))
    return twin.double()


def keep(seen, name, module, args, output):
    seen[name] = output
    output.retain_grad()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lengths_are_those_of_autograd_in_the_dense_model(family):
    case = compressed_case(family)
    case.model.requires_grad_(True)
    flags = [p.requires_grad for p in case.model.parameters()]
    runner = BlockRunner(case.model, case.dense, case.batches[:2], causal_loss)
    found = gradient_lengths(runner, case.dense, causal_loss)
    assert [p.requires_grad for p in case.model.parameters()] == flags
    weights = [layer.weight for layer in case.dense.values()]
    assert all(p.grad is None for p in (*case.model.parameters(), *weights))
    assert not any(m._forward_hooks for m in (*case.model.modules(), *case.dense.values()))
    twin = dense_twin(case).eval().requires_grad_(True)
    for batch, lengths in zip(case.batches[:2], found, strict=True):
        seen = {}
        hooks = [twin.get_submodule(name).register_forward_hook(partial(keep, seen, name)) for name in case.dense]
        causal_loss(twin, batch).backward()
        for hook in hooks:
            hook.remove()
        assert lengths.keys() == case.dense.keys()
        for name, length in lengths.items():
            expected = [h.norm() * len(length) for h in seen[name].grad.flatten(0, 1)]
            torch.testing.assert_close(length.double(), torch.stack(expected), rtol=1e-3, atol=1e-5)


def test_a_loss_without_a_graph_gives_no_lengths():
    case = compressed_case()

    @torch.no_grad()
    def detached(model, batch):
        return causal_loss(model, batch)

    runner = BlockRunner(case.model, case.dense, case.batches[:2], detached)
    assert gradient_lengths(runner, case.dense, detached) == [{}, {}]


def test_lengths_are_those_of_real_tokens_in_one_unit():
    """Padding has none, and the mean over a batch of half as many tokens has gradients twice as long."""
    case = compressed_case()
    batch = case.batches[0]
    ids = nn.functional.pad(batch["input_ids"], (0, 4), value=7)
    padded = {"input_ids": ids, "attention_mask": nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 4))}
    halves = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(2)]
    runner = BlockRunner(case.model, case.dense, [batch, padded, *halves], causal_loss)
    whole, real, *parts = gradient_lengths(runner, case.dense, causal_loss)
    for name, expected in whole.items():
        torch.testing.assert_close(real[name], expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), expected, rtol=1e-3, atol=1e-5)


def test_weights_have_mean_one():
    h = [torch.tensor([4.0, 8.0]), torch.tensor([1.0, 2.0, 3.0, 0.0])]
    one = [{"a": length} for length in h]
    found = token_weights(one, ["a"], [2, 4])
    assert [weight.tolist() for weight in found] == [
        pytest.approx([4 / 3, 8 / 3]), pytest.approx([1 / 3, 2 / 3, 1.0, 0.0]),
    ]  # fmt: skip
    both = [{"a": 3 * length, "b": 4 * length} for length in h]  # of all gradients of a group: |(3 h, 4 h)|
    for weight, expected in zip(token_weights(both, ["a", "b"], [2, 4]), found, strict=True):
        torch.testing.assert_close(weight, expected)
    assert token_weights(one, ["a"], [2, 3]) == []  # lengths of other tokens
    assert token_weights(one, ["b"], [2, 4]) == []
    assert token_weights([{"a": torch.zeros(3)}], ["a"], [3]) == []


def test_layers_are_fitted_by_weighted_least_squares(monkeypatch):
    """One block by hand: least squares whose rows are multiplied by the roots of the weights."""
    monkeypatch.setattr(refit_module, "SHRINK_A", 0.0)
    monkeypatch.setattr(refit_module, "SHRINK_COUPLED_G", 0.0)
    monkeypatch.setattr(TargetMoments, "error", lambda *arguments: float("inf"))  # every candidate is better
    monkeypatch.setattr(Factors, "error", lambda *arguments: 0.0)
    model = Stack(blocks=1).double()
    batches = [{"x": torch.randn(8, 5, 6).double()} for _ in range(8)]
    for batch in batches:
        batch["y"] = torch.randn(8, 5, 6).double()
    layer = model.blocks[0].linear
    W, G = layer.weight.detach(), torch.eye(6, dtype=torch.float64)
    dense = swap_modules(model, {"blocks.0.linear": make_lowrank(*two_sided(W, G, G).truncate(2), layout="factors")})
    fit, choose, _ = shares(8, 4)
    read = sorted(fit + choose)
    inputs = [batches[i]["x"].reshape(-1, 6) for i in read]
    # The gradient of the mean square of h + W h - y at W h, up to a factor that all tokens share.
    w = torch.cat(
        [(x + x @ W.T - batches[i]["y"].reshape(-1, 6)).norm(dim=1) for i, x in zip(read, inputs, strict=True)]
    )
    x, root = torch.cat(inputs), w.sqrt()[:, None]
    x_hat = x  # nothing before the block drifts
    T = torch.linalg.lstsq(root * x_hat, root * (x @ W.T)).solution.T
    B, C = two_sided(T, x_hat.T @ (w[:, None] * x_hat) / w.sum(), G).truncate(2)
    losses = iter([[1.0, 1.0], [0.5, 0.5]])
    monkeypatch.setattr(refit_module, "batch_losses", lambda *arguments: next(losses))
    options = RefitOptions(holdout=4, anchors=(0.0,), target="layer")
    report = refit(model, dense, {"blocks.0.linear": G}, batches, loss=stack_loss, options=options)
    assert report.accepted == 1
    found = compressed_layers(model)["blocks.0.linear"]
    torch.testing.assert_close(found.to_weight(), B @ C, rtol=1e-5, atol=1e-6)


def test_gradients_that_are_not_finite_undo_the_refit():
    case = compressed_case()
    before = {name: value.clone() for name, value in case.model.state_dict().items()}

    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")

    def loss(model, batch):
        return Infinite.apply(causal_loss(model, batch))

    with pytest.raises(FloatingPointError, match="finite gradients"):
        refit(*case.refit_arguments(), loss=loss, options=RefitOptions(holdout=4))
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
