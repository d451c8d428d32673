from __future__ import annotations

import math

import numpy as np
import pytest
from comparison_cases import BEST, HARDNESS, KEEP, KINDS, PUBLISHED, failed, grid, outcome
from scipy.stats import bootstrap

from fasc_lightning.studies.comparison import Budget, Cell, metrics_of, shown_perplexity
from fasc_lightning.studies.comparison._tables import (
    budget_rows,
    failure_lines,
    kind_metrics,
    kinds_rows,
    rank_cells,
    results_rows,
    tied,
    winners_rows,
)

DENSE = outcome(0.0, recalled=40, kept=1.0)


def metrics(measured=None):
    return metrics_of((measured or DENSE).measured)


def test_metrics_are_those_that_there_are_answers_to():
    assert [m.name for m in metrics()] == ["perplexity of news", "facts %"]
    assert [m.name for m in metrics(outcome(pairs=4))] == ["perplexity of news", "facts %", "syntax %"]
    perplexity, facts, syntax = metrics(outcome(pairs=4))
    one = outcome(0.5, recalled=10, pairs=4).measured
    assert perplexity.value(one) == pytest.approx(math.exp(np.mean(HARDNESS) + 0.5))
    assert perplexity.value(one) == pytest.approx(one.perplexity("news"))
    assert facts.value(one) == 25
    assert syntax.value(one) == 50


def test_kinds_split_the_facts():
    by_kind = {m.name: m.value(outcome(recalled=30).measured) for m in kind_metrics(KINDS)}
    assert by_kind == {"geographic (20)": 100, "temporal (20)": 50, "all (40)": 75}


def test_a_tie_is_what_the_bootstrap_of_scipy_calls_one():
    generator = np.random.default_rng(3)
    for shift in (0.0, 0.2, 0.4, 0.6, 2.0):
        a = generator.normal(size=40)
        b = a + generator.normal(shift, 1.0, size=40)
        interval = bootstrap((b - a,), np.mean, method="percentile", rng=generator).confidence_interval
        if min(abs(interval.low), abs(interval.high)) > 0.03:  # resamples of another seed may tip what is close
            assert tied(tuple(a), tuple(b), 0) == (interval.low <= 0 <= interval.high)


def test_pairing_tells_apart_what_means_alone_would_not():
    a = tuple(HARDNESS)
    b = tuple(loss + 0.01 for loss in HARDNESS)
    assert np.std(HARDNESS) > 0.5
    assert not tied(a, b, 0)
    assert tied(a, a, 0)


def test_a_single_item_tells_nothing_apart():
    assert tied((1.0,), (2.0,), 0)


def test_the_best_and_its_ties():
    cells = grid()
    fasc, svd_llm, svd, eq6, magnitude = cells
    perplexity, facts = metrics()
    by_perplexity = rank_cells(cells, perplexity)
    assert {by_perplexity.best} | by_perplexity.ties == {fasc, svd_llm}
    by_facts = rank_cells(cells, facts)
    assert by_facts.best == fasc  # the first of equals
    assert by_facts.ties == {svd_llm}
    assert rank_cells({eq6: failed(), magnitude: DENSE}, perplexity) is None
    assert svd not in by_facts.ties


def test_the_table_of_a_budget():
    rows = {(row["method"], row["setting"]): row for row in budget_rows(DENSE, grid(), metrics())}
    name = "perplexity of news"
    assert next(iter(rows)) == ("dense", "")
    assert list(rows)[-1] == ("magnitude", "")  # unranked, below the others
    assert rows["dense", ""][name] == shown_perplexity(math.exp(np.mean(HARDNESS)))
    best = [row for row in rows.values() if row[name].startswith("**")]
    ties = [row for row in rows.values() if row[name].endswith("≈")]
    assert {row["method"] for row in best + ties} == {"fasc", "svd-llm"}
    assert len(best) == len(ties) == 1
    assert rows["fasc", "fisher-pivot"]["facts %"] == "**95.0 (95 %)**"
    assert rows["svd-llm", "fisher-pivot"]["facts %"] == "95.0 (95 %) ≈"
    assert rows["svd", "uniform-factors"]["facts %"] == "30.0 (30 %)"
    assert rows["svd", "uniform-factors"]["kept"] == "80.0 %"
    assert rows["svd", "uniform-factors"]["seconds"] == "4"
    assert rows["fasc-eq6", "uniform-factors"]["kept"] == "failed"
    assert rows["magnitude", ""]["kept"] == "(20 % zeros)"
    assert rows["magnitude", ""]["facts %"] == "_100.0 (100 %)_"  # better than all, and not in bold
    assert failure_lines(grid()) == [
        "fasc-eq6 keep 0.8 uniform-factors: FloatingPointError: The loss of window 0 is not finite."
    ]


def test_who_wins_in_each_setting_and_in_all():
    rows = winners_rows(grid(), [KEEP, Budget(rank=0.5)], metrics())
    assert [(row["budget"], row["setting"]) for row in rows] == [
        ("keep 0.8", "fisher-pivot"), ("keep 0.8", "uniform-factors"), ("keep 0.8", "any"), ("rank 0.5", "any"),
    ]  # fmt: skip
    assert rows[0]["facts %"] == "fasc ≈ svd-llm"
    assert rows[1]["facts %"] == "svd"
    assert rows[2]["facts %"] == "fasc (fisher-pivot) ≈ svd-llm (fisher-pivot)"
    assert rows[3]["facts %"] == "-"
    single = winners_rows({cell: o for cell, o in grid().items() if cell.setting == BEST}, [KEEP], metrics())
    assert [row["setting"] for row in single] == ["fisher-pivot"]


def test_kinds_are_ranked_one_by_one():
    cells = {
        Cell("fasc", KEEP, PUBLISHED): outcome(recalled=20),
        Cell("svd", KEEP, PUBLISHED): outcome(recalled=10),
    }
    rows = kinds_rows(DENSE, cells, KINDS)
    assert rows[1]["geographic (20)"] == "**100.0 (100 %)**"
    assert rows[1]["temporal (20)"] == "**0.0 (0 %)**"
    assert rows[2]["temporal (20)"] == "0.0 (0 %) ≈"
    assert rows[2]["geographic (20)"] == "50.0 (50 %)"
    assert "seconds" not in rows[0]


def test_results_are_numbers():
    rows = results_rows(DENSE, grid(), KINDS)
    assert [row["method"] for row in rows] == ["dense", "fasc", "svd-llm", "svd", "fasc-eq6", "magnitude"]
    assert all(list(row) == list(rows[0]) for row in rows)
    assert rows[0]["facts % / dense"] == 1
    assert rows[1]["perplexity of news / dense"] == pytest.approx(math.exp(0.2))
    assert rows[1]["facts % of temporal"] == 90
    assert math.isnan(rows[4]["facts %"])
    assert rows[4]["error"] == "FloatingPointError: The loss of window 0 is not finite."
    assert rows[5]["zeros"] == 0.2


def test_a_share_of_nothing_is_undefined():
    nothing = outcome(recalled=0)
    rows = results_rows(nothing, {Cell("fasc", KEEP, BEST): nothing}, KINDS)
    assert math.isnan(rows[1]["facts % / dense"])
    assert budget_rows(nothing, {Cell("fasc", KEEP, BEST): nothing}, metrics())[1]["facts %"] == "**0.0 (-)**"


def test_perplexities_of_any_size():
    assert [shown_perplexity(v) for v in (23.312, 1234.5, 2.7e7)] == ["23.31", "1,234", "2.7e+07"]
