"""The statistics of all tapped layers: what a calibration gathers, and what a solver is given of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasc_lightning.packed import packed_size
from fasc_lightning.streams import CoupledMoments, CrossMoments, Moments, SequenceFisher, StreamedSums

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
        coupled: (A_h (n, n), G_x (m, m)): the same expectations, in which tokens weigh by |h| and by |x|
            (:class:`~fasc_lightning.streams.CoupledMoments`).
        C: E[x h^T], shape (n, m); with g = W^T h, Sigma_xg = C W.
        abs_x: E|x|, shape (n,).
        saliency: E[(g*x)(g*x)^T], g*x elementwise, shape (n, n).
        fisher_rows: E over sequences of the row sums of G_i * G_i with G_i = sum_t h_t x_t^T, a sequence's dL/dW;
            shape (m,).
        kronecker: Factors (right (n, n), left (m, m)) of E over sequences of vec(G_i) vec(G_i)^T ~ right (x) left,
            after one step from identities, or after as many as :mod:`~fasc_lightning.kronecker` took.
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


class CalibrationMoments:
    """The moments of all tapped layers; layers that share an input tensor share its A.

    Inputs are keyed by the *set* of layers that were given the same tensor, so a layer that shares its input in one
    call and not in another is still exact: its A is the sum over the sets it belongs to.

    Args:
        shapes: (m, n) of each layer by name.
        dtype: Type of the accumulators.
        device: Where they live.
        needs: What to gather besides the means, by name (:data:`NEEDS`, :func:`check_needs`); nothing else is
            computed. "coupled" costs about as much as "plain", and does not share A between layers. "C" costs m n
            numbers a layer and about a third more work, "saliency" and "kronecker" as much as A and G do and more work
            than they.

    Raises:
        ValueError: If a need is unknown.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        needs: Iterable[str] = frozenset(),
    ) -> None:
        self.shapes = dict(shapes)
        self.dtype = dtype
        self.device = torch.device(device)
        self.needs = check_needs(needs)
        self.inputs: dict[tuple[str, ...], Moments] = {}
        plain = "plain" in self.needs
        self.gradients = {name: Moments(m, dtype, second=plain).to(self.device) for name, (m, _) in shapes.items()}
        self.couplings: dict[str, CoupledMoments] = {}
        self.crosses: dict[str, CrossMoments] = {}
        self.saliencies: dict[str, Moments] = {}
        self.sequences: dict[str, SequenceFisher] = {}
        for name, (m, n) in shapes.items():
            if "coupled" in self.needs:
                self.couplings[name] = CoupledMoments(m, n, dtype).to(self.device)
            if "C" in self.needs:
                self.crosses[name] = CrossMoments(n, m, dtype).to(self.device)
            if "saliency" in self.needs:
                self.saliencies[name] = Moments(n, dtype).to(self.device)
            if self.needs & {"fisher_rows", "kronecker"}:
                self.sequences[name] = SequenceFisher(m, n, dtype, "kronecker" in self.needs).to(self.device)

    def _new_input(self, n: int) -> Moments:
        absolute, plain = "abs_x" in self.needs, "plain" in self.needs
        return Moments(n, self.dtype, absolute, second=plain).to(self.device)

    def _input(self, members: Iterable[str]) -> Moments:
        key = tuple(sorted(members))
        if key not in self.inputs:
            self.inputs[key] = self._new_input(self.shapes[key[0]][1])
        return self.inputs[key]

    def add_inputs(self, members: Iterable[str], x: Tensor) -> None:
        """Add input rows x (tokens, n) that all of ``members`` were given."""
        self._input(members).update(x)

    def move_inputs(self, members: Iterable[str], reached: Iterable[str], x: Tensor) -> None:
        """Move rows that were counted for ``members`` to the subset that a gradient did reach."""
        correction = self._new_input(x.shape[1])
        correction.update(x)
        self._input(members).subtract_(correction)
        if reached := tuple(reached):
            self._input(reached).add_(correction)

    def add_gradients(self, name: str, h: Tensor, scale: float = 1.0) -> None:
        """Add gradient rows ``scale * h`` (tokens, m) of one layer."""
        self.gradients[name].update(h, scale)

    @property
    def takes_pairs(self) -> bool:
        """Whether something is gathered that needs x and h of a token together."""
        return bool(self.needs - {"plain", "abs_x"})

    def add_pairs(
        self,
        name: str,
        x: Tensor,
        h: Tensor,
        lengths: Sequence[int] | None = None,
        scale: float = 1.0,
        g: Tensor | None = None,
    ) -> None:
        """Add pairs of rows (x, scale * h) of one layer to the statistics that need both.

        Args:
            name: Layer.
            x: Inputs, shape (tokens, n).
            h: Gradients at the outputs, shape (tokens, m).
            lengths: Tokens of each sequence; one sequence by default.
            scale: Factor of every h.
            g: Gradients at the inputs, W^T h, shape (tokens, n); only "saliency" needs them.

        Raises:
            ValueError: If a saliency is gathered and there is no g.
        """
        if name in self.couplings:
            self.couplings[name].update(x, h, scale)
        if name in self.crosses:
            self.crosses[name].update(x, h, scale)
        if name in self.saliencies:
            if g is None:
                raise ValueError(
                    f"Expected the input gradients g = W^T h of layer {name!r} for its saliency; got None."
                )
            self.saliencies[name].update(x.detach() * g.detach(), scale)
        if name in self.sequences:
            self.sequences[name].update(x, h, [len(x)] if lengths is None else lengths, scale)

    def drop_cross(self) -> None:
        """Free C of all layers, once it has served."""
        self.crosses.clear()
        self.needs -= {"C"}

    def tokens(self, name: str) -> int:
        """Number of (x, h) pairs seen by a layer."""
        return int(self.gradients[name].count.item())

    def layer(self, name: str) -> LayerMoments:
        """Return one layer's moments, normalised.

        Raises:
            KeyError: If the layer is not tapped.
            ValueError: If no token reached it.
        """
        if self.tokens(name) == 0:
            raise ValueError(f"Expected moments of layer {name!r} but no gradient reached it in calibration.")
        parts = [moments for key, moments in self.inputs.items() if name in key]
        pooled = parts[0]
        if len(parts) > 1:
            pooled = self._new_input(self.shapes[name][1])
            for part in parts:
                pooled.add_(part)
        G = self.gradients[name]
        sequences = self.sequences.get(name)
        coupled = self.couplings[name].compute() if name in self.couplings else None
        plain = (pooled.compute(), G.compute()) if "plain" in self.needs else coupled
        assert plain is not None  # one of the two is always gathered
        return LayerMoments(
            A=plain[0],
            G=plain[1],
            mean_x=pooled.mean(),
            mean_h=G.mean(),
            tokens=self.tokens(name),
            coupled=coupled,
            C=self.crosses[name].compute() if name in self.crosses else None,
            abs_x=pooled.mean_magnitude() if "abs_x" in self.needs else None,
            saliency=self.saliencies[name].compute() if name in self.saliencies else None,
            fisher_rows=sequences.fisher_rows() if sequences is not None and "fisher_rows" in self.needs else None,
            kronecker=sequences.compute() if sequences is not None and "kronecker" in self.needs else None,
        )

    def gradient_metric(self, name: str) -> Tensor:
        """Return G of one layer alone, shape (m, m): the coupled one if it was gathered, as ``fasc`` takes it."""
        return self.couplings[name].compute()[1] if name in self.couplings else self.gradients[name].compute()

    def input_metric(self, name: str) -> Tensor:
        """Return A of one layer alone, shape (n, n): the coupled one if it was gathered, as ``fasc`` takes it."""
        return self.couplings[name].compute()[0] if name in self.couplings else self.layer(name).A

    def _own(self) -> Iterator[dict[str, Any]]:
        """Yield what is held for each layer on its own, by name, in a fixed order."""
        yield from (self.gradients, self.couplings, self.crosses, self.saliencies, self.sequences)

    def _streams(self) -> Iterator[StreamedSums]:
        yield from self.inputs.values()
        for group in self._own():
            yield from group.values()

    def release(self, name: str) -> None:
        """Free what only this layer needs; a shared A goes with the last layer that shares it."""
        m, n = self.shapes.pop(name)
        for group in self._own():
            group.pop(name, None)
        plain = "plain" in self.needs
        self.gradients[name] = Moments(m, self.dtype, second=plain).to(
            self.device
        )  # its count says that nothing is left
        for key in [key for key in self.inputs if not any(member in self.shapes for member in key)]:
            self.inputs[key] = self._new_input(n)

    def add_(self, other: CalibrationMoments) -> CalibrationMoments:
        """Merge another run's moments of the same layers into these, in place.

        Raises:
            ValueError: If the other run gathered other statistics.
        """
        if other.needs != self.needs:
            raise ValueError(
                f"Expected moments with the same statistics, {sorted(self.needs)}, but got {sorted(other.needs)}."
            )
        for key, moments in other.inputs.items():
            self._input(key).add_(moments)
        for mine, theirs in zip(self._own(), other._own(), strict=True):
            for name, stream in theirs.items():
                mine[name].add_(stream)
        return self

    def all_reduce_(self, group: Any | None = None) -> None:
        """Sum over all processes, in place: every process ends with the moments of all batches."""
        # A process may have met other sets of layers than its peers (a branch that only some batches take).
        keys: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(keys, sorted(self.inputs), group=group)
        for key in sorted(set().union(*keys)):
            self._input(key).all_reduce_(group)
        for own in self._own():
            for name in sorted(own):
                own[name].all_reduce_(group)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(stream.nbytes for stream in self._streams())


def moment_dtype(layers: Iterable[nn.Module]) -> torch.dtype:
    """Return float64 if a layer computes in it, else float32."""
    double = any(p.dtype == torch.float64 for module in layers for p in module.parameters())
    return torch.float64 if double else torch.float32


def moments_bytes(
    shapes: Iterable[tuple[int, int]], dtype: torch.dtype = torch.float32, needs: Iterable[str] = frozenset()
) -> int:
    """Upper bound of the memory that exact moments need, in bytes.

    Which layers share an input is only known once a batch has run, so each layer's A is counted on its own.

    Args:
        shapes: (m, n) of each tapped layer.
        dtype: Type of the accumulators.
        needs: What is gathered besides the means.
    """
    needs = check_needs(needs)
    numbers = 0
    for m, n in shapes:
        second = packed_size(m) + packed_size(n)
        numbers += second * len(needs & {"plain", "coupled"}) + m + n
        numbers += 2 if "coupled" in needs else 0
        numbers += 2 if "plain" not in needs else 0
        numbers += m * n if "C" in needs else 0
        numbers += n if "abs_x" in needs else 0
        numbers += packed_size(n) + n if "saliency" in needs else 0
        numbers += m if needs & {"fisher_rows", "kronecker"} else 0
        numbers += second if "kronecker" in needs else 0
    return numbers * dtype.itemsize
