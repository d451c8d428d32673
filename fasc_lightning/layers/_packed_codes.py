"""Codes of few bits, packed: the stored form, the form of torch's int4 kernel for CPUs, and dense weights from both.

The stored form is that of the format `pack-quantized` of compressed-tensors, in words of 32 bits. The kernel's form is
another order of the same 4-bit codes, which depends on the processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fasc_lightning.layers._grid import words

#: Sizes of groups that torch's int4 kernel takes, and the number that has to divide its outputs.
KERNEL_GROUPS, KERNEL_OUTPUTS = (32, 64, 128, 256), 16

#: Entries of the weight that are made dense at once: the matrix product prepares all inputs for each block, so small
#: blocks cost time. A compiled program has a copy of the operations for each block, so its blocks are larger.
_BLOCK, _COMPILED_BLOCK = 1 << 23, 1 << 24

#: Entries that one operation makes dense on a CPU. They stay in its cache from one operation to the next.
_PASS = 1 << 19

#: Outputs that are packed for the kernel at once: torch takes codes of 4 bytes. A multiple of any processor's block.
_ROWS_AT_ONCE = 1024


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes without gaps: code i of a row is in bits [i * bits, (i + 1) * bits) of the row, lowest bit first.

    Args:
        codes: Integers from 0 to 2^bits - 1, uint8, shape (rows, count).
        bits: 2, 3, 4 or 8.

    Returns:
        int32, shape (rows, words(count, bits)); the bits after the last code are 0.

    Raises:
        ValueError: If a code needs more bits.
    """
    count = codes.shape[1]
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"Expected codes from 0 to {(1 << bits) - 1}, of {bits} bits, but got {int(codes.max())}.")
    codes = F.pad(codes, (0, -count % 32))  # 32 codes fill whole words
    together = 8 if bits == 3 else 8 // bits  # eight codes of 3 bits fill three bytes
    parts = codes.unflatten(1, (-1, together))
    parts = parts.int() if bits == 3 else parts
    data = parts[..., 0].clone(memory_format=torch.contiguous_format)
    for i in range(1, together):
        data |= parts[..., i] << bits * i
    if bits == 3:
        data = torch.stack([(data >> 8 * i) & 0xFF for i in range(3)], -1).to(torch.uint8)
    return data.flatten(1).view(torch.int32)[:, : words(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes that :func:`pack` packed.

    Args:
        packed: int32, shape (rows, words(count, bits)).
        bits: 2, 3, 4 or 8.
        count: Codes in a row.

    Returns:
        uint8, shape (rows, count).
    """
    data = _bytes(packed)
    if bits == 8:
        return data[:, :count].clone()
    if bits == 3:
        threes = F.pad(data, (0, -4 * words(count, 3) % 3)).unflatten(1, (-1, 3)).int()
        values = threes[..., 0] | threes[..., 1] << 8 | threes[..., 2] << 16
        parts = [((values >> 3 * i) & 7).to(torch.uint8) for i in range(8)]
    else:
        parts = [(data >> bits * i) & ((1 << bits) - 1) for i in range(8 // bits)]
    return torch.stack(parts, -1).flatten(1)[:, :count]


def _bytes(packed: Tensor) -> Tensor:
    """Return the bytes of words (rows, count), the lowest first, (rows, 4 count)."""
    if torch.jit.is_tracing():  # TorchScript has no view of another type
        return torch.stack([(packed >> 8 * i) & 0xFF for i in range(4)], -1).flatten(1).to(torch.uint8)
    if packed.stride(1) != 1:  # possible in a tensor that counts as contiguous, if it has one column
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(torch.uint8)  # the processors that torch supports store the lowest byte first


class KernelLayout(NamedTuple):
    """The order of codes that torch's int4 kernel reads on this processor.

    The outputs are in blocks, each of which has its codes by input: n times block / 2 bytes of two codes. If the size
    of a block does not divide m, the last block is smaller, and may have its outputs in another order.

    Attributes:
        block: Outputs in a block.
        order: Position of each output of a block among the lower codes of its bytes, followed by the upper codes; None
            if that is the order of the outputs.
        last: The same for the last block, if it is smaller.
    """

    block: int
    order: tuple[int, ...] | None
    last: tuple[int, ...] | None


def kernel_takes(m: int, n: int, group: int) -> bool:
    """Tell whether torch has an int4 kernel for CPUs that takes a matrix (m, n) with groups of this size."""
    exists = hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
    return exists and group in KERNEL_GROUPS and n % group == 0 and m % KERNEL_OUTPUTS == 0


def kernel_pack(codes: Tensor) -> tuple[Tensor, KernelLayout] | None:
    """Pack 4-bit codes (m, n), uint8, for the kernel.

    Returns:
        Bytes, shape (m, n / 2), and their layout; None if the processor's layout is of an unknown kind.
    """
    layout = _kernel_layout(len(codes))
    if layout is None:
        return None
    packed = torch.cat([_convert(part) for part in codes.split(_ROWS_AT_ONCE)])
    # Only a part of the layout was looked at. What is stored must come back whatever the processor.
    if not torch.equal(kernel_unpack(packed, layout, *codes.shape), codes):
        return None
    return packed, layout


def kernel_unpack(packed: Tensor, layout: KernelLayout, rows: int, n: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Return codes (rows, n) of the kernel's form (rows, n / 2); the rows may be any whole blocks of the matrix."""
    full = rows // layout.block * layout.block
    parts = [_unpack_blocks(packed[:full], n, layout.block, layout.order, dtype)] if full else []
    if full < rows:
        parts.append(_unpack_blocks(packed[full:], n, rows - full, layout.last, dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _unpack_blocks(packed: Tensor, n: int, block: int, order: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
    """Return codes (rows, n) of blocks of one size."""
    data = packed.reshape(-1, n, block // 2).transpose(1, 2).contiguous().to(dtype)
    codes = torch.stack((data & 15, data >> 4), 1).view(-1, block, n)
    if order is not None:
        outputs = codes.unbind(1)
        codes = torch.stack([outputs[i] for i in order], 1)
    return codes.view(-1, n)


def _convert(codes: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)  # the last number has no effect


@lru_cache
def _kernel_layout(m: int) -> KernelLayout | None:
    """Return the layout for m outputs, None if it is not of the kind that :class:`KernelLayout` describes."""
    columns = 32
    # Each code is a digit of its own position. A block ends where the first input follows the second.
    position = torch.arange(min(m, _ROWS_AT_ONCE) * columns).view(-1, columns)
    places = _places(position)
    row, column = places // columns, places % columns
    later = (column != 0).nonzero()
    block = int(later[0]) if len(later) else len(row)
    last = m % block
    if block % 2 or not torch.equal(row[:block].sort().values, torch.arange(block)):
        return None
    final = None if last == 0 else _places(position[:last])[:last] // columns
    if final is not None and not torch.equal(final.sort().values, torch.arange(last)):
        return None
    return KernelLayout(block, _order(row[:block]), None if final is None else _order(final))


def _places(position: Tensor) -> Tensor:
    """Return the position of the code in each half byte of the kernel's form, the lower half first, shape (m n,)."""
    places = torch.zeros(position.numel(), dtype=torch.long)
    for digit in range(4):  # 16^4 positions at most
        data = _convert(position >> 4 * digit & 15).flatten()
        places |= torch.stack((data & 15, data >> 4), 1).flatten().long() << 4 * digit
    return places


def _order(rows: Tensor) -> tuple[int, ...] | None:
    """Return where each row is among the lower codes followed by the upper ones, None if it is in its own place."""
    order = rows.view(-1, 2).t().flatten().argsort()
    return None if torch.equal(order, torch.arange(len(order))) else tuple(order.tolist())


class Packing(NamedTuple):
    """Shape and kind of packed codes.

    Attributes:
        m: Outputs.
        n: Inputs.
        bits: Bits of a code.
        group: Inputs in a group.
        layout: Layout of the kernel's form; None for the stored form.
    """

    m: int
    n: int
    bits: int
    group: int
    layout: KernelLayout | None


def codes_of(packed: Tensor, packing: Packing, a: int, b: int) -> Tensor:
    """Return the codes of outputs a to b, uint8, (b - a, n); of the kernel's form, from one of :func:`row_blocks`."""
    if packing.layout is None:
        return unpack(packed[a:b], packing.bits, packing.n)
    return kernel_unpack(packed[a:b], packing.layout, b - a, packing.n)


def zeros_of(zero: Tensor | None, packing: Packing, device: torch.device) -> Tensor:
    """Return the zero points, uint8, (m, groups).

    Args:
        zero: Packed along the outputs, (words(m, bits), groups); None if all are the middle code.
        packing: Shape and kind of the codes.
        device: Device of the codes.
    """
    if zero is None:
        shape = (packing.m, -(-packing.n // packing.group))
        return torch.full(shape, 1 << packing.bits - 1, dtype=torch.uint8, device=device)
    return unpack(zero.t(), packing.bits, packing.m).t()


def row_blocks(packing: Packing, entries: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield the first and the next output of each block of the weight that is made dense at once."""
    if entries is None:
        entries = _COMPILED_BLOCK if torch.compiler.is_compiling() or torch.jit.is_tracing() else _BLOCK
    rows, whole = max(1, entries // packing.n), packing.m
    if packing.layout is not None:
        block = packing.layout.block
        rows, whole = max(block, rows // block * block), packing.m // block * block
    for a in range(0, whole, rows):
        yield a, min(a + rows, whole)
    if whole < packing.m:
        yield whole, packing.m


def dense_blocks(
    packed: Tensor, scale: Tensor, zero: Tensor | None, packing: Packing, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the weight in blocks of outputs.

    Args:
        packed: The codes, in the form that ``packing`` describes.
        scale: Shape (m, groups).
        zero: Packed zero points, or None, as for :func:`zeros_of`.
        packing: Shape and kind of the codes.
        dtype: Dtype of the blocks.

    Yields:
        The outputs, and their weights (rows, n), rounded once. Without gradients, a block is overwritten by
        the next.
    """
    zeros = zeros_of(zero, packing, scale.device)
    graded = torch.is_grad_enabled()
    eager = packed.is_cpu and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
    fits = dtype == scale.dtype == torch.bfloat16 and packing.n % packing.group == 0
    if not eager or not fits or (graded and scale.requires_grad):
        for a, b in row_blocks(packing):
            yield slice(a, b), _dense(codes_of(packed, packing, a, b), scale[a:b], zeros[a:b], packing, dtype)
        return
    out: Tensor | None = None
    for a, b in row_blocks(packing):
        if out is None or graded or b - a > len(out):
            out = scale.new_empty(b - a, packing.n)
        for start, stop in row_blocks(packing._replace(m=b - a), _PASS):
            part = slice(a + start, a + stop)
            _write_bfloat16(out[start:stop], packed[part], scale[part], zeros[part], packing, stop - start)
        yield slice(a, b), out[: b - a]


def _dense(codes: Tensor, scale: Tensor, zeros: Tensor, packing: Packing, dtype: torch.dtype) -> Tensor:
    """Return the weights (rows, n) of codes (rows, n), scales and zero points (rows, groups), rounded once."""
    # The difference is a small integer. In bfloat16 it is exact, and so is its product with a bfloat16 before rounding.
    exact = dtype == scale.dtype == torch.bfloat16
    wide = dtype if exact else torch.promote_types(dtype, torch.float32)
    codes, scale, zeros = codes.to(wide), scale.to(wide), zeros.to(wide)
    if packing.n % packing.group == 0:
        steps = codes.view(-1, packing.n // packing.group, packing.group) - zeros[:, :, None]
        return (steps * scale[:, :, None]).view(-1, packing.n).to(dtype)
    columns = torch.arange(packing.n, device=codes.device) // packing.group
    return ((codes - zeros[:, columns]) * scale[:, columns]).to(dtype)


def _write_bfloat16(out: Tensor, packed: Tensor, scale: Tensor, zeros: Tensor, packing: Packing, rows: int) -> None:
    """Write what :func:`_dense` returns for the codes of some outputs, on a CPU in half the time."""
    # Batch normalisation is torch's one operation that multiplies and adds by group in a single pass. It does so in
    # float32, where each product and sum is exact here, and then rounds to bfloat16.
    codes, shift = _codes_in_bfloat16(packed, packing, rows)
    mean, factor = (zeros.float() + shift).flatten(), scale.float().flatten()
    groups, none = (1, -1, packing.group), mean.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        codes.view(groups),
        factor,
        None,
        mean,
        torch.ones_like(mean),
        False,
        0.0,
        0.0,
        out=out.view(groups),
        save_mean=none,
        save_invstd=none,
    )


def _codes_in_bfloat16(packed: Tensor, packing: Packing, rows: int) -> tuple[Tensor, int]:
    """Return the codes of some outputs plus a number, in bfloat16, (rows, n), and the number."""
    # bfloat16(128 + code) is bfloat16(128) with the code in its lowest bits, so integer operations make it.
    if packing.bits == 8:
        return unpack(packed, packing.bits, packing.n).to(torch.bfloat16), 0
    layout = packing.layout
    if layout is None and packing.bits == 4 and packing.n % 8 == 0:
        pairs = _bytes(packed).int()  # two codes each, which move to the halves of a word
        pairs = pairs.mul_((1 << 12) + 1).bitwise_and_(0x000F000F).bitwise_or_(0x43004300)
        return pairs.view(torch.bfloat16), 128
    if layout is None:
        codes = unpack(packed, packing.bits, packing.n).to(torch.int16)
    else:
        codes = kernel_unpack(packed, layout, rows, packing.n, torch.int16)
    return codes.bitwise_or_(0x4300).view(torch.bfloat16), 128
