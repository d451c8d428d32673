"""The commands of the guide, run as they stand on a model made in a moment, with fewer windows."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from tiny import save_model_folder

import fasc_command

PAGE = (Path(__file__).parents[2] / "docs/guides/command.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 60

SMALL = "--windows 6 --window 32"
ASKED = "--window 32 --eval-windows 2 --eval-facts facts.jsonl"
#: Appended to the commands: the last value of an option counts.
REDUCED = {
    "compress": f"{SMALL} {ASKED}",
    "run": f"{SMALL} {ASKED} --model models/mine",
    "recover": f"{SMALL} {ASKED} --model models/mine --tokens 600 --steps 2",
    "evaluate": ASKED,
    "score": SMALL,
    "plan": "",
}


# A random model learns nothing from a random model.
@pytest.mark.filterwarnings("ignore:Recovery")
def test_the_guides_commands_run_in_their_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft", reason="peft is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["fasc"])
    save_model_folder("models/mine")
    for name in ("texts.txt", "news.txt"):
        (tmp_path / name).write_text(TEXT)
    fact = {"subject": "France", "relation": "capital", "template": "[X]: [Y] .", "object": "Paris", "kind": "other"}
    other = {**fact, "subject": "Peru", "object": "Lima"}
    (tmp_path / "facts.jsonl").write_text(f"{json.dumps(fact)}\n{json.dumps(other)}")
    for command in COMMANDS:
        program, *words = shlex.split(command)
        assert program == "fasc"
        if words[:1] == ["compress"] and "--model" not in words:
            words += ["--model", "models/mine"]
        fasc_command.main([*words, *REDUCED.get(words[0] if words else "", "").split()])
    assert (tmp_path / "report.json").is_file()
    assert (tmp_path / "rho.csv").is_file()
    assert {"compressed", "small", "recovered", "mine"} <= {path.name for path in tmp_path.iterdir()}
    assert "fasc evaluate recovered" in capsys.readouterr().out
