"""Anchored refit: compressed layers fitted to the inputs that they get in the compressed model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fasc_lightning._utils import Progress, evaluating, undoing
from fasc_lightning.layers import (
    CompressedLinear,
    linear_shape,
    linear_weight,
    quantization_of,
)
from fasc_lightning.refit._batch_loss import BatchLoss, batch_losses, causal_loss, real_tokens
from fasc_lightning.refit._blocks import BlockRunner
from fasc_lightning.refit._candidates import Candidates, FactorCandidates, GridCandidates
from fasc_lightning.refit._checks import check_refit, refittable_layers
from fasc_lightning.refit._joins import Joins, joins_stream
from fasc_lightning.refit._reports import BlockRefit, LayerRefit, RefitReport
from fasc_lightning.refit._shares import Change, shares
from fasc_lightning.refit._solve import DriftMoments, DriftRows, Variant, drift_loss
from fasc_lightning.solvers import SHRINK_A, SHRINK_COUPLED_G, shrink
from fasc_lightning.statistics import moment_dtype

#: The target of a layer: "layer" is the dense layer's output. "stream" adds, for layers whose output is added to the
#: stream of hidden states, the stream's error so far.
Target = Literal["layer", "stream"]

#: The anchor of a refit: "dense" is the dense layer, in the moments that the factors were made with. A layer whose bias
#: moves, or a refit without these moments, uses "factors" instead: the factors before the refit.
Anchor = Literal["dense", "factors"]

#: Fewest batches of a refit: with fewer, too few remain to fit to, beside the batches that choose and that check.
MIN_BATCHES = 4


@dataclass(frozen=True)
class RefitOptions:
    """Options of a refit.

    Attributes:
        anchors: Values of lambda to choose from, layer by layer, by the error on the choosing batches.
        towards: See :data:`Anchor`.
        variants: Factors that may move, chosen in the same way.
        target: See :data:`Target`.
        bias: Whether existing biases move, too.
        holdout: One batch in ``holdout`` chooses and another one checks, but at least one and two (``shares``).
        judge_batches: Number of choosing batches on which the model's loss is measured after each block; factors are
            not fitted to them. 0 leaves out the verdicts on blocks and keeps the last check alone.
    """

    anchors: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    towards: Anchor = "dense"
    variants: tuple[Variant, ...] = ("factors",)
    target: Target = "stream"
    bias: bool = True
    holdout: int = 8
    judge_batches: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.anchors or not all(0 <= anchor < math.inf for anchor in self.anchors):
            raise ValueError(f"Expected `anchors` to be finite numbers of at least 0 but got {self.anchors}.")
        if not self.variants or not set(self.variants) <= {"factors", "right"}:
            raise ValueError(f'Expected `variants` out of "factors" and "right" but got {self.variants}.')
        if self.towards not in ("dense", "factors"):
            raise ValueError(f'Expected `towards` to be "dense" or "factors" but got {self.towards!r}.')
        if self.target not in ("layer", "stream"):
            raise ValueError(f'Expected `target` to be "layer" or "stream" but got {self.target!r}.')
        if self.holdout < 3 or self.judge_batches < 0:
            raise ValueError(
                f"Expected `holdout` of at least 3 and `judge_batches` of at least 0 but got {self.holdout} and "
                f"{self.judge_batches}."
            )


def refit(
    model: nn.Module,
    dense: Mapping[str, nn.Module],
    G: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    inputs: Mapping[str, Tensor] | None = None,
    options: RefitOptions | None = None,
    loss: BatchLoss = causal_loss,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> RefitReport:
    """Refit the factors of a compressed model, block by block in order of execution, in place.

    Each layer is fitted to the inputs that it gets in the model compressed so far, with the dense model's outputs as
    the target and an anchor (``refit/_solve.py``). Batches are in three shares (``shares``). Factors are fitted to the
    first share. The second share chooses lambda and decides layer by layer; accepted factors are then fitted to both
    shares. Only the last check reads the third share: there the model's loss, with all layers together, has to fall by
    more than two standard errors of its change over the batches. G and the anchor's A come from all batches, as for the
    factors before the refit. Rejected factors are put back, as is everything if anything fails. Shapes, ranks, layouts
    and the layers' identities stay.

    Memory: the hidden states of the first two shares at one block's input, twice; the inputs of its layers in the dense
    model; and the moments of one group of layers that share an input.

    Args:
        model: The compressed model.
        dense: The dense layer of each compressed one by name, on the model's device, as
            :func:`~fasc_lightning.layers.swap_modules` returns them.
        G: G = E[h h^T] of each layer by name, shape (m, m), from the calibration. Shrunk here, by as much as "fasc"
            does.
        batches: The calibration's batches, on the model's device, to fit to, to choose by and to check by. Tokens whose
            "attention_mask" is 0 do not count.
        inputs: A = E[x x^T] of each layer by name, shape (n, n), from the calibration, as the factors were made with.
            Shrunk here, by as much as "fasc" does.
        options: Options of the refit.
        loss: Function that sends a batch through the model and returns its mean loss.
        device: Device to solve on; by default each layer's own.
        progress: Wrapper of the loop over blocks.

    Returns:
        A report of the refit.

    Raises:
        RefitError: If the model's blocks cannot be run one by one.
        ValueError: If there are too few batches, or layers do not match.
    """
    start = time.perf_counter()
    options = options or RefitOptions()
    batches = list(batches)
    layers = refittable_layers(model, dense, G, "refit")
    if len(batches) < MIN_BATCHES:
        raise ValueError(
            f"Expected at least {MIN_BATCHES} batches, some of which are held out, but got {len(batches)}. Use smaller "
            "batches."
        )
    fit, choose, check = shares(len(batches), options.holdout)
    check_refit(model, dense)
    with undoing() as undo:
        for layer in layers.values():
            undo.add(layer.load_state_dict, layer_state(layer))
        with evaluating(model):
            before = batch_losses(model, [batches[i] for i in check], loss)
            read = sorted(fit + choose)
            runner = BlockRunner(model, dense, [batches[i] for i in read], loss)
            held = [read.index(i) for i in choose]
            work = _Refit(runner, layers, dense, G, inputs, options, device, progress, held)
            work.run()
            changed = any(layer.accepted for layer in work.reports)
            after = batch_losses(model, [batches[i] for i in check], loss) if changed else before
        change = Change.of(before, after)
        reverted = changed and not change.is_gain
        if not reverted:
            undo.forget()
    reports = [layer.undone() for layer in work.reports] if reverted else work.reports
    done = {layer.name for layer in reports}
    return RefitReport(
        layers=reports,
        blocks=work.blocks,
        skipped=[name for name in layers if name not in done],
        loss_before=change.before,
        loss_after=change.after,
        loss_error=change.error,
        reverted=reverted,
        fit_batches=len(read),
        held_batches=len(check),
        seconds=time.perf_counter() - start,
    )


class _Refit:
    """One refit: the two streams of hidden states, and the loop over blocks."""

    def __init__(
        self,
        runner: BlockRunner,
        layers: Mapping[str, CompressedLinear],
        dense: Mapping[str, nn.Module],
        G: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor] | None,
        options: RefitOptions,
        device: torch.device | str | None,
        progress: Progress | None,
        held: Sequence[int],
    ) -> None:
        self.runner = runner
        self.layers = layers
        self.dense = dense
        self.G = G
        self.inputs = inputs
        self.options = options
        self.device = device
        self.progress = progress or (lambda names, description: names)
        self.held = held
        # The judged batches are spread over all held-out ones, which may come from several sources in turn.
        count = min(options.judge_batches, len(self.held))
        self.judged = [self.held[i * len(self.held) // count] for i in range(count)]
        self.rows = [real_tokens(batch) for batch in runner.batches]
        # Both streams start from the same embeddings.
        self.exact = list(runner.inputs)
        self.drifted = list(runner.inputs)
        self.reports: list[LayerRefit] = []
        self.blocks: list[BlockRefit] = []

    def run(self) -> None:
        """Go through all blocks."""
        current = self._judge(0)
        numbers = [str(i) for i in range(len(self.runner.blocks))]
        for number in self.progress(numbers, "Refitting"):
            current = self._block(int(number), current)

    def _block(self, block: int, current: float) -> float:
        """Refit one block and push both streams past it; returns the judged loss."""
        prefix = self.runner.prefix(block)
        inside = {name: layer for name, layer in self.layers.items() if name.startswith(prefix) and _moves(layer)}
        groups = self.runner.groups(block, self.drifted[0], inside) if inside else []
        first = [self.dense[group[0]] for group in groups]
        with self.runner.dense():
            seen = [self.runner.run_and_see(block, i, hidden, first) for i, hidden in enumerate(self.exact)]
        exact, inputs = [output for _, output in seen], [inputs for inputs, _ in seen]
        del seen
        saved = {name: layer_state(inside[name]) for group in groups for name in group}
        reports = []
        for group in groups:  # each group's inputs are freed after it
            reports += self._group(block, group, exact, [batch.pop(0) for batch in inputs])
        drifted = self._push(block, self.drifted)
        if any(report.accepted for report in reports) and self.judged:
            judged = self._judge(block + 1, drifted)
            accepted = judged < current
            self.blocks.append(BlockRefit(block, current, judged, accepted))
            if accepted:
                current = judged
            else:
                for name, state in saved.items():
                    inside[name].load_state_dict(state)
                reports = [report.undone() for report in reports]
                drifted = self._push(block, self.drifted)
        self.reports += reports
        self.exact, self.drifted = exact, drifted
        return current

    def _group(
        self, block: int, group: Sequence[str], exact: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> list[LayerRefit]:
        """Refit layers that share an input.

        Args:
            block: Number of the block.
            group: Names of the layers.
            exact: The dense block's outputs.
            inputs: The layers' inputs in the dense model.
        """
        first = group[0]
        joins: Joins = None
        if self.options.target == "stream" and len(group) == 1:
            joins = joins_stream(self.runner, block, self.drifted[0], self.layers[first])
        fit, held = self._moments(block, first, joins, exact, inputs)
        return [self._layer(block, name, fit, held) for name in group]

    def _layer(self, block: int, name: str, fit: DriftRows, held: DriftRows) -> LayerRefit:
        """Try all candidates on one layer and keep the best if it beats the present factors."""
        layer, options = self.layers[name], self.options
        device = self.device or next(layer.parameters()).device
        W = linear_weight(self.dense[name]).detach().to(device).double()
        G = shrink(self.G[name].to(device).double(), SHRINK_COUPLED_G)
        own, judged = fit.moments(W), held.moments(W)
        fitted = own.shrunk(W, SHRINK_A)
        candidates = self._candidates(name, W, G, fitted)
        scale = float((G * judged.V).sum()) or 1.0
        before = drift_loss(judged, G, candidates.start) / scale
        best, choice = math.inf, None
        for variant in candidates.variants:
            for anchor in options.anchors:
                found = candidates.solve(fitted, anchor, variant)
                error = drift_loss(judged, G, *candidates.weight(found)) / scale
                if error < best:
                    best, choice = error, (anchor, variant)
        if choice is None or not best < before:
            return LayerRefit(name, block, before, before, math.nan, "", False)
        anchor, variant = choice
        if not self.judged:  # factors are not fitted to batches that give verdicts
            fitted = own.mixed(judged, held.count / (fit.count + held.count)).shrunk(W, SHRINK_A)
        candidates.store(candidates.solve(fitted, anchor, variant))
        return LayerRefit(name, block, before, best, anchor, variant, True)

    def _candidates(self, name: str, W: Tensor, G: Tensor, fitted: DriftMoments) -> Candidates:
        """Return the matrices that a layer can take."""
        layer, options = self.layers[name], self.options
        anchor = self._anchor(name, W, fitted)
        if quantization_of(layer) is not None:
            return GridCandidates(layer, W, None if anchor is None else anchor[1])
        bias = options.bias and layer.bias is not None
        return FactorCandidates(layer, G, options.variants, bias, None if bias else anchor)

    def _anchor(self, name: str, W: Tensor, moments: DriftMoments) -> tuple[Tensor, Tensor] | None:
        """Return the dense weight and the calibration's A, in the unit of the tokens' own A."""
        if self.inputs is None or self.options.towards == "factors":
            return None
        A = shrink(self.inputs[name].to(W.device).double(), SHRINK_A)
        return W, A * (moments.A.diagonal().sum() / A.diagonal().sum())

    def _moments(
        self, block: int, name: str, joins: Joins, exact: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> tuple[DriftRows, DriftRows]:
        """Return the moments of a layer's tokens in the fitting and in the choosing batches.

        Args:
            block: Number of the block.
            name: Name of a layer in it.
            joins: Where the layer's output joins the stream; the layer then has to correct the stream's error.
            exact: The dense block's outputs.
            inputs: The dense layer's inputs.
        """
        layer, original = self.layers[name], self.dense[name]
        m, n = linear_shape(layer)
        dtype, device = moment_dtype([layer]), next(layer.parameters()).device
        fit, held = (DriftRows((m, n), joins is not None, dtype, device) for _ in range(2))
        W, W_low = (weight.detach().to(dtype) for weight in (linear_weight(original), layer.to_weight()))
        for i, rows in enumerate(self.rows):
            x, v = inputs[i].reshape(-1, n).to(dtype), None
            if joins == "end":
                (x_hat,), drifted = self.runner.run_and_see(block, i, self.drifted[i], [layer])
                missing = exact[i] - drifted
            else:
                x_hat = self.runner.layer_input(block, i, self.drifted[i], layer)
                missing = self.exact[i] - self.drifted[i]
            x_hat = x_hat.reshape(-1, n).to(dtype)
            if joins is not None:
                # At the end of the block, the drifted stream includes this layer's present output.
                added = x_hat @ W_low.T if joins == "end" else x @ W.T
                v = added + missing.reshape(-1, m).to(dtype)
            if rows is not None:
                real = rows.to(device)
                x, x_hat, v = x[real], x_hat[real], None if v is None else v[real]
            (held if i in self.held else fit).update(x, x_hat, v)
        return fit, held

    def _push(self, block: int, stream: Sequence[Tensor]) -> list[Tensor]:
        return [self.runner.run(block, i, hidden) for i, hidden in enumerate(stream)]

    def _judge(self, block: int, hidden: Sequence[Tensor] | None = None) -> float:
        """Return the mean loss of the judged batches, run from a block's input on; NaN counts as worst."""
        if not self.judged:
            return math.inf
        stream = self.drifted if hidden is None else hidden
        losses = [self.runner.loss_from(block, i, stream[i]) for i in self.judged]
        return sum(losses) / len(losses)


def _moves(layer: CompressedLinear) -> bool:
    """Return whether a layer can be refitted; int8 factors beside bits cannot: their rounding is their last step."""
    return layer.layout in ("dense", "residual") or quantization_of(layer) is None


def layer_state(layer: CompressedLinear) -> dict[str, Tensor]:
    """Return a copy of a layer's state dict, from which the layer can be restored."""
    return {key: value.detach().clone() for key, value in layer.state_dict().items()}
