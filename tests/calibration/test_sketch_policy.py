from __future__ import annotations

import pytest

from fasc_lightning.calibration import expected_rank, sketches_for_budget
from fasc_lightning.calibration._sketch_policy import auto_size, choose_sketches, describe_sketches
from fasc_lightning.options import Memory, SketchOptions
from fasc_lightning.statistics import CalibrationMoments, LayerSketches, Sketch
from fasc_lightning.statistics._sketch import SKETCH_KINDS


def test_the_automatic_size_is_the_papers_rule():
    assert auto_size(4096, 500, rho=0.3) == 1000
    assert auto_size(4096, 500, rho=0.31) == 2000
    assert auto_size(4096, 500) == 2000  # not known yet: as above the threshold
    assert auto_size(4096, 600) == 2048
    assert auto_size(4096, 1500, rho=0.1) == 2048


@pytest.mark.parametrize(("m", "n", "keep"), [(10, 10, 0.6), (40, 9, 0.8), (7, 31, 0.05), (8, 8, 1.0)])
def test_the_expected_rank_is_the_largest_that_the_share_pays_for(m, n, keep):
    affordable = [k for k in range(1, min(m, n) + 1) if k * (m + n - k) <= keep * m * n + 1e-9]
    assert expected_rank(m, n, None, keep) == max(affordable, default=1)


def test_a_fraction_of_full_rank_and_an_absolute_rank_are_taken_as_they_are():
    assert expected_rank(10, 40, 0.5, None) == 5
    assert expected_rank(10, 40, 3, None) == 3


def test_only_wide_sides_are_sketched_and_narrow_layers_left_out():
    chosen = choose_sketches(
        {"up": (300, 100), "out": (50, 40)}, {"up": 10, "out": 10}, SketchOptions(above=200, seed=3)
    )
    assert chosen == {"up": LayerSketches(None, Sketch(300, 40, 3))}


def test_inputs_of_one_width_get_the_largest_size_that_a_layer_asks_for():
    shapes = {"q": (100, 400), "k": (20, 400)}
    chosen = choose_sketches(shapes, {"q": 30, "k": 5}, SketchOptions(above=200))
    assert {sides.inputs for sides in chosen.values()} == {Sketch(400, 120)}
    CalibrationMoments(shapes, sketches=chosen)  # which would refuse unequal ones


def test_a_budget_gives_the_ranks_and_no_options_no_sketches():
    shapes = {"a": (400, 300)}
    assert sketches_for_budget(shapes, None, 0.1, None) == {}
    found = sketches_for_budget(shapes, SketchOptions(above=350), 0.1, None, {"a": 0.1})
    assert found == {"a": LayerSketches(None, Sketch(400, 60))}


def test_rho_decides_the_size_of_a_layer():
    shapes = {"a": (400, 10), "b": (400, 10)}
    chosen = choose_sketches(shapes, {"a": 5, "b": 5}, SketchOptions(above=200), {"a": 0.1, "b": 0.9})
    assert chosen["a"].outputs == Sketch(400, 10)
    assert chosen["b"].outputs == Sketch(400, 20)


def test_a_sketch_no_smaller_than_the_exact_moment_is_not_made():
    chosen = choose_sketches({"a": (400, 800)}, {"a": 5}, SketchOptions(size=300, above=100))
    assert chosen == {"a": LayerSketches(Sketch(800, 300), None)}


def test_a_size_that_is_too_large_for_every_side_is_refused():
    with pytest.raises(ValueError, match=r"saves memory for some side wider than 100 .*800.* but got 5000"):
        choose_sketches({"a": (400, 800)}, {"a": 5}, SketchOptions(size=5000, above=100))


def test_a_sketch_of_half_the_width_is_not_worth_its_error():
    assert not Sketch(14336, 7168).is_worthwhile
    assert Sketch(14336, 4330).is_worthwhile
    shapes, ranks = {"gate": (14336, 4096)}, {"gate": 2165}
    assert choose_sketches(shapes, ranks, SketchOptions()) == {}
    low = choose_sketches(shapes, ranks, SketchOptions(), {"gate": 0.1})
    assert low == {"gate": LayerSketches(None, Sketch(14336, 4330))}


@pytest.mark.parametrize("kind", SKETCH_KINDS)
def test_what_is_sketched_and_what_stays_exact_for_want_of_room_is_said(kind):
    shapes = {"a": (400, 800), "b": (100, 400), "c": (900, 400)}
    options = SketchOptions(kind, 300, 100)
    sketched, exact = describe_sketches(shapes, choose_sketches(shapes, dict.fromkeys(shapes, 5), options), options)
    parts = ["1 of width 800 in 300 columns", "1 of width 900 in 300 columns"]
    if kind == "gaussian":  # which holds s^2 numbers, whatever the width
        assert sketched == "sketched sides: 3 of width 400 in 300 columns, " + ", ".join(parts)
        assert not exact
        return
    assert sketched == "sketched sides: " + ", ".join(parts)
    assert "sketches (sketch_size=300) would not be clearly smaller" in exact
    assert "3 of width 400 (the outputs of 'a' ...)" in exact
    assert describe_sketches(shapes, {}, SketchOptions(kind, above=1000)) == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sketch": "srht"}, "`sketch` to be one of projected, range, gaussian"),
        ({"sketch_size": 0}, "`sketch_size` to be"),
        ({"sketch_size": "large"}, "`sketch_size` to be"),
        ({"sketch_size": True}, "`sketch_size` to be"),
        ({"sketch_above": -1}, "`sketch_above` to be"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Memory(**options)
