from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from comparison_cases import BEST, HALF, KEEP, KINDS, PUBLISHED, failed, grid, outcome

from fasc_lightning.dependence import save_figure
from fasc_lightning.studies.comparison import Budget, Cell, metrics_of
from fasc_lightning.studies.comparison._figures import budget_figure, kinds_figure, sensitivity_figure

DENSE = outcome(0.0, recalled=40, kept=1.0)
METHODS = ("fasc", "svd-llm", "svd", "asvd", "fwsvd", "gfwsvd", "grad-svd", "fisher-diag", "weight-svd")


def draw(figure, name, tmp_path):
    """Save a figure, where FASC_FIGURES says if a person wants to look at it."""
    folder = Path(os.environ.get("FASC_FIGURES", tmp_path))
    save_figure(figure, folder / f"{name}.png")
    return figure


def many():
    """Nine methods in two settings at three budgets, one of them failing, and magnitude."""
    cells = {}
    for i, method in enumerate(METHODS):
        for setting, penalty in ((PUBLISHED, 1.5), (BEST, 1.0)):
            for keep in (0.8, 0.6, 0.4):
                worse = penalty * (i + 1) * (1 - keep)
                recalled = max(2, 40 - int(30 * worse))
                cells[Cell(method, Budget(keep=keep), setting)] = outcome(worse, recalled=recalled, kept=keep)
    cells[Cell("fasc-eq6", Budget(keep=0.8), PUBLISHED)] = failed()
    for keep in (0.8, 0.6, 0.4):
        zeros = 1 - keep
        cells[Cell("magnitude", Budget(keep=keep))] = outcome(zeros, recalled=int(40 * keep), kept=1.0, zeros=zeros)
    return cells


def test_metrics_against_parameters(tmp_path):
    perplexity, facts = metrics_of(DENSE.measured)
    figure = draw(budget_figure(DENSE, many(), [perplexity, facts], {"facts %": 10.0}), "budgets", tmp_path)
    left, right = figure.axes
    assert left.get_yscale() == "log"
    assert right.get_yscale() == "linear"
    lines = {line.get_label(): line for line in left.lines}
    assert len(lines) == 2 * 9 + 2
    assert list(lines)[:3] == ["fasc, uniform-factors", "fasc, fisher-pivot", "svd-llm, uniform-factors"]
    assert lines["fasc, fisher-pivot"].get_xdata() == pytest.approx([40, 60, 80])
    assert lines["magnitude (zeros, still stored)"].get_xdata() == pytest.approx([40, 60, 80])
    assert lines["fasc, fisher-pivot"].get_linestyle() != lines["fasc, uniform-factors"].get_linestyle()
    assert lines["fasc, fisher-pivot"].get_color() == lines["fasc, uniform-factors"].get_color()
    assert next(line for line in right.lines if line.get_label() == "chance").get_ydata()[0] == 10
    assert "chance" not in lines
    assert figure.get_suptitle() == "1 of 58 cells failed"


def test_kinds_as_bars(tmp_path):
    budgets = [Budget(keep=0.8), Budget(keep=0.6)]
    figure = draw(kinds_figure(DENSE, many(), budgets, KINDS), "kinds", tmp_path)
    assert [axes.get_title() for axes in figure.axes] == [
        "keep 0.8, uniform-factors", "keep 0.8, fisher-pivot", "keep 0.6, uniform-factors", "keep 0.6, fisher-pivot",
    ]  # fmt: skip
    assert len(figure.axes[0].containers) == 10  # nine methods and magnitude
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()][-1] == "all\n(40)"


def test_one_cell_is_enough(tmp_path):
    cells = {Cell("fasc", HALF, BEST): outcome(0.2, recalled=30)}
    assert len(draw(budget_figure(DENSE, cells, metrics_of(DENSE.measured)[:1]), "one", tmp_path).axes) == 1
    assert len(kinds_figure(DENSE, cells, [HALF], KINDS).axes) == 1


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="a metric to draw"):
        budget_figure(DENSE, grid(), [])
    with pytest.raises(ValueError, match="Expected facts"):
        kinds_figure(DENSE, grid(), [KEEP], [])
    with pytest.raises(ValueError, match="a layer or more"):
        sensitivity_figure({"fasc": {}}, "change", "title")


def changes(scale, blocks=30):
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    return {
        f"model.layers.{block}.{kind}": scale * (1 + j) * math.sin(block / 5) ** 2
        for block in range(blocks)
        for j, kind in enumerate(kinds)
    }


def test_sensitivity_by_block_and_kind(tmp_path):
    by_method = {"fasc": changes(0.01), "svd": changes(0.05)}
    by_method["svd"]["model.layers.3.mlp.up_proj"] = math.nan
    figure = draw(sensitivity_figure(by_method, "change of loss", "each layer alone"), "sensitivity", tmp_path)
    first, second, bar = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["q_proj", "v_proj", "up_proj", "down_proj"]
    values = second.collections[0].get_array()
    assert values.shape == (4, 30)
    assert values.mask.sum() == 1
    assert values.mask[2, 3]
    assert first.collections[0].norm.vmax == second.collections[0].norm.vmax  # one scale
    assert bar.get_ylabel() == "change of loss"


def test_changes_in_both_directions_are_centred_on_none():
    figure = sensitivity_figure({"fasc": changes(-1.0), "svd": changes(3.0)}, "change of recall", "")
    norm = figure.axes[0].collections[0].norm
    assert norm.vmin == -norm.vmax


def test_layers_that_all_change_alike_are_drawn():
    figure = sensitivity_figure({"fasc": {"lm_head": 0.0}}, "change", "")
    assert figure.axes[0].collections[0].get_array().shape == (1, 1)
