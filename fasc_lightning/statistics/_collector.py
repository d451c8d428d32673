"""The statistics of all tapped layers: what a calibration gathers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fasc_lightning.statistics._accumulators import Accumulator, CoupledMoments, CrossMoments, Moments
from fasc_lightning.statistics._fisher import SequenceFisher
from fasc_lightning.statistics._layer_moments import LayerMoments, check_needs, layer_moments
from fasc_lightning.statistics._layer_sketches import LayerSketches, check_sketches


class CalibrationMoments:
    """The moments of all tapped layers; layers that share an input tensor share its A.

    Inputs are keyed by the *set* of layers that were given the same tensor, so a layer that shares its input in one
    call and not in another is still exact: its A is the sum over the sets it belongs to.

    Args:
        shapes: (m, n) of each layer by name.
        dtype: Type of the accumulators.
        device: Where they live.
        needs: What to gather besides the means, by name (``NEEDS``); nothing else is
            computed. "coupled" costs about as much as "plain", and does not share A between layers. "C" costs m n
            numbers a layer and about a third more work, "saliency" and "kronecker" as much as A and G do and more work
            than they.
        sketches: Of single layers by name, in place of exact second moments (plain and coupled; what else is needed
            is exact). All processes must have the same.

    Raises:
        ValueError: If a need is unknown, or sketches do not fit their layers.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        needs: Iterable[str] = frozenset(),
        sketches: Mapping[str, LayerSketches] | None = None,
    ) -> None:
        self.shapes = dict(shapes)
        self.dtype = dtype
        self.device = torch.device(device)
        self.needs = check_needs(needs)
        self.sketches = dict(sketches or {})
        check_sketches(self.shapes, self.sketches, shared="plain" in self.needs)
        self.inputs: dict[tuple[str, ...], Moments] = {}
        self.gradients = {name: self._new_gradients(name, m) for name, (m, _) in shapes.items()}
        self.couplings: dict[str, CoupledMoments] = {}
        self.crosses: dict[str, CrossMoments] = {}
        self.saliencies: dict[str, Moments] = {}
        self.sequences: dict[str, SequenceFisher] = {}
        for name, (m, n) in shapes.items():
            if "coupled" in self.needs:
                self.couplings[name] = CoupledMoments(
                    m, n, dtype, (self._sketch(name).inputs, self._sketch(name).outputs)
                ).to(self.device)
            if "C" in self.needs:
                self.crosses[name] = CrossMoments(n, m, dtype).to(self.device)
            if "saliency" in self.needs:
                self.saliencies[name] = Moments(n, dtype).to(self.device)
            if self.needs & {"fisher_rows", "kronecker"}:
                self.sequences[name] = SequenceFisher(m, n, dtype, "kronecker" in self.needs).to(self.device)

    def _sketch(self, name: str) -> LayerSketches:
        return self.sketches.get(name, LayerSketches())

    def _new_gradients(self, name: str, m: int) -> Moments:
        return Moments(m, self.dtype, second="plain" in self.needs, sketch=self._sketch(name).outputs).to(self.device)

    def _new_input(self, name: str, n: int) -> Moments:
        absolute, plain = "abs_x" in self.needs, "plain" in self.needs
        return Moments(n, self.dtype, absolute, second=plain, sketch=self._sketch(name).inputs).to(self.device)

    def _input(self, members: Iterable[str]) -> Moments:
        key = tuple(sorted(members))
        if key not in self.inputs:
            self.inputs[key] = self._new_input(key[0], self.shapes[key[0]][1])
        return self.inputs[key]

    def add_inputs(self, members: Iterable[str], x: Tensor) -> None:
        """Add input rows x (tokens, n) that all of ``members`` were given."""
        self._input(members).update(x.to(self.device))

    def move_inputs(self, members: Iterable[str], reached: Iterable[str], x: Tensor) -> None:
        """Move rows that were counted for ``members`` to the subset that a gradient did reach."""
        members, x = tuple(members), x.to(self.device)
        correction = self._new_input(members[0], x.shape[1])
        correction.update(x)
        self._input(members).subtract_(correction)
        if reached := tuple(reached):
            self._input(reached).add_(correction)

    def add_gradients(self, name: str, h: Tensor, scale: float = 1.0) -> None:
        """Add gradient rows ``scale * h`` (tokens, m) of one layer."""
        self.gradients[name].update(h.to(self.device), scale)

    def settle(self) -> None:
        """Nothing waits: what stands in for these where they are not on the batches' device has to."""

    def drop(self) -> None:
        """Likewise."""

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
        seen: Tensor | None = None,
    ) -> None:
        """Add pairs of rows (x, scale * h) of one layer to the statistics that need both.

        Args:
            name: Layer.
            x: Inputs, shape (tokens, n).
            h: Gradients at the outputs, shape (tokens, m).
            lengths: Tokens of each sequence; one sequence by default.
            scale: Factor of every h.
            g: Gradients at the inputs, W^T h, shape (tokens, n); only "saliency" needs them.
            seen: The rows of the side that is projected through the weight (:meth:`projects`), where one is.

        Raises:
            ValueError: If a saliency is gathered and there is no g, or a side is projected and not ``seen``.
        """
        x, h = x.to(self.device), h.to(self.device)
        if name in self.couplings:
            self.couplings[name].update(x, h, scale, None if seen is None else seen.to(self.device))
        if name in self.crosses:
            self.crosses[name].update(x, h, scale)
        if name in self.saliencies:
            if g is None:
                raise ValueError(
                    f"Expected the input gradients g = W^T h of layer {name!r} for its saliency; got None."
                )
            self.saliencies[name].update(x.detach() * g.detach().to(self.device), scale)
        if name in self.sequences:
            self.sequences[name].update(x, h, [len(x)] if lengths is None else lengths, scale)

    def projects(self, name: str) -> Literal["inputs", "outputs"] | None:
        """Return which side of a layer is held as its weight sees it, if one is."""
        return self._sketch(name).projects

    def drop_cross(self) -> None:
        """Free C of all layers, once it has served."""
        self.crosses.clear()
        self.needs -= {"C"}

    def tokens(self, name: str) -> int:
        """Number of (x, h) pairs seen by a layer."""
        return round(self.gradients[name].count.item())

    def layer(self, name: str) -> LayerMoments:
        """Return one layer's moments, normalised; sketched ones are rebuilt, each time anew.

        Raises:
            KeyError: If the layer is not tapped.
            ValueError: If no token reached it.
        """
        if self.tokens(name) == 0:
            raise ValueError(f"Expected moments of layer {name!r} but no gradient reached it in calibration.")
        parts = [moments for key, moments in self.inputs.items() if name in key]
        pooled = parts[0]
        if len(parts) > 1:
            pooled = self._new_input(name, self.shapes[name][1])
            for part in parts:
                pooled.add_(part)
        G = self.gradients[name]
        sequences = self.sequences.get(name)
        coupled = self.couplings[name].second_moments() if name in self.couplings else None
        plain = (pooled.second_moment(), G.second_moment()) if "plain" in self.needs else coupled
        assert plain is not None  # one of the two is always gathered
        return layer_moments(
            plain,
            coupled,
            mean_x=pooled.mean(),
            mean_h=G.mean(),
            tokens=self.tokens(name),
            C=self.crosses[name].compute() if name in self.crosses else None,
            abs_x=pooled.mean_magnitude() if "abs_x" in self.needs else None,
            saliency=self.saliencies[name].compute() if name in self.saliencies else None,
            fisher_rows=sequences.fisher_rows() if sequences is not None and "fisher_rows" in self.needs else None,
            kronecker=sequences.compute() if sequences is not None and "kronecker" in self.needs else None,
        )

    def G(self, name: str) -> Tensor:  # noqa: N802
        """Return G of one layer alone, shape (m, m): the coupled one if it was gathered, as ``fasc`` takes it."""
        return self.couplings[name].compute()[1] if name in self.couplings else self.gradients[name].compute()

    def A(self, name: str) -> Tensor:  # noqa: N802
        """Return A of one layer alone, shape (n, n): the coupled one if it was gathered, as ``fasc`` takes it.

        A sketched one becomes a matrix: a refit, which asks for it, gathers exact moments of the drifted inputs beside
        it, which are four times as large.
        """
        return self.couplings[name].compute()[0] if name in self.couplings else self.layer(name).A

    def _own(self) -> Iterator[dict[str, Any]]:
        """Yield what is held for each layer on its own, by name, in a fixed order."""
        yield from (self.gradients, self.couplings, self.crosses, self.saliencies, self.sequences)

    def _streams(self) -> Iterator[Accumulator]:
        yield from self.inputs.values()
        for group in self._own():
            yield from group.values()

    def release(self, name: str) -> None:
        """Free what only this layer needs; a shared A goes with the last layer that shares it."""
        m, n = self.shapes.pop(name)
        for group in self._own():
            group.pop(name, None)
        self.gradients[name] = self._new_gradients(name, m)  # its count says that nothing is left
        for key in [key for key in self.inputs if not any(member in self.shapes for member in key)]:
            self.inputs[key] = self._new_input(key[0], n)

    def add_(self, other: CalibrationMoments) -> CalibrationMoments:
        """Merge another run's moments of the same layers into these, in place.

        Raises:
            ValueError: If the other run gathered other statistics.
        """
        if other.needs != self.needs:
            raise ValueError(
                f"Expected moments with the same statistics, {sorted(self.needs)}, but got {sorted(other.needs)}."
            )
        if other.sketches != self.sketches:
            raise ValueError(
                "Expected moments with the same sketches (sizes, kinds, seeds) of the same layers but they differ: "
                "sums of different random matrices do not add up. Gather both with the same `sketches`."
            )
        for key, moments in other.inputs.items():
            self._input(key).add_(moments)
        for mine, theirs in zip(self._own(), other._own(), strict=True):
            for name, stream in theirs.items():
                mine[name].add_(stream)
        return self

    def add_layer_(self, name: str, other: CalibrationMoments, theirs: str, weight: float = 1.0) -> CalibrationMoments:
        """Merge the sums of one layer of another run into those of a layer of these, in place.

        What only one of the two gathers is left alone.

        Args:
            name: Layer here. Its inputs are counted as its own, not as shared ones.
            other: Another run; or this one, for another layer.
            theirs: Layer there.
            weight: As if each of its tokens had been seen so many times.

        Raises:
            ValueError: If the layers differ in shape or in their sketches.
        """
        here, there = self.shapes[name], other.shapes[theirs]
        if (here, self._sketch(name)) != (there, other._sketch(theirs)):
            raise ValueError(
                f"Expected layers of one shape and with the same sketches but {name!r} has {here}, "
                f"{self._sketch(name)} and {theirs!r} {there}, {other._sketch(theirs)}."
            )
        for key, stream in other.inputs.items():
            if theirs in key:
                self._input([name]).add_(stream, weight)
        for mine, group in zip(self._own(), other._own(), strict=True):
            if name in mine and theirs in group:
                mine[name].add_(group[theirs], weight)
        return self

    def check_alike(self, group: Any | None = None) -> None:
        """Compare with the moments of the other processes, each of which has to call this.

        Args:
            group: Of the processes; all by default.

        Raises:
            ValueError: On every process, if the sums do not add up: they are of other layers, statistics or sketches.
        """
        mine = {
            "layers": self.shapes,
            "statistics": {"": sorted(self.needs)},
            "sketches (sizes, kinds, seeds)": self.sketches,
        }
        every: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, mine, group=group)
        for rank, theirs in enumerate(every):
            for what, expected in every[0].items():
                if theirs[what] != expected:
                    key = next(k for k in {**expected, **theirs[what]} if expected.get(k) != theirs[what].get(k))
                    raise ValueError(
                        f"Expected the same {what} on every process, whose sums are added up, but process 0 has "
                        f"{expected.get(key)} and process {rank} {theirs[what].get(key)}{f' of {key!r}' * bool(key)}. "
                        "Give all processes the same options, `seed` among them."
                    )

    def all_reduce_(self, group: Any | None = None, device: torch.device | None = None) -> None:
        """Sum over all processes, in place: every process ends with the moments of all batches.

        Args:
            group: Of the processes; all by default.
            device: Where the processes can reduce, one state at a time; by default where the moments are.

        Raises:
            ValueError: On every process, if the moments are not of the same kind everywhere (:meth:`check_alike`).
        """
        self.check_alike(group)
        # A process may have met other sets of layers than its peers (a branch that only some batches take).
        keys: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(keys, sorted(self.inputs), group=group)
        for key in sorted(set().union(*keys)):
            self._input(key).all_reduce_(group, device)
        for own in self._own():
            for name in sorted(own):
                own[name].all_reduce_(group, device)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(stream.nbytes for stream in self._streams())
