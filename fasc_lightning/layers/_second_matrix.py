"""The second matrix of a low-rank layer, fitted to the first one after that is rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from fasc_lightning.layers._compressed_linear import CompressedLinear, matrix_of
from fasc_lightning.layers._pivoted import PivotedLinear

#: Relative ridge of the normal equations: the features between the matrices may be dependent.
RIDGE = 1e-8


def first_and_second(layer: CompressedLinear) -> tuple[str, str]:
    """Return the names of the matrix that reads the layer's inputs, and of the other one, which reads its outputs."""
    (second,) = (name for name, _ in layer.named_children() if name != layer.reads_inputs)
    return layer.reads_inputs, second


def fitted_second(layer: CompressedLinear, first: Tensor, A: Tensor | None) -> Tensor:
    """Return the second matrix that is best for a changed first one.

    With z = S x the features between the matrices, it minimises tr(D A D^T), D = W' - second S, over the outputs that
    the second matrix makes.

    Args:
        layer: The layer with its present matrices, whose product is W'.
        first: The changed first matrix, of the same shape.
        A: E[x x^T] of the layer's inputs, shape (n, n); None for the identity.
    """
    left, right = (factor.detach().double() for factor in layer.factors())
    S, target = first.double(), left
    if isinstance(layer, PivotedLinear):
        if layer.side == "out":
            order = layer.permutation.argsort()
            target = left[order[layer.rank :]]
        else:
            eye = torch.eye(layer.rank, dtype=S.dtype, device=S.device)
            S = torch.cat([eye, S], dim=1)[:, layer.permutation.argsort()]
    SA = S if A is None else S @ A.to(S)
    gram = SA @ S.T
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    found = torch.linalg.solve(gram, (SA @ right.T) @ target.T).T
    weight = matrix_of(layer.get_submodule(first_and_second(layer)[1]))
    return found.to(weight.dtype)
