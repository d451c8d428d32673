"""Preparation of rounded models for fast decoding."""

from __future__ import annotations

from torch import nn

from fasc_lightning.layers import packed_matrices


def prepare_decoding(model: nn.Module) -> int:
    """Give the layers of 4 bits the form of torch's kernel for few tokens, in place.

    The kernel reads 4 bits a weight, and multiplies few tokens of bfloat16. Without this call each token makes the
    weights dense, and decoding is slower than with dense layers. All else stays as it was: the state dict and copies
    have the stored form, and training, other types and more tokens use the general path.

    Args:
        model: Any module, in bfloat16 or under autocast to it.

    Returns:
        The number of matrices that have that form now: they have 4 bits, are on a CPU, and fit the kernel.
    """
    return sum(matrix.prepare() for matrix in packed_matrices(model))
