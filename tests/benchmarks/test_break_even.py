from __future__ import annotations

import csv
import json

import break_even
import pytest
import torch
from break_even import break_even_table, copies, crossing, main, rank_for
from torch import nn

from fasc_lightning.layers import LowRankLinear, PivotedLinear


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(break_even, "BYTES", 1e4)
    monkeypatch.setattr(break_even, "KEEPS", (0.3, 0.7))


def test_measures_each_shape_once_and_writes_the_table(tmp_path, monkeypatch, capsys):
    options = ["--output", str(tmp_path), "--seconds", "0", "--shapes", "16", "24", "24", "16"]
    main(options)
    with (tmp_path / "break_even.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 2 * 2  # types, shapes, layouts, numbers of tokens, shares
    assert {row["layout"] for row in rows} == {"pivot", "factors"}
    assert all(0 < float(row["kept"]) <= 0.7 and float(row["time"]) > 0 for row in rows)
    assert "| float32 | 16 x 24 |" in capsys.readouterr().out
    measured, measure = [], break_even.measure
    monkeypatch.setattr(break_even, "measure", lambda *args: measured.append(args) or measure(*args))
    main(options)
    assert not measured
    main([*options, "--seconds", "1e-9"])
    assert len(measured) == 4


def test_the_packages_table_is_replaced_only_when_asked(tmp_path, monkeypatch):
    package = tmp_path / "package"
    monkeypatch.setattr(break_even, "BREAK_EVEN", package / "break_even.csv")
    monkeypatch.setattr(break_even, "SHAPES", ((16, 24),))
    options = ["--output", str(tmp_path / "out"), "--seconds", "0"]
    main(options)
    assert not package.exists()
    with pytest.raises(SystemExit):
        main([*options, "--write", "--shapes", "16", "24"])
    assert not package.exists()
    main([*options, "--write"])
    assert (package / "break_even.csv").read_text() == (tmp_path / "out" / "break_even.csv").read_text()


def test_copies_fill_the_memory_of_a_variant():
    made = copies(lambda: nn.Linear(10, 10, bias=False))
    assert len(made) == 25
    assert len({id(layer) for layer in made}) == 25
    assert len(copies(lambda: nn.Linear(100, 100))) == 1


@pytest.mark.parametrize("kind", [PivotedLinear, LowRankLinear])
def test_the_rank_for_a_share_is_the_highest_that_fits(kind):
    k = rank_for(30, 20, 0.6, kind)
    assert kind.cost(30, 20, k) <= 0.6 * 600 < kind.cost(30, 20, k + 1)
    assert rank_for(30, 20, 1e-6, kind) == 1


def test_the_break_even_is_where_the_times_cross():
    def curve(*points):
        return [{"kept": kept, "time": time} for kept, time in points]

    assert crossing(curve((0.2, 0.5), (0.6, 0.9), (0.8, 1.1))) == pytest.approx(0.7)
    assert crossing(curve((0.2, 0.5), (0.8, 1.0))) == 0.8
    assert crossing(curve((0.2, 1.1), (0.8, 1.2))) == 0
    # Of several crossings the last.
    assert crossing(curve((0.2, 0.9), (0.4, 1.1), (0.6, 0.9), (0.8, 1.3))) == pytest.approx(0.65)


def test_a_line_a_shape_and_type():
    rows = [
        {"dtype": dtype, "layout": layout, "m": 4, "n": 6, "tokens": tokens, "kept": kept, "time": 2 * kept}
        for dtype in ("float32", "bfloat16")
        for layout in ("pivot", "factors")
        for tokens in (1, 512)
        for kept in (0.4, 0.8)
    ]
    table = break_even_table(json.loads(json.dumps(rows)))
    assert [line["dtype"] for line in table] == ["float32", "bfloat16"]
    assert table[0]["pivot, 1 token"] == table[0]["factors, 512 tokens"] == "0.50"
    assert break_even.shown(0) == "never"
    assert torch.get_num_threads() == 1
