from __future__ import annotations

import csv
import math
from itertools import product
from statistics import geometric_mean

import pytest
import torch

from fasc_lightning.layers import _layouts as layouts
from fasc_lightning.layers import auto_cost, auto_layout, factors_cost, pivot_cost
from fasc_lightning.layers._layouts import relative_time

TABLE = list(csv.DictReader(layouts.BREAK_EVEN.read_text().splitlines()))
COSTS = {"pivot": pivot_cost, "factors": factors_cost}
SHAPES = sorted({(int(row["m"]), int(row["n"])) for row in TABLE})


@pytest.fixture
def table(monkeypatch):
    """Replace the measured table by the one given."""

    def replace(*rows):
        monkeypatch.setattr(layouts, "_rows", lambda: iter(rows))

    caches = (layouts._table, layouts._curves, layouts.auto_layout)
    for cache in caches:
        cache.cache_clear()
    yield replace
    for cache in caches:
        cache.cache_clear()


def test_the_table_holds_every_shape_in_both_layouts_and_types():
    kinds = {(r["dtype"], r["layout"], int(r["m"]), int(r["n"]), int(r["tokens"])) for r in TABLE}
    assert kinds == {
        (dtype, layout, m, n, tokens)
        for dtype, layout, (m, n), tokens in product(["float32", "bfloat16"], COSTS, SHAPES, [1, 512])
    }
    assert len(SHAPES) == 12
    # Of large layers in bfloat16, matrix-vector products beat torch's dense layer threefold.
    assert all(0 < float(row["kept"]) <= 1 and float(row["kept"]) / 4 < float(row["time"]) < 20 for row in TABLE)
    assert {row["threads"] for row in TABLE} == {"2"}


def test_times_are_those_of_the_table_at_its_points_averaged_over_tokens():
    rows = [r for r in TABLE if (r["dtype"], r["layout"], r["m"], r["n"]) == ("float32", "factors", "576", "576")]
    for kept in {row["kept"] for row in rows}:
        expected = geometric_mean(float(row["time"]) for row in rows if row["kept"] == kept)
        k = round(float(kept) * 576 * 576 / (576 + 576))
        assert relative_time(576, 576, k, "factors") == pytest.approx(expected, rel=0.02)


def test_times_are_interpolated_between_points_and_taken_from_the_nearest_shape(table):
    points = [(0.2, 0.4), (0.6, 1.2)]
    small = [("float32", "factors", 64, 64, 1, kept, time) for kept, time in points]
    large = [("float32", "factors", 512, 512, 1, kept, 9.0) for kept, _ in points]
    table(*small, *large)
    assert relative_time(64, 64, 12, "factors") == pytest.approx(0.4 + 0.8 * (12 * 128 / 4096 - 0.2) / 0.4)
    assert relative_time(64, 64, 1, "factors") == pytest.approx(0.4)
    assert relative_time(100, 60, 1, "factors") == pytest.approx(0.4)
    assert relative_time(300, 300, 1, "factors") == pytest.approx(9.0)
    assert relative_time(1024, 256, 1, "factors") == pytest.approx(9.0)
    assert math.isnan(relative_time(1025, 512, 1, "factors"))


@pytest.mark.parametrize(("m", "n"), [(576, 576), (192, 576), (1536, 576), (96, 64), (20, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_gives_up_less_than_a_rank_and_its_cost_rises_with_the_rank(m, n, dtype):
    costs = [auto_cost(m, n, k, dtype) for k in range(1, min(m, n) + 1)]
    assert costs == sorted(costs)
    for k, cost in enumerate(costs, 1):
        layout = auto_layout(m, n, k, dtype)
        assert cost == {"pivot": pivot_cost(m, n, k), "factors": factors_cost(m, n, k), "dense": m * n}[layout]
        if layout == "dense":
            assert (m - k) * (n - k) * dtype.itemsize <= 4 * min(m, n)
        else:
            assert pivot_cost(m, n, k) <= cost <= pivot_cost(m, n, k + 1)
    assert costs[-1] == m * n


def test_auto_weighs_speed_only_where_sizes_hardly_differ(table):
    fast, slow = 0.5, 1.5

    def times(pivot, factors):
        rows = {"pivot": pivot, "factors": factors}.items()
        layouts._table.cache_clear()
        layouts._curves.cache_clear()
        layouts.auto_layout.cache_clear()
        table(*[("float32", layout, 64, 64, 1, 0.5, time) for layout, time in rows])

    times(pivot=slow, factors=fast)
    assert [auto_layout(64, 64, k) for k in (1, 10, 11, 40, 56, 57, 63)] == [
        *("factors", "factors", "pivot", "pivot", "dense", "dense", "dense")
    ]  # (10 + 1)^2 <= 128; the 64 numbers of the index are what (64 - 56)^2 saves
    assert {auto_layout(200, 64, k) for k in range(1, 64)} == {"pivot"}  # nothing near was measured
    assert auto_layout(200, 64, 64) == "dense"
    times(pivot=fast, factors=slow)
    assert {auto_layout(64, 64, k) for k in range(1, 64)} == {"pivot"}
