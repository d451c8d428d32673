"""The number of terms that a loss averages, read from its autograd graph.

A loss ends in a few operations on single numbers: a mean, or a sum and a division, of its terms; factors; sums with
other losses. Cross entropy saves its own normalisation, the number of targets that are not ignored. This module walks
from the loss backwards through these operations to the averaged terms. It reads the graph and never runs or changes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Operations that pass a single number on, by their node's name without "Backward" and its number.
_PASSES = {
    "ToCopy", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Clone", "Alias", "Expand", "Permute",
    "AsStrided", "LiftFresh",
}  # fmt: skip
_MASKED = {"NllLoss", "NllLoss2D"}
#: Losses of PyTorch that average over all elements, with a reduction of their own.
_ELEMENTWISE = {
    "MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "SoftMarginLoss",
}  # fmt: skip
_SUMS = {"Sum", "Nansum", "Dot", "Bmm", "Mm"}  # products of two vectors, also as einsum makes them
_NONE, _MEAN, _SUM = range(3)
#: Most nodes that are visited: auxiliary losses may be sums over thousands of parameters.
_MOST = 20_000


class LossCount(NamedTuple):
    """The terms of a loss.

    Attributes:
        terms: Number of terms that the loss averages; 1 for a sum.
        empty: Whether there is nothing to predict: every target is ignored.
    """

    terms: float
    empty: bool


class _Kind(IntEnum):
    """The kind of a part of a loss. A higher kind more surely has the terms that matter."""

    SUM = 0  # not divided: a penalty on weights, or a loss that is one sum
    AVERAGE = 1
    ELEMENTS = 2  # an elementwise loss of PyTorch
    TARGETS = 3  # a loss with targets: tokens or classes


@dataclass(frozen=True)
class _Part:
    """One reduction inside of a loss.

    Attributes:
        kind: Kind of the reduction.
        terms: Number of terms that it averages.
        weight: Its factor in the loss if it is a mean; None for a sum, whose factor is part of ``terms``.
        empty: Whether it has no target.
    """

    kind: _Kind
    terms: float
    weight: float | None
    empty: bool = False


class _Place(NamedTuple):
    node: Any
    factor: float  # multiplies the node's number
    divisor: float  # divides the node's number


def count_terms(loss: Tensor, factor: float = 1.0, divisor: float = 1.0) -> LossCount | None:
    """Return the number of terms that a loss averages; None if its graph does not show it.

    In a sum of several losses, losses with targets (cross entropy) decide; without them elementwise losses of PyTorch;
    without these means and divided sums made by hand. Among several losses of the deciding kind, a mean of means has
    the terms of all of them; otherwise the largest number of terms decides. Factors belong to the terms: in
    ``0.5 * cross_entropy(...)`` each term counts half.

    Args:
        loss: A scalar, before its backward pass.
        factor: Factor applied to the module's loss, such as a gradient scaler's.
        divisor: Divisor applied to the module's loss, such as the number of accumulated batches.

    Example:
        >>> import torch
        >>> logits = torch.zeros(4, 7, requires_grad=True)
        >>> targets = torch.tensor([1, 2, 3, -100])
        >>> count_terms(torch.nn.functional.cross_entropy(logits, targets))
        LossCount(terms=3.0, empty=False)
    """
    if loss.grad_fn is None or loss.numel() != 1:
        return None
    parts = _parts(_Place(loss.grad_fn, 1 / factor, 1 / divisor))
    if not parts:
        return None
    kind = max(part.kind for part in parts)
    decisive = [part for part in parts if part.kind == kind]
    return LossCount(_joined(decisive), kind == _Kind.TARGETS and all(part.empty for part in decisive))


def _joined(parts: list[_Part]) -> float:
    """Return the number of terms of a sum of losses of one kind."""
    weights = [part.weight for part in parts if part.weight is not None]
    if len(weights) == len(parts) > 1 and math.isclose(sum(weights), 1, rel_tol=1e-4):
        shares = [weight / part.terms if part.terms else math.inf for weight, part in zip(weights, parts, strict=True)]
        if _alike(weights) or _alike(shares):  # a mean of means: of chunks of a batch
            return sum(part.terms for part in parts)
    return max(part.terms for part in parts)


def _alike(values: list[float]) -> bool:
    return min(values) > 0 and math.isclose(min(values), max(values), rel_tol=1e-4)


def _parts(start: _Place) -> list[_Part]:
    """Return the reductions behind a scalar; none for a graph with too many nodes."""
    parts: list[_Part] = []
    open_: list[_Place] = [start]
    for _ in range(_MOST):
        if not open_:
            return parts
        place = open_.pop()
        node, factor, divisor = place
        name = _name(node)
        children = [child for child, _ in node.next_functions]
        if name in _PASSES:
            open_ += [_Place(child, factor, divisor) for child in children[:1] if child is not None]
        elif name in ("Neg", "Add", "Sub", "Rsub"):
            alpha = float(getattr(node, "_saved_alpha", 1))
            signs = {"Add": (1.0, alpha), "Sub": (1.0, -alpha), "Rsub": (-1.0, alpha), "Neg": (-1.0, 0.0)}[name]
            pairs = zip(children, signs, strict=False)
            open_ += [_Place(child, factor * own, divisor) for child, own in pairs if child is not None]
        elif name in ("Mul", "Div"):
            open_ += list(_scaled(name, place, children))
        elif (losses := _stacked(name, node, children)) is not None:
            by = len(losses) if name == "Mean" else 1
            open_ += [_Place(child, factor / by, divisor) for child in losses]
        elif (part := _reduction(name, place)) is not None:
            parts.append(part)
    return []


def _scaled(name: str, place: _Place, children: list[Any]) -> Iterator[_Place]:
    """Yield the factors of a product, or the dividend of a quotient, that have graphs; each scales the other."""
    other = _number(_saved(place.node, "other"))
    if children[0] is not None and other is not None:
        if name == "Mul":
            yield _Place(children[0], place.factor * other, place.divisor)
        else:
            yield _Place(children[0], place.factor, place.divisor * other)
    if name == "Mul" and len(children) > 1 and children[1] is not None:
        first = _number(_saved(place.node, "self"))
        if first is not None:
            yield _Place(children[1], place.factor * first, place.divisor)


def _stacked(name: str, node: Any, children: list[Any]) -> list[Any] | None:
    """Return the losses that a node reduces after a stack or a concatenation; None if there was neither."""
    if name not in ("Mean", "Sum") or not children or children[0] is None or _name(children[0]) not in ("Stack", "Cat"):
        return None
    losses = [child for child, _ in children[0].next_functions]
    return [child for child in losses if child is not None] if len(losses) == _elements(node) else None


def _reduction(name: str, place: _Place) -> _Part | None:
    """Return the part of a loss that a node reduces from many numbers to one; None if it is no known reduction."""
    node, factor, divisor = place
    weight = factor / divisor if divisor else math.inf
    if name in _MASKED and (targets := _number(_saved(node, "total_weight"))) is not None:
        if node._saved_reduction == _MEAN:
            return _Part(_Kind.TARGETS, targets, weight, targets == 0)
        if node._saved_reduction == _SUM:
            return _Part(_Kind.TARGETS, _divided(factor, divisor, math.inf).terms, None, targets == 0)
    if name in _ELEMENTWISE and isinstance(values := _saved(node, "self"), Tensor):
        if node._saved_reduction == _MEAN:
            return _Part(_Kind.ELEMENTS, values.numel(), weight)
        if node._saved_reduction == _SUM:
            return _Part(_Kind.ELEMENTS, _divided(factor, divisor, math.inf).terms, None)
    elements = _elements(node)
    if name == "Mean" and elements:
        within = _within(node)
        return _Part(_Kind.AVERAGE, _averaged(node) * within, weight)
    if name in _SUMS:
        found = _divided(factor, divisor, elements or 0)
        return _Part(found.kind, found.terms * _within(node), None)
    return None


class _Divided(NamedTuple):
    kind: _Kind
    terms: float


def _divided(factor: float, divisor: float, elements: float) -> _Divided:
    """Return the number by which a sum is divided: a divisor, or a factor that is one over a whole number."""
    if divisor == 0:
        return _Divided(_Kind.AVERAGE, 0.0)
    if not math.isclose(divisor, 1, rel_tol=1e-6):
        return _Divided(_Kind.AVERAGE, abs(divisor))
    count = 1 / abs(factor) if factor else 1.0
    whole = 1.5 < count <= elements and math.isclose(count, round(count), rel_tol=1e-5)
    return _Divided(_Kind.SUM, float(round(count)) if whole else 1.0)


def _within(node: Any) -> float:
    """Return how many terms each input of a node averages, if means over several dimensions follow each other."""
    terms = 1.0
    for _ in range(16):
        node = node.next_functions[0][0] if node.next_functions else None
        if node is None:
            break
        name = _name(node)
        if name == "Mean":
            terms *= _averaged(node)
        elif name not in _PASSES | {"Neg", "Transpose"}:
            break
    return terms


def _averaged(node: Any) -> float:
    """Return the number of values that a mean averages, over some dimensions or all."""
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    if sizes is None:
        return 1.0
    dims = getattr(node, "_saved_dim", None)
    if dims is None or len(dims) == 0:
        return float(math.prod(sizes))
    # Negative dimensions are saved as unsigned numbers.
    return float(math.prod(sizes[(d - 2**64 if d >= 2**63 else d)] for d in dims))


def _elements(node: Any) -> int | None:
    """Return the number of values that a node reduces; None if the node does not save it."""
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    return None if sizes is None else math.prod(sizes)


def _name(node: Any) -> str:
    """Return the name of a node's operation: "Mean" of "MeanBackward1"."""
    name: str = node.name()
    return name.rpartition("::")[2].partition("Backward")[0]


def _saved(node: Any, what: str) -> Any:
    """Return a value that a node saved for its backward pass; None if there is none, or reading it runs a forward."""
    raw = getattr(node, f"_raw_saved_{what}", None)
    if type(getattr(raw, "data", None)).__module__ == "torch.utils.checkpoint":
        return None
    try:
        return getattr(node, f"_saved_{what}", None)
    except RuntimeError:  # the graph has been through its backward pass
        return None


def _number(value: Any) -> float | None:
    """Return a single number as a float; None for anything else."""
    if isinstance(value, Tensor):
        return float(value.detach()) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def graph_alone() -> Iterator[None]:
    """Make forwards in this context build a graph for :func:`count_terms` without activations; it cannot be run."""

    def pack(value: Tensor) -> Tensor | torch.Size:
        return value.detach() if value.numel() == 1 else value.shape

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else torch.empty(()).expand(kept)

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
