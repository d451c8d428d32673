from __future__ import annotations

import itertools
import math
import sys
import types

import numpy as np
import pytest
import scipy.stats
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from fasc_lightning._utils import _plotting as plotting
from fasc_lightning.dependence import (
    RhoHistory,
    angles_figure,
    emergence,
    rho_gain_scatter,
    rho_heatmap,
    rho_profile,
    save_figure,
    training_figure,
)
from fasc_lightning.dependence._figures import log_figure

NAN = math.nan
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def row(step, layer, rho, null=0.1, **others):
    values = {"debiased": rho - 0.2, "low": rho - 0.3, "high": rho - 0.15, "iid_floor": 0.08, **others}
    reason = "" if rho == rho else "g does not vary"
    return {"step": step, "layer": layer, "rho": rho, "null": null, **values, "tokens": 512, "reason": reason}


def llama(blocks):
    return [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in KINDS]


def record(layers, steps, seed=0):
    rng = np.random.default_rng(seed)
    return RhoHistory(row(step, layer, rng.random()) for step in steps for layer in layers)


def line(axes, label):
    return next(each for each in axes.lines if each.get_label() == label)


def legend_texts(owner):
    legends = owner.legends if hasattr(owner, "legends") else [owner.get_legend()]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def overlaps(figure, texts):
    """Pairs of neighbouring texts whose boxes meet once the figure is drawn."""
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    return [(a, b) for a, b in itertools.pairwise(boxes) if a.overlaps(b)]


# The heatmap.


def test_the_heatmap_shows_each_value_at_its_layer_and_true_step():
    history = record(llama(2), [0, 10, 100])
    axes, _ = rho_heatmap(history).axes
    mesh = axes.collections[0]
    np.testing.assert_allclose(mesh.get_array(), history.matrix("debiased"))
    corners = mesh.get_coordinates()
    assert corners.shape == (6 + 1, 3 + 1, 2)
    np.testing.assert_allclose(corners[0, :, 0], [-5, 5, 55, 145])
    np.testing.assert_allclose(corners[:, 0, 1], np.arange(7))  # depth upwards
    assert [text.get_text() for text in axes.get_yticklabels()] == [f"{b}.{kind}" for b in (0, 1) for kind in KINDS]
    assert axes.get_title() == "debiased rho of 6 layers at 3 steps"


def test_signed_colours_are_centred_on_zero_and_others_begin_there():
    history = RhoHistory([row(0, "a", 0.1), row(0, "b", 0.7)])  # debiased -0.1 and 0.5
    signed, colourbar = rho_heatmap(history).axes
    assert signed.collections[0].get_clim() == pytest.approx((-0.5, 0.5))
    assert colourbar.get_ylabel() == "debiased rho"
    plain = rho_heatmap(history, "rho").axes[0].collections[0]
    assert plain.get_clim() == pytest.approx((0, 0.7))
    assert plain.get_cmap().name != signed.collections[0].get_cmap().name


def test_undefined_and_missing_observations_are_left_grey_and_explained():
    history = RhoHistory([row(0, "a", 0.5), row(0, "b", NAN), row(10, "b", 0.5)])
    figure = rho_heatmap(history)
    axes = figure.axes[0]
    np.testing.assert_array_equal(np.ma.getmaskarray(axes.collections[0].get_array()), [[False, True], [True, False]])
    red, green, blue, _ = axes.get_facecolor()
    assert red == green == blue < 0.9
    assert legend_texts(figure) == ["undefined or not observed"]
    assert not rho_heatmap(RhoHistory([row(0, "a", 0.5)])).legends


def test_marks_stand_where_layers_emerge():
    layers, steps = llama(2), [0, 10, 20, 40, 80, 160]
    history = record(layers, steps, seed=3)
    found = emergence(history, 0.3, 2)
    assert set(map(type, found.values())) == {int, type(None)}
    figure = rho_heatmap(history, threshold=0.3, observations=2)
    axes = figure.axes[0]
    marks = set(zip(*line(axes, "emergence").get_data(), strict=True))
    assert marks == {(step, layers.index(layer) + 0.5) for layer, step in found.items() if step is not None}
    assert (
        f"{len(marks)} layers emerged: rho above 0.3 and its null, interval above 0, 2 observations in a row"
        in axes.get_title()
    )
    assert legend_texts(figure) == ["emergence"]
    assert not rho_heatmap(history).axes[0].lines
    none = rho_heatmap(history, threshold=1.0).axes[0]
    assert not none.lines
    assert "0 layers emerged" in none.get_title()


@pytest.mark.parametrize("blocks", [3, 10, 20, 100])
def test_labels_of_layers_do_not_run_into_each_other_and_stand_at_their_rows(blocks):
    layers = llama(blocks)
    figure = rho_heatmap(record(layers, [0, 5]))
    axes = figure.axes[0]
    ticks, labels = axes.get_yticks(), axes.get_yticklabels()
    assert not overlaps(figure, labels)
    assert len(ticks) > min(len(layers), 20) / 2
    names = plotting.short_names(layers)
    assert [label.get_text() for label in labels] == [names[int(tick)] for tick in ticks]
    assert figure.get_figheight() <= 11


@pytest.mark.parametrize("steps", [[7], [0, 500, 1000], [0, 1, 2, 1000], list(range(0, 20000, 10))])
def test_ticks_of_steps_are_whole_and_within_what_was_observed(steps):
    figure = rho_heatmap(record(["a", "b"], steps))
    ticks = figure.axes[0].get_xticks()
    assert len(ticks) >= min(len(steps), 2)
    assert all(tick == int(tick) and steps[0] <= tick <= steps[-1] for tick in ticks)
    assert not overlaps(figure, figure.axes[0].get_xticklabels())


def test_a_heatmap_without_a_single_defined_value_is_all_grey():
    axes, _ = rho_heatmap(RhoHistory([row(0, "a", NAN)])).axes
    assert axes.collections[0].get_array().mask.all()


def test_a_heatmap_of_nothing_or_of_what_is_no_score_is_refused():
    with pytest.raises(ValueError, match="it is empty"):
        rho_heatmap(RhoHistory())
    with pytest.raises(ValueError, match=r"one of the columns rho, .* but got 'tokens'"):
        rho_heatmap(record(["a"], [0]), "tokens")
    with pytest.raises(ValueError, match=r"in \[0, 1\] but got 3"):
        rho_heatmap(record(["a"], [0]), threshold=3)


# The profile.


def test_the_profile_has_a_panel_for_each_kind_with_values_at_their_blocks():
    layers = [*llama(3), "lm_head"]
    rows = record(layers, [40]).at()
    figure = rho_profile(rows)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == ["q_proj", "v_proj", "down_proj", "lm_head (no block)"]
    for kind in ("q_proj", "v_proj", "down_proj"):
        own = [rows[layer] for layer in layers if layer.endswith(kind)]
        for label, column in (("debiased rho", "debiased"), ("rho", "rho"), ("null of rho", "null")):
            x, y = line(panels[kind], label).get_data()
            np.testing.assert_array_equal(x, [0, 1, 2])
            np.testing.assert_array_equal(y, [r[column] for r in own])
        (bars,) = panels[kind].collections
        ends = [(start, end) for (_, start), (_, end) in bars.get_segments()]
        assert ends == [(r["low"], r["high"]) for r in own]
    assert line(panels["q_proj"], "null of rho").get_linestyle() == ":"
    np.testing.assert_array_equal(line(panels["lm_head (no block)"], "rho").get_data(), [[0], [rows["lm_head"]["rho"]]])
    assert set(legend_texts(figure)) == {"debiased rho", "rho", "null of rho", "95 % interval"}
    assert figure.get_suptitle() == "rho by depth, 10 layers, step 40"


def test_panels_of_a_profile_share_their_axes_and_the_lowest_ones_are_labelled():
    layers = [f"h.{block}.{kind}" for block in range(30) for kind in "abcdefg"]
    figure = rho_profile(record(layers, [0]).at())
    assert len(figure.axes) == 8
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert [axes.get_visible() for axes in figure.axes] == [True] * 7 + [False]
    assert [axes.get_xlabel() for axes in figure.axes[:7]] == ["", "", "", "block", "block", "block", "block"]
    assert not overlaps(figure, figure.axes[4].get_xticklabels())


def test_undefined_layers_are_marked_at_their_block_and_the_line_is_broken():
    rows = RhoHistory([row(0, f"h.{i}.fc", NAN if i == 1 else 0.5) for i in range(3)]).at()
    figure = rho_profile(rows)
    (axes,) = figure.axes
    np.testing.assert_array_equal(line(axes, "undefined").get_data(), [[1], [0]])
    np.testing.assert_array_equal(np.isnan(line(axes, "debiased rho").get_ydata()), [False, True, False])
    assert "undefined" in legend_texts(figure)


def test_experts_of_a_block_are_points_side_by_side_without_a_line():
    layers = [f"h.{block}.experts.{e}.up" for block in range(2) for e in range(4)]
    (axes,) = rho_profile(record(layers, [0]).at()).axes
    points = line(axes, "debiased rho")
    assert axes.get_title() == "experts.*.up"
    assert points.get_linestyle() == "None"
    x = points.get_xdata()
    assert len(set(x)) == 8
    np.testing.assert_array_equal(np.round(x), [0, 0, 0, 0, 1, 1, 1, 1])


def test_a_profile_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="one layer or more"):
        rho_profile({})


# The course of training.


def test_one_run_has_a_panel_for_loss_recall_and_rho_on_the_same_steps():
    history = record(llama(4), [0, 50, 100])
    metrics = {
        "loss_train": ([0, 50, 100], [3.0, 2.0, 1.0]),
        "recall_held_out": ([0, 100], [0.0, 80.0]),
        "loss": ([100], [1.5]),
    }
    loss, recall, rho = training_figure(history, metrics).axes
    assert [axes.get_ylabel() for axes in (loss, recall, rho)] == ["loss", "recall of facts (%)", "rho over layers"]
    assert rho.get_xlabel() == "step"
    assert loss.get_xlim() == recall.get_xlim() == rho.get_xlim()
    np.testing.assert_array_equal(line(loss, "loss train").get_data(), [[0, 50, 100], [3, 2, 1]])
    np.testing.assert_array_equal(line(loss, "loss").get_data(), [[100], [1.5]])
    np.testing.assert_array_equal(line(recall, "recall held out").get_data(), [[0, 100], [0, 80]])
    assert line(loss, "loss").get_linestyle() != line(loss, "loss train").get_linestyle()
    for label, column in (("mean debiased", "debiased"), ("mean rho", "rho"), ("mean null", "null")):
        x, y = line(rho, label).get_data()
        np.testing.assert_array_equal(x, [0, 50, 100])
        np.testing.assert_allclose(y, history.matrix(column).mean(0))
    low, high = np.quantile(history.matrix("debiased"), [0.1, 0.9], axis=0)
    (band,) = rho.collections
    corners = band.get_paths()[0].vertices
    for step, bottom, top in zip(history.steps, low, high, strict=True):
        at_step = corners[corners[:, 0] == step, 1]
        assert (at_step.min(), at_step.max()) == pytest.approx((bottom, top))


def test_two_runs_share_panels_and_dashes_and_differ_in_colour():
    runs = {
        "facts": (record(llama(2), [0, 10]), {"loss": ([0, 10], [3, 1]), "recall": ([0, 10], [0, 90])}),
        "shuffled": (record(llama(2), [0, 20], seed=1), {"loss": ([0, 20], [3, 2]), "recall": ([0, 20], [0, 4])}),
    }
    figure = training_figure(runs)
    loss, recall, rho = figure.axes
    assert legend_texts(figure) == ["facts", "shuffled"]
    run_colours = [handle.get_color() for handle in figure.legends[0].get_lines()]
    assert len(set(run_colours)) == 2
    for axes in (loss, recall):
        assert [each.get_color() for each in axes.lines] == run_colours
        assert len({each.get_linestyle() for each in axes.lines}) == 1
    assert [tuple(each.get_xdata()) for each in loss.lines] == [(0, 10), (0, 20)]
    assert [each.get_color() for each in rho.lines if each.get_label() == "mean debiased"] == run_colours
    # Dashes are explained once, not once a run, and in no run's colour.
    assert legend_texts(rho) == ["10 to 90 % of layers, debiased", "mean debiased", "mean rho", "mean null"]
    assert {handle.get_color() for handle in rho.get_legend().get_lines()} == {"black"}


def test_a_metric_keeps_its_dash_where_another_run_lacks_it():
    runs = {
        "a": (RhoHistory(), {"loss_train": ([0], [1]), "loss_validation": ([0], [2])}),
        "b": (RhoHistory(), {"loss_validation": ([0], [3])}),
    }
    (axes,) = training_figure(runs).axes
    validation = [each for each in axes.lines if each.get_label() == "loss validation"]
    assert len(validation) == 2
    assert len({each.get_linestyle() for each in validation}) == 1


def test_panels_without_anything_to_show_are_left_out():
    history = record(["a"], [0, 1])
    assert [axes.get_ylabel() for axes in training_figure(history, {}).axes] == ["rho over layers"]
    assert [axes.get_ylabel() for axes in training_figure(RhoHistory(), {"loss": ([0], [1])}).axes] == ["loss"]


def test_steps_at_which_no_layer_is_defined_are_gaps():
    history = RhoHistory([row(0, "a", 0.5), row(1, "a", NAN), row(2, "a", 0.7), row(2, "b", NAN)])
    (axes,) = training_figure(history, {}).axes
    np.testing.assert_allclose(line(axes, "mean rho").get_ydata(), [0.5, NAN, 0.7])


def test_training_figures_of_something_else_are_refused():
    history = record(["a"], [0])
    with pytest.raises(ValueError, match=r"begin with one of loss, recall but got \['accuracy'\]"):
        training_figure(history, {"accuracy": ([0], [1])})
    with pytest.raises(ValueError, match="as many values of 'loss' as steps but got 1 and 2"):
        training_figure(history, {"loss": ([0, 1], [1])})
    with pytest.raises(ValueError, match="got none"):
        training_figure(RhoHistory(), {})
    with pytest.raises(TypeError, match="second argument"):
        training_figure(history)
    with pytest.raises(TypeError, match="beside each history"):
        training_figure({"a": (history, {})}, {})


# rho against the gain.


def test_the_scatter_has_the_correlations_of_scipy_in_its_title():
    layers = llama(10)
    rng = np.random.default_rng(0)
    rho = dict(zip(layers, rng.random(30), strict=True))
    gain = {layer: value + rng.normal() for layer, value in rho.items()}
    figure = rho_gain_scatter(rho, gain, threshold=0.3, gain_label="points of recall")
    (axes,) = figure.axes
    x, y = np.array(list(rho.values())), np.array(list(gain.values()))
    pearson, spearman = scipy.stats.linregress(x, y), scipy.stats.spearmanr(x, y)
    title = axes.get_title()
    assert f"Pearson r = {pearson.rvalue:.2f} (p = {pearson.pvalue:.2g})" in title
    assert f"Spearman r = {spearman.statistic:.2f} (p = {spearman.pvalue:.2g})" in title
    assert title.endswith("\nn = 30")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rho", "points of recall")
    assert legend_texts(figure) == ["q_proj", "v_proj", "down_proj", "threshold 0.3"]
    assert list(line(axes, "threshold 0.3").get_xdata()) == [0.3, 0.3]
    for kind, points in zip(("q_proj", "v_proj", "down_proj"), axes.collections, strict=True):
        own = [(rho[layer], gain[layer]) for layer in layers if layer.endswith(kind)]
        np.testing.assert_allclose(points.get_offsets(), own)
    assert len({tuple(points.get_facecolor()[0]) for points in axes.collections}) == 3


def test_the_scatter_leaves_out_undefined_layers_and_says_how_many():
    rho = {"a": 0.1, "b": 0.2, "c": 0.4, "d": NAN, "e": 0.3}
    gain = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 9.0, "e": NAN}
    figure = rho_gain_scatter(rho, gain, kinds=dict.fromkeys("abc", "early") | dict.fromkeys("de", "late"))
    (axes,) = figure.axes
    assert "n = 3, 2 undefined left out" in axes.get_title()
    assert f"r = {scipy.stats.pearsonr([0.1, 0.2, 0.4], [1, 3, 2]).statistic:.2f}" in axes.get_title()
    assert legend_texts(figure) == ["early"]


@pytest.mark.parametrize("gain", [{"a": 1.0, "b": 2.0, "c": NAN}, {"a": 1.0, "b": 1.0, "c": 1.0}])
def test_the_scatter_claims_no_correlation_of_two_layers_or_of_a_constant(gain):
    (axes,) = rho_gain_scatter({"a": 0.1, "b": 0.2, "c": 0.3}, gain).axes
    assert axes.get_title().startswith("no correlation")


def test_the_scatter_refuses_layers_that_do_not_match():
    with pytest.raises(ValueError, match=r"got 1 and 2; not in both: \['b'\]"):
        rho_gain_scatter({"a": 1.0}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="got none of 1"):
        rho_gain_scatter({"a": NAN}, {"a": 1.0})
    with pytest.raises(ValueError, match="1 have none, as 'a'"):
        rho_gain_scatter({"a": 1.0}, {"a": 1.0}, kinds={"b": "late"})


# Principal angles.


def test_angles_are_shares_of_each_group_with_the_median_written():
    rng = np.random.default_rng(0)
    high = {f"h{i}": rng.uniform(30, 90, 16) for i in range(4)}
    low = {f"l{i}": rng.uniform(0, 20, (2, 3)) for i in range(50)}
    figure = angles_figure(high, low, "rho = 0.3")
    titles = ("4 layers above rho = 0.3, 64 angles", "50 layers below rho = 0.3, 300 angles")
    for axes, title, group in zip(figure.axes, titles, (high, low), strict=True):
        angles = np.concatenate([values.ravel() for values in group.values()])
        assert axes.get_title() == title
        heights = [bar.get_height() for bar in axes.patches]
        expected = np.histogram(angles, bins=30, range=(0, 90))[0] * 100 / angles.size
        np.testing.assert_allclose(heights, expected)
        assert [text.get_text() for text in axes.texts] == [f"median {np.median(angles):.1f}°"]
        assert list(axes.lines[0].get_xdata()) == [np.median(angles)] * 2
        assert axes.get_xlim() == (0, 90)
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_a_group_without_layers_says_so():
    above, below = angles_figure({}, {"a": [10.0]}, "rho = 0.3").axes
    assert above.get_title() == "0 layers above rho = 0.3, 0 angles"
    assert [text.get_text() for text in above.texts] == ["no layers"]
    assert len(below.patches) == 30


@pytest.mark.parametrize("wrong", [-1.0, 91.0, NAN])
def test_angles_out_of_range_are_refused_with_their_layer(wrong):
    with pytest.raises(ValueError, match=r"in \[0, 90\], but layer 'b' has"):
        angles_figure({"a": [10.0]}, {"b": [20.0, wrong]})


# Files and loggers.


def test_a_figure_is_saved_as_png_at_150_dots_per_inch(tmp_path):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "new" / "rho.png"
    save_figure(rho_heatmap(record(["a"], [0])), path)
    with image.open(path) as saved:
        assert saved.format == "PNG"
        assert saved.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert saved.width == pytest.approx(9 * 150, rel=0.05)
    assert list(path.parent.iterdir()) == [path]


def test_a_figure_that_cannot_be_drawn_leaves_the_old_file(tmp_path):
    path = tmp_path / "rho.png"
    path.write_text("before")
    figure = rho_heatmap(record(["a"], [0]))
    figure.axes[0].set_title("$\\nonsense$")  # fails when drawn
    with pytest.raises(ValueError, match="nonsense"):
        save_figure(figure, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_only_png_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.png but got .*rho\.pdf"):
        save_figure(rho_heatmap(record(["a"], [0])), tmp_path / "rho.pdf")


class Images:
    """Takes figures as Lightning's logger for Weights & Biases does."""

    def __init__(self):
        self.calls = []

    def log_image(self, key, images, step=None, **kwargs):
        self.calls.append((key, images, step))


class Writer:
    """Takes figures as TensorBoard's writer does."""

    def __init__(self):
        self.calls = []

    def add_figure(self, tag, figure, global_step=None, close=True, walltime=None):
        self.calls.append((tag, figure, global_step))


def test_figures_reach_the_loggers_that_take_them_and_no_others(tmp_path):
    images, board = Images(), types.SimpleNamespace(experiment=Writer())
    figure = rho_heatmap(record(["a"], [0]))
    loggers = [images, CSVLogger(tmp_path), DummyLogger(), board, types.SimpleNamespace()]
    assert log_figure(loggers, "rho/heatmap", figure, 40) == 2
    assert images.calls == [("rho/heatmap", [figure], 40)]
    assert board.experiment.calls == [("rho/heatmap", figure, 40)]
    assert log_figure([], "rho/heatmap", figure, 40) == 0


def test_figures_do_not_stay_open_in_pyplot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    history = record(["a"], [0])
    figures = [rho_heatmap(history), rho_profile(history.at()), training_figure(history, {})]
    figures += [rho_gain_scatter({"a": 0.1}, {"a": 0.1}), angles_figure({"a": [1.0]}, {})]
    assert pyplot.get_fignums() == before
    assert not any(figure.canvas.manager for figure in figures)


def test_figures_without_matplotlib_say_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    history = record(["a"], [0])
    for draw in (
        lambda: rho_heatmap(history, threshold=0.3),
        lambda: rho_profile(history.at()),
        lambda: training_figure(history, {}),
        lambda: rho_gain_scatter({"a": 0.1}, {"a": 0.1}),
        lambda: angles_figure({"a": [1.0]}, {}),
    ):
        with pytest.raises(ImportError, match=r"pip install 'fasc-lightning\[plot\]'"):
            draw()
