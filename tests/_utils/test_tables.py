from __future__ import annotations

import csv
import math

from fasc_lightning._utils import markdown_table, save_table, table_text

ROWS = [{"layer": "a [1]", "count": 12345, "r": 0.12345}, {"layer": "b", "count": 2, "r": math.nan}]


def test_text_shows_every_value_and_a_dash_for_nan():
    text = table_text("title [x]", ROWS)
    assert "title [x]" in text
    for shown in ("a [1]", "12,345", "0.123", "-"):
        assert shown in text
    assert "nan" not in text


def test_numbers_too_small_for_three_decimals_keep_two_digits():
    text = table_text("", [{"p": 1.234e-7, "q": 0.0, "r": -0.5, "s": 1.5e12, "t": math.inf, "u": True}])
    for shown in ("1.2e-07", "0.000", "-0.500", "1.5e+12", "inf"):
        assert shown in text


def test_csv_gives_every_value_back_exactly(tmp_path):
    save_table(ROWS, tmp_path / "folder" / "t.csv")
    with (tmp_path / "folder" / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["a [1]", "b"]
    assert float(rows[0]["r"]) == ROWS[0]["r"]
    assert math.isnan(float(rows[1]["r"]))


def test_markdown():
    text = markdown_table([{"a|b": 1.23456, "c": "x|y"}, {"a|b": math.nan, "c": 3}])
    assert text.splitlines()[2:] == ["| 1.235 | x\\|y |", "| - | 3 |"]
