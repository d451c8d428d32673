"""Statistics of all tapped layers, gathered by a calibration."""

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


class RowsRefusedError(FloatingPointError):
    """Rows that the moments refused after the call that brought them had returned.

    Attributes:
        what: Names the rows.
    """

    def __init__(self, what: str, error: FloatingPointError) -> None:
        super().__init__(str(error))
        self.what = what


class CalibrationMoments:
    """Moments of all tapped layers; layers that share an input tensor share its A.

    The sums of inputs are keyed by the *set* of layers that read one tensor. A layer may therefore share its input in
    one call and not in another, and its A stays exact: it is the sum over the sets with that layer.

    Args:
        shapes: (m, n) of each layer by name.
        dtype: Dtype of the sums.
        device: Device of the sums.
        needs: Names of the statistics to gather besides the means (``NEEDS``); nothing else is computed. "coupled"
            costs about as much as "plain", and does not share A between layers. "C" costs m n numbers a layer and about
            a third more work. "saliency" and "kronecker" take as much memory as A and G and more work.
        sketches: Sketches by layer, in place of the exact plain and coupled moments; other statistics stay exact. All
            processes must pass the same.
        output_share: Share of the tokens of a batch whose gradients enter the coupled G of each layer
            (:class:`CoupledMoments`).

    Raises:
        ValueError: If a need is unknown, or a sketch does not fit its layer.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        needs: Iterable[str] = frozenset(),
        sketches: Mapping[str, LayerSketches] | None = None,
        output_share: float = 1.0,
    ) -> None:
        self.shapes = dict(shapes)
        self.dtype = dtype
        self.device = torch.device(device)
        self.needs = check_needs(needs)
        self.sketches = dict(sketches or {})
        self.output_share = output_share
        check_sketches(self.shapes, self.sketches, shared="plain" in self.needs)
        #: Whether rows that are not finite are refused at once, or at the end of their batch (:meth:`settle`). A scalar
        #: of each layer, read at once, would make the host wait for an accelerator again and again.
        self.refuses_at_once = self.device.type == "cpu"
        self._unread: list[tuple[str, Tensor]] = []  # names of rows, and whether they were finite
        self.inputs: dict[tuple[str, ...], Moments] = {}
        self.gradients = {name: self._new_gradients(name, m) for name, (m, _) in shapes.items()}
        self.couplings: dict[str, CoupledMoments] = {}
        self.crosses: dict[str, CrossMoments] = {}
        self.saliencies: dict[str, Moments] = {}
        self.sequences: dict[str, SequenceFisher] = {}
        for name, (m, n) in shapes.items():
            if "coupled" in self.needs:
                sides = self._sketch(name).inputs, self._sketch(name).outputs
                self.couplings[name] = CoupledMoments(m, n, dtype, sides, output_share).to(self.device)
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
        """Add input rows x (tokens, n) that all of ``members`` read."""
        members = tuple(members)
        self._update(self._input(members), x, 1.0, f"an activation of layer {members[0]!r}")

    def move_inputs(self, members: Iterable[str], reached: Iterable[str], x: Tensor) -> None:
        """Move rows that were counted for ``members`` to the subset of layers that got a gradient."""
        members, x = tuple(members), x.to(self.device)
        correction = self._new_input(members[0], x.shape[1])
        correction.update(x)
        self._input(members).subtract_(correction)
        if reached := tuple(reached):
            self._input(reached).add_(correction)

    def add_gradients(self, name: str, h: Tensor, scale: float = 1.0) -> None:
        """Add gradient rows ``scale * h`` (tokens, m) of one layer."""
        self._update(self.gradients[name], h, scale, f"a gradient of layer {name!r}")

    def _update(self, stream: Moments, rows: Tensor, scale: float, what: str) -> None:
        if self.refuses_at_once:
            stream.update(rows.to(self.device), scale)
            return
        finite: list[Tensor] = []
        stream.update(rows.to(self.device), scale, finite)
        self._unread.append((what, finite[0]))

    def sum_outputs(self, share: float) -> None:
        """Let a share of the tokens enter the coupled G from now on."""
        self.output_share = share
        for stream in self.couplings.values():
            stream.output_share = share

    def settle(self) -> None:
        """Read once whether all rows since the last call were finite; moments on the CPU have raised it already.

        Raises:
            RowsRefusedError: If some were not. They are in the moments, which are of no more use.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        finite = torch.stack([flag for _, flag in unread])
        if not finite.all():
            what = unread[int(finite.int().argmin())][0]
            raise RowsRefusedError(what, FloatingPointError("Expected finite vectors but some hold NaN or Inf."))

    def drop(self) -> None:
        """Forget what :meth:`settle` would read."""
        self._unread.clear()

    @property
    def takes_pairs(self) -> bool:
        """Whether a gathered statistic needs x and h of a token together."""
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
            seen: Rows of the projected side times the weight (:meth:`projects`), if a side is projected.

        Raises:
            ValueError: If a saliency is gathered without ``g``, or a side is projected without ``seen``.
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
        """Return the side of a layer that is projected through its weight; None if neither is."""
        return self._sketch(name).projects

    def drop_cross(self) -> None:
        """Free C of all layers."""
        self.crosses.clear()
        self.needs -= {"C"}

    def tokens(self, name: str) -> int:
        """Return the count of (x, h) pairs of a layer."""
        return round(self.gradients[name].count.item())

    def layer(self, name: str) -> LayerMoments:
        """Return one layer's moments, normalised; sketched ones are rebuilt at each call.

        Raises:
            KeyError: If the layer is not tapped.
            ValueError: If no token reached it.
        """
        self.settle()
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
        """Return G of one layer alone, shape (m, m): the coupled G if it was gathered, otherwise the plain one."""
        return self.couplings[name].compute()[1] if name in self.couplings else self.gradients[name].compute()

    def A(self, name: str) -> Tensor:  # noqa: N802
        """Return A of one layer alone, shape (n, n): the coupled A if it was gathered, otherwise the plain one.

        A sketched A becomes a matrix. Only a refit calls this, and it gathers exact moments of the drifted inputs
        besides, which are four times as large.
        """
        return self.couplings[name].compute()[0] if name in self.couplings else self.layer(name).A

    def _own(self) -> Iterator[dict[str, Any]]:
        """Yield the accumulators that each layer holds on its own, by name, in a fixed order."""
        yield from (self.gradients, self.couplings, self.crosses, self.saliencies, self.sequences)

    def _streams(self) -> Iterator[Accumulator]:
        yield from self.inputs.values()
        for group in self._own():
            yield from group.values()

    def release(self, name: str) -> None:
        """Free the sums that only this layer needs; a shared A is freed with the last layer that shares it."""
        m, n = self.shapes.pop(name)
        for group in self._own():
            group.pop(name, None)
        self.gradients[name] = self._new_gradients(name, m)  # a count of zero marks a released layer
        # Of this layer alone: thousands of layers are released one after the other.
        for key in [key for key in self.inputs if name in key and not any(member in self.shapes for member in key)]:
            self.inputs[key] = self._new_input(key[0], n)

    def add_(self, other: CalibrationMoments) -> CalibrationMoments:
        """Add another run's moments of the same layers in place.

        Raises:
            ValueError: If the other run gathered other statistics, or sketched them differently.
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
        """Add the sums of one layer of another run to a layer here, in place.

        Statistics that only one of the two gathers are skipped.

        Args:
            name: Layer here. Its inputs are counted as its own, not as shared ones.
            other: Another run; or this one, with another layer.
            theirs: Layer there.
            weight: Weight of each of its tokens, as if it had come that many times.

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
        """Compare with the moments of the other processes; all processes must call this.

        Args:
            group: Group of the processes; all by default.

        Raises:
            ValueError: On every process, if layers, statistics or sketches differ, so that the sums do not add up.
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
            group: Group of the processes; all by default.
            device: Device of the reduction, one state at a time; by default the device of the moments.

        Raises:
            ValueError: On every process, if the moments differ in kind (:meth:`check_alike`).
        """
        self.check_alike(group)
        # Processes may hold different sets of layers, if only some batches take a branch.
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
