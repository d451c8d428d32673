from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fasc_lightning.layers import make_lowrank
from fasc_lightning.refit import relative_error
from fasc_lightning.refit._block_steps import MIN_LENGTH, FactorCopies, train_copies


def block(dtype=torch.float32):
    layer = make_lowrank(torch.randn(6, 2), torch.randn(2, 4), torch.zeros(6), "pivot", dtype=dtype)
    other = nn.Linear(6, 3, dtype=dtype)
    return nn.Sequential(layer, other), {"0": layer}


def test_errors_are_relative_token_by_token():
    y, t = torch.randn(2, 3, 5), torch.randn(2, 3, 5) * torch.tensor([1.0, 100.0, 1e-3])[:, None]
    rows = torch.tensor([True, True, False, True, False, True])
    each = [
        float(((y[i, j] - t[i, j]) ** 2).sum() / (t[i, j] ** 2).sum()) for i, j in itertools.product(range(2), range(3))
    ]
    assert float(relative_error(y, t, None)) == pytest.approx(sum(each) / 6, rel=1e-5)
    real = [error for error, row in zip(each, rows, strict=True) if row]
    assert float(relative_error(y, t, rows)) == pytest.approx(sum(real) / 4, rel=1e-5)


def test_half_precision_is_compared_in_float32():
    y = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    error = relative_error(y + 0.0078125, y, None)
    assert error.dtype == torch.float32
    assert float(error) == pytest.approx(0.0078125**2, rel=1e-4)


def test_a_token_of_length_zero_does_not_divide_by_it():
    assert float(relative_error(torch.zeros(1, 3), torch.zeros(1, 3), None)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_copies_hold_the_factors_and_the_rest_of_the_block(dtype):
    module, layers = block(dtype)
    before = {name: p.clone() for name, p in module.named_parameters()}
    copies = FactorCopies(module, layers)
    assert copies.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    trained = {name for name, value in copies.tensors.items() if value.requires_grad}
    assert trained == {name for name, _ in module.named_parameters() if name.startswith("0.")}
    assert {value.dtype for value in copies.tensors.values()} == {copies.dtype}
    with torch.no_grad():
        for name in trained:
            copies.tensors[name] += 1
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    copies.store()
    for name, p in module.named_parameters():
        expected = (before[name].to(copies.dtype) + 1).to(dtype) if name in trained else before[name]
        assert torch.equal(p, expected)


def test_learning_rates_are_relative_to_each_tensors_length():
    module, layers = block()
    rates = sorted(group["lr"] for group in FactorCopies(module, layers).groups(0.5))
    lengths = sorted(max(float(p.detach().square().mean().sqrt()), MIN_LENGTH) for p in layers["0"].parameters())
    assert rates == pytest.approx([0.5 * length for length in lengths])
    assert rates[0] == 0.5 * MIN_LENGTH  # biases of zero move, too


def run(module, copies, x, target):
    return lambda i: relative_error(torch.func.functional_call(module, copies.tensors, (x,)), target, None)


def test_steps_are_those_of_adam_with_a_rate_that_falls_to_zero():
    module, layers = block()
    x, target = torch.randn(7, 4), torch.randn(7, 3)
    copies = FactorCopies(module, layers)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in layers["0"].named_parameters()}
    rates = {name: 0.1 * max(float(p.detach().square().mean().sqrt()), MIN_LENGTH) for name, p in leaves.items()}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in leaves.items()}
    for step in range(4):
        held = {f"0.{name}": p for name, p in leaves.items()}
        loss = relative_error(torch.func.functional_call(module, held, (x,)), target, None)
        for (name, p), g in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.999).add_(0.001 * g * g)
            unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            p.data -= rates[name] * (1 - step / 4) * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    assert train_copies(copies, run(module, copies, x, target), itertools.repeat(0), 4, 0.1)
    for name, p in leaves.items():
        torch.testing.assert_close(copies.tensors[f"0.{name}"], p)


def test_an_error_that_is_not_finite_ends_the_steps():
    module, layers = block()
    copies = FactorCopies(module, layers)
    target = torch.full((7, 3), torch.nan)
    assert not train_copies(copies, run(module, copies, torch.randn(7, 4), target), itertools.repeat(0), 4, 0.1)


def test_a_block_that_does_not_run_its_factors_has_nothing_to_train():
    module, layers = block()
    copies = FactorCopies(module, layers)
    assert not train_copies(copies, lambda i: torch.zeros(()), itertools.repeat(0), 4, 0.1)
