from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fasc_lightning import CompressionReport, expert_table
from fasc_lightning.compression import LayerReport
from fasc_lightning.compression._expert_report import expert_rows, expert_summary
from fasc_lightning.layers import Size
from fasc_lightning.statistics import SketchFigures

NAN = math.nan


def layer(expert, projection, tokens, debiased, rank=2):
    name = f"m.experts.{expert}.{projection}"
    return LayerReport(name, (8, 4), rank, "pivot", tokens, 0.5, 0.1, debiased, 0.0, "fasc")


LAYERS = [
    layer(0, "w_up", 30, 0.1),
    layer(0, "w_down", 30, 0.3),
    layer(1, "w_up", 10, 0.6),
    layer(2, "w_up", 0, NAN, rank=4),
]


def test_experts_are_listed_by_debiased_rho_and_unmeasured_ones_last():
    rows = expert_rows(LAYERS)
    assert [row.expert for row in rows] == [1, 0, 2]
    assert rows[1].rho_debiased == pytest.approx(0.2)
    assert (rows[0].share, rows[1].share) == (0.25, 0.75)
    assert (rows[0].rank, rows[2].rank) == (0.5, 1.0)


def test_the_table_says_how_many_of_how_many_it_shows():
    text = expert_table(LAYERS, most=2)
    assert "2 of 3" in text
    assert "m.experts.1" in text
    assert "m.experts.2" not in text
    assert expert_table([SimpleNamespace(name="m.q_proj")]) == ""


def test_the_summary_says_how_many_tokens_experts_saw_and_which_of_them_were_too_few():
    line, table = expert_summary(LAYERS)
    assert line == (
        "3 experts in 1 modules: 0 to 30 tokens an expert, 13 on average; 1 saw few and borrow from their block's; "
        "1 saw none and stay dense"
    )
    assert table == expert_table(LAYERS, 5)
    assert expert_summary([]) == []


def test_a_report_of_a_model_with_experts_shows_them_and_one_without_does_not():
    size = {"dense": Size(64, 256, 128), "compressed": Size(32, 128, 64)}
    plain = LayerReport("m.q_proj", (8, 4), 2, "pivot", 30, 0.5, 0.1, 0.2, 0.0, "fasc")
    for layers, shown in ((LAYERS, True), ([plain], False)):
        report = CompressionReport("fasc", {}, 0, size, size, {}, 0, 0, layers)
        assert ("knowledge-heavy experts" in str(report)) is shown
        assert ("tokens an expert" in str(report)) is shown


def test_a_report_of_experts_goes_to_json_and_back(tmp_path):
    size = {"dense": Size(64, 256, 128), "compressed": Size(32, 128, 64)}
    sketched = replace(LAYERS[0], sketches={"inputs": SketchFigures(size=2, error=0.25)}, flags=("experts",))
    report = CompressionReport("fasc", {}, 0, size, size, {}, 0, 0, [sketched, *LAYERS[1:]])
    report.to_json(tmp_path / "report.json")
    again = CompressionReport.from_dict(json.loads((tmp_path / "report.json").read_text()))
    assert str(again) == str(report)
    assert again.to_dict() == report.to_dict()
    assert expert_table(again.layers) == expert_table(report.layers)
    assert again.layers[0] == sketched
    assert math.isnan(again.layers[3].rho_debiased)
