"""The one declaration of options: its groups, short forms, flat names and descriptions, and those that take it."""

from __future__ import annotations

import copy
import inspect
import json
import operator
from dataclasses import MISSING, fields
from functools import partial
from typing import get_args, get_type_hints

import pytest
from tiny import causal_model, token_loader
from transformers import LlamaConfig

from fasc_lightning import (
    Calibration,
    CompressionOptions,
    FascCallback,
    Gate,
    LoraRecovery,
    Memory,
    Monitor,
    compress,
    plan,
)
from fasc_lightning.options import (
    GATE_BY,
    CompressionKeywords,
    PlanKeywords,
    QuantizeWord,
    ReductionKind,
    available_allocations,
    described,
)
from fasc_lightning.options._compression import FLAT, GROUPS
from fasc_lightning.options._described import descriptions
from fasc_lightning.solvers import available_methods

CONFIG = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)

#: Of every option of a group: a value that is not the default.
OTHERS = {
    "calibration": {
        "steps": 5,
        "update_weights": False,
        "token_fraction": 0.5,
        "stages": 2,
        "loss_terms": "sum",
        "token_mask": len,
    },
    "memory": {"sketch": "range", "sketch_size": 64, "sketch_above": 512, "device": "cpu", "passes": 2},
    "monitor": {
        "every_n_steps": 7,
        "tokens": 64,
        "threshold": 0.5,
        "observations": 2,
        "gradient": "output",
        "log_layers": False,
    },
    "gate": {"threshold": 0.25, "by": "pooled", "exclude": "paper"},
}


def test_the_callback_takes_at_most_18_arguments_of_which_two_have_a_place():
    parameters = inspect.signature(FascCallback).parameters.values()
    assert len(parameters) <= 18
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == ["rank", "keep"]
    assert FascCallback(0.5).rank == 0.5
    with pytest.raises(TypeError, match="positional argument"):
        FascCallback(0.5, None, "svd")


def test_every_option_of_a_group_has_one_flat_name():
    parts = [(part.group, part.option) for part in FLAT.values()]
    assert sorted(parts) == sorted((name, field.name) for name, group in GROUPS.items() for field in fields(group))
    assert {name: set(values) for name, values in OTHERS.items()} == {
        name: {field.name for field in fields(group)} for name, group in GROUPS.items()
    }


@pytest.mark.parametrize("name", FLAT)
def test_a_flat_name_is_given_read_and_set_as_the_option_of_its_group(name):
    group, option = FLAT[name].group, FLAT[name].option
    value = OTHERS[group][option]
    others = {"gate": 0.3} if name == "gate_exclude" else {}
    others |= {"update_weights": False} if name == "passes" else {}
    assert getattr(FascCallback(keep=0.5), name) == described(name).default
    callback = FascCallback(keep=0.5, **{**others, name: value})
    assert getattr(callback, name) == getattr(getattr(callback, group), option) == value
    grouped = FascCallback(keep=0.5, **{**others, group: getattr(callback, group)})
    assert getattr(grouped, name) == value
    assert grouped.options == callback.options
    changed = FascCallback(keep=0.5, **others)
    setattr(changed, name, value)
    assert getattr(changed, group) == getattr(callback, group)


def test_a_flat_name_changes_the_group_that_is_given_with_it():
    given = Memory(sketch="range", sketch_size=64)
    callback = FascCallback(keep=0.5, memory=given, sketch_size=32)
    assert callback.memory == Memory(sketch="range", sketch_size=32)
    assert given.sketch_size == 64
    callback = FascCallback(keep=0.5, gate=0.2, gate_by="rho", gate_exclude=["q_proj"])
    assert callback.gate == Gate(0.2, "rho", ["q_proj"])


@pytest.mark.parametrize(
    ("short", "long"),
    [
        *(({"memory": kind}, {"memory": Memory(sketch=kind)}) for kind in get_args(ReductionKind)),
        ({"monitor": 50}, {"monitor": Monitor(every_n_steps=50)}),
        ({"gate": 0.1}, {"gate": Gate(threshold=0.1)}),
        ({"gate": 0}, {"gate": Gate(threshold=0.0)}),
        ({"memory": None, "monitor": None, "gate": None, "calibration": None}, {}),
    ],
)
def test_short_forms(short, long):
    options = {"keep": 0.5, "update_weights": False}
    found, expected = FascCallback(**options, **short), FascCallback(**options, **long)
    for name in GROUPS:
        assert getattr(found, name) == getattr(expected, name)


@pytest.mark.parametrize(
    ("name", "short", "long"),
    [
        ("memory", "range", Memory(sketch="range")),
        ("monitor", 50, Monitor(every_n_steps=50)),
        ("gate", 0.1, Gate(threshold=0.1)),
        ("calibration", None, Calibration()),
        ("recovery", "lora", LoraRecovery()),
    ],
)
def test_short_forms_are_set_later_too(name, short, long):
    callback = FascCallback(keep=0.5)
    setattr(callback, name, short)
    assert getattr(callback, name) == long
    assert callback.options == FascCallback(keep=0.5, **{name: long}).options


def test_what_a_group_may_not_be_is_refused_where_it_is_set():
    callback = FascCallback(keep=0.5, gate=0.1)
    with pytest.raises(ValueError, match="`gate` to be in"):
        callback.gate = 2.0
    assert callback.gate == Gate(0.1)


@pytest.mark.parametrize("mask", [partial(len), operator.itemgetter("attention_mask")])
def test_plain_data_name_the_code_of_callables_without_a_name(mask):
    found = CompressionOptions(keep=0.5, token_mask=mask, loss_terms=mask).to_dict()
    assert found["token_mask"] == found["loss_terms"] == f"{type(mask).__module__}.{type(mask).__qualname__}"
    assert found == json.loads(json.dumps(found))


def test_what_is_printed_is_what_differs_from_the_defaults():
    callback = FascCallback(keep=0.6, calibration=Calibration(update_weights=False), memory="projected", monitor=50)
    assert repr(callback) == (
        "FascCallback(keep=0.6, calibration=Calibration(update_weights=False), memory=Memory(sketch='projected'), "
        "monitor=Monitor(every_n_steps=50))"
    )
    assert repr(FascCallback(rank=0.5)) == "FascCallback(rank=0.5)"
    assert repr(Gate()) == "Gate()"


def test_plain_data_hold_what_differs_from_the_defaults_and_make_the_options_again():
    assert FascCallback(rank=0.5).to_dict() == {"rank": 0.5}
    options = CompressionOptions(
        keep=0.5,
        targets={"v_proj", "q_proj"},
        recovery=LoraRecovery(r=4),
        quantize="int8",
        **{
            name: OTHERS[part.group][part.option]
            for name, part in FLAT.items()
            if name not in ("calibration_steps", "stages")
        },
    )
    found = options.to_dict()
    assert found == json.loads(json.dumps(found))
    assert found["targets"] == ["q_proj", "v_proj"]
    assert found["recovery"]["arm"] == "lora"
    assert found["token_mask"] == "builtins.len"
    assert found["gate"] == 0.25
    again = {name: value for name, value in found.items() if name not in ("recovery", "token_mask")}
    assert CompressionOptions(**again).to_dict() == again
    callback = FascCallback(keep=0.5, recovery="lora", quantize="int8")
    assert set(callback.options) == {"keep", "recovery"}  # a report states int8 once the layers are


def test_the_callback_is_itself_not_its_options():
    callback, other = FascCallback(rank=0.5), FascCallback(rank=0.5)
    assert callback != other
    assert len({callback, other}) == 2
    assert copy.deepcopy(callback).rank == 0.5


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (
            {"rank": 0.5},
            "FascCallback{'targets': None, 'exclude': None, 'rho_gradient': 'input', 'monitors': False}",
        ),
        (
            {"keep": 0.5, "targets": ["q_proj"], "exclude": "up", "monitor": Monitor(5, gradient="output")},
            "FascCallback{'targets': ['q_proj'], 'exclude': 'up', 'rho_gradient': 'output', 'monitors': True}",
        ),
    ],
)
def test_checkpoints_know_the_callback_by_the_same_words_as_ever(options, key):
    assert FascCallback(**options).state_key == key


def test_every_option_is_described_with_all_of_its_values():
    for cls in (CompressionOptions, *GROUPS.values()):
        assert list(descriptions(cls)) == [field.name for field in fields(cls)]
        assert all(field.default is not MISSING for field in fields(cls))
    for name, values in {
        "method": available_methods(),
        "allocation": available_allocations(),
        "gate_by": GATE_BY,
        "sketch": get_args(ReductionKind),
        "layout": get_args(get_type_hints(CompressionOptions)["layout"]),
        "rho_gradient": get_args(get_type_hints(Monitor)["gradient"]),
        "quantize": get_args(QuantizeWord),
    }.items():
        missing = [value for value in values if f'"{value}"' not in described(name).help]
        assert not missing, f"{name}: {missing}"
    assert "``" not in described("gate").help


def test_keywords_are_the_fields():
    hints = get_type_hints(CompressionOptions)
    fields_of = {field.name: hints[field.name] for field in fields(CompressionOptions)}
    fields_of["ignore"] = hints["exclude"]
    assert get_type_hints(CompressionKeywords) == fields_of
    assert get_type_hints(PlanKeywords) == {name: hint for name, hint in fields_of.items() if name != "memory"}


def test_ignore_is_another_name_of_exclude():
    callback = FascCallback(keep=0.5, ignore=["lm_head"])
    assert callback.exclude == callback.ignore == ["lm_head"]
    assert callback.options == {"keep": 0.5, "exclude": ["lm_head"]}
    callback.ignore = "up"
    assert callback.exclude == "up"
    assert FascCallback(keep=0.5, ignore=None, exclude="up").exclude == "up"
    assert plan(CONFIG, callback, ignore=r".*attn.*").layers == plan(CONFIG, callback, exclude=r".*attn.*").layers
    for call in (FascCallback, CompressionOptions, partial(plan, CONFIG)):
        with pytest.raises(ValueError, match=r"`exclude` or `ignore`.*got both \(exclude='up', ignore=\['down'\]\)"):
            call(keep=0.5, exclude="up", ignore=["down"])
    with pytest.raises(TypeError, match="`exclude` to be a regular expression"):
        FascCallback(keep=0.5, ignore=3)


def test_compress_takes_options_and_keywords_in_place_of_some_of_them():
    options = CompressionOptions(
        keep=0.8, allocation="uniform", refit=False, memory=Memory(passes=2), update_weights=False
    )
    report = compress(causal_model(), token_loader(), options, keep=0.7, progress=False)
    expected = {"keep": 0.7, "allocation": "uniform", "refit": False, "passes": 2, "update_weights": False}
    assert report.options == expected
    assert options.keep == 0.8
    found = compress(
        causal_model(), token_loader(), FascCallback(keep=0.8), memory="projected", dry_run=True, progress=False
    )
    assert found.options == {"sketch": "projected", "update_weights": False}


def test_a_plan_takes_options_and_chooses_what_they_leave_open():
    easy = plan(CONFIG, CompressionOptions(keep=0.6), memory="1GB", probed=False)
    assert easy.options == {}
    assert easy.parts["training"] > 0
    frozen = Calibration(update_weights=False)
    for options in (CompressionOptions(keep=0.6, calibration=frozen), None):
        found = plan(CONFIG, options, **({"keep": 0.6} if options is None else {}), memory="1GB", probed=False)
        assert found.parts["training"] == 0
    held = CompressionOptions(keep=0.6, calibration=frozen, memory=Memory(passes=2))
    assert plan(CONFIG, held, memory="1GB", probed=False).options == {"passes": 2, "update_weights": False}
    sketched = CompressionOptions(keep=0.6, memory=Memory("range", sketch_size=8, sketch_above=16))
    expected = {"sketch": "range", "sketch_size": 8, "sketch_above": 16}
    assert plan(CONFIG, sketched, memory="1GB", probed=False).options == expected
    assert plan(CONFIG, sketched, sketch=None, memory="1GB", probed=False).options == {}
    beside = CompressionOptions(keep=0.6, memory=Memory(device="cpu"))
    assert plan(CONFIG, beside, memory="1GB", device="cuda", probed=False).options == {"moments_device": "cpu"}
    with pytest.raises(ValueError, match="neither `rank` nor `keep`"):
        plan(CONFIG, FascCallback(monitor=5), memory="1GB", probed=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FascCallback(keep=0.5, gate=1.5), "`gate` to be in"),
        (lambda: Gate(1.5), "`threshold` to be in"),
        (lambda: FascCallback(keep=0.5, monitor=0), "`monitor` to be an int of at least 1"),
        (lambda: FascCallback(keep=0.5, calibration_steps=0), "`calibration_steps` to be a positive int"),
        (lambda: Calibration(steps=0), "`steps` to be a positive int"),
        (lambda: FascCallback(keep=0.5, moments_device="gpu"), "`moments_device` to be None"),
        (lambda: FascCallback(keep=0.5, calibration={"steps": 3}), "`calibration` to be a Calibration but got"),
        (lambda: FascCallback(keep=0.5, memory=Memory(passes=2)), "update_weights=False with passes=2"),
        (lambda: FascCallback(keep=0.5, memory="projected"), "update_weights=False with sketch='projected'"),
        (lambda: compress(causal_model(), [], 0.5), "`options` to be a CompressionOptions but got 0.5"),
        (lambda: plan(CONFIG, {"rank": 0.5}), "`options` to be a CompressionOptions but got {'rank': 0.5}"),
        (lambda: FascCallback(keep=0.5, steps=3), "unexpected keyword argument 'steps'"),
        (
            lambda: FascCallback(keep=0.5, alocation=1),
            r"^FascCallback\(\) got .*'alocation'\. Did you mean 'allocation'",
        ),
        (lambda: CompressionOptions(keep=0.5, igonre=1), r"^CompressionOptions\(\) got .* Did you mean 'ignore'\?$"),
        (lambda: compress(causal_model(), [], alocation=1), r"^compress\(\) got .* Did you mean 'allocation'\?$"),
        (lambda: compress(causal_model(), [], progres=1), r"^compress\(\) got .*'progres'\. Did you mean 'progress'"),
        (lambda: plan(CONFIG, keep=0.5, gate_exlude=1), r"^plan\(\) got .* Did you mean 'gate_exclude'\?$"),
        (lambda: plan(CONFIG, keep=0.5, zzz=1), r"^plan\(\) got an unexpected keyword argument 'zzz'\.$"),
    ],
)
def test_what_is_refused_is_called_as_the_caller_called_it(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"quantize": "int4"}, 0.25),
        ({"quantize": "int8"}, 0.25),
        ({"quantize": "int4", "refit": True}, 1.0),
        ({"quantize": "int3"}, 1.0),  # refitted by default
        ({"size": 0.27}, 1.0),
        ({"keep": 0.8}, 1.0),
        ({"keep": 0.8, "quantize": "int8"}, 1.0),
    ],
)
def test_all_gradients_count_where_their_moment_decides_anything(options, share):
    assert CompressionOptions(**options).output_share == share
