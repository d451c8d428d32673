from __future__ import annotations

import copy
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from refit_cases import Stack, arguments, compressed_case, interrupted_loss, same, stack_loss, state
from tiny import FAMILIES
from torch import nn

from fasc_lightning.layers import LowRankLinear, PivotedLinear, compressed_layers, make_lowrank, swap_modules
from fasc_lightning.refit import RefitOptions, causal_loss, refit
from fasc_lightning.refit import _block_training as refine_module
from fasc_lightning.refit._block_steps import FactorCopies
from fasc_lightning.refit._block_training import refine
from fasc_lightning.refit._shares import Change

#: Few and small, for models of two blocks.
FEW = {"steps": 20, "lr": 1e-2, "holdout": 4}


def held_loss(case):
    held = case.batches[3::4]
    with torch.no_grad():
        return sum(causal_loss(case.model, batch).item() for batch in held) / len(held)


def last_hidden(model, batches):
    with torch.no_grad():
        outputs = [model(input_ids=batch["input_ids"], output_hidden_states=True) for batch in batches]
    return [output.hidden_states[-2] for output in outputs]  # before the last block, whose output is normalised here


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_err_less_and_lose_no_more_with_the_same_layers(family):
    case = compressed_case(family, rank=0.2)
    before = held_loss(case)
    layers = compressed_layers(case.model)
    kinds = {name: (type(layer), layer.rank, id(layer)) for name, layer in layers.items()}
    ids = [id(p) for p in case.model.parameters()]
    report = refine(*arguments(case), **FEW)
    assert report.loss_before == pytest.approx(before, rel=1e-5)
    assert (before if report.reverted else report.loss_after) == pytest.approx(held_loss(case), rel=1e-5)
    assert held_loss(case) <= before
    assert report.blocks[0].after < report.blocks[0].before
    assert all(block.accepted is (block.after < block.before) for block in report.blocks)
    assert sorted(name for block in report.blocks for name in block.layers) == sorted(case.dense)
    assert kinds == {
        name: (type(layer), layer.rank, id(layer)) for name, layer in compressed_layers(case.model).items()
    }
    assert ids == [id(p) for p in case.model.parameters()]
    assert (report.fit_batches, report.held_batches, report.tokens) == (9, 3, 12 * 48)


def test_hidden_states_come_nearer_to_the_dense_models_than_the_closed_form_brought_them(monkeypatch):
    monkeypatch.setattr(Change, "is_gain", True)  # whatever twelve batches can tell, the closed form stays
    case = compressed_case(rank=0.3)
    held = case.batches[3::4]
    compressed = swap_modules(case.model, case.dense)
    exact = last_hidden(case.model, held)
    swap_modules(case.model, compressed)

    def error():
        pairs = zip(last_hidden(case.model, held), exact, strict=True)
        return sum(float((found - t).square().sum() / t.square().sum()) for found, t in pairs)

    errors = [error()]
    refit(*case.refit_arguments(), options=RefitOptions(holdout=4))
    errors.append(error())
    refine(*arguments(case), **FEW)
    errors.append(error())
    assert errors[2] < errors[1] < errors[0]


def test_the_held_out_loss_falls_below_what_the_closed_form_reached(monkeypatch):
    monkeypatch.setattr(Change, "is_gain", True)
    case = compressed_case(rank=0.3)
    refit(*case.refit_arguments(), options=RefitOptions(holdout=4))
    before = held_loss(case)
    report = refine(*arguments(case), **FEW)
    assert held_loss(case) < before
    assert report.loss_after == pytest.approx(held_loss(case), rel=1e-5)
    assert str(report).startswith("Refinement: 2 of 2 blocks, 20 steps each, held-out loss")


def linear_stack():
    """Two residual linear blocks of rank 2 out of 6, in float64, and batches."""
    model = Stack().double()
    batches = [{"x": torch.randn(3, 5, 6).double(), "y": torch.zeros(3, 5, 6).double()} for _ in range(8)]
    replacements = {
        f"blocks.{i}.linear": make_lowrank(torch.randn(6, 2).double(), torch.randn(2, 6).double(), layout="factors")
        for i in range(2)
    }
    return model, swap_modules(model, replacements), batches


@pytest.mark.parametrize("target", ["dense", "drifted"])
def test_the_target_is_the_dense_block_on_dense_or_on_drifted_inputs(target):
    model, dense, batches = linear_stack()
    report = refine(model, dense, batches, loss=stack_loss, steps=5, holdout=8, target=target)
    x = batches[7]["x"].reshape(-1, 6)
    first, second = (dense[f"blocks.{i}.linear"].weight for i in range(2))
    with torch.no_grad():
        drifted = model.blocks[0](x)  # refined by now
        given = x + x @ first.T if target == "dense" else drifted
        expected = given + given @ second.T
        output = drifted + drifted @ model.blocks[1].linear.to_weight().T
        error = float(((output - expected).square().sum(1) / expected.square().sum(1)).mean())
    assert not report.reverted
    assert [block.accepted for block in report.blocks] == [True, True]
    assert report.blocks[1].after == pytest.approx(error, rel=1e-9)


def test_many_steps_reach_the_best_factors_there_are():
    """One linear block, whose best factors of full rank are the dense matrix; with the rank to hold it."""
    model = Stack(blocks=1).double()
    batches = [{"x": torch.randn(3, 5, 6).double(), "y": torch.zeros(3, 5, 6).double()} for _ in range(8)]
    W = model.blocks[0].linear.weight.detach()
    U, S, V = torch.linalg.svd(W)
    noisy = make_lowrank(U * S + 0.1 * torch.randn(6, 6).double(), V, layout="factors")
    dense = swap_modules(model, {"blocks.0.linear": noisy})
    report = refine(model, dense, batches, loss=stack_loss, steps=400, lr=3e-2)
    assert report.blocks[0].before > 1e-3
    assert report.blocks[0].after < 1e-9
    torch.testing.assert_close(noisy.to_weight(), W, rtol=0, atol=1e-3)


def test_what_does_not_carry_over_is_not_accepted():
    """Batches that are fitted to hold noise, those that are held out the text that the model was compressed on."""
    case = compressed_case()
    noise = [{"input_ids": torch.full((2, 24), 3 + i)} for i in range(12)]
    batches = [batch if i % 4 == 3 else noise[i] for i, batch in enumerate(case.batches)]
    before = state(case.model)
    report = refine(case.model, case.dense, batches, holdout=4, lr=0.1)
    assert report.accepted == 0
    assert all(block.after >= block.before for block in report.blocks)
    assert same(before, state(case.model))
    assert report.loss_after == report.loss_before
    assert not report.reverted


def test_steps_that_diverge_are_not_accepted():
    case = compressed_case()
    before = state(case.model)
    report = refine(*arguments(case), steps=20, lr=1e30)
    assert report.accepted == 0
    assert all(not block.after < block.before for block in report.blocks)
    assert same(before, state(case.model))


@pytest.mark.parametrize("after", [3.0, float("nan")])
def test_the_last_check_puts_everything_back_and_says_so(monkeypatch, after):
    case = compressed_case()
    before = state(case.model)
    losses = iter([2.0, after])
    monkeypatch.setattr(refine_module._Refinement, "_model_loss", lambda self: next(losses))
    report = refine(*arguments(case), **FEW)
    assert report.reverted
    assert report.accepted == 0
    assert same(before, state(case.model))
    assert f"put back, since the held-out loss would have gone from 2.0000 to {after:.4f}" in str(report)


@pytest.mark.parametrize("calls", [1, 13, 15, 16])
def test_an_interrupted_refinement_leaves_the_factors_as_they_were(calls):
    case = compressed_case()
    before, modules = state(case.model), list(case.model.modules())
    case.model.train()
    with pytest.raises(KeyboardInterrupt):
        refine(*arguments(case), loss=interrupted_loss(calls), **FEW)
    assert same(before, state(case.model))
    assert modules == list(case.model.modules())
    assert case.model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())


def test_a_failure_in_the_second_block_undoes_the_first(monkeypatch):
    case = compressed_case()
    before, parameters = state(case.model), list(case.model.parameters())
    train = refine_module.train_copies
    calls = []

    def fail(copies, *rest):
        calls.append(copies)
        if len(calls) == 2:
            assert not same(before, state(case.model))
            raise MemoryError("no")
        return train(copies, *rest)

    monkeypatch.setattr(refine_module, "train_copies", fail)
    with pytest.raises(MemoryError, match="no"):
        refine(*arguments(case), **FEW)
    assert same(before, state(case.model))
    assert all(a is b for a, b in zip(parameters, case.model.parameters(), strict=True))


def test_activations_that_are_not_finite_are_an_error():
    case = compressed_case()
    with torch.no_grad():
        case.model.model.layers[1].mlp.down_proj.basis.weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="held-out error of block 1 is"):
        refine(*arguments(case), **FEW)


@pytest.mark.parametrize("layout", ["pivot", "factors"])
def test_layouts_stay(layout):
    case = compressed_case(layout=layout)
    kind = PivotedLinear if layout == "pivot" else LowRankLinear
    before = state(case.model)
    report = refine(*arguments(case), **FEW)
    assert report.accepted == 2
    assert {type(layer) for layer in compressed_layers(case.model).values()} == {kind}
    for name, value in case.model.state_dict().items():
        inside = any(name.startswith(f"{layer}.") for layer in case.dense)
        assert torch.equal(value, before[name]) is not (inside and value.is_floating_point()), name


def test_half_precision_models_stay_so_and_are_judged_as_they_are():
    case = compressed_case(rank=0.3)
    case.model.bfloat16()
    for layer in case.dense.values():
        layer.bfloat16()
    before = held_loss(case)
    report = refine(*arguments(case), **FEW)
    assert report.accepted == 2
    assert report.loss_after == pytest.approx(held_loss(case), rel=1e-5)
    assert report.loss_after < before
    assert {p.dtype for p in case.model.parameters()} == {torch.bfloat16}


def test_steps_are_taken_in_float32(monkeypatch):
    case = compressed_case(rank=0.3)
    case.model.bfloat16()
    for layer in case.dense.values():
        layer.bfloat16()
    types = set()

    def watch(copies, error, batches, steps, lr):
        types.add(error(next(batches)).dtype)
        types.update(value.dtype for value in copies.tensors.values() if value.is_floating_point())
        return False

    monkeypatch.setattr(refine_module, "train_copies", watch)
    refine(*arguments(case), **FEW)
    assert types == {torch.float32}


def test_padding_does_not_count():
    case = compressed_case()
    other = copy.deepcopy(case)
    padded = []
    for batch in case.batches:
        ids = nn.functional.pad(batch["input_ids"], (0, 5), value=7)
        mask = nn.functional.pad(batch["attention_mask"], (0, 5))
        padded.append({"input_ids": ids, "attention_mask": mask})
    first = refine(*arguments(case), **FEW)
    second = refine(other.model, other.dense, padded, **FEW)
    assert first.accepted == second.accepted == 2
    for a, b in zip(first.blocks, second.blocks, strict=True):
        assert a.before == pytest.approx(b.before, rel=1e-4)
        assert a.after == pytest.approx(b.after, rel=1e-2)
    assert second.loss_after == pytest.approx(first.loss_after, rel=1e-3)


def test_the_seed_decides_and_nothing_else():
    results = []
    for seed in (0, 0, 1):
        case = compressed_case()
        torch.manual_seed(len(results))
        refine(*arguments(case), **FEW, seed=seed)
        results.append(state(case.model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_random_generators_stay_as_they_were():
    case = compressed_case()

    def drawing(model, batch):
        torch.rand(1), np.random.rand(1), random.random()  # noqa: NPY002
        return causal_loss(model, batch)

    before = torch.get_rng_state(), np.random.get_state()[2], random.getstate()  # noqa: NPY002
    refine(*arguments(case), loss=drawing, **FEW)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[2], random.getstate()) == before[1:]  # noqa: NPY002


def test_modes_flags_and_gradients_stay_as_they_were():
    case = compressed_case()
    case.model.train()
    case.model.model.layers[1].eval()
    for i, p in enumerate(case.model.parameters()):
        p.grad = None
        p.requires_grad_(i % 2 == 0)
    modes = [module.training for module in case.model.modules()]
    with torch.no_grad():  # as a caller may be
        assert refine(*arguments(case), **FEW).accepted
    assert modes == [module.training for module in case.model.modules()]
    assert all(p.requires_grad is (i % 2 == 0) for i, p in enumerate(case.model.parameters()))
    assert all(p.grad is None for p in case.model.parameters())


def test_dense_layers_and_dense_blocks_in_between_stay():
    case = compressed_case()
    block = "model.layers.0."
    back = {name: case.dense.pop(name) for name in list(case.dense) if name.startswith(block) or "q_proj" in name}
    swap_modules(case.model, back)
    before = state(case.model)
    report = refine(*arguments(case), **FEW)
    assert [block.block for block in report.blocks] == [1]
    assert report.accepted == 1
    for name, value in case.model.state_dict().items():
        if any(name.startswith(f"{layer}.") for layer in back):
            assert torch.equal(value, before[name])


def test_layers_that_are_not_run_are_left_alone():
    case = compressed_case()
    spare = make_lowrank(torch.randn(8, 2), torch.randn(2, 8))
    case.model.model.layers[1].spare = spare.requires_grad_(False)
    case.dense["model.layers.1.spare"] = nn.Linear(8, 8, bias=False)
    before = state(spare)
    assert refine(*arguments(case), **FEW).accepted == 2
    assert same(before, state(spare))


def test_copies_are_those_of_one_block_at_a_time(monkeypatch):
    alive: weakref.WeakSet[FactorCopies] = weakref.WeakSet()
    most = []

    class Counted(FactorCopies):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(refine_module, "FactorCopies", Counted)
    refine(*arguments(compressed_case()), **FEW)
    assert most == [1, 1]


@pytest.mark.parametrize("target", ["drifted", pytest.param("dense", marks=pytest.mark.exhaustive)])
def test_hidden_states_are_held_twice_and_no_more(monkeypatch, target):
    case = compressed_case()
    rows, runners = sum(batch["input_ids"].numel() for batch in case.batches), []
    train, runner = refine_module.train_copies, refine_module.BlockRunner

    class Kept(runner):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            runners.append(self)

    held = []

    def count(*arguments):
        gc.collect()
        shape = runners[0].run(0, 0, case.model.model.embed_tokens(case.batches[0]["input_ids"])).shape
        states = {x.data_ptr() for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == shape}
        held.append(len(states) * shape[:-1].numel())
        return train(*arguments)

    monkeypatch.setattr(refine_module, "BlockRunner", Kept)
    monkeypatch.setattr(refine_module, "train_copies", count)
    refine(*arguments(case), **FEW, target=target)
    assert runners[0].inputs == []
    assert max(held) <= 2 * rows + 48  # and the batch at hand


class TellsMore(nn.Module):
    """A block that returns a tuple, and is given something by keyword."""

    def __init__(self, block):
        super().__init__()
        self.linear = block.linear

    def forward(self, hidden, *, scale):
        return hidden + scale * self.linear(hidden), "and more"


class Teller(nn.Module):
    def __init__(self, stack):
        super().__init__()
        self.blocks = nn.ModuleList(TellsMore(block) for block in stack.blocks)

    def forward(self, hidden):
        for block in self.blocks:
            hidden, _ = block(hidden, scale=torch.ones((), dtype=hidden.dtype))
        return hidden


def test_blocks_that_return_tuples_are_refined_as_those_that_return_tensors():
    reports = []
    for wrap in (lambda model: model, Teller):
        torch.manual_seed(0)
        model, dense, batches = linear_stack()
        reports.append(refine(wrap(model), dense, batches, loss=stack_loss, steps=5, holdout=8))
    assert reports[0].accepted == 2
    assert reports[0].blocks == reports[1].blocks


def test_no_more_batches_are_asked_for_than_the_tokens_allow():
    case = compressed_case()
    asked = []

    def stream():
        for batch in case.batches:
            asked.append(batch)
            yield batch

    report = refine(case.model, case.dense, stream(), steps=5, tokens=5 * 48 + 47)
    assert report.tokens == 5 * 48
    assert report.fit_batches + report.held_batches == 5
    assert len(asked) == 6
    with pytest.raises(ValueError, match=r"at least 4 batches, .* within 191 tokens but got 3"):
        refine(*arguments(case), tokens=191)
