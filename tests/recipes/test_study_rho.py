"""The recipe through its real entry point, on a model made in a moment."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest
from processes import run_script
from tiny import save_model_folder

from fasc_lightning.dependence import RhoHistory

RECIPE = Path(__file__).parents[2] / "recipes" / "study_rho.py"
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 60


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("study_rho_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    """A model folder and a text."""
    save_model_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def arguments(folder, *more):
    return [
        "--model", str(folder / "model"),
        "--calibration", str(folder / "text.txt"),
        "--windows", "20",
        "--heldout-windows", "4",
        "--window", "64",
        "--eval-windows", "2",
        "--eval-text", f"foxes={folder / 'text.txt'}", f"again={folder / 'text.txt'}",
        "--output", str(folder / "out"),
        *more,
    ]  # fmt: skip


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_studies_from_one_pass(recipe, folder, capsys):
    recipe.main(arguments(folder, "--thresholds", "0", "0.4", "1", "--gate-by", "rho", "--gate-exclude", "paper"))
    out = folder / "out"
    report = json.loads((out / "report.json").read_text())
    printed = capsys.readouterr().out
    for study in recipe.STUDIES:
        assert f"{study}: " in printed
        assert report[study]
    figures = {"profile", "gains_rho", "gains_pooled", "gains_debiased", "angles_fifths"}
    assert figures <= {path.stem for path in out.glob("*.png")}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))

    layers = table(out / "layers.csv")
    assert len(layers) == len(report["layers"]) == 14
    for row in layers:
        for column in ("rho", "pooled", "debiased", "predicted_gain", "heldout_gain", "median_angle"):
            assert abs(float(row[column])) < 90
        assert float(row["predicted_gain"]) >= -1e-9  # fasc minimises what is predicted
    assert {row["flags"] for row in layers if "q_proj" in row["layer"]} == {"early attention"}
    assert set(RhoHistory.from_csv(out / "history.csv").layers) == {row["layer"] for row in layers}

    assert [row["tokens"] for row in report["sizes"]["medians"]] == [1024, 20 * 64]
    assert len(table(out / "sizes_layers.csv")) == 2 * 14
    own = [row["r with 1,280"] for row in report["sizes"]["correlations"] if row["tokens"] == 1280]
    assert own == pytest.approx([1, 1, 1])

    gates = {row["gate"]: row for row in report["gate"]}
    assert list(gates) == ["no gate: all fasc", "rho > 0", "rho > 0.4", "rho > 1", "all svd", "dense model"]
    counts = [row["layers on fasc"] for row in gates.values()]
    # Two blocks of four attention layers are excluded, and the last down projection.
    assert counts[:2] == [14, 14 - 9]
    assert 0 <= counts[2] <= 5
    assert counts[3:] == [0, 0, 0]
    for row in gates.values():
        assert row["perplexity of foxes"] == row["perplexity of again"] > 1
        assert row["kept"] <= 1
    for same in ("kept", "seconds", "perplexity of foxes"):
        assert gates["rho > 1"][same] == gates["all svd"][same]
    assert gates["rho > 0"]["kept"] < gates["dense model"]["kept"] == 1


def test_the_dense_layers_are_back_after_each_gate(recipe, folder):
    from fasc_lightning.data import load_model, text_windows
    from fasc_lightning.evaluation import perplexity

    report = recipe.main(arguments(folder, "--studies", "gate", "--thresholds", "0.2"))
    model, tokenizer = load_model(str(folder / "model"))
    expected = perplexity(model, text_windows(TEXT, tokenizer, 2, 64))
    assert report["gate"][-1]["gate"] == "dense model"  # measured last
    assert report["gate"][-1]["perplexity of foxes"] == pytest.approx(expected, rel=1e-6)
    assert report["gate"][0]["perplexity of foxes"] != pytest.approx(expected, rel=1e-6)


def test_one_study_writes_only_its_own(recipe, folder):
    path = folder / "r.json"
    report = recipe.main(arguments(folder, "--studies", "angles", "--windows", "4", "--report", str(path)))
    assert json.loads(path.read_text())["angles"][0]["layers"] == 3  # a fifth of 14
    assert not {"profile", "gains", "sizes", "gate"} & set(report)
    assert {p.name for p in (folder / "out").iterdir()} - {"angles_threshold.png"} == {
        "angles.csv", "angles_fifths.png", "layers.csv",
    }  # fmt: skip


def test_the_same_seed_gives_the_same_study(recipe, folder):
    options = arguments(folder, "--studies", "profile", "gains", "--windows", "6")
    first, second = recipe.main(options), recipe.main(options)
    assert repr(first["layers"]) == repr(second["layers"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--studies", "profiles"], ValueError, "of profile, gains, angles, sizes, gate but got profiles"),
        (["--thresholds", "0.1", "1.1"], ValueError, "but got 1.1"),
        (["--rho-threshold", "-1"], ValueError, "but got -1"),
        (["--rank", "17"], ValueError, r"v_proj|k_proj"),
        (["--rank", "0.0"], ValueError, "rank"),
        (["--windows", "0"], ValueError, "--windows to be at least 1"),
        (["--heldout-windows", "0"], ValueError, "--heldout-windows to be at least 1"),
        (["--eval-text", "foxes"], ValueError, "NAME=FILE but got 'foxes'"),
        (["--eval-text", "foxes=nowhere.txt"], FileNotFoundError, r"nowhere\.txt is none"),
    ],
)
def test_bad_input(recipe, folder, options, error, message):
    with pytest.raises(error, match=message):
        recipe.main(arguments(folder, *options))


def test_as_a_script_with_a_config_file(folder):
    config = folder / "options.yaml"
    config.write_text("studies: [profile]\nwindows: 2\n")
    command = [RECIPE, *arguments(folder)[:4], "--config", str(config)]
    command += ["--window", "32", "--heldout-windows", "1", "--output", str(folder / "out")]
    run_script(*command)
    assert len(table(folder / "out" / "profile.csv")) == 7
