"""The recipe through its real entry point, on a model made in a moment."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from processes import run_script
from tiny import save_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasc_lightning.evaluation import builtin_facts
from fasc_lightning.layers import select_layers
from fasc_lightning.studies.comparison import Comparison
from fasc_lightning.studies.comparison import _speed as speed

RECIPE = Path(__file__).parents[2] / "recipes" / "compare_bytes.py"
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 60
ROWS = ["--sizes", "0.54", "0.33", "int8", "int4/16", "nearest-int4/16", "--keep", "0.8", "--refit", "sizes", "keep"]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("compare_bytes_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_peer(model_folder, folder, bits, **changes):
    """A folder as another program leaves it: symmetric rounding to the nearest, one scale a row."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    size = 0
    for layer in select_layers(model).values():
        W = layer.weight.data
        scale = W.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        layer.weight.data = (W / scale).round() * scale
        size += W.numel() * bits // 8 + 2 * len(W)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    report = {"name": "absmax", "version": "1.2", "settings": {"sym": True}, "bits": bits, "group": -1}
    report |= {"layer_bytes": size, "seconds": 12.5, "threads": 1, "layers": 14}
    (folder / "peer.json").write_text(json.dumps({**report, **changes}))


def make_folder(folder):
    """A model folder, texts, facts and two peers."""
    save_model_folder(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for layer in select_layers(model).values():
        layer.weight.data *= 8  # so that rounding shows in the predictions
    model.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT.swapcase())
    facts = [fact.to_dict() for fact in builtin_facts() if fact.relation in ("currency, America", "capital, America")]
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    for bits in (4, 8):
        make_peer(folder / "model", folder / f"absmax-{bits}", bits)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def arguments(folder, *more):
    return [
        "--model", str(folder / "model"),
        "--calibration", str(folder / "text.txt"),
        "--windows", "4",
        "--window", "64",
        "--eval-windows", "3",
        "--kl-windows", "2",
        "--eval-text", f"foxes={folder / 'text.txt'}", f"seXof={folder / 'other.txt'}",
        "--eval-facts", str(folder / "facts.jsonl"),
        "--output", str(folder / "out"),
        *more,
    ]  # fmt: skip


def peers(folder):
    return ["--peers", str(folder / "absmax-4"), str(folder / "absmax-8")]


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """Folder and content of a run of everything that nothing interrupted."""
    folder = make_folder(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(speed, "DECODED", 2)
        return folder, recipe.main(arguments(folder, *ROWS, *peers(folder), "--speed"))


def lines_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]


def test_every_row_is_written_as_text_numbers_and_figure(whole):
    folder, content = whole
    out = folder / "out"
    names = {row["model"] for row in content["models"]}
    assert names == {
        "dense", "size 0.54, refitted", "size 0.33, refitted", "int8, refitted", "int4 groups of 16, refitted",
        "int4 groups of 16 to the nearest", "keep 0.8, refitted", "absmax-4", "absmax-8",
    }  # fmt: skip
    with (out / "results.csv").open(newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == [row["model"] for row in content["models"]]
    assert json.loads((out / "results.json").read_text())["models"] == json.loads(
        json.dumps(content["models"]).replace("NaN", "null")
    )
    page = (out / "results.md").read_text()
    for heading in ("Models by their bytes", "At equal bytes", "Other programs"):
        assert f"## {heading}" in page
    for name in names - {"dense"}:
        assert f"| {name} |" in page
    assert "(bytes.png)" in page
    assert (out / "bytes.png").read_bytes().startswith(b"\x89PNG")


def test_rows_hold_bytes_quality_and_seconds(whole):
    folder, content = whole
    rows = {row["model"]: row for row in content["models"]}
    dense = rows["dense"]
    assert dense["share of 16 bits"] == 1
    assert (dense["KL on foxes"], dense["perplexity of foxes / dense"]) == (pytest.approx(0, abs=1e-6), 1)
    shares = [row["share of 16 bits"] for row in content["models"]]
    assert shares == sorted(shares, reverse=True)
    for name, row in rows.items():
        assert row["error"] == ""
        assert row["bytes of the model"] - row["bytes of the layers"] == (
            dense["bytes of the model"] - dense["bytes of the layers"]
        )
        if name != "dense":
            assert row["KL on foxes"] > 0
            assert row["KL on seXof"] > 0
            assert row["seconds to compress"] > 0
    for size in (0.54, 0.33):
        assert 0.7 * size < rows[f"size {size}, refitted"]["share of 16 bits"] <= size
    assert rows["keep 0.8, refitted"]["share of 16 bits"] <= 0.86  # pivots have an index
    assert (
        rows["int4 groups of 16, refitted"]["bytes of the layers"]
        == (rows["int4 groups of 16 to the nearest"]["bytes of the layers"])
    )
    by_bits = [rows[name]["KL on foxes"] for name in ("int8, refitted", "int4 groups of 16, refitted", "absmax-4")]
    assert by_bits == sorted(by_bits)
    assert rows["absmax-4"]["seconds to compress"] == 12.5
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    numbers = sum(layer.weight.numel() for layer in select_layers(model).values())
    outputs = sum(len(layer.weight) for layer in select_layers(model).values())
    assert dense["bytes of the layers"] == 2 * numbers
    assert rows["absmax-4"]["bytes of the layers"] == numbers // 2 + 2 * outputs
    assert content["other programs"]["absmax-8"]["settings"] == {"sym": True}


def test_speed_is_that_of_the_dense_model_and_of_models_with_bits(whole):
    _, content = whole
    timed = {row["model"] for row in content["models"] if row["decode tokens/s"] > 0}
    assert timed == {row["model"] for row in content["models"] if row["prefill tokens/s"] > 0}
    bits = ("size 0.54", "size 0.33", "int8", "int4 groups of 16")
    assert timed == {"dense", *(f"{name}, refitted" for name in bits)}


def test_a_row_alone_may_be_refitted_or_rounded(recipe):
    sizes = ["--sizes", "int4", "0.3", "0.3+refit", "int4+refit", "nearest-int4"]
    options = recipe.build_parser().parse_args([*sizes, "--keep", "0.8", "0.8+int8", "0.8+int8+refit", "--refit"])
    assert [str(cell.budget) + (" refitted" if cell.refit else "") for cell in recipe.cells_of(options)] == [
        "size 0.3", "size 0.3 refitted", "int4", "int4 refitted", "int4 groups of 64 to the nearest",
        "keep 0.8", "keep 0.8, int8", "keep 0.8, int8 refitted",
    ]  # fmt: skip


def test_single_answers_are_kept(whole):
    folder, content = whole
    files = list((folder / "out" / "cells" / "models").glob("*.json"))
    assert len(files) == len(content["models"])
    for path in files:
        measured = json.loads(path.read_text())["outcome"]["measured"]
        assert {name: len(found) for name, found in measured["losses"].items()} == {"foxes": 3, "seXof": 3}
        assert {name: len(found) for name, found in measured["divergence"].items()} == {"foxes": 2, "seXof": 2}


def test_a_second_run_measures_nothing_and_says_the_same(recipe, whole, monkeypatch, capsys):
    folder, content = whole
    page = (folder / "out" / "results.md").read_text()
    monkeypatch.setattr(Comparison, "measure", None)
    monkeypatch.setattr("fasc_lightning.studies.comparison._questions.log_probabilities", None)
    again = recipe.main(arguments(folder, *ROWS, *peers(folder), "--speed"))
    assert repr(again["models"]) == repr(content["models"])
    lines = lines_of(capsys)
    assert lines
    assert all(line.endswith("(kept)") for line in lines)
    without_head = re.compile(r"^\* .*$", re.MULTILINE)
    assert without_head.sub("", (folder / "out" / "results.md").read_text()) == without_head.sub("", page)


def test_an_interrupted_run_goes_on_to_the_same_rows(recipe, whole, folder, monkeypatch, capsys):
    _, content = whole
    options = arguments(folder, *ROWS)
    real, done = Comparison.measure, []

    def killed(self, cell, *more):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(cell)
        return real(self, cell, *more)

    with monkeypatch.context() as patched:
        patched.setattr(Comparison, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            recipe.main(options)
    assert not (folder / "out" / "results.md").exists()
    capsys.readouterr()
    found = {row["model"]: row for row in recipe.main(options)["models"]}
    assert [line.endswith("(kept)") for line in lines_of(capsys)] == [True] * 2 + [False] * 5
    for row in content["models"]:
        if (other := found.get(row["model"])) is not None:
            same = [name for name in other if "seconds" not in name]
            assert repr([other[name] for name in same]) == repr([row[name] for name in same])


def test_a_folder_that_has_changed_is_measured_again(recipe, folder, capsys):
    options = arguments(folder, "--sizes", "--keep", "--peers", str(folder / "absmax-4"))
    recipe.main(options)
    capsys.readouterr()
    make_peer(folder / "model", folder / "absmax-4", 4, layer_bytes=10_000)
    content = recipe.main(options)
    assert [line.endswith("(kept)") for line in lines_of(capsys)] == [True, False]
    assert content["models"][1]["bytes of the layers"] == 10_000
    assert not (folder / "out" / "statistics").exists()


def test_a_model_of_other_weights_is_no_peer(recipe, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "absmax-8")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(folder / "absmax-8")
    content = recipe.main(arguments(folder, "--sizes", "--keep", *peers(folder)))
    rows = {row["model"]: row for row in content["models"]}
    assert rows["absmax-4"]["error"] == ""
    assert "differs in model.norm.weight" in rows["absmax-8"]["error"]
    page = (folder / "out" / "results.md").read_text()
    assert "| absmax-8 | another program | failed |" in page
    assert "Failed: folder absmax-8: ValueError: Expected a model that differs" in page


def test_the_built_in_questions(recipe, folder):
    options = ["--model", str(folder / "model"), "--calibration", str(folder / "text.txt"), "--windows", "4"]
    options += ["--window", "64", "--eval-windows", "1", "--sizes", "0.3", "--keep", "--output", str(folder / "out")]
    content = recipe.main(options)
    assert content["models"][1]["KL on python-reference"] > 0
    assert content["models"][1]["facts %"] >= 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--sizes", "int5"], ValueError, "a size as 0.27, or bits as int8, int4, int3, int2, .* but got 'int5'"),
        (["--sizes", "1.5"], ValueError, r"in \(0, 1\]"),
        (["--sizes", "int4/7"], ValueError, "multiple of 8"),
        (["--sizes", "0.27", "0.27"], ValueError, "fasc size 0.27 measured-pivot is twice"),
        (["--sizes", "--keep"], ValueError, "--sizes, --keep or --peers"),
        (["--keep", "1.2"], ValueError, r"\(0, 1\]"),
        (["--setting", "best"], ValueError, "ALLOCATION-LAYOUT"),
        (["--refit", "peers"], ValueError, "--refit to be of sizes, keep but got peers"),
        (["--kl-windows", "-1"], ValueError, "--kl-windows to be at least 0"),
        (["--eval-windows", "0"], ValueError, "--eval-windows to be at least 1"),
        (["--eval-precision", "low"], ValueError, "--eval-precision to be one of highest"),
        (["--peers", "nowhere"], FileNotFoundError, r"peer\.json is none"),
        (["--eval-facts", "nowhere.jsonl"], FileNotFoundError, r"nowhere\.jsonl is none"),
    ],
)
def test_bad_input(recipe, tmp_path, options, error, message):
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(error, match=message):
        recipe.main(["--calibration", str(tmp_path / "text.txt"), *options])


def test_a_peer_that_states_too_little_is_refused(recipe, tmp_path):
    (tmp_path / "peer.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="Expected the entry 'version'"):
        recipe.main(["--peers", str(tmp_path)])


def test_as_a_script_with_a_config_file(folder):
    config = folder / "options.yaml"
    config.write_text("sizes: [0.3, int4]\nkeep: []\nrefit: []\n")
    run_script(RECIPE, *arguments(folder), "--config", str(config))
    content = json.loads((folder / "out" / "results.json").read_text())
    assert [row["model"] for row in content["models"]] == ["dense", "size 0.3", "int4"]
