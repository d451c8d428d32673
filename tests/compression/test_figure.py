"""The picture of what each layer got."""

from __future__ import annotations

import pytest

from fasc_lightning.compression import LayerReport, allocation_figure


def layer(name, quantize=None, rank=8, layout="dense"):
    nan = float("nan")
    return LayerReport(name, (8, 16), rank, layout, 10, nan, nan, nan, 0.0, "fasc", quantize=quantize)


def test_cells_hold_the_bits_of_all_stored_numbers_and_the_codes_are_written():
    four = {"bits": 4, "group": 16, "symmetric": False}
    layers = [
        layer("h.0.q_proj", four),
        layer("h.0.up_proj"),
        layer("h.1.q_proj", "int8"),
        layer("h.1.up_proj", None, 2, "factors"),
    ]
    axes, bar = allocation_figure(layers).axes
    image = axes.images[0].get_array()
    # 4 bits a code, 16 of scale and 4 of zero point for 16 inputs; 8 bits and 16 of scale; 16; 2 (8 + 16) numbers.
    assert image.tolist() == [[4 + 20 / 16, 8 + 16 / 16], [16, 16 * 2 * 24 / 128]]
    assert [text.get_text() for text in axes.texts] == ["4", "8"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["q_proj", "up_proj"]
    assert bar.get_ylabel() == "bits a weight"


def test_experts_share_a_cell_and_layers_outside_of_blocks_have_one():
    layers = [layer(f"h.0.experts.{i}.up_proj", "int8") for i in range(3)] + [layer("head")]
    axes, _ = allocation_figure(layers).axes
    assert axes.images[0].get_array().shape == (2, 1)


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="Expected the layers of a report but got none"):
        allocation_figure([])
