"""The parameters that a recovery without adapters trains."""

from __future__ import annotations

from torch import nn

from fasc_lightning._utils import Undo
from fasc_lightning.layers import packed_matrices
from fasc_lightning.options import FactorRecovery, trained_factors


def train_factors(model: nn.Module, recovery: FactorRecovery, undo: Undo) -> None:
    """Make the factors, and the scales of rounded matrices, require gradients.

    Args:
        model: The compressed model, all of whose parameters are frozen.
        recovery: Options of the recovery.
        undo: Gets the rounding of the scales to 16 bits, for the end; until then they are float32.
    """
    for matrix in packed_matrices(model):
        undo.add(matrix.narrow_scales)
        matrix.widen_scales()
    for parameter in trained_factors(model, recovery).values():
        parameter.requires_grad_(True)
