from __future__ import annotations

import torch
from peak import table as peak_table
from sketch_quality import Statistic, Together, statistics_of, table

from fasc_lightning.statistics import CalibrationMoments, LayerSketches, Sketch


def test_sizes_go_by_the_rank_of_the_budget_and_end_at_half_the_width():
    assert [s.name for s in statistics_of(0.4)] == ["exact", "projected", "range 366", "range 732", "gaussian 366"]
    assert [s.name for s in statistics_of(0.8)] == ["exact", "projected", "range 768", "gaussian 768"]


def test_only_wide_sides_are_held_in_another_way():
    assert Statistic("range", 366).of(1536, 576) == LayerSketches(None, Sketch(1536, 366))
    assert Statistic().of(1536, 576) == LayerSketches()
    assert Statistic("projected").of(576, 1536).projects == "inputs"


def test_moments_that_are_fed_together_are_those_that_are_fed_alone():
    shapes, x, h = {"layer": (3, 5)}, torch.randn(7, 5), torch.randn(7, 3)
    alone, *others = (CalibrationMoments(shapes, needs={"coupled"}) for _ in range(3))
    for sums in (alone, Together(others)):
        sums.add_inputs(("layer",), x)
        sums.add_gradients("layer", h, 2.0)
        sums.add_pairs("layer", x, h, None, 2.0, None, None)
    for moments in others:
        for mine, theirs in zip(alone.couplings["layer"].compute(), moments.couplings["layer"].compute(), strict=True):
            assert torch.equal(mine, theirs)


def test_rows_stand_beside_the_exact_one_of_their_budget():
    def row(statistic, keep, value):
        return {
            "statistic": statistic,
            "keep": keep,
            "bytes": 2 * value,
            "perplexity": {"wikitext2": value, "c4": value},
            "facts": 40.0,
        }

    text = table([row(None, None, 10.0), row("exact", 0.6, 20.0), row("range 582", 0.6, 21.0)])
    assert "| | dense | 10.00 | 10.00 | 40.0 % | |" in text
    assert "| 0.6 | range 582 | 21.00 (+5.0 %) | 21.00 (+5.0 %) | 40.0 % | 0 MB (1.05) |" in text


def test_peaks_are_told_without_the_interpreter():
    row = {"before": 10**9, "peak": 3 * 10**9, "predicted": 2 * 10**9, "moments": 10**9, "mapped": 0}
    assert "| whole | 1.00 | 2.00 | 2.00 | 1.00 |" in peak_table({"whole": row})
