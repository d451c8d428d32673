"""The recipe through its real entry point, on a model made in a moment."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path

import pytest
from processes import run_script
from tiny import save_model_folder
from transformers import AutoModelForCausalLM

from fasc_lightning.evaluation import builtin_facts
from fasc_lightning.solvers import available_methods, register_solver
from fasc_lightning.studies.comparison import Comparison

RECIPE = Path(__file__).parents[2] / "recipes" / "compare_methods.py"
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 60
PAIRS = [{"phenomenon": "agreement", "uid": f"u{i}", "good": f"he is {i}", "bad": f"he are {i}"} for i in range(4)]
GRID = ["--methods", "fasc", "svd", "magnitude", "--keep", "0.8", "--rank", "0.5"]
GRID += ["--settings", "uniform-factors", "fisher-pivot"]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("compare_methods_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_folder(folder):
    """A model folder, texts, facts and minimal pairs."""
    save_model_folder(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT.swapcase())
    facts = [fact.to_dict() for fact in builtin_facts() if fact.relation in ("currency, America", "capital, America")]
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """Folder, printed lines and content of a run of everything that nothing interrupted."""
    folder = make_folder(tmp_path_factory.mktemp("whole"))
    studies = ["--studies", *recipe.STUDIES, "--study-facts", "5", "--study-windows", "1", "--thresholds", "0", "1"]
    return folder, recipe.main(arguments(folder, *GRID, *studies, "--minimal-pairs", str(folder / "pairs.jsonl")))


def arguments(folder, *more):
    return [
        "--model", str(folder / "model"),
        "--calibration", str(folder / "text.txt"),
        "--windows", "4",
        "--window", "64",
        "--eval-windows", "3",
        "--eval-text", f"foxes={folder / 'text.txt'}", f"seXof={folder / 'other.txt'}",
        "--eval-facts", str(folder / "facts.jsonl"),
        "--output", str(folder / "out"),
        *more,
    ]  # fmt: skip


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def comparable(content):
    """What two runs must have in common: all but where they wrote and the seconds they took."""
    cells = [
        {name: value for name, value in cell.items() if not name.startswith("seconds")} for cell in content["cells"]
    ]
    return repr((cells, content["best"]))


def test_everything_is_written(whole):
    folder, content = whole
    out = folder / "out"
    figures = {
        "budgets_perplexity", "budgets_recall", "kinds", "sensitivity_loss", "sensitivity_facts",
        "rho_sensitivity_fasc", "rho_sensitivity_svd",
    }  # fmt: skip
    assert {path.stem for path in out.glob("*.png")} == figures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    names = {"results", "layers", "critical", "correlations", "groups", "thresholds"}
    assert {path.stem for path in out.glob("*.csv")} == names
    page = (out / "results.md").read_text()
    for figure in figures:
        assert f"({figure}.png)" in page
    assert page.count("ties with it") == 1
    for heading in ("Who is best", "keep 0.8", "rank 0.5", "Facts by kind, keep 0.8", "One layer at a time"):
        assert f"## {heading}" in page
    assert json.loads((out / "results.json").read_text())["cells"][0]["method"] == "dense"
    assert content["seed"] == 0
    assert content["seconds"]["pass"] > 0
    assert {"torch", "fasc-lightning"} <= set(content["versions"])


def test_the_grid(whole):
    folder, content = whole
    rows = {(row["method"], row["budget"], row["setting"]): row for row in content["cells"]}
    assert len(rows) == len(content["cells"]) == 1 + 2 * (2 * 2 + 1)
    assert [row["method"] for row in table(folder / "out" / "results.csv")] == [r["method"] for r in content["cells"]]
    for (method, _, _), row in rows.items():
        assert row["error"] == ""
        assert row["perplexity of foxes"] > 1
        assert 0 <= row["facts %"] <= 100
        assert 0 <= row["syntax %"] <= 100
        if method in ("fasc", "svd"):
            assert row["kept"] < 0.81
        else:
            assert row["kept"] == 1
    assert rows["magnitude", "keep 0.8", ""]["zeros"] == pytest.approx(0.2, abs=0.01)
    assert rows["magnitude", "rank 0.5", ""]["zeros"] > 0.2
    assert {row["setting"] for row in content["best"]} == {"uniform-factors", "fisher-pivot", "any"}
    assert not any("magnitude" in str(row) for row in content["best"])


def test_single_answers_are_kept(whole):
    folder, content = whole
    files = list((folder / "out" / "cells" / "grid").glob("*.json"))
    assert len(files) == len(content["cells"])
    facts = len((folder / "facts.jsonl").read_text().splitlines())
    for path in files:
        measured = json.loads(path.read_text())["outcome"]["measured"]
        assert {name: len(losses) for name, losses in measured["losses"].items()} == {"foxes": 3, "seXof": 3}
        assert (len(measured["recalled"]), len(measured["preferred"])) == (facts, 4)


def test_studies_of_layers(whole):
    folder, content = whole
    layers = table(folder / "out" / "layers.csv")
    assert len(layers) == 14
    debiased = [float(row["debiased"]) for row in layers]
    assert debiased == sorted(debiased, reverse=True)
    assert {row["layers"] for row in content["groups"][1:]} == {3}  # a fifth of 14
    gates = {row["cell"]: row["layers"] for row in content["thresholds"]}
    assert gates["all fasc"] == 14
    assert gates["all svd"] == 0
    assert 0 <= gates.get("rho above 0", 14) <= 14
    kinds = {name for name in content["cells"][0] if name.startswith("facts % of ")}
    assert kinds == {"facts % of geographic", "facts % of other"}


def test_a_second_run_measures_nothing_and_says_the_same(recipe, whole, monkeypatch, capsys):
    folder, content = whole
    page = (folder / "out" / "results.md").read_text()
    monkeypatch.setattr(Comparison, "measure", None)
    studies = ["--studies", *recipe.STUDIES, "--study-facts", "5", "--study-windows", "1", "--thresholds", "0", "1"]
    again = recipe.main(arguments(folder, *GRID, *studies, "--minimal-pairs", str(folder / "pairs.jsonl")))
    assert comparable(again) == comparable(content)
    assert again["seconds"]["pass"] == content["seconds"]["pass"]  # of the run that made the statistics
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert lines
    assert all(line.endswith("(kept)") for line in lines)
    without_head = re.compile(r"^\* .*$", re.MULTILINE)
    assert without_head.sub("", (folder / "out" / "results.md").read_text()) == without_head.sub("", page)


def test_an_interrupted_run_goes_on_to_the_same_tables(recipe, folder, monkeypatch, capsys):
    options = arguments(folder, *GRID)
    expected = recipe.main([*options, "--output", str(folder / "expected")])
    real, done = Comparison.measure, []

    def killed(self, cell, *more):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(cell)
        return real(self, cell, *more)

    with monkeypatch.context() as patched:
        patched.setattr(Comparison, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            recipe.main(options)
    assert not (folder / "out" / "results.md").exists()
    capsys.readouterr()
    found = recipe.main(options)
    assert comparable(found) == comparable(expected)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line.endswith("(kept)") for line in lines] == [True] * 4 + [False] * 7


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "change",
    [
        ["--windows", "5"],
        ["--model", "changed"],
        pytest.param(["--seed", "1"], marks=pytest.mark.exhaustive),
        pytest.param(["--eval-windows", "2"], marks=pytest.mark.exhaustive),
        pytest.param(["--eval-text", "foxes=other.txt"], marks=pytest.mark.exhaustive),
    ],
    ids=lambda change: change[0],
)
def test_other_data_and_settings_use_nothing_that_is_kept(recipe, folder, capsys, monkeypatch, change):
    monkeypatch.chdir(folder)
    small = ["--methods", "fasc", "--studies", "grid", "--calibration", "text.txt", "other.txt"]
    recipe.main(arguments(folder, *small))
    save_model_folder(folder / "changed")
    model = AutoModelForCausalLM.from_pretrained(folder / "changed")
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    model.save_pretrained(folder / "changed")
    capsys.readouterr()
    recipe.main(arguments(folder, *small, *change))
    printed = capsys.readouterr().out
    assert "[2/2] fasc" in printed
    assert "(kept)" not in printed


def test_a_method_that_fails_is_shown_with_its_reason_and_stops_nothing(recipe, folder):
    @register_solver("broken")
    def broken(W, moments):
        raise FloatingPointError("the solver met NaN | and gave up")

    assert "broken" in available_methods()
    content = recipe.main(arguments(folder, "--methods", "broken", "fasc", "--keep", "0.8", "0.001"))
    rows = {(row["method"], row["budget"]): row for row in content["cells"]}
    assert rows["broken", "keep 0.8"]["error"] == "FloatingPointError: the solver met NaN | and gave up"
    assert rows["fasc", "keep 0.8"]["error"] == ""
    assert "a budget of at least" in rows["fasc", "keep 0.001"]["error"]
    page = (folder / "out" / "results.md").read_text()
    assert "Failed: broken keep 0.8 measured-pivot: FloatingPointError: the solver met NaN" in page
    assert [row["perplexity of foxes"] for row in content["best"]] == ["fasc", "-"]


def test_refit_and_passes_are_cells_of_their_own(recipe, folder):
    options = arguments(folder, "--methods", "gfwsvd", "--studies", "grid")
    recipe.main([*options, "--gfwsvd-passes", "0"])
    content = recipe.main([*options, "--gfwsvd-passes", "1", "--refit-methods", "fasc"])
    refitted = [cell for cell in content["cells"] if cell.get("refit")]
    assert [cell["method"] for cell in refitted] == ["fasc"]
    assert refitted[0]["seconds refit"] > 0
    assert content["seconds"]["1 further kronecker steps"] > 0
    assert len(list((folder / "out" / "cells" / "grid").glob("gfwsvd*"))) == 2


@pytest.mark.exhaustive  # compare_bytes asks them, too
def test_the_built_in_questions(recipe, folder):
    options = ["--model", str(folder / "model"), "--calibration", str(folder / "text.txt"), "--windows", "2"]
    options += ["--window", "64", "--eval-windows", "1", "--methods", "fasc", "--output", str(folder / "out")]
    content = recipe.main(options)
    assert "perplexity of python-reference" in content["cells"][0]
    assert content["cells"][0]["facts %"] >= 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--methods", "fascs"], ValueError, "--methods to be of .*magnitude, llm-pruner but got fascs"),
        (["--methods", "fasc", "fasc"], ValueError, "--methods to be different names"),
        (["--study-methods", "magnitude"], ValueError, "--study-methods to be of"),
        (["--studies", "grids"], ValueError, "of grid, kinds, sensitivity, layers, thresholds but got grids"),
        (["--settings", "best"], ValueError, "ALLOCATION-LAYOUT"),
        (["--keep", "1.2"], ValueError, r"\(0, 1\]"),
        (["--rank", "-1"], ValueError, "rank"),
        (["--thresholds", "2"], ValueError, r"in \[0, 1\]"),
        (["--eval-windows", "0"], ValueError, "--eval-windows to be at least 1"),
        (["--gfwsvd-passes", "-1"], ValueError, "--gfwsvd-passes to be at least 0"),
        (["--eval-text", "foxes"], ValueError, "NAME=FILE but got 'foxes'"),
        (["--eval-facts", "nowhere.jsonl"], FileNotFoundError, r"nowhere\.jsonl is none"),
        (["--minimal-pairs", "nowhere.jsonl"], FileNotFoundError, r"nowhere\.jsonl is none"),
    ],
)
def test_bad_input(recipe, folder, options, error, message):
    with pytest.raises(error, match=message):
        recipe.main(arguments(folder, *options))


def test_as_a_script_with_a_config_file(folder):
    config = folder / "options.yaml"
    config.write_text("methods: [fasc]\nstudies: [grid]\n")
    command = [RECIPE, *arguments(folder), "--config", str(config)]
    run_script(*command)
    assert len(table(folder / "out" / "results.csv")) == 2
