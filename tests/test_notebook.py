"""The notebook: its form, its committed outputs, and its code on a model made in a moment.

``jupyter nbconvert --to notebook --execute --inplace docs/notebook.ipynb`` makes the outputs again.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib.figure
import pytest
import transformers
from tiny import byte_tokenizer, save_model_folder

from fasc_lightning import RhoHistory
from fasc_lightning._utils import table_text
from fasc_lightning.dependence._summary import describe
from fasc_lightning.layers import compressed_layers

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "


@pytest.fixture
def no_progress_bars():
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.usefixtures("no_progress_bars")
def test_the_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("matplotlib.pyplot.switch_backend", lambda backend: None)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    save_model_folder(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    small = {"MODEL": "model", "WINDOWS": 12, "WINDOW": 32, "FOLDER": "small"}
    names: dict = {}
    for cell in CODE:
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
        if cell is CODE[0]:
            assert small.keys() <= names.keys()
            names |= small
    printed = capsys.readouterr().out
    assert isinstance(names["figure"], matplotlib.figure.Figure)
    assert "bytes in 16 bits kept" in printed  # the report's table is a part of its text
    assert "the same logits\n" in printed
    assert f"perplexity {names['dense']:.2f} dense, {names['compressed']:.2f} compressed" in printed
    assert f"| perplexity of python-reference | {names['dense']:.2f} |" in printed
    assert len(compressed_layers(names["reloaded"])) == 14


def test_the_file_is_a_notebook_with_the_outputs_of_one_run():
    content = json.loads(NOTEBOOK.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) >= (4, 5)
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert {cell["cell_type"] for cell in CELLS} == {"code", "markdown"}
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    kinds = {(output["output_type"], output.get("name")) for output in outputs}
    assert kinds == {("stream", "stdout"), ("execute_result", None)}  # no errors, no warnings
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert any("the same logits" in "".join(output.get("text", "")) for output in outputs)
    assert NOTEBOOK.stat().st_size < 200_000
    text = "".join(line for cell in CELLS for line in cell["source"]) + "".join(
        line for output in outputs for line in output.get("text", [])
    )
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr)/", text)


def test_tables_are_text_in_a_notebook_too(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    row = {"step": 0, "layer": "q", "rho": 0.5, "null": 0.25, "debiased": 0.25, "low": 0.0, "high": 0.5}
    history = RhoHistory([{**row, "iid_floor": 0.1, "tokens": 512, "reason": ""}])
    assert "0.500" in describe(history)
    assert "0.500" in table_text("scores", [{"rho": 0.5}])


def test_cells_are_short():
    assert max(len(cell["source"]) for cell in CELLS) <= 16
