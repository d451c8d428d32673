from __future__ import annotations

import random

import pytest

from fasc_lightning.calibration import projected, shares
from fasc_lightning.planning._memory import LayerMemory, Peak, Storage, choose_storage, layer_memory, peak_memory
from fasc_lightning.statistics import LayerSketches, Sketch, moments_bytes, packed_size

WHOLE = [LayerMemory(100, factors=30, workspace=50), LayerMemory(60, 20, 25), LayerMemory(80, 10, 40)]
WHOLE += [LayerMemory(20, 10, 5)]
SKETCHED = [LayerMemory(40, 30, 45), LayerMemory(60, 20, 25), LayerMemory(30, 10, 35), LayerMemory(10, 10, 5)]
LAYERS = {None: WHOLE, "range": SKETCHED}
BOTH = (False, True)
BUILT = 55


def peak(storage, consume=True):
    return peak_memory(LAYERS[storage.kind], storage, 7, 11, consume, built=BUILT)


def chosen(memory, host=0, kinds=(None, "range"), offloaded=BOTH, passes=None):
    return choose_storage(peak, Peak(memory, host), kinds=kinds, offloaded=offloaded, passes=passes, most=len(WHOLE))


def walked(storage, consume=True):
    """Peaks by going through every moment of a compression and adding up what is there."""
    device = host = 0
    held, factors = {}, {}
    layers = LAYERS[storage.kind]
    for share in shares([layer.moments for layer in layers], storage.passes):
        held |= {i: layers[i].moments for i in share}
        steps = [(0, 11), *((i, layers[i].workspace) for i in share)]
        for number, (i, extra) in enumerate(steps):
            made = layers[i].factors if number else 0
            if storage.passes == 1 and number:
                factors[i], made = made, made if storage.offloaded else 0
            there = sum(held.values()) + sum(factors.values())
            device = max(device, 7 + extra + made + (0 if storage.offloaded else there))
            host = max(host, there if storage.offloaded else 0)
            if number and consume:
                del held[i]
    left = sum(held.values()) + sum(factors.values())
    device = max(device, 7 + (0 if storage.offloaded else left))
    device = max(device, 7 + BUILT + (0 if storage.offloaded else sum(held.values())))
    return Peak(device, host)


def test_exact_moments_are_those_that_calibration_counts():
    for needs in ({"plain"}, {"coupled"}, {"plain", "coupled", "C"}):
        assert layer_memory(24, 40, needs=needs).moments == moments_bytes([(24, 40)], needs=needs)


def test_a_sketch_stands_in_for_its_side():
    sketch = Sketch(4096, 128)
    whole, wide = (
        layer_memory(64, 4096, sketches=sides, needs={"coupled"}) for sides in (None, LayerSketches(inputs=sketch))
    )
    assert whole.moments - wide.moments == 4 * (packed_size(4096) - sketch.numbers)
    assert wide.workspace < whole.workspace


def test_a_projection_stands_in_for_the_wider_side_by_the_narrower():
    whole, seen, square = (
        layer_memory(64, n, sketches=sides, needs={"coupled"})
        for n, sides in ((4096, None), (4096, projected(64, 4096)), (64, None))
    )
    assert whole.moments - seen.moments == 4 * (packed_size(4096) - packed_size(64) - 1)
    assert seen.moments < square.moments + 4 * 4100
    assert seen.workspace < whole.workspace


def test_two_kinds_of_second_moments_take_two_sketches():
    def saved(needs):
        sides = LayerSketches(Sketch(512, 32), Sketch(512, 32))
        return layer_memory(512, 512, needs=needs).moments - layer_memory(512, 512, sketches=sides, needs=needs).moments

    assert saved({"plain", "coupled"}) == 2 * saved({"coupled"})


def test_sketches_grow_linearly_with_the_width_and_exact_moments_with_its_square():
    def grown(sides):
        narrow, wide = (layer_memory(d, d, sketches=sides(d), needs={"coupled"}).moments for d in (2048, 8192))
        return wide / narrow

    assert grown(lambda d: LayerSketches(Sketch(d, 64), Sketch(d, 64))) == pytest.approx(4, rel=0.02)
    assert grown(lambda d: None) > 14


def test_shares_are_consecutive_and_complete():
    generator = random.Random(0)
    for _ in range(50):
        sizes = [generator.randint(1, 100) for _ in range(generator.randint(1, 20))]
        passes = generator.randint(1, len(sizes))
        found = shares(sizes, passes)
        assert [i for share in found for i in share] == list(range(len(sizes)))
        assert all(found)
        assert len(found) == passes
    assert shares([5, 5, 5, 5], 2) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("consume", [True, False])
def test_the_peak_is_what_a_walk_through_the_compression_adds_up_to(consume):
    for passes in range(1, 5):
        for storage in (Storage(s, o, passes) for s in LAYERS for o in BOTH):
            assert peak(storage, consume) == walked(storage, consume), storage


def test_batches_that_run_once_more_meet_all_factors():
    busy = peak_memory(WHOLE, Storage(), 7, 1000, measured=True)
    assert busy.device == 7 + 1000 + max(260, 70)
    late = peak_memory([LayerMemory(10, 100, 5)] * 3, Storage(), 7, 1000, measured=True)
    assert late.device == 7 + 1000 + 300
    assert peak_memory([LayerMemory(10, 100, 5)] * 3, Storage(None, True), 7, 1000, measured=True).device == 1007


def test_moments_that_are_kept_take_more_and_those_beside_the_device_take_none_of_it():
    assert peak(Storage(), consume=False).device > peak(Storage()).device
    aside = peak(Storage(offloaded=True))
    assert aside.device < peak(Storage()).device
    assert aside.host >= sum(layer.moments for layer in WHOLE)


def test_exact_on_the_device_comes_first_then_the_cpu_then_sketches_then_passes():
    whole = peak(Storage()).device
    assert chosen(whole) == Storage()
    assert chosen(whole - 20, host=500) == Storage(offloaded=True)
    assert chosen(whole - 20) == Storage("range")
    passed = chosen(whole - 20, kinds=(None,))
    assert passed.passes > 1
    assert peak(passed).device <= whole - 20
    assert peak(Storage(passes=passed.passes - 1)).device > whole - 20
    assert chosen(whole - 20, kinds=(None,), passes=1) is None
    assert chosen(10) is None


def test_what_is_asked_for_is_not_second_guessed():
    assert chosen(10**6, host=10**6, kinds=("range",), offloaded=(True,), passes=3) == Storage("range", True, 3)
