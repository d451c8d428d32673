"""Over how many terms a loss is a mean, as its autograd graph tells; the graph is read and never run or changed.

A loss ends in a few operations on single numbers: a mean, or a sum and a division, of its terms; factors; other losses
that are added. Cross entropy keeps its own normalisation, the number of targets that are not ignored. From the loss
backwards through those operations, this finds what is averaged.
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

#: Operations that pass a single number on, by the name of their node without its number.
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
#: Nodes that are looked at: aux losses may be sums over thousands of parameters.
_MOST = 20_000


class LossCount(NamedTuple):
    """What a graph tells of a loss.

    Attributes:
        terms: Over how many terms it is a mean; 1 of a sum.
        empty: Whether there is nothing to predict: each of its targets is ignored.
    """

    terms: float
    empty: bool


class _Kind(IntEnum):
    """Of what a part of a loss is made, by how sure it is that its terms are those that matter."""

    SUM = 0  # not divided: a penalty on weights, or a loss that is one sum
    AVERAGE = 1
    ELEMENTS = 2  # a loss of PyTorch's own
    TARGETS = 3  # that knows its targets, tokens or classes


@dataclass(frozen=True)
class _Part:
    """One reduction that a loss is made of.

    Attributes:
        kind: Of what it is made.
        terms: Over how many terms it is a mean.
        weight: Its factor in the loss if it is a mean; None of a sum, where factors and terms are one.
        empty: Whether it has no target.
    """

    kind: _Kind
    terms: float
    weight: float | None
    empty: bool = False


class _Place(NamedTuple):
    node: Any
    factor: float  # by which the node's number is multiplied
    divisor: float  # and by which it is divided


def count_terms(loss: Tensor, factor: float = 1.0, divisor: float = 1.0) -> LossCount | None:
    """Return over how many terms a loss is a mean; None if its graph does not tell.

    Of several losses that are added, those decide that know their targets (cross entropy), else those that PyTorch
    averages, else means and divided sums made by hand; of several alike, a mean of means has the terms of all of them,
    and else the most terms decide. Factors belong to the terms: of ``0.5 * cross_entropy(...)`` each counts half.

    Args:
        loss: A scalar, before its backward pass.
        factor: What others have multiplied it by since it was made: a gradient scaler.
        divisor: What others have divided it by: the batches of an accumulation.

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
    """Return the number of terms of losses of one kind that are added."""
    weights = [part.weight for part in parts if part.weight is not None]
    if len(weights) == len(parts) > 1 and math.isclose(sum(weights), 1, rel_tol=1e-4):
        shares = [weight / part.terms if part.terms else math.inf for weight, part in zip(weights, parts, strict=True)]
        if _alike(weights) or _alike(shares):  # a mean of means: of chunks of a batch
            return sum(part.terms for part in parts)
    return max(part.terms for part in parts)


def _alike(values: list[float]) -> bool:
    return min(values) > 0 and math.isclose(min(values), max(values), rel_tol=1e-4)


def _parts(start: _Place) -> list[_Part]:
    """Return the reductions behind a scalar; none of a graph that is too large to be looked through."""
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
    """Yield what a product or a quotient of numbers is made of; a factor with a graph of its own is a number, too."""
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
    """Return the losses that were put side by side before they were reduced; None if that is not what was done."""
    if name not in ("Mean", "Sum") or not children or children[0] is None or _name(children[0]) not in ("Stack", "Cat"):
        return None
    losses = [child for child, _ in children[0].next_functions]
    return [child for child in losses if child is not None] if len(losses) == _elements(node) else None


def _reduction(name: str, place: _Place) -> _Part | None:
    """Return the part of a loss that a node reduces from many numbers to one; None if it does not, or nobody knows."""
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
    """Return by how many terms a sum is divided: a divisor says it, and a factor that is one over a whole number."""
    if divisor == 0:
        return _Divided(_Kind.AVERAGE, 0.0)
    if not math.isclose(divisor, 1, rel_tol=1e-6):
        return _Divided(_Kind.AVERAGE, abs(divisor))
    count = 1 / abs(factor) if factor else 1.0
    whole = 1.5 < count <= elements and math.isclose(count, round(count), rel_tol=1e-5)
    return _Divided(_Kind.SUM, float(round(count)) if whole else 1.0)


def _within(node: Any) -> float:
    """Return over how many terms each number is a mean that a node reduces: of means over one dimension and another."""
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
    """Return over how many numbers a mean goes, along some dimensions or all."""
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    if sizes is None:
        return 1.0
    dims = getattr(node, "_saved_dim", None)
    if dims is None or len(dims) == 0:
        return float(math.prod(sizes))
    # Negative dimensions are saved as unsigned numbers.
    return float(math.prod(sizes[(d - 2**64 if d >= 2**63 else d)] for d in dims))


def _elements(node: Any) -> int | None:
    """Return how many numbers a node reduces; None if it does not say."""
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    return None if sizes is None else math.prod(sizes)


def _name(node: Any) -> str:
    """Return the name of a node's operation: "Mean" of "MeanBackward1"."""
    name: str = node.name()
    return name.rpartition("::")[2].partition("Backward")[0]


def _saved(node: Any, what: str) -> Any:
    """Return what a node has saved for its backward pass; None if it has not, or reading it would run a forward."""
    raw = getattr(node, f"_raw_saved_{what}", None)
    if type(getattr(raw, "data", None)).__module__ == "torch.utils.checkpoint":
        return None
    try:
        return getattr(node, f"_saved_{what}", None)
    except RuntimeError:  # the graph has been through its backward pass
        return None


def _number(value: Any) -> float | None:
    """Return a single number; None of anything else."""
    if isinstance(value, Tensor):
        return float(value.detach()) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def graph_alone() -> Iterator[None]:
    """Let a forward make a graph that :func:`count_terms` can read, and that holds no activations: it cannot be run."""

    def pack(value: Tensor) -> Tensor | torch.Size:
        return value.detach() if value.numel() == 1 else value.shape

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else torch.empty(()).expand(kept)

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
