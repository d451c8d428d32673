from __future__ import annotations

import math

import numpy as np
import pytest

from fasc_lightning._utils import (
    block_index,
    cell_edges,
    label_rows,
    module_kinds,
    over_layers,
    short_names,
    spread_positions,
    ticks_within,
)

NAN = math.nan


def test_the_block_is_the_first_whole_part_that_is_a_number():
    assert block_index("model.layers.12.mlp.experts.3.up_proj") == 12
    assert block_index("h0.conv1d.fc2") is None
    assert block_index("lm_head") is None


def test_kinds_are_last_parts_unless_a_block_has_two_of_them():
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.attn.c_attn", "h.1.attn.c_proj", "head"]
    kinds = ["attn.c_proj", "mlp.c_proj", "c_attn", "attn.c_proj", "head"]
    assert list(module_kinds(names).values()) == kinds
    experts = module_kinds(["m.0.experts.0.up", "m.0.experts.1.up", "m.0.gate"])
    assert list(experts.values()) == ["experts.*.up", "experts.*.up", "gate"]


def test_short_names_lose_what_all_share_and_never_everything():
    assert short_names(["m.0.q.base", "m.1.k.base"]) == ["0.q", "1.k"]
    assert short_names(["m.layers.0.q", "m.layers.1.k", "lm_head"]) == ["0.q", "1.k", "lm_head"]
    assert short_names(["m.0.q"]) == ["q"]
    assert short_names(["m.0", "m.0.m"]) == ["0", "0.m"]
    assert short_names(["x.0.q", "x.0.q.q"]) == ["q", "q.q"]
    assert short_names([]) == []


def test_means_and_quantiles_are_over_defined_layers():
    values = np.array([[1.0, NAN, NAN], [3.0, 5.0, NAN], [8.0, NAN, NAN]])
    found = over_layers(values, 0.5)
    np.testing.assert_array_equal(found, [[4.0, 5.0, NAN], [3.0, 5.0, NAN]])


def test_cells_meet_half_way_and_their_ends_are_symmetric():
    np.testing.assert_array_equal(cell_edges([0, 10, 100]), [-5, 5, 55, 145])
    np.testing.assert_array_equal(cell_edges([7]), [6.5, 7.5])


def test_all_rows_have_labels_or_else_the_first_ones_of_blocks():
    layers = [f"h.{block}.{kind}" for block in range(12) for kind in "abc"] + ["head"]
    assert label_rows(layers, 40) == list(range(37))
    assert label_rows(layers, 13) == [*range(0, 36, 3), 36]
    assert label_rows(layers, 7) == [0, 6, 12, 18, 24, 30, 36]
    assert label_rows([f"fc{i}" for i in range(10)], 5) == [0, 2, 4, 6, 8]


def test_blocks_that_repeat_are_spread_within_their_place():
    np.testing.assert_allclose(spread_positions([0, 2, 5]), [0, 2, 5])
    np.testing.assert_allclose(spread_positions([0, 3, 3]), [0, 2.825, 3.175])
    assert np.abs(spread_positions([1] * 100) - 1).max() < 0.35


@pytest.mark.parametrize(("first", "last"), [(3, 3), (3, 4), (0, 9), (17, 31_415)])
def test_ticks_are_a_few_whole_numbers_within_the_ends(first, last):
    ticks = ticks_within(first, last)
    assert ticks == sorted(set(ticks))
    assert first <= ticks[0]
    assert ticks[-1] <= last
    assert min(2, last - first + 1) <= len(ticks) <= 8
