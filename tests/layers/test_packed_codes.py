from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasc_lightning.layers import _packed_codes
from fasc_lightning.layers._grid import BITS, words
from fasc_lightning.layers._packed_codes import (
    KernelLayout,
    Packing,
    dense_blocks,
    kernel_pack,
    kernel_takes,
    kernel_unpack,
    pack,
    row_blocks,
    unpack,
)

needs_kernel = pytest.mark.skipif(not kernel_takes(16, 32, 32), reason="this torch has no int4 kernel for CPUs")


def random_codes(rows, count, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, count), dtype=torch.uint8, generator=generator)


def packed_by_hand(codes, bits):
    """Each row as one large integer, cut into words."""
    rows = []
    for row in codes.tolist():
        number = sum(code << bits * i for i, code in enumerate(row))
        rows.append([number >> 32 * i & 0xFFFFFFFF for i in range(words(len(row), bits))])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32).view(len(codes), -1)


# The stored form


@pytest.mark.parametrize("count", [1, 7, 8, 10, 11, 31, 32, 33, 96, 100])
@pytest.mark.parametrize("bits", BITS)
def test_codes_follow_each_other_without_gaps(bits, count):
    codes = random_codes(3, count, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert torch.equal(packed, packed_by_hand(codes, bits))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 4), st.integers(1, 130), st.integers(0, 999))
def test_unpacking_gives_the_codes_back(bits, rows, count, seed):
    codes = random_codes(rows, count, bits, seed)
    found = unpack(pack(codes, bits), bits, count)
    assert found.dtype == torch.uint8
    assert torch.equal(found, codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [64, 3])
def test_transposed_codes_pack_as_others(bits, count):
    codes = random_codes(count, 5, bits)
    packed = pack(codes.t(), bits)
    assert torch.equal(packed, packed_by_hand(codes.t(), bits))
    assert torch.equal(unpack(packed.t().contiguous().t(), bits, count), codes.t())


@pytest.mark.parametrize("bits", BITS)
def test_codes_do_not_share_memory_with_words(bits):
    packed = pack(random_codes(2, 32, bits), bits)
    before = packed.clone()
    unpack(packed, bits, 32).fill_(0)
    assert torch.equal(packed, before)


def test_codes_of_more_bits_are_refused():
    with pytest.raises(ValueError, match="from 0 to 7, of 3 bits, but got 8"):
        pack(torch.full((1, 2), 8, dtype=torch.uint8), 3)


@pytest.mark.parametrize("bits", BITS)
def test_words_are_those_of_compressed_tensors(bits):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = random_codes(5, 45, bits)
    signed = (codes.int() - (1 << bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(signed, bits))
    assert torch.equal(pack(codes.t(), bits).t(), pack_to_int32(signed, bits, packed_dim=0))
    assert torch.equal(unpack_from_int32(pack(codes, bits), bits, codes.shape), signed)


# The kernel's form


@needs_kernel
@pytest.mark.parametrize(
    ("m", "n"), [(16, 32), (32, 64), (48, 32), (64, 40), (80, 64), (112, 32), (192, 64), (1040, 32)]
)
def test_the_kernel_gets_its_own_form_and_codes_come_back(m, n):
    codes = random_codes(m, n, 4)
    packed, layout = kernel_pack(codes)
    assert torch.equal(packed, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2))
    assert torch.equal(kernel_unpack(packed, layout, m, n), codes)
    assert torch.equal(kernel_unpack(packed, layout, m, n, torch.int16), codes.to(torch.int16))
    for a, b in row_blocks(Packing(m, n, 4, n, layout), entries=40 * n):
        assert torch.equal(kernel_unpack(packed[a:b], layout, b - a, n), codes[a:b])


@pytest.fixture
def processor(monkeypatch):
    """Give torch the layout of a processor that does not exist."""

    def use(convert):
        _packed_codes._kernel_layout.cache_clear()
        monkeypatch.setattr(_packed_codes, "_convert", convert)
        monkeypatch.setattr(_packed_codes, "_ROWS_AT_ONCE", 960)  # a multiple of the blocks below

    yield use
    _packed_codes._kernel_layout.cache_clear()


def blocks_of_24(codes):
    """Blocks of 24 outputs in reverse, two neighbours in a byte; the rest as a block in its own order."""
    parts = []
    for part in codes.to(torch.uint8).split(24):
        rows = part.flip(0) if len(part) == 24 else part
        parts.append((rows[0::2] | rows[1::2] << 4).t().flatten())
    return torch.cat(parts).view(len(codes), -1)


@pytest.mark.parametrize("m", [16, 24, 40, 64, 1024])
def test_the_layout_is_found_on_other_processors(processor, m):
    processor(blocks_of_24)
    codes = random_codes(m, 32, 4)
    packed, layout = kernel_pack(codes)
    assert layout.block == min(m, 24)
    assert torch.equal(kernel_unpack(packed, layout, m, 32), codes)


def by_output(codes):
    """All inputs of an output side by side."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)


def changing_with_the_input(codes):
    """As on a known processor for the first inputs, and otherwise for the rest."""
    rows = codes.to(torch.uint8).clone()
    rows[:, 32:] = rows[:, 32:].flip(0)
    return blocks_of_24(rows)


@pytest.mark.parametrize("convert", [by_output, changing_with_the_input])
def test_an_unknown_kind_of_layout_is_not_used(processor, convert):
    processor(convert)
    assert kernel_pack(random_codes(48, 64, 4)) is None


def test_shapes_that_the_kernel_takes():
    assert not kernel_takes(24, 64, 64)
    assert not kernel_takes(32, 96, 64)
    assert not kernel_takes(32, 48, 16)


# Dense blocks


def numbers(m, n, bits, group, seed=0):
    """Codes, scales of bfloat16, zero points, and the exact matrix."""
    groups = -(-n // group)
    codes, zero = random_codes(m, n, bits, seed), random_codes(m, groups, bits, seed + 1)
    scale = torch.rand(m, groups, generator=torch.Generator().manual_seed(seed)).add_(0.01).bfloat16()
    wide = [value.double().repeat_interleave(group, 1)[:, :n] for value in (zero, scale)]
    return codes, scale, zero, (codes.double() - wide[0]) * wide[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "group"), [(64, 16), (40, 8), (44, 44), (40, 16)])
@pytest.mark.parametrize("bits", BITS)
def test_weights_are_rounded_once(monkeypatch, bits, n, group, dtype):
    monkeypatch.setattr(_packed_codes, "_BLOCK", 7 * n)
    monkeypatch.setattr(_packed_codes, "_PASS", 2 * n)
    codes, scale, zero, exact = numbers(17, n, bits, group)
    packing = Packing(17, n, bits, group, None)
    for graded in (False, True):
        with torch.set_grad_enabled(graded):
            blocks = dense_blocks(pack(codes, bits), scale, pack(zero.t(), bits).t(), packing, dtype)
            found = [(rows, W.clone()) for rows, W in blocks]
        assert [(rows.start, rows.stop) for rows, _ in found] == [(0, 7), (7, 14), (14, 17)]
        dense = torch.cat([W for _, W in found])
        assert dense.dtype == dtype
        assert torch.equal(dense, exact.to(dtype))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [16, 80, 256])
def test_weights_of_the_kernels_form_are_the_same(monkeypatch, m, dtype):
    monkeypatch.setattr(_packed_codes, "_BLOCK", 130 * 64)
    monkeypatch.setattr(_packed_codes, "_PASS", 10 * 64)
    codes, scale, zero, exact = numbers(m, 64, 4, 32)
    packed, layout = kernel_pack(codes)
    packing = Packing(m, 64, 4, 32, layout)
    with torch.no_grad():
        blocks = dense_blocks(packed, scale, pack(zero.t(), 4).t(), packing, dtype)
        dense = torch.cat([W.clone() for _, W in blocks])
    assert torch.equal(dense, exact.to(dtype))


def test_blocks_that_a_graph_keeps_are_not_overwritten(monkeypatch):
    monkeypatch.setattr(_packed_codes, "_BLOCK", 4 * 32)
    codes, scale, zero, exact = numbers(8, 32, 4, 32)
    blocks = list(
        dense_blocks(pack(codes, 4), scale, pack(zero.t(), 4).t(), Packing(8, 32, 4, 32, None), torch.bfloat16)
    )
    assert torch.equal(torch.cat([W for _, W in blocks]), exact.bfloat16())


def test_blocks_cover_all_outputs_once():
    for layout in (None, KernelLayout(8, None, None)):
        for m in (8, 20, 36):
            blocks = list(row_blocks(Packing(m, 10, 4, 10, layout), entries=170))
            assert [a for a, _ in blocks] == [0, *(b for _, b in blocks[:-1])]
            assert blocks[-1][1] == m
