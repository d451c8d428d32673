from __future__ import annotations

import pytest
import scale
from pages import markers
from scale import BUDGETS, configs, main, table_5
from transformers import LlamaConfig

from fasc_lightning.planning import model_on_meta

#: Parameters of the published checkpoints.
PUBLISHED = {
    "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B": 7_241_732_096,
    "Llama-3-8B": 8_030_261_248,
    "Gemma-2-9B": 9_241_705_984,
    "Qwen2.5-7B": 7_615_616_512,
    "Mixtral-8x7B": 46_702_792_704,
    "Llama-3-70B": 70_553_706_496,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_are_those_of_the_published_models(name):
    model = model_on_meta(configs()[name])
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_pivots_reach_what_the_paper_reports_and_two_factors_do_not():
    sizes = {row["Mistral-7B in bfloat16"]: float(row["GiB"]) for row in table_5()}
    assert sizes["compressed to rank 0.5, pivots"] < 8.4 < sizes["compressed to rank 0.5, two factors"]
    assert sizes["original"] < 14.2


def test_tables_are_written_between_the_markers_of_a_page(tmp_path, monkeypatch):
    small = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    monkeypatch.setattr(scale, "configs", lambda: {"small": small, "Mistral-7B": small})
    page = tmp_path / "scale.md"
    page.write_text(f"above\n{markers('scale.py')[0]}\nold\n{markers('scale.py')[1]}\nbelow\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["scale.py", "--write", str(page), "--memory", "1GB"])
    main()
    text = page.read_text(encoding="utf-8")
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "old" not in text
    assert text.count("| small | ") == 2 * len(BUDGETS)
