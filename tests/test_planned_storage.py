from __future__ import annotations

import itertools
import random

import pytest

from fasc_lightning.moments import LayerSketches, moments_bytes
from fasc_lightning.packed import packed_size
from fasc_lightning.planned_storage import (
    LayerMemory,
    Peak,
    Storage,
    choose_storage,
    layer_memory,
    peak_memory,
    shares,
)
from fasc_lightning.sketch import Sketch

LAYERS = [LayerMemory(100, 40, factors=30, workspace=50, sketched_workspace=45), LayerMemory(60, 60, 20, 25, 25)]
LAYERS += [LayerMemory(80, 30, 10, 40, 35), LayerMemory(20, 10, 10, 5, 5)]


def chosen(memory, host=0, sketches=True, passes=None, resident=7, activations=11):
    def peak(storage):
        return peak_memory(LAYERS, storage, resident, activations)

    return choose_storage(LAYERS, peak, Peak(memory, host), sketches=sketches, passes=passes), peak


def test_exact_moments_are_those_that_calibration_counts():
    for needs in ({"plain"}, {"coupled"}, {"plain", "coupled", "C"}):
        assert layer_memory(24, 40, needs=needs).exact == moments_bytes([(24, 40)], needs=needs)


def test_a_sketch_stands_in_for_the_sides_for_which_it_is_smaller():
    wide = layer_memory(64, 4096, sketch_size=128, needs={"coupled"})
    assert wide.exact - wide.sketched == 4 * (packed_size(4096) - Sketch(4096, 128).numbers)
    assert layer_memory(64, 64, sketch_size=128).sketched == layer_memory(64, 64).exact


@pytest.mark.parametrize("needs", [{"plain"}, {"coupled"}, {"plain", "coupled"}])
def test_settled_sketches_are_counted_to_the_byte(needs):
    sides = LayerSketches(Sketch(4096, 128), None)
    found = layer_memory(512, 4096, needs=needs, sketches=sides)
    assert found.exact == found.sketched == moments_bytes([(512, 4096)], needs=needs, sketches=[sides])
    assert found.workspace == found.sketched_workspace < layer_memory(512, 4096, needs=needs).workspace


def test_two_kinds_of_second_moments_take_two_sketches():
    def saved(needs):
        found = layer_memory(512, 512, sketch_size=32, needs=needs)
        return found.exact - found.sketched

    assert saved({"plain", "coupled"}) == 2 * saved({"coupled"})


def test_statistics_that_no_sketch_stands_for_stay_exact():
    found = layer_memory(512, 512, sketch_size=32, needs={"saliency"})
    assert found.sketched == found.exact


def test_sketches_grow_linearly_with_the_width_and_exact_moments_with_its_square():
    narrow, wide = (layer_memory(d, d, sketch_size=64, needs={"coupled"}) for d in (2048, 8192))
    assert wide.sketched / narrow.sketched == pytest.approx(4, rel=0.02)
    assert wide.exact / narrow.exact > 14


def test_shares_are_consecutive_and_complete():
    generator = random.Random(0)
    for _ in range(50):
        sizes = [generator.randint(1, 100) for _ in range(generator.randint(1, 20))]
        passes = generator.randint(1, 25)
        found = shares(sizes, passes)
        assert [i for share in found for i in share] == list(range(len(sizes)))
        assert all(found)
        assert len(found) <= passes
    assert shares([5, 5, 5, 5], 2) == [[0, 1], [2, 3]]
    assert shares([1, 1], 9) == [[0], [1]]


def test_the_peak_of_one_pass_is_what_a_walk_through_it_meets():
    found = peak_memory(LAYERS, Storage(), resident=7, activations=11)
    calibrating = 260 + 11
    # Moments that are left, factors made so far and the room of the layer at hand.
    factorising = [260 + 30 + 50, 160 + 50 + 25, 100 + 60 + 40, 20 + 70 + 5]
    assert found == Peak(7 + max(calibrating, *factorising), 0)
    kept = peak_memory(LAYERS, Storage(), resident=7, activations=11, consume=False)
    assert kept.device == 7 + max(260 + 30 + 50, 260 + 50 + 25, 260 + 60 + 40, 260 + 70 + 5)


def test_what_is_moved_counts_beside_the_device():
    storage = Storage(offloaded=frozenset({0}), factors_offloaded=True)
    found = peak_memory(LAYERS, storage, resident=7, activations=11)
    assert found.device == 7 + max(160 + 11, 160 + 30 + 50, 160 + 20 + 25, 100 + 10 + 40, 20 + 10 + 5)
    assert found.host == 100 + 30


def test_passes_hold_one_share_at_a_time_and_the_factors_of_those_before():
    found = peak_memory(LAYERS, Storage(passes=2), resident=0, activations=0)
    first, second = shares([layer.exact for layer in LAYERS], 2)
    assert (first, second) == ([0], [1, 2, 3])
    assert found.device == max(100 + 30 + 50, 160 + 30, 160 + 50 + 25, 100 + 60 + 40, 20 + 70 + 5)


def test_no_other_storage_with_fewer_sketches_fits():
    whole = peak_memory(LAYERS, Storage(), 7, 11).device
    for memory in range(whole - 100, whole):
        storage, peak = chosen(memory, passes=1)
        fewer = [frozenset(s) for k in range(5) for s in itertools.combinations(range(4), k)]
        fitting = [s for s in fewer if peak(Storage(s)).device <= memory]
        if storage is None:
            assert not fitting
        else:
            assert peak(storage).device <= memory
            assert storage.sketched in fitting


def test_exact_on_the_device_comes_first_then_the_cpu_then_sketches_then_passes():
    whole = peak_memory(LAYERS, Storage(), 7, 11).device
    assert chosen(whole)[0] == Storage()
    beside, _ = chosen(whole - 20, host=500)
    assert beside.factors_offloaded
    assert not beside.sketched
    assert chosen(whole - 20)[0].sketched
    passed, peak = chosen(whole - 20, sketches=False)
    assert passed.passes > 1
    assert peak(passed).device <= whole - 20
    assert chosen(whole - 20, sketches=False, passes=1)[0] is None
    assert chosen(10)[0] is None
