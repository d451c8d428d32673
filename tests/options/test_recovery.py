from __future__ import annotations

import json
import sys

import pytest

from fasc_lightning import Distillation, FactorRecovery, FascCallback, LoraRecovery
from fasc_lightning.options import as_recovery
from fasc_lightning.options._recovery import describe_recovery

peft = pytest.importorskip("peft", reason="peft is not installed")


def test_short_forms_stand_for_the_defaults():
    assert as_recovery("lora") == LoraRecovery()
    assert as_recovery("factors") == FactorRecovery()
    assert as_recovery(None) is None
    assert LoraRecovery(teacher="dense").distillation == Distillation()


def test_alpha_defaults_to_twice_the_rank():
    config = LoraRecovery(r=6, dropout=0.1).lora_config()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (6, 12, 0.1)
    assert LoraRecovery(alpha=5).lora_config().lora_alpha == 5


def test_a_config_of_peft_is_taken_as_it_is_and_not_changed():
    config = peft.LoraConfig(r=3, use_rslora=True, target_modules=["q_proj"])
    found = LoraRecovery(config=config).lora_config()
    assert found is not config
    assert (found.r, found.use_rslora, found.target_modules) == (3, True, {"q_proj"})
    assert LoraRecovery(config={"r": 5}).lora_config().r == 5


@pytest.mark.parametrize("arm", [LoraRecovery, FactorRecovery])
def test_the_rate_is_lower_towards_a_teacher_unless_it_is_given(arm):
    assert 0 < arm(teacher="dense").rate < arm().rate
    assert arm(teacher=Distillation(weight=0.5)).rate == arm(teacher="dense").rate
    assert arm(teacher="dense", learning_rate=0.5).rate == arm(learning_rate=0.5).rate == 0.5
    assert describe_recovery(arm())["learning_rate"] == arm().rate


@pytest.mark.parametrize(
    ("arm", "options", "error", "message"),
    [
        (LoraRecovery, {"r": 0}, ValueError, "`r` to be a positive int"),
        (LoraRecovery, {"alpha": -1}, ValueError, "`alpha` to be positive"),
        (LoraRecovery, {"dropout": 1.0}, ValueError, r"`dropout` to be in \[0, 1\)"),
        (LoraRecovery, {"epochs": 0}, ValueError, "`epochs` to be a positive int"),
        (LoraRecovery, {"teacher": "sparse"}, ValueError, "None, 'dense' or a Distillation but got 'sparse'"),
        (LoraRecovery, {"config": "lora"}, TypeError, "a peft LoraConfig"),
        (LoraRecovery, {"config": peft.AdaLoraConfig(total_step=9)}, TypeError, "a peft LoraConfig"),
        (LoraRecovery, {"config": {"r": 2}, "r": 4}, ValueError, "but got both"),
        (LoraRecovery, {"config": {"bias": "all"}}, ValueError, "bias='none' but got 'all'"),
        (LoraRecovery, {"config": {"modules_to_save": ["norm"]}}, ValueError, "modules_to_save=None"),
        (LoraRecovery, {"config": {"init_lora_weights": "pissa"}}, ValueError, "'pissa', which changes the factors"),
        (LoraRecovery, {"config": {"inference_mode": True}}, ValueError, "inference_mode=False but got True"),
        (LoraRecovery, {"config": {"arrow_config": peft.ArrowConfig()}}, ValueError, "cannot be merged into it"),
        (LoraRecovery, {"precision": "bf16-true"}, ValueError, "would convert the model itself"),
        (FactorRecovery, {"precision": "16"}, ValueError, "`precision` to be one of 32-true, bf16-mixed, 16-mixed"),
        (FactorRecovery, {"precision": 16}, ValueError, "but got 16"),
        (FactorRecovery, {"learning_rate": 0}, ValueError, "`learning_rate` to be positive"),
        (FactorRecovery, {"validate_every": 0}, ValueError, "`validate_every` to be a positive int"),
        (FactorRecovery, {"patience": 1.5}, ValueError, "`patience` to be a positive int"),
        (FactorRecovery, {"norms": 1}, TypeError, "`norms` to be True or False"),
    ],
)
def test_wrong_options_are_refused(arm, options, error, message):
    with pytest.raises(error, match=message):
        arm(**options)


def test_peft_is_asked_for_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"fasc-lightning\[recovery\]"):
        FascCallback(rank=0.5, recovery="lora")
    FascCallback(rank=0.5, recovery="factors")


def test_a_description_is_plain_data():
    for recovery in (
        LoraRecovery(config={"r": 3}, teacher="dense"),
        FactorRecovery(norms=True),
        LoraRecovery(config=peft.LoraConfig(r=2), teacher=Distillation(dtype="bfloat16")),
    ):
        description = describe_recovery(recovery)
        assert json.loads(json.dumps(description)) == description
        assert description["arm"] == recovery.arm


def test_a_description_says_what_a_config_asks_for():
    names = ["v_proj", "q_proj", "down_proj", "up_proj"]
    config = {"r": 3, "lora_dropout": 0.1, "target_modules": names, "rank_pattern": {"q_proj": 5}}
    description = describe_recovery(LoraRecovery(config=config))
    assert (description["r"], description["alpha"], description["dropout"]) == (3, peft.LoraConfig().lora_alpha, 0.1)
    assert description["config"] == {**config, "target_modules": sorted(names)}  # and nothing that is a default


@pytest.mark.parametrize("arm", [LoraRecovery, FactorRecovery])
@pytest.mark.parametrize("precision", [None, "32-true", "bf16-mixed", "16-mixed"])
def test_precisions_that_leave_the_model_as_it_is_are_taken(arm, precision):
    assert describe_recovery(arm(precision=precision))["precision"] == precision


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--fasc.recovery", "lora"], LoraRecovery()),
        (["--fasc.recovery", '{"r": 4, "teacher": "dense"}'], LoraRecovery(r=4, teacher="dense")),
        (["--fasc.recovery", '{"norms": true}'], FactorRecovery(norms=True)),
        (["--fasc.recovery", '{"r": 2, "precision": "bf16-mixed"}'], LoraRecovery(r=2, precision="bf16-mixed")),
        (
            ["--fasc.recovery", '{"r": 2, "teacher": {"temperature": 2.0, "cache": "folder"}}'],
            LoraRecovery(r=2, teacher=Distillation(temperature=2.0, cache="folder")),
        ),
    ],
)
def test_command_lines_take_short_forms_and_options(arguments, expected):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(FascCallback, "fasc")
    callback = parser.instantiate(parser.parse_args(["--fasc.rank", "0.5", *arguments])).fasc
    assert callback.recovery == expected
