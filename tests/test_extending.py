"""Solvers and allocations of a user's own, wherever an option takes them."""

from __future__ import annotations

import pytest
import torch
from jsonargparse import ArgumentParser
from tiny import causal_model, causal_module, token_loader

from fasc_lightning import FascCallback, compress, plan
from fasc_lightning.cli import add_compression_options, compression_options
from fasc_lightning.compression import StorageOptions, available_allocations, register_allocation, spend
from fasc_lightning.layers import is_compressed
from fasc_lightning.solvers import Factorization, available_methods, register_solver, solver_needs, svd_llm


def mine(W, moments):
    """svd-llm under another name; it reads C, too."""
    assert moments.require("C").shape == (W.shape[1], W.shape[0])
    return svd_llm(W, moments)


@pytest.fixture
def names():
    register_solver("mine", needs=["C"])(mine)
    seen = []

    @register_allocation("mine")
    def allocate(options, budget):
        seen.append((list(options), budget))
        return spend(options, budget)

    return seen


def test_a_solver_and_an_allocation_serve_a_fit(make_trainer, names):
    callback = FascCallback(keep=0.8, method="mine", allocation="mine", refit=False)
    make_trainer(callback).fit(causal_module(), token_loader())
    assert callback.report.method == "mine"
    assert callback.report.options["allocation"] == "mine"
    assert {layer.method for layer in callback.report.layers} == {"mine"}
    builtin = FascCallback(keep=0.8, method="svd-llm", allocation="fisher", refit=False)
    make_trainer(builtin).fit(causal_module(), token_loader())
    assert [(p.name, p.rank) for p in callback.report.layers] == [(p.name, p.rank) for p in builtin.report.layers]
    assert "mine" in repr(callback)


def test_an_allocation_sees_every_layer_with_costs_and_losses(names):
    model = causal_model()
    report = compress(model, token_loader(), keep=0.8, allocation="mine", progress=False)
    (options, budget), second = names  # predicted losses, then corrected ones
    assert [o.name.removeprefix("model.") for o in options] == [layer.name for layer in report.layers]
    assert [o.shape for o in options] == [layer.shape for layer in report.layers]
    for option, corrected in zip(options, second[0], strict=True):
        assert isinstance(option, StorageOptions)
        assert option.losses[-1] == 0
        assert option.costs[-1] == option.shape[0] * option.shape[1]
        assert (option.costs == corrected.costs).all()
    assert any((o.losses != c.losses).any() for o, c in zip(options, second[0], strict=True))
    assert budget == second[1] == sum(int(0.8 * m * n) for m, n in (o.shape for o in options))


def test_an_allocation_serves_sizes_in_bytes_too(names):
    same = compress(causal_model(), token_loader(), size=0.3, progress=False)
    report = compress(causal_model(), token_loader(), size=0.3, allocation="mine", progress=False)
    assert report.targeted == same.targeted
    assert names[0][0][0].costs[-1] == 2 * 32 * 32


def test_predicted_losses_alone_are_spent_once(names):
    calls = []

    @register_allocation("once", measures=False)
    def once(options, budget):
        calls.append(budget)
        return spend(options, budget)

    compress(causal_model(), token_loader(), keep=0.8, allocation="once", progress=False)
    assert len(calls) == 1


def test_plans_and_command_lines_know_them(names):
    model = causal_model()
    assert plan(model, keep=0.8, method="mine", allocation="mine", probed=False).parts["moments"] > 0
    parser = ArgumentParser()
    add_compression_options(parser, "rank 0.5")
    found = compression_options(parser.parse_args(["--method", "mine", "--allocation", "mine"]))
    assert (found["method"], found["allocation"]) == ("mine", "mine")
    assert available_methods().count("mine") == 1
    assert available_allocations() == ["measured", "fisher", "uniform", "mine"]
    assert solver_needs("mine") == {"C", "plain"}


@pytest.mark.parametrize("option", ["method", "allocation"])
def test_names_of_one_test_are_gone_in_the_next(option):
    with pytest.raises(ValueError, match=f"Expected `{option}` to be one of .* but got 'mine'"):
        FascCallback(keep=0.8, **{option: "mine"})


def test_wrong_registrations_are_refused_at_once():
    with pytest.raises(ValueError, match=r"'fasc' is registered already, for fasc_lightning\.solvers"):
        register_solver("fasc")(mine)
    with pytest.raises(ValueError, match="'uniform' is registered already"):
        register_allocation("uniform")(lambda options, budget: [])
    with pytest.raises(TypeError, match=r"solver 'one' to be a function of \(W, moments\) but it takes \(W\)"):
        register_solver("one")(lambda W: W)
    with pytest.raises(TypeError, match=r"allocation 'one' to be a function of \(options, budget\) but it takes"):
        register_allocation("one")(lambda options: options)
    with pytest.raises(TypeError, match=r"HINT: @register_solver\('mine'\)"):
        register_solver(mine)
    with pytest.raises(TypeError, match=r"needs=\['C'\]"):
        register_solver("one", needs="C")
    with pytest.raises(ValueError, match="among plain, coupled"):
        register_solver("one", needs=["hessian"])
    assert "one" not in [*available_methods(), *available_allocations()]


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda W: None, TypeError, "'wrong' to return a Factorization but got NoneType"),
        (lambda W: (W, W, W), TypeError, "to return a Factorization but got tuple"),
        (
            lambda W: Factorization(W[:, :2], W[:3], torch.zeros(3)),
            ValueError,
            r"losses \(r \+ 1,\) for a weight of shape",
        ),
        (lambda W: Factorization(W[:, :0], W[:0], torch.zeros(1)), ValueError, "with r up to"),
        (lambda W: Factorization(W[:, :1], W[:1], torch.tensor([1.0, torch.nan])), ValueError, "finite losses"),
    ],
)
def test_what_a_solver_returns_is_checked(returned, error, message):
    register_solver("wrong")(lambda W, moments: returned(W))
    model = causal_model()
    with pytest.raises(error, match=message):
        compress(model, token_loader(), keep=0.8, method="wrong", progress=False)
    assert not is_compressed(model)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda options: [0], "to return 14 indexes"),
        (lambda options: None, "of its layer, but got None"),
        (lambda options: [0.5 for _ in options], "of its layer, but got"),
        (lambda options: [-1 for _ in options], "each of one option of its layer"),
        (lambda options: [len(o.costs) for o in options], "each of one option of its layer"),
        (lambda options: [len(o.costs) - 1 for o in options], "to spend at most [0-9,]+ but its choice costs"),
    ],
)
@pytest.mark.parametrize("budget", [{"keep": 0.8}, {"size": 0.3}])
def test_what_an_allocation_returns_is_checked(returned, message, budget):
    register_allocation("wrong")(lambda options, budget: returned(options))
    model = causal_model()
    with pytest.raises(
        (TypeError, ValueError), match=f"Expected allocation 'wrong' {message}|Expected allocation 'wrong' .*{message}"
    ):
        compress(model, token_loader(), **budget, allocation="wrong", progress=False)
    assert not is_compressed(model)
