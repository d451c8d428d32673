"""Normalised moments of one layer, as solvers read them: matrices, or moments rebuilt from sketches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fasc_lightning.statistics._second_moments import SecondMoment, dense

#: Statistics that can be gathered besides the means: "plain", and the optional fields of :class:`LayerMoments`.
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
    """Return the names of statistics as a set; "plain" is added unless "coupled" is the only one.

    Raises:
        ValueError: If one is unknown.
    """
    if unknown := sorted(set(needs) - set(NEEDS)):
        raise ValueError(f"Expected `needs` to be among {', '.join(NEEDS)} but got {unknown[0]!r}.")
    needs = frozenset(needs)
    return needs if needs == {"coupled"} else needs | {"plain"}


def not_gathered(need: str, reader: str | None = None) -> ValueError:
    """Return the error for a missing statistic: its meaning, its reader and the way to gather it."""
    return ValueError(
        f"Expected moments with `{need}`, {NEEDS[need]}{f', for {reader}' if reader else ''}; but it was not gathered. "
        "HINT: FascCallback and compress() gather "
        f"what their `method` needs; by hand it is CalibrationMoments(shapes, needs={{{need!r}}})."
    )


@dataclass(frozen=True)
class LayerMoments:
    """Moments of one layer y = W x + b with W of shape (m, n).

    The fields up to ``tokens`` are always present, the others if they were gathered (:data:`NEEDS`).

    Attributes:
        A: E[x x^T] over the tokens, shape (n, n); the A of ``coupled`` if only that was gathered.
        G: E[h h^T] with h = dL/dy and L the sum of the token losses, shape (m, m); the G of ``coupled`` if only that
            was gathered.
        mean_x: E[x], shape (n,).
        mean_h: E[h], shape (m,).
        tokens: Count of tokens behind the expectations.
        coupled: A (n, n) and G (m, m) in which tokens weigh by |h| and by |x|
            (:class:`~fasc_lightning.statistics.CoupledMoments`).
        C: E[x h^T], shape (n, m); with g = W^T h, Sigma_xg = C W.
        abs_x: E|x|, shape (n,).
        saliency: E[(g*x)(g*x)^T], g*x elementwise, shape (n, n).
        fisher_rows: E over sequences of the row sums of dW * dW with dW = sum_t h_t x_t^T, a sequence's weight
            gradient; shape (m,).
        kronecker: Factors A (n, n) and G (m, m) of E over sequences of vec(dW) vec(dW)^T ~ A (x) G, after one step from
            identities; :func:`~fasc_lightning.studies.rho.refine_kronecker` makes more steps.
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
        """Whether ``coupled`` was gathered; no sketch is made a matrix."""
        return self.coupled is not None

    def to(self, device: torch.device | str) -> LayerMoments:
        """Return a copy on a device."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})

    def plain_moments(self) -> tuple[SecondMoment, SecondMoment]:
        """Return A and G as they are held: a sketch stays low-rank, where reading ``A`` makes a matrix."""
        return self.A, self.G

    def coupled_moments(self) -> tuple[SecondMoment, SecondMoment]:
        """Return the A and G of ``coupled`` as they are held.

        Raises:
            ValueError: If they were not gathered.
        """
        A, G = self.require("coupled")
        return A, G


class SketchedLayerMoments(LayerMoments):
    """Moments of a layer with sketched second moments.

    Every read of ``A``, ``G`` and ``coupled`` makes matrices, so any solver works. A solver that reads
    :meth:`plain_moments` or :meth:`coupled_moments` makes only the matrices that it needs.

    Args:
        plain: A and G.
        coupled: A and G of ``coupled``, or None.
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
    """Return a field of moments on a device: tensors, second moments, pairs of them; other values unchanged."""
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, SecondMoment) else value


def layer_moments(
    plain: tuple[SecondMoment, SecondMoment], coupled: tuple[SecondMoment, SecondMoment] | None, **fields: Any
) -> LayerMoments:
    """Return the moments of a layer, of the class that its second moments need.

    Args:
        plain: A and G.
        coupled: A and G of ``coupled``, or None.
        fields: The other fields by name.
    """
    exact = [S for S in (*plain, *(coupled or ())) if isinstance(S, Tensor)]
    if len(exact) < 2 + 2 * (coupled is not None):
        return SketchedLayerMoments(plain, coupled, **fields)
    return LayerMoments(exact[0], exact[1], coupled=None if coupled is None else (exact[2], exact[3]), **fields)
