"""Benchmarks without a test file of their own, from their options to their results, on a model made in a moment."""

from __future__ import annotations

import json

import adapter_start
import gpu
import monitoring
import p1
import peak
import pytest
import speed
from pages import markers
from tiny import causal_model, save_model_folder

from fasc_lightning.data import load_model


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Let the benchmarks load a tiny model in place of SmolLM2; the value is its folder."""
    save_model_folder(tmp_path / "model")
    for module in (adapter_start, monitoring, peak, speed):
        monkeypatch.setattr(module, "load_model", lambda name: load_model(str(tmp_path / "model")))
    return tmp_path / "model"


def test_speed_times_calibrating_and_factorising(tiny, tmp_path, capsys):
    speed.main(["--output", str(tmp_path), "--batches", "2", "--window", "32"])
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["of_bare"].keys() == {*speed.ARMS}
    assert all(value > 0 for value in [*result["of_bare"].values(), *result["factorising"].values()])
    assert result["moments_bytes"] > 0
    assert "of bare" in capsys.readouterr().out


def test_monitoring_times_steps_with_and_without_an_observation(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(monitoring, "small_decoder", lambda: causal_model("llama"))
    monkeypatch.setattr(monitoring, "SIZES", ((1, 32), (2, 16)))
    monitoring.main(["--output", str(tmp_path), "--steps", "2"])
    results = json.loads((tmp_path / "monitoring.json").read_text())["results"]
    assert [found["tokens"] for found in results.values()] == [16 * 64, 32, 32]
    assert all(found["observed_step"] > 0 for found in results.values())
    assert "every 50 steps" in capsys.readouterr().out


def test_p1_runs_a_row_once(tiny, tmp_path, monkeypatch, capsys):
    text = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 40
    for name in (*p1.CALIBRATION, *p1.TEXTS.values()):
        (tmp_path / name).write_text(text)
    fact = {"subject": "Peru", "relation": "r", "template": "[X] has [Y] .", "object": "Lima", "kind": "other"}
    (tmp_path / p1.FACTS).write_text("\n".join(map(json.dumps, [fact, {**fact, "subject": "Oslo", "object": "?"}])))
    sizes = ["--windows", "4", "--eval-windows", "2", "--window", "32"]
    monkeypatch.setattr(p1, "ROWS", {"half": ["--keep", "0.5", "--refit", "false", "--model", str(tiny), *sizes]})
    monkeypatch.setenv("FASC_DATA", str(tmp_path))
    p1.main(["--output", str(tmp_path / "out"), "--rows", "half"])
    first = (tmp_path / "out" / "half.json").stat().st_mtime_ns
    p1.main(["--output", str(tmp_path / "out"), "--rows", "half"])
    assert (tmp_path / "out" / "half.json").stat().st_mtime_ns == first
    assert "| half | " in (tmp_path / "out" / "p1.md").read_text()


def test_peak_compares_predicted_with_measured_memory(tiny):
    row = peak.measure(peak.ROWS["projected"], 2, 32)
    assert 0 < row["before"] <= row["loaded"] <= row["peak"]
    assert row["predicted"] > 0
    assert peak.table({"projected": row}).splitlines()[2].startswith("| projected | ")


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "OBSERVED_STEPS", 2)
    sizes = ["--windows", "6", "--batch", "2", "--window", "32", "--past", "8", "--vocabulary", "64"]
    page = tmp_path / "gpu.md"
    page.write_text("\n".join(markers("gpu.py")))
    options = ["--output", str(tmp_path), "--write", str(page), "--device", "cpu", "--shapes", "tiny", *sizes]
    gpu.main([*options, "--seconds-a-cell", "0"])
    found = json.loads((tmp_path / "tiny.json").read_text())
    assert found["forms"].keys() == gpu.FORMS.keys()
    assert all(figures["seconds"]["all"] > 0 for figures in found["forms"].values())
    for forms in found["inference"].values():
        assert forms.keys() == {"dense", *gpu.FORMS}
        assert forms["dense"]["times dense"] == 1
    assert "| tiny | int4 |" in page.read_text()
    gpu.main([*options, "--seconds-a-cell", "0", "--seconds", "0"])  # a saved shape is not measured again
    assert "left out" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="raise --seconds"):  # figures of other settings are not shown
        gpu.main([*options, "--seconds", "0"])
    with pytest.raises(SystemExit, match="--windows to be at least 2"):
        gpu.main([*options, "--windows", "1"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_starts_of_adapters_are_measured_before_and_after(tiny, tmp_path, monkeypatch, capsys):
    text = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 200
    for name in {*adapter_start.CALIBRATION, *(file for file, _ in adapter_start.JUDGES.values())}:
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("FASC_DATA", str(tmp_path))
    sizes = ["--window", "32", "--windows", "4", "--eval-windows", "2", "--tokens", "96", "--r", "4"]
    adapter_start.main(["--output", str(tmp_path / "out"), "--precision", "32-true", *sizes])
    rows = {name: json.loads((tmp_path / "out" / f"{name}-3.json").read_text()) for name in adapter_start.STARTS}
    assert all(row["before"] != row["after"] for row in rows.values())
    assert len({row["before"]["squad"] for row in rows.values()}) == 3
    assert "| loss | 3 | " in capsys.readouterr().out
