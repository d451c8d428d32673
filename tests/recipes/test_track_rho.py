"""The recipe through its real entry point on models made in a moment: outputs, resuming, arithmetic of the report."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_script
from safetensors.torch import load_file
from tiny import byte_tokenizer, causal_model

from fasc_lightning import RhoHistory

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))
recipe = importlib.import_module("track_rho")
run_report = importlib.import_module("run_report")

FILES = {"history.csv", "training.csv", "heatmap.png", "profile.png"}
CONTROL = {f"control_{name}" for name in FILES}
SHARED = {"training.png", "report.json", "options.json", "model"}


@pytest.fixture(autouse=True, scope="module")
def _tiny():
    """A decoder of one block, and a checkpoint at each observation."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in {"WIDTH": 16, "INNER_WIDTH": 24, "LAYERS": 1, "HEADS": 2, "CHECKPOINT_EVERY": 1}.items():
            monkeypatch.setattr(recipe, name, value)
        yield


def arguments(output, *more):
    return [
        "--people", "6", "--steps", "9", "--batch-size", "2", "--window", "32", "--monitor-every-n-steps", "2",
        "--output", str(output), *more,
    ]  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    """The tables, byte by byte."""
    return {path.name: path.read_bytes() for path in folder.glob("*.csv")}


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{run}.ckpt", weights_only=False)["state_dict"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(_tiny, tmp_path_factory):
    """Folder and report of a run on facts and its control that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, recipe.main(arguments(folder))


def without_seconds(report):
    """What a resumed run must have in common with an uninterrupted one."""
    options = {name: value for name, value in report["options"].items() if name not in ("output", "resume")}
    runs = {name: {k: v for k, v in run.items() if k != "seconds"} for name, run in report["runs"].items()}
    return {**report, "options": options, "runs": runs, "seconds": None}


# What a run leaves behind.


def test_outputs(whole):
    folder, report = whole
    assert {path.name for path in folder.iterdir()} == FILES | CONTROL | SHARED | {"facts.ckpt", "control.ckpt"}
    assert json.loads((folder / "report.json").read_text())["runs"].keys() == {"facts", "control"}
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for prefix in ("", "control_"):
        history = RhoHistory.from_csv(folder / f"{prefix}history.csv")
        assert history.steps == [0, 2, 4, 6, 8]
        assert len(history.layers) == 7
        with (folder / f"{prefix}training.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == [0, 2, 4, 6, 8, 9]
        assert [math.isnan(float(row["loss"])) for row in rows] == [True] + 5 * [False]
        assert all(0 <= float(row["recall"]) <= 100 for row in rows)
    assert report["seed"] == 0
    assert {"torch", "lightning", "transformers", "fasc-lightning"} <= set(report["versions"])


def test_the_report_is_what_the_tables_say(whole):
    folder, report = whole
    for name, prefix in (("facts", ""), ("control", "control_")):
        run = report["runs"][name]
        rows = list(RhoHistory.from_csv(folder / f"{prefix}history.csv").at(8).values())
        assert run["rho"]["step"] == 8
        assert run["rho"]["layers"] == 7
        assert run["rho"]["mean"] == pytest.approx(np.mean([row["rho"] for row in rows]))
        assert run["rho"]["debiased_median"] == pytest.approx(np.median([row["debiased"] for row in rows]), nan_ok=True)
        assert run["rho"]["above_threshold"] == np.mean([row["rho"] > 0.3 for row in rows])
        above = [row["rho"] > row["null"] for row in rows if row["null"] == row["null"]]  # few texts have no null
        assert run["rho"]["above_null"] == pytest.approx(np.mean(above) if above else np.nan, nan_ok=True)
        assert run["emergence"].keys() == {row["layer"] for row in rows}
        with (folder / f"{prefix}training.csv").open() as file:
            last = list(csv.DictReader(file))[-1]
        assert run["loss"] == float(last["loss"])
        assert run["recall"] == float(last["recall"])
        assert run["chance"] == pytest.approx(100 * np.mean([1 / n for n in run_candidates()]))


def run_candidates() -> list[int]:
    from biographies import make_people, recall_facts

    facts = recall_facts(make_people(6, 0))
    objects = {}
    for fact in facts:
        objects.setdefault(fact.relation, set()).add(fact.object)
    return [len(objects[fact.relation]) for fact in facts]


def test_runs_start_alike_and_part(whole):
    folder, report = whole
    with (folder / "training.csv").open() as mine, (folder / "control_training.csv").open() as other:
        mine, other = list(csv.DictReader(mine)), list(csv.DictReader(other))
    assert mine[0]["recall"] == other[0]["recall"]  # the same weights
    assert not same(weights(folder, "facts"), weights(folder, "control"))
    last = report["comparison"]["debiased_difference_last"]
    means = [report["runs"][name]["rho"]["debiased_mean"] for name in ("facts", "control")]
    assert last == pytest.approx(means[0] - means[1], nan_ok=True)


def test_the_saved_model_is_the_one_trained_on_facts(whole):
    folder, _ = whole
    saved = load_file(folder / "model" / "model.safetensors")
    trained = weights(folder, "facts")
    assert all(torch.equal(tensor, trained[f"model.{name}"]) for name, tensor in saved.items())
    from fasc_lightning.data import load_model

    model, tokenizer = load_model(str(folder / "model"))
    assert model.config.vocab_size == len(tokenizer)


def test_without_resume_nothing_of_an_earlier_run_is_used(whole, tmp_path, capsys):
    folder, report = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    again = recipe.main(arguments(tmp_path))
    printed = capsys.readouterr().out
    assert "facts, step 2 of 9" in printed
    assert "control, step 2 of 9" in printed
    assert content(tmp_path) == content(folder)
    assert repr(without_seconds(again)) == repr(without_seconds(report))  # with NaN, which equals nothing


def test_another_seed_is_another_run(whole, tmp_path):
    folder, _ = whole
    recipe.main(arguments(tmp_path, "--seed", "1", "--control", "false"))
    assert {path.name for path in tmp_path.iterdir()} == FILES | SHARED | {"facts.ckpt"}
    assert content(tmp_path)["training.csv"] != content(folder)["training.csv"]


# Resuming.


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("measurements", "killed_in"),
    [
        (2, "the facts run, after its first checkpoint"),
        pytest.param(4, "the facts run, at its fourth row", marks=pytest.mark.exhaustive),
        pytest.param(6, "the control, before its first row", marks=pytest.mark.exhaustive),
        (9, "the control, at its fourth row"),
    ],
)
def test_a_resumed_run_is_an_uninterrupted_one(whole, tmp_path, monkeypatch, measurements, killed_in):
    folder, report = whole
    measure, calls = recipe.factual_recall, []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) > measurements:
            raise RuntimeError("killed")
        return measure(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "factual_recall", dying)
        with pytest.raises(RuntimeError, match="killed"):
            recipe.main(arguments(tmp_path))
    assert not (tmp_path / "report.json").exists(), killed_in

    trained = []
    training_step = recipe.Training.training_step
    monkeypatch.setattr(
        recipe.Training, "training_step", lambda self, *args: trained.append(1) or training_step(self, *args)
    )
    resumed = recipe.main(arguments(tmp_path, "--resume", "true"))
    assert len(trained) < 18
    for run in ("facts", "control"):
        assert same(weights(tmp_path, run), weights(folder, run))
    assert content(tmp_path) == content(folder)
    assert repr(without_seconds(resumed)) == repr(without_seconds(report))


def test_a_finished_run_is_not_trained_again(whole, tmp_path, monkeypatch):
    folder, report = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(recipe.Training, "training_step", lambda *args: pytest.fail("trained again"))
    resumed = recipe.main(arguments(tmp_path, "--resume", "true"))
    assert content(tmp_path) == content(folder)
    assert repr(without_seconds(resumed)) == repr(without_seconds(report))


@pytest.mark.exhaustive
def test_nothing_to_resume_is_a_start(whole, tmp_path, capsys):
    folder, _ = whole
    recipe.main(arguments(tmp_path / "new", "--resume", "true"))
    assert "No checkpoint in" in capsys.readouterr().out
    assert content(tmp_path / "new") == content(folder)


def test_other_options_are_not_resumed(whole):
    folder, _ = whole
    before = content(folder)
    with pytest.raises(ValueError, match=r"it had --steps 9, --learning-rate 0\.002\. Give the same ones"):
        recipe.main(arguments(folder, "--resume", "true", "--steps", "12", "--learning-rate", "1e-4"))
    assert content(folder) == before


# Fine-tuning.


@pytest.fixture
def folder(tmp_path):
    """A model folder, a text and facts."""
    tokenizer = byte_tokenizer()
    causal_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Pack my box with five dozen liquor jugs. " * 30)
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


def fine_tuning(folder, *more):
    return [
        "--model", str(folder / "model"), "--text", str(folder / "text.txt"), "--window", "64",
        "--output", str(folder / "out"), *more,
    ]  # fmt: skip


def test_fine_tuning_on_a_text(folder, capsys):
    before = load_file(folder / "model" / "model.safetensors")
    report = recipe.main(
        fine_tuning(folder, "--eval-facts", str(folder / "facts.jsonl"), "--report", str(folder / "r.json"))
    )
    # 1,230 bytes: 19 windows of 64, five batches of four.
    assert report["options"]["steps"] == 5
    assert report["options"]["monitor_every_n_steps"] == 1
    assert list(report["runs"]) == ["text"]
    assert report["comparison"] is None
    assert report["runs"]["text"]["chance"] == 50.0
    assert {path.name for path in (folder / "out").iterdir()} == FILES | SHARED - {"report.json"} | {"text.ckpt"}
    assert json.loads((folder / "r.json").read_text())["model"] == str(folder / "model")
    after = load_file(folder / "out" / "model" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "control" not in capsys.readouterr().out


def test_without_facts_there_is_no_recall(folder, capsys):
    report = recipe.main(fine_tuning(folder, "--steps", "3"))
    assert report["runs"]["text"]["recall"] is None
    assert "recall" not in capsys.readouterr().out
    # NaN, which JSON has not, is null there.
    assert json.loads((folder / "out" / "report.json").read_text())["runs"]["text"]["recall"] is None


def test_the_order_of_a_text_is_a_function_of_seed_and_epoch():
    windows = torch.arange(20).view(10, 2)
    first = recipe.shuffled_windows(windows, 0, 0)
    assert torch.equal(first.sort(0).values, windows)
    assert torch.equal(first, recipe.shuffled_windows(windows, 0, 0))
    assert not torch.equal(first, recipe.shuffled_windows(windows, 0, 1))
    assert not torch.equal(first, recipe.shuffled_windows(windows, 1, 0))


# Bad input.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--model", "smollm2"], ValueError, "--model and --text together"),
        (["--text", "a.txt"], ValueError, "--model and --text together"),
        (["--eval-facts", "f.jsonl"], ValueError, "--eval-facts with --model and --text only"),
        (["--model", "m", "--text", "nowhere.txt"], FileNotFoundError, r"nowhere\.txt is none"),
        (["--model", "m", "--text", "nowhere.txt", "--control", "true"], ValueError, "--control true without --text"),
        (["--steps", "0"], ValueError, "--steps to be at least 1"),
        (["--window", "1"], ValueError, "--window to be at least 2"),
        (["--learning-rate", "0"], ValueError, "--learning-rate to be positive"),
        (["--people", "1"], ValueError, "between 2 and 6000 people"),
        (["--window", "1000"], ValueError, "Give more --people or a smaller --window"),
        (["--rho-threshold", "2"], ValueError, "threshold"),
        (["--monitor-every-n-steps", "0"], ValueError, "monitor_every_n_steps"),
        (["--monitor-tokens", "1"], ValueError, "monitor_tokens"),
    ],
)
def test_bad_input(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        recipe.main(["--people", "6", "--output", str(tmp_path), *options])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"at step \d of facts"):
        recipe.main(arguments(tmp_path, "--learning-rate", "1e30", "--monitor-every-n-steps", "5"))


# Parts.


def test_a_stream_is_the_epochs_one_after_the_other():
    epochs = [torch.randint(0, 100, (size, 4)) for size in (5, 1, 7, 3, 4, 4)]
    stream = recipe.BatchStream(epochs.__getitem__, batch_size=3, steps=8)
    batches = [batch["input_ids"] for batch in stream]
    assert len(stream) == len(batches) == 8
    assert torch.equal(torch.cat(batches), torch.cat(epochs))


def test_a_stream_goes_on_from_its_state():
    def epoch_windows(epoch):
        return torch.full((5, 2), epoch)

    whole = [batch["input_ids"] for batch in recipe.BatchStream(epoch_windows, 3, 7)]
    for stop in range(8):
        first = recipe.BatchStream(epoch_windows, 3, 7)
        batches = iter(first)
        before = [next(batches)["input_ids"] for _ in range(stop)]
        second = recipe.BatchStream(epoch_windows, 3, 7)
        second.load_state_dict(first.state_dict())
        after = [batch["input_ids"] for batch in second]
        assert len(before) + len(after) == 7
        assert torch.equal(torch.cat(before + after), torch.cat(whole))


def test_the_learning_rate_goes_up_and_down():
    rates = [recipe.warmup_cosine(step, 100) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[5:]))
    assert rates[-1] == pytest.approx(0.05)
    assert recipe.warmup_cosine(0, 1) == 1.0


def test_correlation():
    from scipy.stats import pearsonr

    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 20))
    assert run_report.correlation(x, y) == pytest.approx(pearsonr(x, y).statistic)
    holes = np.where(np.arange(20) % 5 == 0, np.nan, y)
    kept = np.isfinite(holes)
    assert run_report.correlation(x, holes) == pytest.approx(pearsonr(x[kept], y[kept]).statistic)
    for useless in (np.zeros(20), np.full(20, np.nan)):
        assert math.isnan(run_report.correlation(x, useless))
    assert math.isnan(run_report.correlation(x[:2], y[:2]))


def made_up_run(debiased: list[float], recalled: list[float]) -> run_report.Run:
    """A run of one layer whose rho and recall are given."""
    history = RhoHistory()
    rows = []
    for step, (value, recall) in enumerate(zip(debiased, recalled, strict=True)):
        row = {"step": step, "layer": "layers.0.q_proj", "rho": abs(value), "null": 0.1, "debiased": value}
        row |= {"low": value - 0.1, "high": value + 0.1, "iid_floor": 0.05, "tokens": 64, "reason": ""}
        history.append(row)
        rows.append({"step": step, "loss": 3.0 - step / 10, "recall": recall})
    result = recipe.FactsResult(percent=recalled[-1], chance=5.0, count=10, by_kind={"other": (recalled[-1], 10)})
    return run_report.Run(None, None, history, rows, result, {"train": 1.0, "recall": 0.0})


def test_the_reading_says_when_a_correlation_is_the_drift_of_both_runs():
    recalled = [5.0, 10.0, 40.0, 85.0, 90.0, 95.0]
    drift = [0.9, 0.8, 0.6, 0.4, 0.3, 0.3]
    facts, control = made_up_run(drift, recalled), made_up_run(drift, [5.0, 6.0, 4.0, 5.0, 5.0, 5.0])
    comparison = run_report.compare_runs(facts, control)
    own = run_report.run_report(facts, 0.35)
    assert own["correlation_of_recall_and_rho"] < -0.9
    assert own["known_at_step"] == 3
    assert own["emergence"] == {"layers.0.q_proj": 0}
    assert comparison["correlation_of_recall_and_rho_of_control"] == own["correlation_of_recall_and_rho"]
    assert comparison["debiased_difference_last"] == 0.0
    assert math.isnan(comparison["correlation_of_recall_and_difference"])


def test_the_difference_is_that_of_the_second_half():
    recalled = [5.0] * 6
    facts, control = made_up_run([0.5, 0.5, 0.5, 0.4, 0.5, 0.6], recalled), made_up_run([0.3] * 6, recalled)
    comparison = run_report.compare_runs(facts, control)
    assert comparison["debiased_difference_second_half"] == pytest.approx(0.2)
    assert comparison["debiased_difference_second_half_deviation"] == pytest.approx(np.std([0.1, 0.2, 0.3]))
    assert comparison["debiased_difference_by_layer"] == {"layers.0.q_proj": pytest.approx(0.2)}


def test_undefined_layers_are_counted_and_left_out():
    run = made_up_run([0.2, 0.2, 0.2], [5.0] * 3)
    row = run.history[-1]
    run.history.append({**row, "layer": "dead", "rho": math.nan, "debiased": math.nan, "null": math.nan, "reason": "?"})
    rho = run_report.run_report(run, 0.3)["rho"]
    assert rho["layers"] == 2
    assert rho["undefined"] == 1
    assert rho["debiased_mean"] == 0.2
    assert rho["above_null"] == 1.0


def test_as_a_script_with_a_config_file(tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text(f"people: 5\nsteps: 1\ncontrol: 'false'\nreport: {tmp_path / 'r.json'}\n")
    command = [RECIPES / "track_rho.py", "--config", str(config), "--output", str(tmp_path)]
    run_script(*command)
    report = json.loads((tmp_path / "r.json").read_text())
    assert 2e6 < report["parameters"] < 5e6
    assert report["options"]["control"] == "false"
