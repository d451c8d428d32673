from __future__ import annotations

import json
import subprocess

import large_models
import pytest
from pages import markers
from processes import run_script


@pytest.fixture
def forked(monkeypatch):
    """Let rows run in processes whose libraries have been imported before they start; the value lists their rows."""
    rows = []

    def run(command, **unused):
        rows.append(command[command.index("--row") + 1 :][:2])
        return subprocess.CompletedProcess(command, 0, run_script(*command[1:]))

    monkeypatch.setattr("memory.subprocess.run", run)
    return rows


def test_every_part_is_measured_once_and_written_down(forked, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("\n".join(markers("large_models.py")), encoding="utf-8")
    options = ["--sizes", "tiny", "--output", str(tmp_path), "--write", str(page)]
    large_models.main(options)
    large_models.main(options)  # existing rows are not measured again
    assert forked == [[part, name] for part, names in large_models.PARTS.items() for name in names]
    found = json.loads((tmp_path / "large_models.json").read_text(encoding="utf-8"))
    for name, row in found["model"].items():
        assert row["generated"] == large_models.GENERATED
        assert row["logits_differ"] == pytest.approx(0, abs=1e-2), name
        assert row["phases"].keys() == {"make", "bare", "compress", "save", "load", "compare", "generate"}
    assert found["block"]["projected"]["report"]["moments_bytes"] < found["block"]["whole"]["report"]["moments_bytes"]
    assert found["model"]["size 0.27"]["report"]["kept_bytes"] <= 0.28
    assert all(row["predicted"] > 0 for row in found["peak"].values())
    text = page.read_text(encoding="utf-8")
    for start in ("| projected | 1 |", "| keep 0.6 | 0.00 G | 1 |", "| size 0.27 | 0.00 G | 1 |", "| 4 passes |"):
        assert start in text


def test_a_row_that_fails_leaves_the_others(forked, tmp_path, monkeypatch):
    def run(script, arguments):
        if "whole" in arguments:
            raise subprocess.CalledProcessError(137, script)
        return {"peak": 3, "before": 1, "predicted": 2, "moments": 1, "threads": 1}

    monkeypatch.setattr(large_models, "run_alone", run)
    with pytest.raises(SystemExit, match=r"peak, whole \(exit code 137\)"):
        large_models.main(["--parts", "peak", "--sizes", "tiny", "--output", str(tmp_path)])
    saved = json.loads((tmp_path / "large_models.json").read_text(encoding="utf-8"))["peak"]
    assert saved.keys() == {"projected", "4 passes"}
