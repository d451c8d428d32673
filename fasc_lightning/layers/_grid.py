"""Grids of few bits: integer codes, and for each group of inputs a scale and a zero point."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Bits that a code may have.
BITS = (2, 3, 4, 8)

#: Type of stored scales. Each of its values is also a float32 and, in the range of weights, a float16. So a conversion
#: of the model between these types changes no weight.
SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Grid:
    """The numbers that a rounded matrix (m, n) may hold: scale * (code - zero), code an integer of few bits.

    Each output has one scale, and one zero point, for each group of consecutive inputs. If ``group`` does not divide n,
    the last group is smaller.

    Attributes:
        bits: Bits of a code: 2, 3, 4 or 8.
        group: Inputs in a group; None puts all inputs into one.
        symmetric: Whether all zero points are the middle code, which is then not stored.
    """

    bits: int
    group: int | None = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"Expected `bits` to be one of {', '.join(map(str, BITS))} but got {self.bits!r}.")
        if self.group is not None and (type(self.group) is not int or self.group < 8 or self.group % 8):
            raise ValueError(
                f"Expected `group` to be a positive multiple of 8, or None for all inputs, but got {self.group!r}."
            )

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return self.levels // 2

    def groups(self, n: int) -> int:
        """Return the number of groups of n inputs."""
        return 1 if self.group is None else math.ceil(n / self.group)

    def columns(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the group of each input, shape (n,)."""
        return torch.arange(n, device=device) // (n if self.group is None else self.group)

    def nbytes(self, m: int, n: int) -> int:
        """Return the bytes of a stored (m, n) matrix: codes and zero points in 32-bit words, scales in 16 bits."""
        groups = self.groups(n)
        zeros = 0 if self.symmetric else words(m, self.bits) * groups * 4
        return m * words(n, self.bits) * 4 + m * groups * SCALE_DTYPE.itemsize + zeros


@dataclass(frozen=True)
class Rounded:
    """A matrix (m, n) on a grid.

    Attributes:
        grid: The grid.
        codes: Integers from 0 to ``grid.levels - 1``, uint8, shape (m, n).
        scale: Shape (m, groups), float32; each is a value of :data:`SCALE_DTYPE`.
        zero: Zero points, uint8, shape (m, groups).
    """

    grid: Grid
    codes: Tensor
    scale: Tensor
    zero: Tensor

    def dequantize(self) -> Tensor:
        """Return the matrix W', shape (m, n), in float32."""
        return dequantize(self.codes, self.scale, self.zero, self.grid)


def words(count: int, bits: int) -> int:
    """Return the number of 32-bit words that hold ``count`` codes without gaps."""
    return math.ceil(count * bits / 32)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Return scale * (codes - zero), shape (m, n), in the type of the scales."""
    columns = grid.columns(codes.shape[1], codes.device)
    return (codes.to(scale.dtype) - zero.to(scale.dtype)[:, columns]) * scale[:, columns]
