"""The examples of the guides, run one after the other on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny import byte_tokenizer, causal_model, token_loader

from fasc_lightning.compression import available_allocations
from fasc_lightning.solvers import available_methods

GUIDES = Path(__file__).parents[1] / "docs" / "guides"


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (GUIDES / page).read_text(), re.MULTILINE | re.DOTALL)


def run(page, fresh=False):
    """Run the blocks of a guide in one namespace; each on a fresh model if asked to."""
    tokenizer = byte_tokenizer()
    names = {"tokenizer": tokenizer, "batches": list(token_loader(samples=16))}
    for code in blocks(page):
        if fresh or "model" not in names:
            names["model"] = causal_model(vocab_size=len(tokenizer), max_position_embeddings=128)
        exec(compile(code, page, "exec"), names)
    return names


def test_solvers_and_allocations_of_the_guide_compress():
    names = run("extend.md", fresh=True)
    assert {"cautious", "columns"} <= set(available_methods())
    assert "careful" in available_allocations()
    assert names["report"].options["allocation"] == "careful"
    assert 0 < names["report"].kept <= 0.8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_guide_to_evaluation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("evaluate.md")
    assert names["found"].count == len(names["recalled"]) == 3
    assert names["ratio"].low <= names["ratio"].estimate <= names["ratio"].high
    assert names["divergences"].shape == (12,)
    assert names["result"].counts == {"mine": 4}
