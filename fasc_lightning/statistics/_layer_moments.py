"""What a solver is given of one layer: its normalised moments, each a matrix or rebuilt from a sketch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fasc_lightning.statistics._second_moments import SecondMoment, dense

#: What may be gathered besides the means: "plain", and the names of optional fields of :class:`LayerMoments`.
NEEDS = {
    "plain": "A and G, in which all tokens weigh alike",
    "coupled": "A and G, in which a token weighs by the length of its other vector",
    "C": "E[x h^T]",
    "abs_x": "E|x|",
    "saliency": "E[(g*x)(g*x)^T] with g = W^T h",
    "fisher_rows": "row sums of the squared weight gradients of sequences",
    "kronecker": "a step towards the nearest Kronecker factors of the Fisher of sequences",
}


def check_needs(needs: Iterable[str]) -> frozenset[str]:
    """Return the names of statistics as a set; "plain" is one of them unless "coupled" alone stands in for it.

    Raises:
        ValueError: If one is unknown.
    """
    if unknown := sorted(set(needs) - set(NEEDS)):
        raise ValueError(f"Expected `needs` to be among {', '.join(NEEDS)} but got {unknown[0]!r}.")
    needs = frozenset(needs)
    return needs if needs == {"coupled"} else needs | {"plain"}


def not_gathered(need: str, reader: str | None = None) -> ValueError:
    """Return the error for a statistic that is missing: what it is, who reads it and how to gather it."""
    return ValueError(
        f"Expected moments with `{need}`, {NEEDS[need]}{f', for {reader}' if reader else ''}; but it was not gathered. "
        "HINT: FascCallback and compress() gather "
        f"what their `method` needs; by hand it is CalibrationMoments(shapes, needs={{{need!r}}})."
    )


@dataclass(frozen=True)
class LayerMoments:
    """What a solver knows of one layer y = W x + b with W of shape (m, n).

    The fields up to ``tokens`` are always there; the others where they were gathered (:data:`NEEDS`).

    Attributes:
        A: E[x x^T] over the tokens, shape (n, n); that of ``coupled`` where nothing but it was gathered.
        G: E[h h^T] with h = dL/dy and L the sum of the token losses, shape (m, m); likewise.
        mean_x: E[x], shape (n,).
        mean_h: E[h], shape (m,).
        tokens: Number of tokens behind the expectations.
        coupled: (A (n, n), G (m, m)): the same expectations, in which tokens weigh by |h| and by |x|
            (:class:`~fasc_lightning.statistics.CoupledMoments`).
        C: E[x h^T], shape (n, m); with g = W^T h, Sigma_xg = C W.
        abs_x: E|x|, shape (n,).
        saliency: E[(g*x)(g*x)^T], g*x elementwise, shape (n, n).
        fisher_rows: E over sequences of the row sums of G_i * G_i with G_i = sum_t h_t x_t^T, a sequence's dL/dW;
            shape (m,).
        kronecker: Factors (right (n, n), left (m, m)) of E over sequences of vec(G_i) vec(G_i)^T ~ right (x) left,
            after one step from identities, or after as many as ``studies/rho/_nearest_kronecker.py`` took.
    """

    A: Tensor
    G: Tensor
    mean_x: Tensor
    mean_h: Tensor
    tokens: int
    coupled: tuple[Tensor, Tensor] | None = None
    C: Tensor | None = None
    abs_x: Tensor | None = None
    saliency: Tensor | None = None
    fisher_rows: Tensor | None = None
    kronecker: tuple[Tensor, Tensor] | None = None

    def require(self, need: str) -> Any:
        """Return an optional field.

        Raises:
            ValueError: If it was not gathered.
        """
        value = getattr(self, need)
        if value is None:
            raise not_gathered(need)
        return value

    @property
    def is_coupled(self) -> bool:
        """Whether ``coupled`` was gathered; tells without making matrices of sketches."""
        return self.coupled is not None

    def to(self, device: torch.device | str) -> LayerMoments:
        """Return the same on a device."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})

    def plain_moments(self) -> tuple[SecondMoment, SecondMoment]:
        """Return A and G in the forms that they have: a sketch is not made a matrix, as it is by reading ``A``."""
        return self.A, self.G

    def coupled_moments(self) -> tuple[SecondMoment, SecondMoment]:
        """Return ``coupled`` in the forms that it has.

        Raises:
            ValueError: If it was not gathered.
        """
        A, G = self.require("coupled")
        return A, G


class SketchedLayerMoments(LayerMoments):
    """The same of a layer some of whose second moments were sketched.

    ``A``, ``G`` and ``coupled`` are made matrices when they are read, each time anew, so that any solver can be given
    these; one that takes forms (``statistics/_second_moments.py``) makes no matrix that it does not need.

    Args:
        plain: A and G.
        coupled: As of :class:`LayerMoments`, or None.
        fields: The other fields by name.
    """

    def __init__(
        self, plain: tuple[SecondMoment, SecondMoment], coupled: tuple[SecondMoment, SecondMoment] | None, **fields: Any
    ) -> None:
        for name, value in {"_plain": plain, "_coupled": coupled, **fields}.items():
            object.__setattr__(self, name, value)

    @property
    def A(self) -> Tensor:  # noqa: N802
        """See :class:`LayerMoments`."""
        return dense(self.plain_moments()[0])

    @property
    def G(self) -> Tensor:  # noqa: N802
        """See :class:`LayerMoments`."""
        return dense(self.plain_moments()[1])

    @property
    def coupled(self) -> tuple[Tensor, Tensor] | None:
        """See :class:`LayerMoments`."""
        moments: tuple[SecondMoment, SecondMoment] | None = self.__dict__["_coupled"]
        return None if moments is None else (dense(moments[0]), dense(moments[1]))

    def to(self, device: torch.device | str) -> SketchedLayerMoments:
        """See :class:`LayerMoments`."""
        held = {name: _moved(value, device) for name, value in vars(self).items()}
        return SketchedLayerMoments(held.pop("_plain"), held.pop("_coupled"), **held)

    @property
    def is_coupled(self) -> bool:
        """See :class:`LayerMoments`."""
        return self.__dict__["_coupled"] is not None

    def plain_moments(self) -> tuple[SecondMoment, SecondMoment]:
        """See :class:`LayerMoments`."""
        moments: tuple[SecondMoment, SecondMoment] = self.__dict__["_plain"]
        return moments

    def coupled_moments(self) -> tuple[SecondMoment, SecondMoment]:
        """See :class:`LayerMoments`."""
        moments: tuple[SecondMoment, SecondMoment] | None = self.__dict__["_coupled"]
        if moments is None:
            raise not_gathered("coupled")
        return moments


def _moved(value: Any, device: torch.device | str) -> Any:
    """Return a field of moments on a device: tensors, forms, pairs of them, or what has no device."""
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, SecondMoment) else value


def layer_moments(
    plain: tuple[SecondMoment, SecondMoment], coupled: tuple[SecondMoment, SecondMoment] | None, **fields: Any
) -> LayerMoments:
    """Return the moments of a layer, of either class, from forms.

    Args:
        plain: A and G.
        coupled: As of :class:`LayerMoments`, or None.
        fields: The other fields by name.
    """
    exact = [S for S in (*plain, *(coupled or ())) if isinstance(S, Tensor)]
    if len(exact) < 2 + 2 * (coupled is not None):
        return SketchedLayerMoments(plain, coupled, **fields)
    return LayerMoments(exact[0], exact[1], coupled=None if coupled is None else (exact[2], exact[3]), **fields)
