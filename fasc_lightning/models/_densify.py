"""Conversion of a compressed model to a dense one."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from fasc_lightning._utils import undoing
from fasc_lightning.layers import is_compressed, swap_to_dense
from fasc_lightning.models._attach import attach_config

Model = TypeVar("Model", bound=nn.Module)


def to_dense(model: Model) -> Model:
    """Turn a compressed model into an ordinary dense one with the same outputs, in place.

    It serves tools that know no low-rank layers: ``save_pretrained`` then writes an ordinary folder, which loads
    without this package. The dense model is as large and as slow as before the compression, and no more accurate. A
    layer of shape (m, n) holds m n numbers again instead of k (m + n - k) (pivot) or k (m + n) (factors). So the
    targeted layers of a model that kept 60 % of them grow by two thirds, on disk and in memory, and take as many FLOPs
    a token as before. Both forms of all these layers are in memory during the call.

    Args:
        model: A transformers model, a LightningModule or any other module that holds compressed layers.

    Returns:
        The same model. Outputs agree with the compressed model's to rounding, not bit by bit.

    Raises:
        ValueError: If the model has no compressed layers, or weights are offloaded. The model is unchanged.
        TypeError: If a factor carries adapters, or another library's quantisation. The model is unchanged.

    Example:
        >>> model = load_compressed("compressed")  # doctest: +SKIP
        >>> to_dense(model).save_pretrained("dense")  # doctest: +SKIP
    """
    if not is_compressed(model):
        raise ValueError(f"Expected a model with compressed layers, but {type(model).__name__} has none: it is dense.")
    with undoing() as undo:
        undo.keep(model, attributes=True)
        swap_to_dense(model)
        attach_config(model)
        undo.forget()
    return model
