"""Lightning's own command line with the callback by class path, on a model made in a moment."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml
from processes import run_script
from tiny import save_model_folder

from fasc_lightning import FascCallback, load_compressed
from fasc_lightning.layers import is_compressed
from fasc_lightning.options import FactorRecovery, LoraRecovery

# Lightning's word on arguments that do not come from the command line, which here is pytest's.
pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    # Lightning's own calls.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Recovery.*nothing lowered"),  # the model is random: so is what it loses
]
RECIPES = Path(__file__).parents[2] / "recipes"
CONFIG = RECIPES / "configs" / "lightning_cli.yaml"
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 30


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("lightning_cli_recipe", RECIPES / "lightning_cli.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # jsonargparse looks classes up by their module's name
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def folder(tmp_path):
    save_model_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def arguments(folder, *more):
    """The example as it stands, on a smaller model and less data."""
    return [
        "fit",
        "--config", str(CONFIG),
        "--model.name", str(folder / "model"),
        "--data.sources", f"[{folder / 'text.txt'}]",
        "--data.window", "64",
        "--data.tokens", "1000",
        "--output", str(folder / "out"),
        *more,
    ]  # fmt: skip


def callback_of(cli):
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, FascCallback))


def test_the_example_compresses_recovers_and_saves(recipe, folder):
    cli = recipe.main(arguments(folder))
    callback = callback_of(cli)
    assert callback.keep == 0.8
    assert callback.recovery == LoraRecovery(r=8, teacher="dense")
    assert callback.report.kept <= 0.8
    assert callback.report.recovery["arm"] == "lora"
    assert is_compressed(cli.model)
    saved = load_compressed(folder / "out")
    assert sum(p.numel() for p in saved.parameters()) == callback.report.whole["compressed"].parameters


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("factors", FactorRecovery()),
        ("lora", LoraRecovery()),
        # What both classes have stays as it stands in the file.
        (
            "{class_path: fasc_lightning.FactorRecovery, init_args: {norms: true, learning_rate: 0.002}}",
            FactorRecovery(norms=True, teacher="dense", learning_rate=0.002),
        ),
    ],
)
def test_the_command_line_changes_the_callback(recipe, folder, value, expected):
    from fasc_lightning.options import as_recovery

    options = ["--trainer.callbacks.keep", "0.6", "--trainer.callbacks.recovery", value]
    callback = callback_of(recipe.main(arguments(folder, *options)))
    assert callback.keep == 0.6
    assert as_recovery(callback.recovery) == expected
    assert callback.report.recovery["arm"] == expected.arm


def test_without_a_recovery_it_only_compresses(recipe, folder):
    cli = recipe.main(arguments(folder, "--trainer.callbacks.recovery", "null"))
    assert callback_of(cli).report.recovery is None
    assert is_compressed(cli.model)


def test_what_cannot_work_is_refused_before_the_work(recipe, folder, monkeypatch):
    def load(name):
        raise AssertionError("a model is loaded")

    (folder / "taken").mkdir()
    (folder / "taken" / "notes.txt").touch()
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "load_model", load)
        with pytest.raises(FileExistsError, match="holds other files"):
            recipe.main(arguments(folder, "--output", str(folder / "taken")))
    with pytest.raises(ValueError, match=r"one fasc_lightning\.FascCallback among trainer\.callbacks but got 0"):
        recipe.main(arguments(folder, "--trainer.callbacks", "null"))


def test_as_a_script_on_the_file_alone(folder):
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["name"] = str(folder / "model")
    config["data"] = {"sources": [str(folder / "text.txt")], "window": 64, "tokens": 1000}
    config["output"] = str(folder / "out")
    (folder / "cli.yaml").write_text(yaml.safe_dump(config))
    command = [RECIPES / "lightning_cli.py", "fit", "--config", str(folder / "cli.yaml")]
    run_script(*command)
    assert load_compressed(folder / "out").config.quantization_config is not None


@pytest.mark.parametrize("name", ["FascCallback", "fasc_lightning.FascCallback"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["keep=0.6", "memory.sketch=projected", "calibration.update_weights=false"], None),
        (["keep=0.6", "memory=projected", "update_weights=false"], None),
        (["keep=0.6", "sketch=projected", "update_weights=false"], None),
        (["monitor=50"], {"monitor_every_n_steps": 50}),
        (["monitor.every_n_steps=50", "monitor.tokens=64"], {"monitor_every_n_steps": 50, "monitor_tokens": 64}),
        (["rank=12", "gate=0.1", "calibration.steps=3"], {"rank": 12, "gate": 0.1, "calibration_steps": 3}),
        (["rank=0.5", "gate.threshold=0.1", "gate_by=pooled"], {"rank": 0.5, "gate": 0.1, "gate_by": "pooled"}),
    ],
)
def test_groups_and_flat_names_on_lightnings_command_line(name, options, expected):
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    more = [f"--trainer.callbacks.{option}" for option in options]
    args = [f"--trainer.callbacks+={name}", *more, "--trainer.logger=false"]
    cli = LightningCLI(BoringModel, run=False, save_config_callback=None, args=args)
    assert callback_of(cli).options == (expected or {"keep": 0.6, "sketch": "projected", "update_weights": False})


def test_a_file_may_hold_groups_flat_names_or_both(tmp_path):
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    init = {"keep": 0.8, "update_weights": False, "memory": {"passes": 2}, "gate": {"threshold": 0.2}, "monitor": 5}
    trainer = {"callbacks": [{"class_path": "FascCallback", "init_args": init}], "logger": False}
    (tmp_path / "cli.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    args = ["--config", str(tmp_path / "cli.yaml"), "--trainer.callbacks.memory.passes=3"]
    callback = callback_of(LightningCLI(BoringModel, run=False, save_config_callback=None, args=args))
    assert callback.options == {
        "keep": 0.8, "update_weights": False, "passes": 3, "gate": 0.2, "monitor_every_n_steps": 5
    }  # fmt: skip
