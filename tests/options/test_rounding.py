"""Options of rounding: what a size and bits may be, what they rule out, and how command lines give them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import yaml
from tiny import causal_model
from transformers import LlamaConfig

from fasc_lightning import CompressionOptions, FascCallback, LoraRecovery, Memory, plan
from fasc_lightning.layers import INT8_ROWS, Grid
from fasc_lightning.options import SIZE_GRIDS, Quantize, as_size
from fasc_lightning.options._calibration import CalibrationOptions

CONFIG = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)

# Lightning's word on arguments that do not come from the command line, which here is pytest's, and its own calls.
on_command_lines = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter", "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.27, 0.27),
        (1, 1.0),
        (1e-9, 1e-9),
        (np.float64(0.5), 0.5),
        ("90MB", 90_000_000),
        ("90 mb", 90_000_000),
        ("1.5GB", 1_500_000_000),
        (" 4GiB ", 2**32),
        ("2KiB", 2048),
        ("3MiB", 3 * 2**20),
        ("7kB", 7000),
        ("12B", 12),
        (None, None),
    ],
)
def test_a_size_is_a_fraction_or_bytes(value, expected):
    found = as_size(value)
    assert found == expected
    assert isinstance(found, type(expected))


@pytest.mark.parametrize(
    "value",
    [0, 0.0, -0.5, 1.5, 2, 100_000_000, math.nan, math.inf, True, False, "", "90", "0.27", "27%", "MB", "-3MB", "1e3MB",
     "90XB", "1,000KB", [0.5], {"size": 1}, object()],
)  # fmt: skip
def test_what_is_no_size_is_refused_by_name(value):
    for make in (as_size, lambda size: FascCallback(size=size), lambda size: plan(CONFIG, size=size)):
        with pytest.raises(ValueError, match=r"Expected `size` to be a fraction .* or the bytes of the whole model"):
            make(value)


@pytest.mark.parametrize("value", ["int5", "INT4", "nf4", 4, True, 0.5, [4], {"bits": 4}, Grid(4), object()])
def test_what_is_no_kind_of_rounding_is_refused_by_name(value):
    for others in ({}, {"keep": 0.5}, {"size": 0.5}):
        with pytest.raises(ValueError, match="`quantize` to be one of 'int8', 'int8-dynamic', 'int4', 'int3', 'int2'"):
            CompressionOptions(quantize=value, **others)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 5}, ValueError, "`bits` to be one of 2, 3, 4, 8 but got 5"),
        ({"bits": 4.0}, ValueError, r"`bits` to be one of 2, 3, 4, 8 but got 4\.0"),
        ({"bits": True}, ValueError, "`bits` to be one of"),
        ({"bits": None}, ValueError, "`bits` to be one of"),
        ({"group": 0}, ValueError, "`group` to be a positive multiple of 8"),
        ({"group": 12}, ValueError, "`group` to be a positive multiple of 8.* but got 12"),
        ({"group": -8}, ValueError, "`group` to be a positive multiple of 8"),
        ({"group": 64.0}, ValueError, "`group` to be a positive multiple of 8"),
        ({"symmetric": 1}, TypeError, "`symmetric` to be True or False"),
        ({"symmetric": None}, TypeError, "`symmetric` to be True or False"),
        ({"rounding": "stochastic"}, ValueError, "`rounding` to be one of calibrated, nearest but got 'stochastic'"),
        ({"rounding": None}, TypeError, "`rounding` to be a string"),
    ],
)
def test_a_grid_that_does_not_exist_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        Quantize(**options)


def test_scalars_of_other_libraries_are_the_numbers_they_hold():
    found = Quantize(np.int64(3), torch.tensor(32), np.bool_(True))
    assert found == Quantize(3, 32, symmetric=True)
    assert [type(value) for value in (found.bits, found.group, found.symmetric)] == [int, int, bool]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0.3, "quantize": "int4"}, r"`size` or `quantize` but got both \(size=0.3, quantize='int4'\)"),
        ({"size": 0.3, "quantize": "int8-dynamic"}, "`size` or `quantize` but got both"),
        ({"size": "9MB", "keep": 0.5}, r"`size` or a rank but got both \(size='9MB', rank=None, keep=0.5\)"),
        ({"size": 0.3, "rank": 0.5}, "`size` or a rank but got both"),
        ({"keep": 0.5, "quantize": "int4"}, "quantize='int8' together with a rank but got 'int4'.*leave out `rank`"),
        ({"rank": 8, "quantize": Quantize(8)}, r"quantize='int8' together with a rank but got Quantize\(bits=8"),
        (
            {"quantize": "int8-dynamic"},
            "'int8-dynamic' together with `rank` or `keep` but got it alone. HINT: quantize",
        ),
        ({"size": 0.3, "recovery": "lora"}, "recovery='factors', which trains scales, but got adapters"),
        ({"quantize": "int4", "recovery": LoraRecovery(r=2)}, "recovery='factors', which trains scales"),
        ({"quantize": "int8", "recovery": "factors"}, "recovery=None with quantize='int8' alone"),
        ({"quantize": Quantize(rounding="nearest"), "refit": True}, "with rounding='nearest' but got True"),
        ({"quantize": "int4", "method": "svd-llm"}, "method='fasc' or 'fasc-plain', .* but got 'svd-llm'"),
        ({"size": 0.3, "method": "weight-svd"}, "method='fasc' or 'fasc-plain'"),
        ({"size": 0.3, "gate": 0.1}, "gate=None without ranks"),
        ({"quantize": "int3", "gate": 0.1}, "gate=None without ranks"),
        ({"size": 0.3, "memory": "projected", "update_weights": False}, "sketch=None, .* HINT: Memory.passes=2"),
        ({"quantize": "int4", "memory": Memory("range")}, "sketch=None, since rounding reads whole moments"),
        ({"size": 0.3, "passes": 2}, "update_weights=False with passes=2"),
        ({"size": 0.3, "passes": 2, "update_weights": False, "refit": True}, "refit=False or 'auto' with passes=2"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FascCallback(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0.3, "method": "fasc-plain"},
        {"size": "9MB", "recovery": "factors"},
        {"quantize": "int4", "recovery": "factors"},
        {"quantize": "int4", "passes": 3, "update_weights": False},
        {"quantize": Quantize(8, 32, True), "monitor": 5, "refit": True},
        {"quantize": Quantize(rounding="nearest")},
        {"keep": 0.8, "quantize": "int8", "recovery": "lora"},
        {"rank": 0.5, "quantize": "int8-dynamic", "gate": 0.1, "method": "fasc"},
    ],
)
def test_what_goes_together_is_taken(options):
    assert FascCallback(**options).compresses


def test_a_size_and_bits_are_budgets_and_a_rank_beside_int8_is_one_of_ranks():
    for options in ({"size": 0.3}, {"quantize": "int4"}, {"quantize": "int8"}, {"quantize": Quantize(2)}):
        found = CompressionOptions(**options)
        assert found.compresses
        assert found.rounds
        assert found.grids
    for options in ({"keep": 0.5, "quantize": "int8"}, {"rank": 0.5}):
        found = CompressionOptions(**options)
        assert found.compresses
        assert not found.rounds
        assert found.grids == ()
    assert not FascCallback(monitor=5).compresses
    with pytest.raises(ValueError, match=r"neither `rank` nor `keep`.*size=0.27 .* quantize='int4'"):
        CompressionOptions()
    with pytest.raises(ValueError, match=r"`rank`, `keep`, `size` or `quantize`.* together with `gate`"):
        FascCallback(monitor=5, gate=0.1)


@pytest.mark.parametrize(
    ("options", "grids", "calibrated", "measures"),
    [
        ({"size": 0.3}, SIZE_GRIDS, True, True),
        ({"size": "9MB", "allocation": "fisher"}, SIZE_GRIDS, True, False),
        ({"quantize": "int8"}, (INT8_ROWS,), True, False),
        ({"quantize": "int4"}, (Grid(4),), True, False),
        ({"quantize": "int3"}, (Grid(3),), True, False),
        ({"quantize": "int2"}, (Grid(2),), True, False),
        ({"quantize": Quantize(3, None, True)}, (Grid(3, None, True),), True, False),
        ({"quantize": Quantize(2, 32, rounding="nearest")}, (Grid(2, 32),), False, False),
        ({"keep": 0.5}, (), True, True),
        ({"keep": 0.5, "allocation": "uniform", "quantize": "int8"}, (), True, False),
    ],
)
def test_what_options_mean(options, grids, calibrated, measures):
    for found in (CompressionOptions(**options), CalibrationOptions.of(FascCallback(**options))):
        assert found.grids == grids
        assert found.is_calibrated is calibrated
        assert found.measures is measures


def test_a_word_is_the_grid_of_a_quantize():
    assert Quantize().grid == CompressionOptions(quantize="int4").grids[0] == Grid(4, 64, False)
    assert CompressionOptions(quantize=Quantize(3)).grids == CompressionOptions(quantize="int3").grids
    assert CompressionOptions(quantize=Quantize(8, None, symmetric=True)).grids == (INT8_ROWS,)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"size": 0.27}, {"size": 0.27}),
        ({"size": "90MB", "refit": True}, {"size": "90MB", "refit": True}),
        ({"quantize": "int4"}, {"quantize": "int4"}),
        (
            {"quantize": Quantize(3, 32)},
            {"quantize": {"bits": 3, "group": 32, "symmetric": False, "rounding": "calibrated"}},
        ),
    ],
)
def test_plain_data_hold_the_budget(options, expected):
    for found in (CompressionOptions(**options).to_dict(), FascCallback(**options).options):
        assert found == expected == json.loads(json.dumps(found))
    if not isinstance(expected.get("quantize"), dict):
        assert CompressionOptions(**expected).to_dict() == expected
    callback = FascCallback(**options)
    assert ", ".join(f"{name}={value!r}" for name, value in options.items()) in repr(callback)


def test_a_report_states_bits_before_a_recovery_and_int8_of_factors_only_after_it():
    assert FascCallback(quantize="int4", recovery="factors").options["quantize"] == "int4"
    assert "quantize" not in FascCallback(keep=0.5, quantize="int8", recovery="factors").options


def test_options_of_another_compression_can_be_changed_to_a_size():
    held = CompressionOptions(keep=0.6, targets=["up_proj"])
    found = plan(CONFIG, held, keep=None, size=0.3, memory="1GB", probed=False)
    assert {layer.bits for layer in found.layers} == {4}
    with pytest.raises(ValueError, match="`size` or a rank but got both"):
        plan(CONFIG, held, size=0.3, memory="1GB", probed=False)


def command_line(args):
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    cli = LightningCLI(BoringModel, run=False, save_config_callback=None, seed_everything_default=False, args=args)
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, FascCallback))


QUANTIZE = "fasc_lightning.options.Quantize"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["size=0.27"], {"size": 0.27}),
        (["size=90MB"], {"size": "90MB"}),
        (["quantize=int4"], {"quantize": "int4"}),
        (["quantize=int8", "keep=0.8"], {"quantize": "int8", "keep": 0.8}),
        ([f"quantize={QUANTIZE}", "quantize.bits=3"], {"quantize": Quantize(3)}),
        (["quantize.bits=3", "quantize.group=32"], {"quantize": Quantize(3, 32)}),
        (
            [f"quantize={{class_path: {QUANTIZE}, init_args: {{bits: 2, group: null}}}}"],
            {"quantize": Quantize(2, None)},
        ),
        (["quantize={bits: 3, rounding: nearest}"], {"quantize": Quantize(3, rounding="nearest")}),
    ],
)
@on_command_lines
def test_lightnings_command_line_takes_words_class_paths_and_nested_options(options, expected):
    more = [f"--trainer.callbacks.{option}" for option in options]
    callback = command_line(["--trainer.callbacks+=FascCallback", *more, "--trainer.logger=false"])
    assert callback.options == CompressionOptions(**expected).to_dict()
    assert callback.quantize == expected.get("quantize")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("int3", "int3"),
        ({"class_path": QUANTIZE, "init_args": {"bits": 3, "symmetric": True}}, Quantize(3, symmetric=True)),
        ({"bits": 3, "group": 128}, Quantize(3, 128)),
    ],
)
@on_command_lines
def test_a_file_may_hold_any_of_these(tmp_path, given, expected):
    init = {"quantize": given, "update_weights": False}
    trainer = {"callbacks": [{"class_path": "FascCallback", "init_args": init}], "logger": False}
    (tmp_path / "cli.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    assert command_line(["--config", str(tmp_path / "cli.yaml")]).quantize == expected


@pytest.mark.parametrize("option", ["size=much", "size=1.5", "quantize=int5", "quantize.bits=5"])
@on_command_lines
def test_a_wrong_value_on_a_command_line_ends_it(option, capsys):
    with pytest.raises((SystemExit, ValueError)):
        command_line(["--trainer.callbacks+=FascCallback", f"--trainer.callbacks.{option}", "--trainer.logger=false"])
    capsys.readouterr()


def test_a_refused_callback_costs_nothing_of_a_model():
    model = causal_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    from fasc_lightning import compress

    with pytest.raises(ValueError, match="got both"):
        compress(model, [], size=0.3, quantize="int4")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
