"""Every option of the public functions and classes refuses what is of a wrong type, at once and by its name."""

from __future__ import annotations

import inspect
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from fasc_lightning import (
    Calibration,
    Distillation,
    FactorRecovery,
    FascCallback,
    FascTrainerCallback,
    Gate,
    LoraRecovery,
    Memory,
    Monitor,
    RecoveryCallback,
    compress,
    plan,
    quantize,
    recover,
    score,
)
from fasc_lightning.options import CompressionOptions, Quantize, RefineOptions, checks_options, described
from fasc_lightning.options._compression import FLAT
from fasc_lightning.options._types import CHECKS

#: What options are given beside those that are wrong.
CALLS = {
    FascCallback: {"keep": 0.5},
    FascTrainerCallback: {"keep": 0.5},
    compress: {"model": None, "batches": None, "keep": 0.5},
    score: {"model": None, "data": None},
    recover: {"model": None, "batches": None},
    plan: {"model_or_config": nn.Linear(8, 8), "keep": 0.5, "memory": "1GB", "probed": False},
    quantize: {"model": None},
    RecoveryCallback: {"recovery": "factors"},
    LoraRecovery: {},
    FactorRecovery: {},
    RefineOptions: {},
    Distillation: {},
    Calibration: {},
    Memory: {},
    Monitor: {},
    Gate: {},
    Quantize: {},
}

#: Functions and classes that take options of a compression as keywords.
TAKERS = (FascCallback, FascTrainerCallback, compress, plan)

#: Arguments that are no options: models, data.
DATA = {"model", "model_or_config", "batches", "data", "checkpoints", "dense", "recovery_data", "recovery_held_out"}
DATA |= {"held_out", "options"}

#: What the callback of a compression hands to that of its recovery.
INTERNAL = {(RecoveryCallback, "key"), (RecoveryCallback, "teacher"), (RecoveryCallback, "failed")}

#: What options are called in what is said of them.
SAID = {"quantization": "quantize", "gate_threshold": "gate"}

#: What no option is.
NOTHING = [object(), {"a": 1}, 1j]

#: What options of a kind are not, by the name of what checks them.
WRONG = {
    "number": ["x", True, [1.0], math.nan, math.inf],
    "share": ["x", True, [1.0], math.nan, math.inf],
    "whole": ["x", True, 1.5, [1], math.nan],
    "width": ["x", True, 1.5, -1],
    "seed": ["x", True, 1.5, -1, 2**63],
    "flag": ["no", 1, 0, "True", []],
    "text": [5, ["fasc"], True, "nobody knows this"],
    "path": [5, ["folder"], True],
    "patterns": [5, [1], True, ["q_proj", 2], "(", "*", "[a"],
    "averaging": [5, "median", ["mean"], True],
    "function": [5, "x", True],
    "switch": [5, "yes", [True], 1.0],
    "device": ["x", [1], "cuda:x"],
    "size": [[1], True, "much"],
    "own": ["x", 3.5, [1]],
}


def kind(call, name):
    """What checks an option."""
    if name in ("calibration", "memory", "monitor", "gate") and (call, name) != (plan, "memory"):
        return "own"
    if name == "moments_device" or (call, name) == (Memory, "device"):
        return "own"
    return CHECKS[FLAT[name].option if name in FLAT else name].__name__


def options():
    for call in CALLS:
        parameters = inspect.signature(call).parameters.values()
        named = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
        if call in TAKERS:
            fields = [name for name in inspect.signature(CompressionOptions).parameters if name != "flat"]
            named = {name: described(name).default for name in (*fields, *FLAT)} | named
        for name, default in named.items():
            if name not in DATA and (call, name) not in INTERNAL:
                yield pytest.param(call, name, default, id=f"{call.__name__}-{name}")


@pytest.mark.parametrize(("call", "name", "default"), list(options()))
def test_wrong_options_are_refused_by_name(call, name, default):
    given = {key: value for key, value in CALLS[call].items() if not (key == "keep" and name == "rank")}
    wrong = [*NOTHING, *WRONG[kind(call, name)]]
    if name == "precision":
        wrong = [*NOTHING, 16, "bf16"]
    if name == "cache":
        given["blocks"] = 0
    optional = default is None or default is inspect.Parameter.empty or name in ("sketch", "group")
    if not optional:
        wrong.append(None)
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=f"`{SAID.get(name, name)}`|{name}="):
            call(**{**given, name: value})


def test_a_number_that_is_not_finite_is_no_rate():
    for name in ("learning_rate", "alpha"):
        for value in (math.nan, math.inf, 0, -1.0):
            with pytest.raises(ValueError, match=name):
                LoraRecovery(**{name: value})


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        ({"rank": np.int64(4)}, "rank", 4),
        ({"rank": np.float32(0.5)}, "rank", 0.5),
        ({"keep": np.float64(0.5)}, "keep", 0.5),
        ({"size": np.float32(0.5)}, "size", 0.5),
        ({"size": torch.tensor(0.25)}, "size", 0.25),
        ({"keep": 0.5, "align": np.int32(8)}, "align", 8),
        ({"keep": 0.5, "seed": np.int64(3)}, "seed", 3),
        ({"keep": 0.5, "calibration_steps": np.int64(3)}, "calibration_steps", 3),
        ({"keep": 0.5, "update_weights": np.bool_(False)}, "update_weights", False),
        ({"keep": 0.5, "token_fraction": torch.tensor(0.5)}, "token_fraction", 0.5),
        ({"keep": 0.5, "monitor_every_n_steps": np.int64(2)}, "monitor_every_n_steps", 2),
        ({"keep": 0.5, "sketch": "range", "sketch_size": np.int64(16)}, "sketch_size", 16),
        ({"keep": 0.5, "passes": np.int64(2), "update_weights": False}, "passes", 2),
    ],
)
def test_scalars_of_other_libraries_are_the_numbers_they_hold(options, name, expected):
    found = getattr(FascCallback(**options), name)
    assert found == expected
    assert type(found) is type(expected)


def test_the_fields_of_frozen_options_are_numbers_too():
    recovery = LoraRecovery(r=np.int64(4), dropout=np.float64(0.5), epochs=np.int64(2))
    assert [type(value) for value in (recovery.r, recovery.dropout, recovery.epochs)] == [int, float, int]
    assert type(RefineOptions(lr=np.float64(0.5)).lr) is float


def test_patterns_may_be_lists_tuples_and_sets():
    for value in (["q_proj"], ("q_proj",), {"q_proj"}, r".*q_proj", "all-linear"):
        assert FascCallback(keep=0.5, targets=value).targets == value


def test_arguments_that_do_not_fit_are_refused_by_the_function_itself():
    with pytest.raises(TypeError, match=r"recover\(\) got an unexpected keyword argument 'ranks'"):
        recover(None, None, ranks=3)
    with pytest.raises(TypeError, match=r"^quantize\(\) got .*'exclud'\. Did you mean 'exclude'\?"):
        quantize(None, exclud=["head"])
    with pytest.raises(TypeError, match=r"^RecoveryCallback\(\) got .*'recovry'\. Did you mean 'recovery'\?"):
        RecoveryCallback(recovry="lora")
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'model'"):
        quantize()


def test_what_is_no_option_is_left_alone():
    @checks_options
    def call(model, *, rank=None):
        return model, rank

    assert call("anything", rank=3) == ("anything", 3)
    assert call("anything") == ("anything", None)
    assert str(inspect.signature(call)) == "(model, *, rank=None)"
    with pytest.raises(TypeError, match=re.escape("`rank` to be a number but got 'x'")):
        call(0, rank="x")
